"""From what a client asks to what the engine is asked: texts become tokens, and have to fit."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from palm_rlhf.data.special_token_guard import strings
from palm_rlhf.serving.chat_model import Served
from palm_rlhf.serving.deadline import check_deadline
from palm_rlhf.serving.generation import Request
from palm_rlhf.serving.http.errors import ApiError
from palm_rlhf.serving.http.openai_requests import Ask
from palm_rlhf.serving.http.tool_calls import call_grammar
from palm_rlhf.serving.structured import Grammar

Kind = Literal["chat", "completion", "response"]
PROMPTS = {"chat": "messages", "completion": "prompt", "response": "input"}
HOPELESS = 4  # a text of so many contexts, however long its tokens are, is not read to count them


def engine_requests(served: Served, context: int, kind: Kind, ask: Ask, client: str = "") -> list[Request]:
    """One request of a client for each reply that is to be drawn, those to one prompt next to each other."""
    check_ids(ask.options["logit_bias"], served.palm.num_tokens, "logit_bias")
    chat, name = kind != "completion", PROMPTS[kind]
    options = {**ask.options, "client": client, "grammar": grammar_of(served, ask)}
    if not ask.ignore_eos:
        options["stop"] += served.turn_end_strings if chat else ()
        options["stop_tokens"] = served.turn_ends if chat else served.eos_tokens
    requests = []
    for prompt in ask.prompts:
        tools = [] if ask.tools is None else ask.tools.definitions
        forms = {"continued": ask.continued, "add_special_tokens": ask.add_special_tokens}
        tokens = prompt_tokens(served, context, prompt, tools, name, **forms)
        room = room_for_reply(len(tokens), ask.max_new_tokens, context, name)
        requests += [Request(tokens, room, index=index, **options) for index in range(ask.best_of)]
    return requests


def within_output(requests: list[Request], most: int, *, fixed: bool) -> list[Request]:
    """Requests whose replies hold so many tokens and log-probabilities at most, all together.

    Where their length is not `fixed`, by their client, they are shortened as far as that needs; ApiError where it is.
    """
    prompts = sum(len(request.prompt) * told(request.prompt_logprobs) for request in requests)
    prices = [1 + told(request.logprobs) for request in requests]
    total = prompts + sum(price * request.max_new_tokens for price, request in zip(prices, requests))
    if total <= most:
        return requests
    room = max(most - prompts, 0) // sum(prices)
    if room and not fixed:
        return [replace(request, max_new_tokens=min(request.max_new_tokens, room)) for request in requests]
    raise ApiError(
        400,
        f"the {len(requests)} replies may come to {total:,} tokens and log-probabilities together; expected at most "
        f"{most:,}: ask for fewer replies, tokens or alternatives",
        param="max_tokens",
        code="too_much_output",
    )


def told(alternatives: int | None) -> int:
    """Log-probabilities that are told of a token: its own, and those of so many alternatives; None asks for none."""
    return 0 if alternatives is None else 1 + alternatives


def grammar_of(served: Served, ask: Ask) -> Grammar | None:
    """What replies have to follow; ApiError where this server cannot see to it."""
    if ask.tools is not None and served.call_form is None:
        message = "tools are not supported by this model: its chat template writes none, or in a form not read here"
        raise ApiError(400, message, param="tools", code="unsupported_parameter")
    if ask.json_schema is None and (ask.tools is None or ask.tools.free):
        return None
    try:
        grammars = served.grammars
        if ask.tools is not None:
            return call_grammar(ask.tools, served.call_form, grammars)
        return grammars.json(ask.json_schema)
    except ValueError as error:
        name = ask.schema_name if ask.tools is None else "tools"
        raise ApiError(400, f"{name} cannot be followed: {error}", param=name) from error


def check_counts(values: dict[str, Any], context: int) -> None:
    """ApiError for a conversation of more messages than the context has tokens, before any of them is looked at."""
    for name in ("messages", "input"):
        if isinstance(values.get(name), list) and (count := len(values[name])) > context:
            message = f"{name} has at least {count} tokens, and the context of this model is {context} tokens"
            raise overflow(message, name)


def prompt_tokens(
    served: Served,
    context: int,
    prompt: str | list,
    tools: Sequence[dict] = (),
    name: str | None = None,
    *,
    continued: bool = False,
    add_special_tokens: bool = False,
) -> list[int]:
    """The tokens of a text, of a conversation in which tools may be called, or those given; errors say the name.

    A conversation that is continued ends with words of the assistant, which the reply goes on with.
    """
    if isinstance(prompt, list) and isinstance(prompt[0], int):
        check_ids(prompt, served.palm.num_tokens, "prompt")
        return prompt
    name = name or ("prompt" if isinstance(prompt, str) else "messages")
    size = len(prompt) if isinstance(prompt, str) else sum(1 + len(message["content"]) for message in prompt)
    size += sum(map(len, strings(tools)))
    if size > HOPELESS * context * served.longest_token:
        least = size // served.longest_token
        raise overflow(f"{name} has at least {least} tokens, and the context of this model is {context} tokens", name)
    try:
        if isinstance(prompt, str):
            tokens = served.encode_text(prompt, add_special_tokens=add_special_tokens)
        else:
            tokens = served.encode_continued(prompt) if continued else served.encode_chat(prompt, tools)
    except ValueError as error:
        raise ApiError(400, f"{name} cannot be read by this model: {error}", param=name) from error
    if not tokens:
        raise ApiError(400, f"{name} is empty; expected at least one token", param=name)
    return tokens


def room_for_reply(length: int, asked: int | None, context: int, name: str) -> int:
    """Tokens that a reply may have; ApiError where they do not fit."""
    if length + (asked != 0) > context:
        raise overflow(f"{name} has {length} tokens, and the context of this model is {context} tokens", name)
    if asked is not None and length + asked > context:
        raise overflow(
            f"{name} has {length} tokens and {asked} more are asked for, together {length + asked}; the context of "
            f"this model is {context} tokens",
            name,
        )
    return context - length if asked is None else asked


def overflow(message: str, param: str) -> ApiError:
    """Says that something is longer than the context."""
    return ApiError(400, f"{message}: shorten it, or ask for fewer", param=param, code="context_length_exceeded")


def check_ids(ids: list[int] | dict[int, float], num_tokens: int, name: str) -> None:
    """ApiError for an id outside of the vocabulary."""
    if ids and max(ids) >= num_tokens:
        raise ApiError(400, f"{name} has the token id {max(ids)}; expected 0 to {num_tokens - 1}", param=name)


def score_tokens(
    served: Served, context: int, prompt: str | list, replies: list[str]
) -> tuple[list[int], list[list[int]]]:
    """The tokens of a prompt, and those of replies to it."""
    tokens = prompt_tokens(served, context, prompt)
    found = []
    for index, reply in enumerate(replies):
        name = f"replies[{index}]"
        check_deadline()
        try:
            continued = served.tokenizer.encode_continuation
            ids = continued(reply) if isinstance(prompt, str) else served.encode_reply(prompt, reply)
        except ValueError as error:
            raise ApiError(400, f"{name} cannot be read by this model: {error}", param=name) from error
        if not ids:
            raise ApiError(400, f"{name} is empty; expected at least one token", param=name)
        if len(tokens) + len(ids) > context:
            raise overflow(
                f"{name} has {len(ids)} tokens after {len(tokens)} of the prompt, and the context of this model is "
                f"{context} tokens",
                name,
            )
        found.append(ids)
    return tokens, found
