"""The work of each path of the server, whatever framework calls it."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from typing import Any

from palm_rlhf.serving.engine import Engine
from palm_rlhf.serving.generation import EngineError, EngineFull, Generation, Piece, Request
from palm_rlhf.serving.http.preparation import Preparation
from palm_rlhf.serving.http.prometheus import Metrics
from palm_rlhf.serving.http.request_bodies import BodyReader, RequestLimits
from palm_rlhf.serving.http.request_log import current, note_reason
from palm_rlhf.serving.protocol.echo import with_prompts
from palm_rlhf.serving.protocol.engine_requests import Kind, check_counts, engine_requests, score_tokens, within_output
from palm_rlhf.serving.protocol.errors import ApiError, as_api_error, gone
from palm_rlhf.serving.protocol.event_stream import (
    PATIENCE,
    Blocks,
    EventStream,
    Inbox,
    JsonReply,
    Mailbox,
    cancel,
    read_pieces,
    unless_gone,
)
from palm_rlhf.serving.protocol.openai_replies import CompletionWriter, encoded
from palm_rlhf.serving.protocol.openai_requests import ParsedRequest, read_chat, read_completion, read_json, read_score
from palm_rlhf.serving.protocol.responses_api import ResponseWriter, read_response
from palm_rlhf.serving.protocol.schema import check
from palm_rlhf.serving.protocol.tokenize_api import DETOKENIZE, TOKENIZE, detokenize, tokenize
from palm_rlhf.serving.protocol.tool_calls import reading_calls
from palm_rlhf.serving.served_model import ServedModel

logger = logging.getLogger(__name__)
NUM_WRITERS = 2  # threads that write long replies; few, since each holds a whole reply twice
ReplyWriter = CompletionWriter | ResponseWriter
READERS = {"chat": read_chat, "completion": read_completion, "response": read_response}
SCORED_AT_ONCE = 8  # replies that are scored between two tokens of running replies


def client_of(scope: dict[str, Any]) -> str:
    """Return who asks, by the name that the middleware has given the client, or "" where nobody is known."""
    return scope.get("palm_rlhf.client") or ""


class Handlers:
    """The paths of the protocol, around one engine."""

    def __init__(self, model: ServedModel, engine: Engine, metrics: Metrics, limits: RequestLimits):
        self.model, self.engine, self.metrics, self.limits = model, engine, metrics, limits
        self.bodies, self.preparation = BodyReader(limits), Preparation(limits.prepare_timeout)
        self.started = int(time.time())
        self._mailbox: Mailbox | None = None
        self._writers = ThreadPoolExecutor(NUM_WRITERS, "palm-rlhf-replies")

    async def generate(self, request: Any, kind: Kind) -> JsonReply | EventStream:
        """Answer a request for a chat completion, a completion or a response, whole or as a stream."""
        client = client_of(request.scope)
        parsed, requests = await self.prepared(request, lambda body: self.parse(kind, read_json(body), client))
        writer = self._writer(kind, parsed)
        if parsed.stream:
            return self.stream(writer, parsed, requests)
        return JsonReply(await self._while_connected(request, self._whole(writer, parsed, requests)))

    def stream(self, writer: ReplyWriter, parsed: ParsedRequest, requests: list[Request]) -> EventStream:
        """Return the replies to requests as a stream of events."""
        inbox = self._submit(requests, PATIENCE)
        return EventStream(self._events(writer, parsed, inbox), inbox.generations)

    def _writer(self, kind: Kind, parsed: ParsedRequest) -> ReplyWriter:
        if kind == "response":
            return ResponseWriter(parsed.model, parsed.repeated)
        counting = (parsed.include_usage, parsed.continuous_usage, parsed.prompt_logprobs)
        return CompletionWriter(kind, parsed.model, self.model.tokenizer, *counting)

    def parse(self, kind: Kind, values: dict[str, Any], client: str) -> tuple[ParsedRequest, list[Request]]:
        """Return a parsed body, and its requests to the engine."""
        check_counts(values, self.engine.context)
        parsed = READERS[kind](values)
        self._check_model(parsed.model)
        if parsed.best_of > parsed.n and self.model.reward_model is None:
            raise ApiError(400, "best_of needs a reward model: start the server with --reward-model", param="best_of")
        most = min(self.engine.most_of(client), self.limits.max_n)
        if (count := len(parsed.prompts) * parsed.best_of) > most:
            name = "prompt" if len(parsed.prompts) > most else "best_of" if parsed.best_of > parsed.n else "n"
            expected = f"at most {most}, as many as one client may have at once"
            raise ApiError(400, f"{name} asks for {count} replies in all; expected {expected}", param=name)
        requests = engine_requests(self.model, self.engine.context, kind, parsed, client)
        return parsed, within_output(requests, self.limits.max_output, fixed=parsed.max_new_tokens is not None)

    async def score(self, request: Any) -> dict[str, Any]:
        """Return the reward model's scores of replies to a prompt."""
        tokens, answers = await self.prepared(request, self._parse_score)
        work = self._scores(tokens, answers, client_of(request.scope))
        scores = await self._while_connected(request, work)
        num_tokens = len(tokens) + sum(map(len, answers))
        return {
            "object": "list",
            "model": self.model.name,
            "data": [{"object": "score", "index": index, "score": score} for index, score in enumerate(scores)],
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        }

    def _parse_score(self, body: bytearray) -> tuple[list[int], list[list[int]]]:
        """Return the tokens of a prompt and of replies to it."""
        values = read_json(body)
        check_counts(values, self.engine.context)
        name, prompt, replies = read_score(values)
        self._check_model(self.model.name if name is None else name)
        if self.model.reward_model is None:
            raise ApiError(400, "this server has no reward model: start it with --reward-model", code="no_reward_model")
        return score_tokens(self.model, self.engine.context, prompt, replies)

    async def tokenize(self, request: Any) -> dict[str, Any]:
        """Return the tokens of a text or a conversation."""
        context = self.engine.context
        return await self.prepared(request, lambda body: tokenize(self.model, context, self._values(body, TOKENIZE)))

    async def detokenize(self, request: Any) -> dict[str, Any]:
        """Return the text of tokens."""
        return await self.prepared(request, lambda body: detokenize(self.model, self._values(body, DETOKENIZE)))

    def _values(self, body: bytearray, schema: dict[str, Any]) -> dict[str, Any]:
        """Return the checked entries of a body that need not name the model."""
        values = read_json(body)
        check_counts(values, self.engine.context)
        values = check(values, schema)
        self._check_model(values.get("model", self.model.name))
        return values

    def model_entry(self, name: str) -> dict[str, Any]:
        """Return the entry of a model; ApiError for a model that is not here."""
        self._check_model(name)
        return {
            "id": name,
            "object": "model",
            "created": self.started,
            "owned_by": "palm-rlhf",
            "max_model_len": self.engine.context,
            "parent": None if name == self.model.name else self.model.name,
        }

    def model_list(self) -> dict[str, Any]:
        """Return the list of models: the base, then its adapters."""
        return {"object": "list", "data": [self.model_entry(name) for name in self.model.names]}

    def health(self) -> dict[str, Any]:
        """Return how many replies the engine computes; ApiError where it does not compute."""
        if not self.engine.alive:
            raise ApiError(503, "the engine has stopped", code="unavailable")
        if self.engine.stalled:
            seconds = self.engine.config.stall_timeout
            raise ApiError(503, f"the engine has done nothing for {seconds:g} seconds, with work to do", code="stalled")
        return {"status": "ok", "running": self.engine.num_running, "waiting": self.engine.num_waiting}

    def ready(self) -> dict[str, Any]:
        """Return the same where there is room for another reply; ApiError where there is none."""
        health = self.health()
        if (taken := health["running"] + health["waiting"]) >= self.engine.limit:
            raise ApiError(503, f"{taken} replies run and wait, as many as may", code="queue_full")
        return {**health, "status": "ready"}

    async def prepared(self, request: Any, work: Callable[[bytearray], Any]) -> Any:
        """Return the result of some work on the body of a request, which runs in a thread."""
        client = client_of(request.scope)
        async with self.bodies.read(client, request.receive) as body:
            found = await self.preparation.run(client, request.receive, body, work)
        if found is None:
            raise gone()
        return found

    def _check_model(self, name: str) -> None:
        if name not in self.model.names:
            message = f"the model {name!a:.80} does not exist; this server has {', '.join(self.model.names)}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def _while_connected(self, request: Any, work: Awaitable) -> Any:
        try:
            found = await unless_gone(request.receive, work)
        except Exception as error:
            raise as_api_error(error) from error
        if found is None:
            raise gone()
        return found

    def _submit(self, requests: list[Request], patience: int | None = None) -> Inbox:
        """Return the inbox in which the pieces of replies arrive; `patience` is how far its reader may fall behind."""
        if self._mailbox is None:
            self._mailbox = Mailbox(asyncio.get_running_loop())
        inbox = Inbox(patience)
        try:
            inbox.generations = self.engine.submit_all(requests, self._mailbox.deliver_to(inbox))
        except (ValueError, EngineFull, EngineError) as error:
            raise as_api_error(error) from error
        return inbox

    async def _whole(self, writer: ReplyWriter, parsed: ParsedRequest, requests: list[Request]) -> bytes:
        """Return a reply that is not streamed."""
        inbox = self._submit(requests)
        generations = inbox.generations
        replies: list[list[Piece]] = [[] for _ in generations]
        try:
            async for found in self._pieces(parsed, inbox):
                for number, piece in found:
                    replies[number].append(piece)
        finally:
            cancel(generations)
            self._note(parsed, generations)
        best = await self._best(parsed, list(zip(generations, replies)))
        return await self._off_loop(lambda: encoded(writer.whole(best, generations)))

    async def _off_loop(self, work: Callable[[], Any]) -> Any:
        """Return the result of long work on a reply, which runs in a thread so that the loop answers others."""
        return await asyncio.get_running_loop().run_in_executor(self._writers, work)

    def _pieces(self, parsed: ParsedRequest, inbox: Inbox) -> Blocks:
        """Return the pieces of replies as they come, with their prompts where asked for, and with the calls in them."""
        blocks = read_pieces(inbox)
        if parsed.tools is not None and self.model.call_form is not None:
            return reading_calls(blocks, inbox.generations, self.model.call_form)
        if not parsed.echo:
            return blocks
        prompts = [prompt for prompt in parsed.prompts for _ in range(parsed.best_of)]
        return with_prompts(blocks, self.model.tokenizer, prompts, inbox.generations)

    async def _best(self, parsed: ParsedRequest, replies: list[tuple[Generation, list[Piece]]]) -> list[tuple]:
        """Return the n replies of highest score to each prompt, best first."""
        if parsed.best_of == parsed.n:
            return replies
        kept = []
        for start in range(0, len(replies), parsed.best_of):
            group = replies[start : start + parsed.best_of]
            prompt, answers = group[0][0].request.prompt, [generation.tokens for generation, _ in group]
            scores = await self._scores(prompt, answers, group[0][0].request.client)
            order = sorted(range(len(group)), key=lambda number: -scores[number])
            kept += [group[number] for number in order[: parsed.n]]
        return kept

    async def _scores(self, prompt: list[int], answers: list[list[int]], client: str) -> list[float]:
        """Return scores of replies, computed a few at a time, so that running replies and other clients take turns."""
        scores: list[float] = []
        for start in range(0, len(answers), SCORED_AT_ONCE):
            some = answers[start : start + SCORED_AT_ONCE]
            job = self.engine.call(partial(self.model.score, prompt, some), client)
            scores += await asyncio.wrap_future(job)
        return scores

    async def _events(self, writer: ReplyWriter, parsed: ParsedRequest, inbox: Inbox) -> AsyncGenerator[bytes, None]:
        """Yield the blocks of a stream; an error comes as an event, since the status has been sent."""
        generations = inbox.generations
        if opening := writer.opening(generations):
            yield opening
        try:
            async with aclosing(self._pieces(parsed, inbox)) as blocks:
                async for found in blocks:
                    work = partial(writer.block, found, generations)
                    is_long = any(piece.logprobs for _, piece in found)
                    if block := await self._off_loop(work) if is_long else work():
                        yield block
            if closing := writer.closing(generations):
                yield closing
        except Exception as error:
            api_error = as_api_error(error)
            note_reason(str(api_error))
            yield writer.failure(api_error)
        finally:
            self._note(parsed, generations)
        if writer.end:
            yield writer.end

    def _note(self, parsed: ParsedRequest, generations: list[Generation]) -> None:
        """Write a request to the log, and its times to the metrics."""
        now = time.monotonic()
        for generation in generations:
            self.metrics.observe_reply(generation, now)
        logger.info(
            "%s user=%s metadata=%s prompt_tokens=%d completion_tokens=%d replies=%d ended=%s seconds=%.3f",
            current().who,
            ascii(parsed.user),
            json.dumps(parsed.metadata),
            sum(len(prompt) for prompt in {id(g.request.prompt): g.request.prompt for g in generations}.values()),
            sum(len(generation.tokens) for generation in generations),
            len(generations),
            ",".join(sorted({generation.finish_reason or "cancelled" for generation in generations})),
            now - generations[0].submitted,
        )
