"""Who judges: a server that speaks the chat-completions protocol, a PaLM of one's own, or a RewardModel."""

import email.utils
import hashlib
import http.client
import json
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, NoReturn, cast

import torch
from beartype import beartype
from torch import Tensor

from palm_rlhf.data.conversation import Template, encode_prompt, encode_response, end_of_turn
from palm_rlhf.data.tokenizer import Tokenizer
from palm_rlhf.evaluation.judging.answers import Question, Turns
from palm_rlhf.evaluation.judging.judge_prompts import Messages, Method, judge_messages
from palm_rlhf.evaluation.message_text import text_of
from palm_rlhf.model.palm import PaLM
from palm_rlhf.model.token_ids import known_tokens
from palm_rlhf.policy.reward_model import RewardModel
from palm_rlhf.policy.sequences import join

MAX_RESPONSE_BYTES = 1 << 24
MAX_DELAY = 60.0
TRANSIENT = {408, 409, 425, 429, *range(500, 600)}


@dataclass(frozen=True)
class JudgeRequest:
    """One judgment to be made: of the answers to a question's turn, in the order in which they are shown."""

    question: Question
    turn: int
    models: tuple[str, ...]
    replies: tuple[Turns, ...]
    method: Method
    swapped: bool = False
    """Whether the model that comes first elsewhere is shown second."""
    sample: int = 0

    @cached_property
    def messages(self) -> Messages:
        return judge_messages(self.method, self.question, self.replies, self.turn)

    def key(self, judge: "Judge") -> str:
        """What tells this judgment from all others: all that decides it, and nothing else."""
        decisive = [judge.identity, self.method, self.messages, self.models, self.swapped, self.sample]
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


class JudgeReply(NamedTuple):
    """What a judge says: a text to parse, or scores of the answers as they were shown."""

    text: str | None = None
    scores: Sequence[float] | None = None
    usage: dict[str, Any] | None = None


class Judge:
    """Answers requests. `identity` has all of it that decides the answers, `sees_order` whether their order may."""

    name: str
    identity: dict[str, Any]
    sees_order = True
    max_concurrency: int | None = None

    def __call__(self, request: JudgeRequest) -> JudgeReply:
        """The judgment; an OSError where there is none to be had."""
        raise NotImplementedError

    def stop(self) -> None:
        """Gives up waiting for what might still come."""


class _Transient(Exception):
    """A failure that may pass, and the seconds that the server asks to wait."""

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class ChatJudge(Judge):
    """Any server with `/chat/completions` (OpenAI's protocol), asked again with growing delays when it fails.

    url: of the API, such as `http://127.0.0.1:18888/v1`. api_key: sent to that URL only; redirects are not followed.
    retries: after the first failure. backoff: seconds before the first of them, doubled for each that follows.

    Raises, when called: PermissionError for a key that is refused, ConnectionError where the last attempt failed too,
    or the server refuses the request.
    """

    @beartype
    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key: str | None = None,
        temperature: float | int = 0.0,
        max_tokens: int | None = 1024,
        timeout: float | int = 120.0,
        retries: int = 5,
        backoff: float | int = 1.0,
    ):
        if retries < 0 or backoff < 0 or timeout <= 0:
            raise ValueError(
                f"got retries={retries}, backoff={backoff} and timeout={timeout}, expected at least 0 retries, seconds "
                "of at least 0 before one, and seconds above 0 to wait for a reply"
            )
        self.url, self.name = completions_url(url), model
        self.identity = {"model": model, "temperature": float(temperature), "max_tokens": max_tokens}
        self.api_key, self.timeout, self.retries, self.backoff = api_key, timeout, retries, backoff
        self._opener = urllib.request.build_opener(_NoRedirects)
        self._stopped = threading.Event()

    def __call__(self, request: JudgeRequest) -> JudgeReply:
        for attempt in range(self.retries + 1):
            try:
                return self._ask(request)
            except _Transient as error:
                failure = error
            if attempt < self.retries:
                self._stopped.wait(retry_delay(attempt, failure.retry_after, self.backoff))
            if self._stopped.is_set():
                break
        raise ConnectionError(f"the judge at {self.url} did not answer after {attempt + 1} attempts: {failure}")

    def stop(self) -> None:
        """Asks no more: who waits for a retry gives up."""
        self._stopped.set()

    def _ask(self, request: JudgeRequest) -> JudgeReply:
        body = {name: value for name, value in self.identity.items() if value is not None}
        body |= {"messages": request.messages}
        if request.sample:
            body["seed"] = request.sample
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        post = urllib.request.Request(self.url, json.dumps(body).encode(), headers, method="POST")
        try:
            with self._opener.open(post, timeout=self.timeout) as response:
                return _read_completion(response.read(MAX_RESPONSE_BYTES))
        except urllib.error.HTTPError as error:
            with error:
                self._refuse(error, error.read(2000).decode(errors="replace"))
        except (OSError, http.client.HTTPException) as error:
            raise _Transient(f"{type(error).__name__}: {error}") from error

    def _refuse(self, error: urllib.error.HTTPError, body: str) -> NoReturn:
        reason = f"HTTP {error.code}: {body.strip()[:300]}"
        if error.code in TRANSIENT:
            raise _Transient(reason, parse_retry_after(error.headers.get("Retry-After"))) from error
        if error.code in (401, 403):
            raise PermissionError(f"the judge at {self.url} refuses the key, {reason}: name another by --api-key-env")
        raise ConnectionError(f"the judge at {self.url} refuses the request, {reason}")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """A key is for the server that was named, and for no other."""


@beartype
def completions_url(url: str) -> str:
    """The address to post to, of a server, of its API, or in full; ValueError for what is no http address."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"got the judge {url!r}, expected an address such as http://127.0.0.1:18888/v1")
    path = parts.path.rstrip("/") or "/v1"
    path = path if path.endswith("/chat/completions") else f"{path}/chat/completions"
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))


@beartype
def retry_delay(attempt: int, retry_after: float | None, backoff: float | int) -> float:
    """The seconds to wait after attempt 0, 1, ...: what the server asks, or else doubling ones, less up to a half."""
    if retry_after is not None:
        return min(max(retry_after, 0.0), MAX_DELAY)
    return min(backoff * 2.0**attempt, MAX_DELAY) * random.uniform(0.5, 1.0)


@beartype
def parse_retry_after(value: str | None, now: float | None = None) -> float | None:
    """The seconds that a Retry-After header asks for, as a number or a date; None where it says nothing."""
    if value is None:
        return None
    try:
        return float(value)
    except ValueError:
        pass
    try:
        return email.utils.parsedate_to_datetime(value).timestamp() - (time.time() if now is None else now)
    except ValueError:
        return None


def _read_completion(content: bytes) -> JudgeReply:
    try:
        completion = json.loads(content)
        text = text_of(completion["choices"][0]["message"]["content"]) or ""
        usage = completion.get("usage")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise _Transient(f"no completion ({type(error).__name__}: {error}): {content[:200]!r}") from error
    text = text.encode(errors="replace").decode()  # half of a surrogate pair could not be shown
    return JudgeReply(text, usage=usage if isinstance(usage, dict) else None)


class LocalJudge(Judge):
    """A PaLM as the judge. Its samples differ by their seeds, and are the same in every run.

    version: tells its judgments from those of other weights under the same name.
    """

    max_concurrency = 1

    @beartype
    def __init__(
        self,
        palm: PaLM,
        tokenizer: Tokenizer,
        template: Template,
        *,
        name: str = "palm",
        temperature: float | int = 0.0,
        max_tokens: int = 1024,
        version: str = "",
    ):
        self.palm, self.tokenizer, self.template, self.name = palm, tokenizer, template, name
        self.identity = {"model": name, "temperature": float(temperature), "max_tokens": max_tokens, "version": version}
        self._allowed_tokens = known_tokens(tokenizer, palm.num_tokens)

    def __call__(self, request: JudgeRequest) -> JudgeReply:
        end = end_of_turn(self.tokenizer, self.template)
        prompt = encode_prompt(request.messages, self.tokenizer, self.template).to(self.palm.device)
        seed = int(request.key(self)[:15], 16)
        generated = self.palm.generate(
            prompt=prompt,
            max_new_tokens=self.identity["max_tokens"],
            temperature=self.identity["temperature"],
            eos_token=end,
            allowed_tokens=self._allowed_tokens,
            generator=torch.Generator(self.palm.device).manual_seed(seed),
        )
        response = cast(Tensor, generated).tolist()  # one prompt, one sample: `t`
        response = response[: response.index(end)] if end in response else response
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(response)}
        return JudgeReply(self.tokenizer.decode(response), usage=usage)


class RewardJudge(Judge):
    """A RewardModel, which reads each conversation alone: there is no order, and a second sample is the first.

    version: tells its judgments from those of other weights under the same name.
    """

    sees_order = False
    max_concurrency = 1

    @beartype
    def __init__(
        self,
        reward_model: RewardModel,
        tokenizer: Tokenizer,
        template: Template,
        *,
        name: str = "reward",
        version: str = "",
    ):
        self.reward_model, self.tokenizer, self.template, self.name = reward_model, tokenizer, template, name
        self.identity = {"reward_model": name, "version": version}

    def __call__(self, request: JudgeRequest) -> JudgeReply:
        return JudgeReply(scores=[self.score(request.question, reply, request.turn) for reply in request.replies])

    @beartype
    def score(self, question: Question, reply: Turns, turn: int = 1) -> float:
        """The score of a reply's last turn after all before it."""
        messages = [{"role": "user", "content": question.turns[0]}]
        for asked, answered in zip(question.turns[1:turn], reply):
            messages += [{"role": "assistant", "content": answered}, {"role": "user", "content": asked}]
        prompt = encode_prompt(messages, self.tokenizer, self.template)
        response = encode_response(messages, reply[turn - 1], self.tokenizer, self.template)
        return float(self.reward_model.score(join([prompt], [response])))
