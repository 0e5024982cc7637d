"""A judge behind a server with the chat-completions protocol, with retries."""

import email.utils
import http.client
import json
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any, NoReturn

from beartype import beartype

from palm_rlhf.evaluation.judging.judges import Judge, JudgeReply, JudgeRequest
from palm_rlhf.evaluation.message_text import text_of

MAX_RESPONSE_BYTES = 1 << 24
MAX_DELAY = 60.0
TRANSIENT = {408, 409, 425, 429, *range(500, 600)}


class _Transient(Exception):
    """A temporary failure, and the seconds that the server asks to wait."""

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class ChatJudge(Judge):
    """A server with `/chat/completions` (OpenAI's protocol). Failed requests are retried with growing delays.

    A call raises PermissionError if the server refuses the key, and ConnectionError if it refuses the request or the
    last attempt fails.

    Args:
        url: The address of the API, such as `http://127.0.0.1:18888/v1`.
        model: The model's name on the server.
        api_key: The key, sent to this address only; redirects are not followed.
        temperature: Sampling temperature.
        max_tokens: Longest judgment, in tokens; None leaves it to the server.
        timeout: Seconds to wait for a reply.
        retries: Attempts after the first failure.
        backoff: Seconds before the first retry, doubled for each further one.
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
                f"got retries={retries}, backoff={backoff} and timeout={timeout}, expected retries and backoff of at "
                "least 0, and a timeout above 0"
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
        """Stop retrying: calls that wait for a retry fail at once."""
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
            raise PermissionError(f"the judge at {self.url} refuses the key ({reason}): set another by --api-key-env")
        raise ConnectionError(f"the judge at {self.url} refuses the request ({reason})")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Follow no redirect: the key is for the named server only."""


@beartype
def completions_url(url: str) -> str:
    """Return the address of chat completions for the address of a server, of its API, or of the endpoint itself.

    Raises ValueError unless it is an http or https address.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"got the judge address {url!r}, expected one such as http://127.0.0.1:18888/v1")
    path = parts.path.rstrip("/") or "/v1"
    path = path if path.endswith("/chat/completions") else f"{path}/chat/completions"
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))


@beartype
def retry_delay(attempt: int, retry_after: float | None, backoff: float | int) -> float:
    """Return the seconds to wait after attempt 0, 1, ...: the server's wish, or exponential backoff with jitter."""
    if retry_after is not None:
        return min(max(retry_after, 0.0), MAX_DELAY)
    return min(backoff * 2.0**attempt, MAX_DELAY) * random.uniform(0.5, 1.0)


@beartype
def parse_retry_after(value: str | None, now: float | None = None) -> float | None:
    """Return the seconds that a Retry-After header (a number or a date) asks for; None without a valid one."""
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
    text = text.encode(errors="replace").decode()  # a lone surrogate cannot be printed
    return JudgeReply(text, usage=usage if isinstance(usage, dict) else None)
