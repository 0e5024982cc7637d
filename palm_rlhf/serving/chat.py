"""The command ``palm-rlhf chat``: a conversation with a model, in a terminal or by pipes."""

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal

from beartype import beartype
from tyro.conf import Positional, arg

from palm_rlhf.serving.chat_model import Served, load
from palm_rlhf.serving.engine import Engine, EngineConfig
from palm_rlhf.serving.engine.slot_cache import SlotCache
from palm_rlhf.serving.generation import Request
from palm_rlhf.training.run.checkpoints import write_text

PROMPT, MORE = "> ", ". "
QUOTES = '"""'
HELP = """\
Enter ends a message. A backslash before it goes on in the next line; so does everything between \"\"\" and \"\"\".
/reset         forget what was said, but not the system message
/regenerate    say the last reply anew
/system TEXT   set the system message, from the next reply on; without a text there is none
/save FILE     write the conversation to a new file, as a line of JSON that `palm-rlhf data` and trainers read
/help          show this
/quit          end; so does Ctrl-D
Ctrl-C stops a reply, and keeps what was said of it. A message that begins with / goes between \"\"\" and \"\"\"."""
# A model may say what moves the cursor or renames the window: a terminal is shown pictures of such characters.
VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
VISIBLE |= {0x7F: 0x2421, **dict.fromkeys(range(0x80, 0xA0), 0xFFFD)}


class Conversation:
    """What was said, and what the model says next.

    `messages` are those of the user and the assistant in turn, whole exchanges only: all that was said, of which the
    model reads what its context has room for. `num_forgotten` counts the exchanges before that.
    """

    @beartype
    def __init__(
        self,
        served: Served,
        engine: Engine,
        *,
        system: str | None = None,
        temperature: float | int = 0.7,
        top_p: float | int = 1.0,
        max_tokens: int | None = None,
        seed: int | None = None,
    ):
        self.served, self.engine, self.system, self.max_tokens = served, engine, system, max_tokens
        self.sampling = {"temperature": temperature, "top_p": top_p, "seed": seed}
        self.messages: list[dict[str, str]] = []
        self.num_forgotten = self.num_replies = 0
        self.finish_reason: str | None = None  # of the last reply
        self._request([0], 1)  # an option out of range is told now

    @beartype
    def say(self, text: str) -> Iterator[str]:
        """The reply to a message, as it comes.

        Both are remembered from its first words on: whoever stops listening keeps what was said. ValueError for a
        message that the context has no room for.
        """
        return self._reply([*self.messages, {"role": "user", "content": text}])

    def say_again(self) -> Iterator[str]:
        """Another reply to the last message, which takes the place of the one there is."""
        if not self.messages:
            raise ValueError("nothing was said yet: there is no reply to say anew")
        return self._reply(self.messages[:-1])

    def reset(self) -> None:
        """Forgets what was said, but not the system message."""
        self.messages, self.num_forgotten = [], 0

    @beartype
    def save(self, path: Path) -> None:
        """Writes all that was said to a new file, as a line of JSON; FileExistsError where there is one."""
        with open(path, "x"):
            pass  # the name is ours now: nobody's file is written over
        try:
            write_text(path, json.dumps({"messages": [*self._opening, *self.messages]}, ensure_ascii=False) + "\n")
        except BaseException:
            path.unlink()
            raise

    @property
    def _opening(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def _reply(self, messages: list[dict[str, str]]) -> Iterator[str]:
        prompt, num_forgotten = self._fit(messages)
        room = self.engine.context - len(prompt)
        request = self._request(prompt, min(self.max_tokens or room, room))
        self.num_replies += 1
        reply = {"role": "assistant", "content": ""}
        said = [*messages, reply]
        for piece in self.engine.submit(request):
            reply["content"] += piece.text
            self.finish_reason = piece.finish_reason
            if piece.text or piece.finish_reason == "stop":
                self.messages, self.num_forgotten = said, num_forgotten
            yield piece.text

    def _request(self, prompt: list[int], max_new_tokens: int) -> Request:
        ends = {"stop": self.served.turn_end_strings, "stop_tokens": self.served.turn_ends}
        return Request(prompt, max_new_tokens, index=self.num_replies, **ends, **self.sampling)

    def _fit(self, messages: list[dict[str, str]]) -> tuple[list[int], int]:
        """The tokens of the latest exchanges that leave a quarter of the context to the reply, and how many they leave
        out. The last message may take more of it.
        """
        context, forgotten = self.engine.context, self.num_forgotten
        wanted = min(self.max_tokens or context, max(context // 4, 1))
        while True:
            prompt = self.served.encode_chat([*self._opening, *messages[2 * forgotten :]])
            is_last = 2 * forgotten + 1 == len(messages)
            if len(prompt) + wanted <= context or (is_last and len(prompt) < context):
                return prompt, forgotten
            if is_last:
                raise ValueError(
                    f"the message has {len(prompt)} tokens with what stands around it, and the context has {context} "
                    "for it and the reply: say it in fewer words"
                )
            forgotten += 1


class Session:
    """A conversation with whoever is at standard input; replies go to standard output, everything else to stderr."""

    def __init__(self, conversation: Conversation):
        self.conversation = conversation
        self.is_person = sys.stdin.isatty()
        self.is_screen = sys.stdout.isatty()
        self.commands: dict[str, Callable[[str], None]] = {
            "/reset": self.reset,
            "/regenerate": lambda _: self.show(conversation.say_again),
            "/system": self.set_system,
            "/save": self.save,
            "/help": lambda _: note(HELP),
        }

    def run(self) -> None:
        """Answers until the input ends."""
        while True:
            try:
                text, is_quoted = read_message(self.read_line)
                if text.startswith("/") and not is_quoted:
                    name, _, rest = text.partition(" ")
                    if name == "/quit":
                        return
                    self.commands.get(name, self.refuse)(rest.strip())
                elif text:
                    self.show(lambda text=text: self.conversation.say(text))
            except EOFError:
                if self.is_person:
                    note("")  # the shell's prompt goes to a line of its own
                return
            except KeyboardInterrupt:
                if not self.is_person:
                    raise
                note("\n(Ctrl-D ends)")

    def read_line(self, prompt: str) -> str:
        """A line without its end; EOFError after the last."""
        if self.is_person and self.is_screen:
            return input(prompt)
        if self.is_person:
            print(prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n").removeprefix("\ufeff")  # a file's byte order mark

    def show(self, ask: Callable[[], Iterator[str]]) -> None:
        """Prints a reply as it comes; Ctrl-C stops it."""
        conversation = self.conversation
        known, forgotten = conversation.messages, conversation.num_forgotten
        try:
            for text in ask():
                print(text.translate(VISIBLE) if self.is_screen else text, end="", flush=True)
            print(flush=True)
        except KeyboardInterrupt:
            if not self.is_person:
                raise
            print(flush=True)
            note("(stopped)" if conversation.messages is not known else "(stopped before a word: nothing was said)")
        except (ValueError, RuntimeError) as error:
            if conversation.messages is not known:
                print(flush=True)
            note(f"({error})")
        else:
            if conversation.finish_reason == "length":
                note("(the reply was cut: it reached its limit of tokens)")
        if conversation.num_forgotten > forgotten:
            number = conversation.num_forgotten
            what = "exchange is" if number == 1 else f"{number} exchanges are"
            note(f"(the context of {conversation.engine.context} tokens is full: the first {what} forgotten)")

    def reset(self, _: str) -> None:
        """Begins anew."""
        self.conversation.reset()
        note("(forgotten)")

    def set_system(self, text: str) -> None:
        """Sets the system message, or removes it."""
        self.conversation.system = text or None
        note("(the system message is set)" if text else "(there is no system message)")

    def save(self, name: str) -> None:
        """Saves the conversation, and never over another file."""
        if not name or not self.conversation.messages:
            note("(name a file: /save FILE)" if not name else "(nothing was said yet)")
            return
        path = Path(name).expanduser()
        try:
            self.conversation.save(path)
        except FileExistsError:
            note(f"({path} exists, and stays as it is: choose another name)")
        except OSError as error:
            note(f"({path} could not be written: {error})")
        else:
            note(f"(saved to {path})")

    def refuse(self, _: str) -> None:
        """Tells what to do about a command that there is not."""
        note("(there is no such command: /help lists those there are)")


def note(text: str) -> None:
    """Says something that is not the model's."""
    print(text, file=sys.stderr, flush=True)


@beartype
def read_message(read_line: Callable[[str], str]) -> tuple[str, bool]:
    """A message from lines, and whether it stood in quotes; `read_line` takes a prompt and raises EOFError at the end.

    An end of the input inside of a message ends the message.
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


@beartype
def chat(
    checkpoint: Annotated[Positional[str], arg(metavar="MODEL")],
    *,
    system: Annotated[str | None, arg(metavar="TEXT")] = None,
    temperature: float = 0.7,
    top_p: float = 1.0,
    max_tokens: Annotated[int | None, arg(metavar="TOKENS")] = None,
    seed: Annotated[int | None, arg(metavar="INT")] = None,
    context: Annotated[int | None, arg(metavar="TOKENS")] = None,
    template: Literal["auto", "plain", "default", "oasst", "vicuna", "openchat"] = "auto",
    lora_scope: Annotated[str | None, arg(metavar="NAME")] = None,
) -> None:
    """Talk with a model in the terminal: it remembers what was said, and its replies come word by word.

    /help lists the commands, such as /reset, /system and /save. Where the input is a pipe, each of its lines is a
    message, and the output has the replies alone.

    Args:
        checkpoint: The folder of a run or of a model with its tokenizer and template, or a hub id, owner/name; without
            a tokenizer the tokens are bytes.
        system: The message that tells the model how to be.
        temperature: Divides the logits before sampling; 0 always takes the likeliest token.
        top_p: Samples from the fewest tokens that hold this much of the probability; 1 takes all.
        max_tokens: The longest reply; by default what the context has room for.
        seed: Makes the replies repeatable; others each time by default.
        context: Tokens of what is remembered with the reply; the model's max_seq_len by default.
        template: How conversations are written; auto is the model's own, plain has roles as words.
        lora_scope: A LoRA scope to merge into the weights.
    """
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; expected at least 1")
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (it gives `input` its history)
    served = load(checkpoint, template=template, lora_scope=lora_scope)
    size = (context or served.palm.config.max_seq_len) * SlotCache.bytes_per_token(served.palm)
    config = EngineConfig(
        context=context,
        max_batch=1,
        queue=8,  # replies that were stopped, and leave with the next token
        cache_memory=max(2 * size, 2**31),
        prefix_memory=max(2 * size, 2**28),
        timeout=math.inf,
    )
    with Engine(served.palm, served.tokenizer, config) as engine:
        options = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "seed": seed}
        session = Session(Conversation(served, engine, system=system, **options))
        if session.is_person:
            note(f"{served.name}, with {engine.context:,} tokens of context. /help lists the commands, Ctrl-D ends.")
        session.run()
