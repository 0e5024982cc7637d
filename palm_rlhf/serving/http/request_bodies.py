"""The bodies of requests as they arrive: each within a size and a time, and all together within some memory."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from palm_rlhf.serving.protocol.errors import ApiError

DRAINED = 16  # a body above the limit is read up to so many times the limit, so that the client gets the error
SHARE = 0.5  # of the memory for bodies, the part that one client may use


@dataclass(frozen=True)
class RequestLimits:
    """The limits of single requests.

    Args:
        max_body: Bytes of one body.
        body_timeout: Seconds in which a body has to arrive.
        body_memory: Bytes of all bodies that are being read, of which one client may use half.
        small_body: The first bytes of each body, which do not count, so that clients with large bodies keep no ordinary
            request out.
        prepare_timeout: Seconds in which a body has to be read and tokenized.
        max_n: The most replies that one request may ask for.
        max_output: The most tokens and log-probabilities that these may hold together.
    """

    max_body: int = 4 * 2**20
    body_timeout: float = 30.0
    body_memory: int = 64 * 2**20
    small_body: int = 2**16
    prepare_timeout: float = 10.0
    max_n: int = 128
    max_output: int = 2**17

    def __post_init__(self):
        for name in ("max_n", "max_output"):
            if getattr(self, name) < 1:
                raise ValueError(f"got {name}={getattr(self, name)}, expected at least 1")
        if self.body_memory * SHARE < self.max_body:
            raise ValueError(
                f"got body_memory={self.body_memory:,} bytes, of which one client may use half, expected at least "
                f"{int(self.max_body / SHARE):,}, for one body of max_body, {self.max_body:,} bytes"
            )


class BodyReader:
    """A reader of bodies, which counts the memory of those that are being read and worked on."""

    def __init__(self, limits: RequestLimits):
        self.limits = limits
        self.held: Counter[str] = Counter()  # bytes, by client

    @asynccontextmanager
    async def read(self, client: str, receive: Callable[[], Awaitable[dict[str, Any]]]) -> AsyncIterator[bytearray]:
        """Yield the body of a request; its memory counts until the context is left.

        Raises ApiError where the body breaks a limit.
        """
        body = bytearray()
        try:
            try:
                await asyncio.wait_for(self._fill(body, client, receive), self.limits.body_timeout)
            except asyncio.TimeoutError as error:
                message = f"the body did not arrive within {self.limits.body_timeout:g} seconds"
                raise ApiError(408, message, code="body_timeout", headers={"Connection": "close"}) from error
            yield body
        finally:
            self._resize(client, len(body), 0)

    async def _fill(self, body: bytearray, client: str, receive: Callable[[], Awaitable[dict[str, Any]]]) -> None:
        limit, size, more = self.limits.max_body, 0, True
        while more and size <= limit * DRAINED:
            event = await receive()
            if event["type"] == "http.disconnect":
                raise ApiError(499, "the client went away before its body had arrived")
            part, more = event.get("body", b""), event.get("more_body", False)
            size += len(part)
            if size <= limit:
                self._resize(client, len(body), size)
                body += part
            elif body:  # the rest is read and dropped
                self._resize(client, len(body), 0)
                body.clear()
        if size > limit:
            message = f"the body is above the limit of {limit} bytes"
            raise ApiError(413, message, code="body_too_large", headers={"Connection": "close"})

    def _resize(self, client: str, before: int, after: int) -> None:
        """Count that a body of a client has changed its size; ApiError where there is no room for it."""
        small, most = self.limits.small_body, self.limits.body_memory
        more = max(after - small, 0) - max(before - small, 0)
        own = self.held[client] + more > most * SHARE
        if more > 0 and (own or self.held.total() + more > most):
            owner = "this client's requests" if own else "all requests together"
            text = f"the bodies of {owner} hold as much memory as they may; send fewer at once, or later"
            headers = {"Retry-After": "1", "Connection": "close"}
            raise ApiError(429 if own else 503, text, code="too_many_bodies", headers=headers)
        self.held[client] += more
        if not self.held[client]:
            del self.held[client]
