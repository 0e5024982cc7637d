"""From a parsed request to requests to the engine: texts become tokens, which have to fit the context."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from palm_rlhf.data.special_token_guard import strings_in
from palm_rlhf.serving.deadline import check_deadline
from palm_rlhf.serving.generation import Request
from palm_rlhf.serving.protocol.errors import ApiError
from palm_rlhf.serving.protocol.openai_requests import ParsedRequest
from palm_rlhf.serving.protocol.tool_calls import call_grammar
from palm_rlhf.serving.served_model import ServedModel
from palm_rlhf.serving.structured import Grammar

Kind = Literal["chat", "completion", "response"]
PROMPTS = {"chat": "messages", "completion": "prompt", "response": "input"}
HOPELESS = 4  # a text that is longer than so many contexts of longest tokens is refused before it is tokenized


def engine_requests(
    model: ServedModel, context: int, kind: Kind, parsed: ParsedRequest, client: str = ""
) -> list[Request]:
    """Return a request to the engine for each reply; those to one prompt lie next to each other."""
    check_ids(parsed.options["logit_bias"], model.palm.num_tokens, "logit_bias")
    chat, name = kind != "completion", PROMPTS[kind]
    options = {**parsed.options, "client": client, "grammar": grammar_of(model, parsed)}
    options["adapter"] = model.adapters.get(parsed.model)
    options["continues_text"] = parsed.continued or not chat
    if not parsed.ignore_eos:
        options["stop"] += model.turn_end_strings if chat else ()
        options["stop_tokens"] = model.turn_ends if chat else model.eos_tokens
    requests = []
    for prompt in parsed.prompts:
        tools = [] if parsed.tools is None else parsed.tools.definitions
        forms = {"continued": parsed.continued, "add_special_tokens": parsed.add_special_tokens}
        tokens = prompt_tokens(model_of(model, parsed.template_options), context, prompt, tools, name, **forms)
        room = room_for_reply(len(tokens), parsed.max_new_tokens, context, name)
        requests += [Request(tokens, room, index=index, **options) for index in range(parsed.best_of)]
    return requests


def within_output(requests: list[Request], most: int, *, fixed: bool) -> list[Request]:
    """Return requests whose replies hold at most so many tokens and log-probabilities, all together.

    Where the client has not `fixed` their length, they are shortened as far as needed; else ApiError is raised.
    """
    prompts = sum(len(request.prompt) * num_logprobs(request.prompt_logprobs) for request in requests)
    prices = [1 + num_logprobs(request.logprobs) for request in requests]
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


def num_logprobs(alternatives: int | None) -> int:
    """Return the number of log-probabilities reported for a token: its own and its alternatives; 0 for None."""
    return 0 if alternatives is None else 1 + alternatives


def grammar_of(model: ServedModel, parsed: ParsedRequest) -> Grammar | None:
    """Return the grammar that replies have to follow, or None; ApiError where this model cannot follow it."""
    name = parsed.schema_name if parsed.tools is None else "tools"
    try:
        if parsed.tools is not None:
            if model.call_form is None:
                message = "tools are not supported by this model: its chat template does not write them in a known form"
                raise ApiError(400, message, param="tools", code="unsupported_parameter")
            return None if parsed.tools.free else call_grammar(parsed.tools, model.call_form, model.grammars)
        return None if parsed.json_schema is None else model.grammars.json(parsed.json_schema)
    except ValueError as error:
        raise ApiError(400, f"{name} cannot be followed: {error}", param=name) from error


def check_counts(values: dict[str, Any], context: int) -> None:
    """Raise ApiError for a conversation with more messages than the context has tokens, before it is read."""
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
    """Return the tokens of a text, of a conversation in which tools may be called, or the token ids themselves.

    Raises ApiError, which names the parameter.

    Args:
        name: The parameter that the prompt came in.
        continued: Whether the reply goes on with the last message, which is the assistant's.
        add_special_tokens: Whether a text begins with the special tokens that the tokenizer puts there.
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


def model_of(model: ServedModel, options: Mapping[str, bool]) -> ServedModel:
    """Return the model with switches of its chat template set; ApiError for those that it does not read."""
    try:
        return model.with_template_options(options) if options else model
    except ValueError as error:
        raise ApiError(400, f"chat_template_kwargs: {error}", param="chat_template_kwargs") from error


def room_for_reply(length: int, asked: int | None, context: int, name: str) -> int:
    """Return the tokens that a reply may have; ApiError where they do not fit the context."""
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
    """Make the error for a prompt or reply that is longer than the context."""
    return ApiError(400, f"{message}: shorten it, or ask for fewer", param=param, code="context_length_exceeded")


def check_ids(ids: list[int] | dict[int, float], num_tokens: int, name: str) -> None:
    """Raise ApiError for an id outside the vocabulary."""
    if ids and max(ids) >= num_tokens:
        raise ApiError(400, f"{name} has the token id {max(ids)}; expected 0 to {num_tokens - 1}", param=name)


def score_tokens(
    model: ServedModel, context: int, prompt: str | list, replies: list[str]
) -> tuple[list[int], list[list[int]]]:
    """Return the tokens of a prompt, and the tokens of each reply to it."""
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
