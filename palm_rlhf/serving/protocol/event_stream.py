"""Pieces of replies on their way from the engine's thread to the event loop, and to clients that may go away."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from palm_rlhf.serving.generation import Generation, Piece

Blocks = AsyncGenerator[list[tuple[int, Piece]], None]  # pieces that came together, by the number of their reply
PATIENCE = 64  # pieces of each reply of a stream that may wait for its reader
BLOCK = 64  # pieces that become one block of events
PART = 2**16  # bytes of a reply that are written at once


class Inbox:
    """Pieces of some generations on their way to one reader on the event loop.

    `patience` is how many pieces of each generation may wait. Where the reader falls behind further, the generations
    wait too, without a row, until half of these are read. None is for a reader that always keeps up.
    """

    def __init__(self, patience: int | None = None):
        self.generations: list[Generation] = []
        self._patience, self._paused = patience, False
        self._pieces: deque[tuple[Generation, Piece]] = deque()
        self._came = asyncio.Event()

    def __len__(self) -> int:
        return len(self._pieces)

    def put(self, generation: Generation, piece: Piece) -> None:
        """Add a piece."""
        self._pieces.append((generation, piece))
        self._came.set()
        if not self._paused and self._behind(1):
            self._pause(True)

    async def take(self) -> list[tuple[Generation, Piece]]:
        """Return the pieces that have come, at most BLOCK of them; wait for the first, and let other tasks run."""
        await asyncio.sleep(0)
        await self._came.wait()
        found = [self._pieces.popleft() for _ in range(min(len(self._pieces), BLOCK))]
        if not self._pieces:
            self._came.clear()
        if self._paused and not self._behind(1 / 2):
            self._pause(False)
        return found

    def _behind(self, part: float) -> bool:
        return self._patience is not None and len(self._pieces) > part * self._patience * len(self.generations)

    def _pause(self, paused: bool) -> None:
        self._paused = paused
        for generation in self.generations:
            generation.pause(paused)


class Mailbox:
    """A carrier of pieces from the engine's thread to inboxes of an event loop, which it wakes once for many pieces."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop, self._scheduled = loop, False
        self._pieces: deque[tuple[Inbox, Generation, Piece]] = deque()

    def deliver_to(self, inbox: Inbox) -> Callable[[Generation, Piece], None]:
        """Return the function that puts pieces of generations into an inbox."""

        def deliver(generation: Generation, piece: Piece) -> None:
            self._pieces.append((inbox, generation, piece))
            if not self._scheduled:
                self._scheduled = True
                try:
                    self._loop.call_soon_threadsafe(self._drain)
                except RuntimeError:  # the loop is closed, and nobody reads any more
                    self._pieces.clear()

        return deliver

    def _drain(self) -> None:
        self._scheduled = False  # before the pieces are taken: a later piece schedules the next call
        while self._pieces:
            inbox, generation, piece = self._pieces.popleft()
            inbox.put(generation, piece)


async def read_pieces(inbox: Inbox) -> Blocks:
    """Yield all pieces as they come, each with the number of its generation, until all have ended.

    Raises the error of a generation that failed.
    """
    numbers = {id(generation): number for number, generation in enumerate(inbox.generations)}
    num_open = len(numbers)
    while num_open:
        found = await inbox.take()
        yield [(numbers[id(generation)], piece) for generation, piece in found]
        for generation, piece in found:
            num_open -= piece.finish_reason is not None
            if piece.finish_reason is not None and generation.error is not None:
                raise generation.error


def cancel(generations: list[Generation]) -> None:
    """Cancel the generations that have not ended."""
    for generation in generations:
        if generation.finish_reason is None:
            generation.cancel()


async def unless_gone(receive: Callable[[], Awaitable[dict[str, Any]]], work: Awaitable[Any]) -> Any:
    """Return the result of some work; cancel the work and return None when the client goes away."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(until_gone(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for future in (task, gone):
            future.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def until_gone(receive: Callable[[], Awaitable[dict[str, Any]]]) -> None:
    """Wait for the end of a connection whose request has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream:
    """An ASGI reply of server-sent events, which stops as soon as the client goes away.

    `events` are blocks of one or more whole events. The generations that they come from are cancelled at the end.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], generations: list[Generation]):
        self.events, self.generations = events, generations

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        try:
            await unless_gone(receive, self._write(send))
        finally:
            cancel(self.generations)  # here, since a generator that has not started runs no `finally`
            await self.events.aclose()

    async def _write(self, send: Callable) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),  # stops proxies from buffering the events
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for block in self.events:
            await send({"type": "http.response.body", "body": block, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class JsonReply:
    """An ASGI reply of JSON, written in parts, so that a client that reads slowly is told from one that has stopped."""

    def __init__(self, body: bytes):
        self.body = body

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(self.body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for start in range(0, len(self.body), PART):
            stop = start + PART
            more = stop < len(self.body)
            await send({"type": "http.response.body", "body": self.body[start:stop], "more_body": more})
