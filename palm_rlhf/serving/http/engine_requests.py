"""From what a client asks to what the engine is asked: texts become tokens, and have to fit."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from palm_rlhf.data.special_token_guard import strings_in
from palm_rlhf.serving.deadline import check_deadline
from palm_rlhf.serving.generation import Request
from palm_rlhf.serving.http.errors import ApiError
from palm_rlhf.serving.http.openai_requests import ParsedRequest
from palm_rlhf.serving.http.tool_calls import call_grammar
from palm_rlhf.serving.served_model import ServedModel
from palm_rlhf.serving.structured import Grammar

Kind = Literal["chat", "completion", "response"]
PROMPTS = {"chat": "messages", "completion": "prompt", "response": "input"}
HOPELESS = 4  # a text of so many contexts, however long its tokens are, is not read to count them


def engine_requests(
    model: ServedModel, context: int, kind: Kind, parsed: ParsedRequest, client: str = ""
) -> list[Request]:
    """One request of a client for each reply that is to be drawn, those to one prompt next to each other."""
    check_ids(parsed.options["logit_bias"], model.palm.num_tokens, "logit_bias")
    chat, name = kind != "completion", PROMPTS[kind]
    options = {**parsed.options, "client": client, "grammar": grammar_of(model, parsed)}
    if not parsed.ignore_eos:
        options["stop"] += model.turn_end_strings if chat else ()
        options["stop_tokens"] = model.turn_ends if chat else model.eos_tokens
    requests = []
    for prompt in parsed.prompts:
        tools = [] if parsed.tools is None else parsed.tools.definitions
        forms = {"continued": parsed.continued, "add_special_tokens": parsed.add_special_tokens}
        tokens = prompt_tokens(model, context, prompt, tools, name, **forms)
        room = room_for_reply(len(tokens), parsed.max_new_tokens, context, name)
        requests += [Request(tokens, room, index=index, **options) for index in range(parsed.best_of)]
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


def grammar_of(model: ServedModel, parsed: ParsedRequest) -> Grammar | None:
    """What replies have to follow; ApiError where this server cannot see to it."""
    if parsed.tools is not None and model.call_form is None:
        message = "tools are not supported by this model: its chat template writes none, or in a form not read here"
        raise ApiError(400, message, param="tools", code="unsupported_parameter")
    if parsed.json_schema is None and (parsed.tools is None or parsed.tools.free):
        return None
    try:
        grammars = model.grammars
        if parsed.tools is not None:
            return call_grammar(parsed.tools, model.call_form, grammars)
        return grammars.json(parsed.json_schema)
    except ValueError as error:
        name = parsed.schema_name if parsed.tools is None else "tools"
        raise ApiError(400, f"{name} cannot be followed: {error}", param=name) from error


def check_counts(values: dict[str, Any], context: int) -> None:
    """ApiError for a conversation of more messages than the context has tokens, before any of them is looked at."""
    for name in ("messages", "input"):
        if isinstance(values.get(name), list) and (count := len(values[name])) > context:
            message = f"{name} has at least {count} tokens, and the context of this model is {context} tokens"
            raise overflow(message, name)


def prompt_tokens(
    model: ServedModel,
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
        check_ids(prompt, model.palm.num_tokens, "prompt")
        return prompt
    name = name or ("prompt" if isinstance(prompt, str) else "messages")
    size = len(prompt) if isinstance(prompt, str) else sum(1 + len(message["content"]) for message in prompt)
    size += sum(map(len, strings_in(tools)))
    if size > HOPELESS * context * model.longest_token:
        least = size // model.longest_token
        raise overflow(f"{name} has at least {least} tokens, and the context of this model is {context} tokens", name)
    try:
        if isinstance(prompt, str):
            tokens = model.encode_text(prompt, add_special_tokens=add_special_tokens)
        else:
            tokens = model.encode_continued(prompt) if continued else model.encode_chat(prompt, tools)
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
    model: ServedModel, context: int, prompt: str | list, replies: list[str]
) -> tuple[list[int], list[list[int]]]:
    """The tokens of a prompt, and those of replies to it."""
    tokens = prompt_tokens(model, context, prompt)
    found = []
    for index, reply in enumerate(replies):
        name = f"replies[{index}]"
        check_deadline()
        try:
            continued = model.tokenizer.encode_continuation
            ids = continued(reply) if isinstance(prompt, str) else model.encode_reply(prompt, reply)
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
