"""Chat templates: the text around the messages of a conversation, as data or in Jinja."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from beartype import beartype

from palm_rlhf.data.jinja_sandbox import bounded, compiled, sandbox
from palm_rlhf.data.tokenizer import CONFIG_FILE, EOS, NAMES_FILE, token_name
from palm_rlhf.data.tokenizer_gguf import read_gguf_config
from palm_rlhf.model.files import read_text, write_text
from palm_rlhf.model.interop.gguf_header import is_gguf
from palm_rlhf.model.interop.peft_base import base_of, is_adapter
from palm_rlhf.model.weights_folder import TOKENIZER_FILES, read_json

Messages = Sequence[Mapping[str, Any]]
TEMPLATE_FILE, JINJA_FILE = "template.json", "chat_template.jinja"
GIVEN = ("messages", "tools", "documents", "add_generation_prompt")  # what `render` tells a template
MESSAGE_KEYS = ("role", "name", "content", "tool_calls", "tool_call_id")  # the keys that templates see

JINJA = """\
{{{{ {start} }}}}{default_system}{{% for message in messages %}}\
{{% if message['role'] == 'system' %}}{{{{ {system[0]} + message['content'] + {system[1]} }}}}\
{{% elif message['role'] == 'user' %}}{{{{ {user[0]} + message['content'] + {user[1]} }}}}\
{{% else %}}{{{{ {assistant[0]} + message['content'] + {assistant[1]} }}}}{{% endif %}}{{% endfor %}}\
{{% if add_generation_prompt %}}{{{{ {assistant[0]} }}}}{{% endif %}}"""
JINJA_DEFAULT_SYSTEM = """\
{{% if not messages or messages[0]['role'] != 'system' %}}{{{{ {text} }}}}{{% endif %}}"""


@beartype
@dataclass(frozen=True)
class ChatTemplate:
    """The text before and after the messages of each role; `special_tokens` stand in it by their names.

    The turn of the assistant must end in a special token.

    Args:
        system: The text before and after the system message.
        user: The text before and after a message of the user.
        assistant: The text before and after a message of the assistant.
        special_tokens: The names of the special tokens in these texts.
        start: Opens every conversation.
        default_system: The system message of conversations without one.
    """

    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    special_tokens: tuple[str, ...]
    start: str = ""
    default_system: str | None = None

    def __post_init__(self):
        if not any(name in self.assistant[1] for name in self.special_tokens):
            raise ValueError(
                f"got {self.assistant[1]!r} after messages of the assistant, expected one of the special tokens "
                f"{self.special_tokens} in it, by which a model learns to stop: add one"
            )

    def render(self, messages: Messages, *, add_generation_prompt: bool = False) -> str:
        """Return the conversation as text; with a generation prompt, up to where the assistant begins to speak."""
        opening = self.opening(messages)
        turns = ((getattr(self, message["role"]), message["content"]) for message in messages)
        text = "".join(before + content + after for (before, after), content in turns)
        return opening + text + (self.assistant[0] if add_generation_prompt else "")

    def opening(self, messages: Messages) -> str:
        """Return the text before the first message."""
        if self.default_system is None or (messages and messages[0]["role"] == "system"):
            return self.start
        return self.start + self.default_system.join(self.system)

    def to_jinja(self) -> str:
        """Return the same template as a `chat_template` of Hugging Face."""
        quoted = {role: [quote(part) for part in getattr(self, role)] for role in ("system", "user", "assistant")}
        default_system = ""
        if self.default_system is not None:
            default_system = JINJA_DEFAULT_SYSTEM.format(text=quote(self.default_system.join(self.system)))
        return JINJA.format(start=quote(self.start), default_system=default_system, **quoted)

    @beartype
    def save_pretrained(self, directory: str | Path) -> None:
        """Write the template beside a tokenizer, for `load_template`, and as Jinja for other libraries."""
        _save(Path(directory), dataclasses.asdict(self), self.to_jinja())


@beartype
@dataclass(frozen=True)
class JinjaTemplate:
    """A Hugging Face `chat_template`, which runs in a sandbox where it can change and reach nothing, and not for long.

    It has the names and filters of `apply_chat_template` in transformers: those in `variables`, such as bos_token;
    `tools`, and `documents`, which is None; `strftime_now`, `raise_exception` and `tojson`. The special tokens are
    those of the tokenizer.
    """

    source: str
    variables: dict[str, Any] = field(default_factory=dict)
    special_tokens: tuple[str, ...] = ()

    def __post_init__(self):
        _ = self._compiled  # raises ValueError now if the source is not valid Jinja

    @cached_property
    def _compiled(self) -> Any:
        return compiled(self.source)

    @property
    def options(self) -> frozenset[str]:
        """The names that the template reads besides the conversation and `variables`, such as enable_thinking."""
        from jinja2 import meta

        return frozenset(meta.find_undeclared_variables(sandbox().parse(self.source)) - {*GIVEN, *self.variables})

    @beartype
    def with_options(self, options: Mapping[str, bool]) -> "JinjaTemplate":
        """Return the template with some of its `options` set, such as `enable_thinking=False` for Qwen3.

        Raises ValueError for a name that it does not read.
        """
        if not options:
            return self
        if unknown := sorted(options.keys() - self.options):
            raise ValueError(f"got the options {unknown}, expected some of {sorted(self.options)}, which it reads")
        return dataclasses.replace(self, variables={**self.variables, **options})

    @property
    def knows_tools(self) -> bool:
        """Whether the template writes the functions that may be called: it mentions `tools`."""
        return re.search(r"\btools\b", self.source) is not None

    def render(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Return the conversation as text, with the tools that may be called; ValueError if the template refuses it."""
        plain = [{key: message[key] for key in MESSAGE_KEYS if key in message} for message in messages]
        names = {**self.variables, "messages": plain, "add_generation_prompt": add_generation_prompt}
        try:
            with bounded():
                return self._compiled.render(**{**names, "tools": tools, "documents": None})
        except Exception as error:  # a template can fail in every way that Python can
            raise ValueError(f"the chat template refuses the conversation: {type(error).__name__}: {error}") from error

    @beartype
    def save_pretrained(self, directory: str | Path) -> None:
        """Write the template beside a tokenizer, for `load_template` and for other libraries."""
        _save(Path(directory), dataclasses.asdict(self), self.source)


def quote(text: str) -> str:
    """Return a string as Jinja reads it."""
    return json.dumps(text, ensure_ascii=False)


def _save(folder: Path, fields: dict[str, Any], source: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / JINJA_FILE, source)
    write_text(folder / TEMPLATE_FILE, json.dumps(fields, indent=2) + "\n")


@beartype
def load_template(directory: str | Path) -> ChatTemplate | JinjaTemplate:
    """Open a template that `save_pretrained` wrote, or the `chat_template` of a Hugging Face folder or GGUF file.

    An adapter of PEFT without a template has that of its base.
    """
    folder = Path(directory)
    if (folder / TEMPLATE_FILE).is_file():
        return _from_fields(read_json(folder / TEMPLATE_FILE), folder / TEMPLATE_FILE)
    if is_gguf(folder):
        config = read_gguf_config(folder)
    else:
        config = read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
    named = {key: value for key, value in config.items() if value is not None}
    if (folder / NAMES_FILE).is_file():
        named = read_json(folder / NAMES_FILE) | named
    source = config.get("chat_template")
    if isinstance(source, list):  # several by name
        entries = [entry for entry in source if isinstance(entry, dict)]
        source = next((entry.get("template") for entry in entries if entry.get("name") == "default"), None)
    if (folder / JINJA_FILE).is_file():
        source = read_text(folder / JINJA_FILE)
    if not isinstance(source, str) and is_adapter(folder):
        return load_template(base_of(folder, files=TOKENIZER_FILES))
    if not isinstance(source, str):
        raise FileNotFoundError(
            f"{folder} has no {TEMPLATE_FILE}, no {JINJA_FILE} and no chat_template in its {CONFIG_FILE}, expected one "
            f"of them: take the one of {list(PRESETS)} from PRESETS that the model was trained with"
        )
    names = {key: token_name(value) for key, value in named.items() if key.endswith("_token")}
    return JinjaTemplate(source, {key: name for key, name in names.items() if isinstance(name, str)})


def _from_fields(fields: dict[str, Any], file: Path) -> ChatTemplate | JinjaTemplate:
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    try:
        return JinjaTemplate(**values) if "source" in fields else ChatTemplate(**values)
    except Exception as error:
        raise ValueError(f"{file} describes no template ({error}): save it again") from error


PRESETS = {
    "default": ChatTemplate(
        system=("<|system|>", EOS),
        user=("<|user|>", EOS),
        assistant=("<|assistant|>", EOS),
        special_tokens=(EOS, "<|system|>", "<|user|>", "<|assistant|>"),
    ),
    # Köpf et al. 2023
    "oasst": ChatTemplate(
        system=("<|system|>", EOS),
        user=("<|prompter|>", EOS),
        assistant=("<|assistant|>", EOS),
        special_tokens=(EOS, "<|system|>", "<|prompter|>", "<|assistant|>"),
    ),
    # version 1.1; users can forge all of it but the end of the assistant's turn
    "vicuna": ChatTemplate(
        system=("", " "),
        user=("USER: ", " "),
        assistant=("ASSISTANT: ", "</s>"),
        special_tokens=("<s>", "</s>"),
        start="<s>",
        default_system=(
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions."
        ),
    ),
    # version 3.5
    "openchat": ChatTemplate(
        system=("GPT4 Correct System: ", "<|end_of_turn|>"),
        user=("GPT4 Correct User: ", "<|end_of_turn|>"),
        assistant=("GPT4 Correct Assistant: ", "<|end_of_turn|>"),
        special_tokens=("<s>", "<|end_of_turn|>"),
        start="<s>",
    ),
}
