"""A conversation in a terminal or by pipes: reading messages, the commands, and printing replies."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from beartype import beartype

from palm_rlhf.serving.dialogue import Dialogue

PROMPT, MORE = "> ", ". "
QUOTES = '"""'
HELP = """\
Enter ends a message. A backslash before it goes on in the next line; so does everything between \"\"\" and \"\"\".
/reset         forget the conversation, but not the system message
/regenerate    replace the last reply by another
/system TEXT   set the system message, from the next reply on; without a text there is none
/save FILE     write the conversation to a new file, as a line of JSON that `palm-rlhf data` and trainers read
/help          show this
/quit          end; so does Ctrl-D
Ctrl-C stops a reply, and keeps its words so far. A message that begins with / goes between \"\"\" and \"\"\"."""
# Control characters in a reply could move the cursor or rename the window: a terminal gets visible symbols instead.
VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
VISIBLE |= {0x7F: 0x2421, **dict.fromkeys(range(0x80, 0xA0), 0xFFFD)}


class TerminalSession:
    """A dialogue on standard input; replies go to standard output, everything else to standard error."""

    def __init__(self, dialogue: Dialogue):
        self.dialogue = dialogue
        self.is_person = sys.stdin.isatty()
        self.is_screen = sys.stdout.isatty()
        self.commands: dict[str, Callable[[str], None]] = {
            "/reset": self.reset,
            "/regenerate": lambda _: self.show(dialogue.say_again),
            "/system": self.set_system,
            "/save": self.save,
            "/help": lambda _: note(HELP),
        }

    def run(self) -> None:
        """Answer messages until the input ends."""
        while True:
            try:
                text, is_quoted = read_message(self.read_line)
                if text.startswith("/") and not is_quoted:
                    name, _, rest = text.partition(" ")
                    if name == "/quit":
                        return
                    self.commands.get(name, self.refuse)(rest.strip())
                elif text:
                    self.show(partial(self.dialogue.say, text))
            except EOFError:
                if self.is_person:
                    note("")  # so that the shell's prompt begins a line
                return
            except KeyboardInterrupt:
                if not self.is_person:
                    raise
                note("\n(Ctrl-D ends)")

    def read_line(self, prompt: str) -> str:
        """Return a line without its end; EOFError after the last line."""
        if self.is_person and self.is_screen:
            return input(prompt)
        if self.is_person:
            print(prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n").removeprefix("\ufeff")  # a file's byte order mark

    def show(self, make_reply: Callable[[], Iterator[str]]) -> None:
        """Print a reply while it is generated; Ctrl-C stops it."""
        dialogue = self.dialogue
        known, forgotten = dialogue.messages, dialogue.num_forgotten
        try:
            self.write(make_reply())
        except KeyboardInterrupt:
            if not self.is_person:
                raise
            print(flush=True)
            note("(stopped)" if dialogue.messages is not known else "(stopped before the first word)")
        except (ValueError, RuntimeError) as error:
            if dialogue.messages is not known:
                print(flush=True)
            note(f"({error})")
        if dialogue.num_forgotten > forgotten:
            number = dialogue.num_forgotten
            what = "exchange is" if number == 1 else f"{number} exchanges are"
            note(f"(the context of {dialogue.engine.context} tokens is full: the first {what} forgotten)")

    def write(self, reply: Iterator[str]) -> None:
        """Print a reply while it is generated, and a note if it reached its limit of tokens."""
        for text in reply:
            print(text.translate(VISIBLE) if self.is_screen else text, end="", flush=True)
        print(flush=True)
        if self.dialogue.finish_reason == "length":
            note("(the reply was cut: it reached its limit of tokens)")

    def answer_once(self, text: str) -> None:
        """Print the reply to one message, which is never a command; "-" is all of standard input.

        Raises ValueError for a blank message, and for one that the context has no room for.
        """
        message = (sys.stdin.read().removeprefix("\ufeff") if text == "-" else text).strip()
        if not message:
            raise ValueError("got a blank message, expected a text after --once, or - and a text on standard input")
        self.write(self.dialogue.say(message))

    def reset(self, _: str) -> None:
        """Forget the messages."""
        self.dialogue.reset()
        note("(forgotten)")

    def set_system(self, text: str) -> None:
        """Set the system message, or remove it."""
        self.dialogue.system = text or None
        note("(the system message is set)" if text else "(there is no system message)")

    def save(self, name: str) -> None:
        """Save the conversation to a new file."""
        if not name or not self.dialogue.messages:
            note("(name a file: /save FILE)" if not name else "(nothing was said yet)")
            return
        path = Path(name).expanduser()
        try:
            self.dialogue.save(path)
        except FileExistsError:
            note(f"({path} exists, and stays as it is: choose another name)")
        except OSError as error:
            note(f"({path} could not be written: {error})")
        else:
            note(f"(saved to {path})")

    def refuse(self, _: str) -> None:
        """Explain that there is no such command."""
        note("(there is no such command: /help lists those there are)")


def note(text: str) -> None:
    """Print a line that is not part of a reply."""
    print(text, file=sys.stderr, flush=True)


@beartype
def read_message(read_line: Callable[[str], str]) -> tuple[str, bool]:
    """Return a message from lines, and whether it was in quotes.

    `read_line` takes a prompt, and raises EOFError at the end of the input, which ends the message too.
    """
    line = read_line(PROMPT)
    quoted = line.lstrip().startswith(QUOTES)
    lines = [line.lstrip().removeprefix(QUOTES)] if quoted else [line]

    def is_open() -> bool:
        return not lines[-1].rstrip().endswith(QUOTES) if quoted else lines[-1].endswith("\\")

    with contextlib.suppress(EOFError):
        while is_open():
            following = read_line(MORE)
            if not quoted:
                lines[-1] = lines[-1][:-1]
            lines.append(following)
    text = "\n".join(lines).strip()
    return (text.removesuffix(QUOTES).strip() if quoted else text), quoted
