"""Tools in chats: the tools that a request offers, the grammar of calls, and the calls in a reply."""

import json
import uuid
from collections import deque
from collections.abc import Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal

from palm_rlhf.serving.call_form import ARGUMENTS, CLOSE, OPEN, CallForm
from palm_rlhf.serving.deadline import check_deadline
from palm_rlhf.serving.generation import Generation, Piece, TokenLogprob, ToolCall
from palm_rlhf.serving.protocol.errors import ApiError
from palm_rlhf.serving.protocol.event_stream import Blocks
from palm_rlhf.serving.structured import MAX_SCHEMA_CHARS, WHITESPACE, Grammar, Grammars, nested_values

MOST_CALLS = 16  # in one reply: a model that has to call could otherwise go on for ever
ANY = {"type": "object"}


@dataclass(frozen=True)
class Tools:
    """The functions of a request, in OpenAI's form, and how they may be called.

    `choice` is "auto", "required", or "named" where one function was chosen, which is the only definition left then.
    """

    definitions: list[dict[str, Any]] = field(default_factory=list)
    choice: Literal["auto", "required", "named"] = "auto"
    parallel: bool = True

    @property
    def free(self) -> bool:
        """Whether replies need no grammar."""
        strict = any(tool["function"].get("strict", False) for tool in self.definitions)
        return self.choice == "auto" and self.parallel and not strict


def read_tools(values: dict[str, Any]) -> Tools | None:
    """Return the tools of a chat that may be called; ApiError where tool_choice names none of them."""
    tools, choice = values.get("tools", []), values.get("tool_choice")
    if not tools or choice == "none":
        if choice not in (None, "none", "auto"):
            raise ApiError(400, "got tool_choice without tools; expected the tools to choose from", param="tool_choice")
        return None
    check_depth(tools, "tools")
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) < len(names):
        raise ApiError(400, f"tools has the names {', '.join(names)}; expected each once", param="tools")
    parallel = values.get("parallel_tool_calls", True)
    if not isinstance(choice, dict):
        return Tools(tools, "required" if choice == "required" else "auto", parallel)
    name = choice["function"]["name"]
    if name not in names:
        message = f"tool_choice names the function {name!a}; expected one of {', '.join(names)}"
        raise ApiError(400, message, param="tool_choice")
    return Tools([tool for tool in tools if tool["function"]["name"] == name], "named", parallel=False)


def check_depth(value: Any, name: str) -> None:
    """Raise ApiError for a value of JSON that is nested too deep."""
    try:
        deque(nested_values(value), maxlen=0)
    except ValueError as error:
        raise ApiError(400, f"{name} cannot be read: {error}", param=name) from error


def read_history(call: dict[str, Any], name: str) -> dict[str, Any]:
    """Return an earlier call as templates expect it, with its arguments as an object; ApiError for other arguments."""
    function = call["function"]
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        place = f"{name}.function.arguments"
        message = f"{place} is {function['arguments']!a:.80}; expected an object of JSON, as a string"
        raise ApiError(400, message, param=place)
    check_depth(arguments, f"{name}.function.arguments")
    return {"id": call["id"], "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def call_grammar(tools: Tools, form: CallForm, grammars: Grammars) -> Grammar:
    """Return the grammar that replies have to follow where the tools are not `free`.

    A required or chosen call follows the parameters of its function; in free text, calls of functions that are `strict`
    do. Raises ApiError for parameters that cannot be followed.
    """
    optional, functions = tools.choice == "auto", [tool["function"] for tool in tools.definitions]
    schemas = [
        function.get("parameters", ANY) if function.get("strict") or not optional else ANY for function in functions
    ]
    if (size := len(json.dumps(schemas))) > MAX_SCHEMA_CHARS:
        message = f"the parameters of tools have {size:,} characters in all; expected at most {MAX_SCHEMA_CHARS:,}"
        raise ApiError(400, message, param="tools")
    calls = []
    for number, (function, schema) in enumerate(zip(functions, schemas, strict=True)):
        check_deadline()
        try:
            grammars.json(schema)  # for an error that names the function
        except ValueError as error:
            message = f"the parameters of the tool {function['name']} cannot be followed: {error}"
            raise ApiError(400, message, param="tools") from error
        calls.append(f"call{number}: {_call(number, function['name'], schema, form)}")
    body = " | ".join(f"call{number}" for number in range(len(calls)))
    try:
        return grammars.lark("\n".join([_shape(tools, form, optional), f"body: {body}", *calls]))
    except ValueError as error:
        raise ApiError(400, f"the tools cannot be followed together: {error}", param="tools") from error


def _call(number: int, name: str, parameters: dict[str, Any], form: CallForm) -> str:
    """Return the grammar of one call, an object of JSON. Its schema gets a name, to which its references refer."""
    schema = {
        "x-guidance": {"whitespace_pattern": WHITESPACE, "lenient": False},
        "type": "object",
        "properties": {"name": {"const": name}, ARGUMENTS[form]: {"$id": f"urn:tool:{number}", **parameters}},
        "required": ["name", ARGUMENTS[form]],
        "additionalProperties": False,
    }
    return f"%json {json.dumps(schema)}"


def _shape(tools: Tools, form: CallForm, optional: bool) -> str:
    """Return the grammar of the places of calls in a reply."""
    if form == "json":
        return "start: body" if not optional else "start: TEXT | body\nTEXT: /([^{](.|\\n)*)?/"
    call = f'"\\n" body "\\n{CLOSE}"'
    if optional:
        start = f"(head {call})* TEXT" if tools.parallel else f"TEXT | head {call}"
        return f'start: {start}\nTEXT: /(.|\\n)*/\nhead[lazy]: TEXT "{OPEN}"'
    more = f' ("\\n" "{OPEN}" {call}){{0,{MOST_CALLS - 1}}}' if tools.parallel else ""
    return f'start: "{OPEN}" {call}{more}'


def read_call(text: str, form: CallForm, number: int) -> ToolCall | None:
    """Return the call that a text is, as call `number` of its reply; None for other text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get(ARGUMENTS[form], {})
    if not isinstance(arguments, dict):
        return None
    return ToolCall(number, f"call_{uuid.uuid4().hex[:24]}", value["name"], json.dumps(arguments, ensure_ascii=False))


class CallReader:
    """A reader that finds the calls in the text of a reply as it comes, and leaves other text as it is.

    Text is held back while it may become a call.
    """

    def __init__(self, form: CallForm):
        self.form = form
        self.num_calls = 0
        self._held = ""
        self._logprobs: tuple[TokenLogprob, ...] = ()

    def read(self, piece: Piece) -> Piece:
        """Return a piece of a reply without the text of calls, but with the calls that ended in it."""
        self._held += piece.text
        ended = piece.finish_reason is not None
        text, calls = self._tags(ended) if self.form == "tags" else self._json(ended)
        self.num_calls += len(calls)
        reason, logprobs = piece.finish_reason, self._logprobs + piece.logprobs
        self._logprobs = () if text or calls or ended else logprobs
        return piece._replace(
            text=text,
            calls=tuple(calls),
            logprobs=() if self._logprobs else logprobs,
            finish_reason="tool_calls" if reason == "stop" and self.num_calls else reason,
        )

    def _tags(self, ended: bool) -> tuple[str, list[ToolCall]]:
        outside = ""
        calls: list[ToolCall] = []
        while True:
            before, found, rest = self._held.partition(OPEN)
            if not found:
                size = 0 if ended else held_back(before, OPEN)
                outside, self._held = outside + before[: len(before) - size], before[len(before) - size :]
                break
            inside, closed, after = rest.partition(CLOSE)
            if not closed and not ended:
                outside, self._held = outside + before, OPEN + rest
                break
            call = read_call(inside, self.form, self.num_calls + len(calls))
            outside += before + ("" if call else OPEN + inside + closed)
            calls += [call] if call else []
            self._held = after
        if self.num_calls + len(calls) and not outside.strip():
            outside = ""  # only line breaks around calls
        return outside, calls

    def _json(self, ended: bool) -> tuple[str, list[ToolCall]]:
        if not ended and self._held.lstrip()[:1] in ("", "{"):
            return "", []
        text, self._held = self._held, ""
        call = read_call(text, self.form, 0) if ended else None
        return ("", [call]) if call else (text, [])


def held_back(text: str, mark: str) -> int:
    """Return how many of the last characters of a text may be the beginning of a mark."""
    sizes = range(min(len(text), len(mark) - 1), 0, -1)
    return next((size for size in sizes if mark.startswith(text[-size:])), 0)


async def reading_calls(blocks: Blocks, generations: Iterable[Generation], form: CallForm) -> Blocks:
    """Yield the pieces of replies, with the calls in them found."""
    readers = [CallReader(form) for _ in generations]
    async with aclosing(blocks):
        async for found in blocks:
            yield [(number, readers[number].read(piece)) for number, piece in found]
