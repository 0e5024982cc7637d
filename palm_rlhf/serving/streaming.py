"""From the engine's thread to the event loop, and from there to clients that may go away at any time."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from palm_rlhf.serving.generation import Generation, Piece


class Mailbox:
    """Carries pieces from the engine's thread to queues of an event loop, which is woken once for many of them."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop, self._scheduled = loop, False
        self._pieces: deque[tuple[asyncio.Queue, Generation, Piece]] = deque()

    def deliver_to(self, queue: asyncio.Queue) -> Callable[[Generation, Piece], None]:
        """The function that puts pieces of generations, as pairs, into a queue."""

        def deliver(generation: Generation, piece: Piece) -> None:
            self._pieces.append((queue, generation, piece))
            if not self._scheduled:
                self._scheduled = True
                try:
                    self._loop.call_soon_threadsafe(self._drain)
                except RuntimeError:  # the loop is closed: no one is left to read
                    self._pieces.clear()

        return deliver

    def _drain(self) -> None:
        self._scheduled = False  # before the last look: what comes after it is carried by the next call
        while self._pieces:
            queue, generation, piece = self._pieces.popleft()
            queue.put_nowait((generation, piece))


async def pieces(queue: asyncio.Queue, generations: list[Generation]) -> AsyncGenerator[list[tuple[int, Piece]], None]:
    """All pieces that have come, each with the number of its generation, until all have ended.

    Raises what broke one of them.
    """
    numbers = {id(generation): number for number, generation in enumerate(generations)}
    num_open = len(generations)
    while num_open:
        found = [await queue.get()]
        while not queue.empty():
            found.append(queue.get_nowait())
        yield [(numbers[id(generation)], piece) for generation, piece in found]
        for generation, piece in found:
            num_open -= piece.finish_reason is not None
            if piece.finish_reason is not None and generation.error is not None:
                raise generation.error


def cancel(generations: list[Generation]) -> None:
    """Frees the places of those that have not ended."""
    for generation in generations:
        if generation.finish_reason is None:
            generation.cancel()


async def unless_gone(receive: Callable[[], Awaitable[dict[str, Any]]], work: Awaitable[Any]) -> Any:
    """The result of some work, which is cancelled when the client goes away; None then."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(until_gone(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for future in (task, gone):
            future.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def until_gone(receive: Callable[[], Awaitable[dict[str, Any]]]) -> None:
    """Waits for the end of a connection whose request has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream:
    """An ASGI reply of server-sent events, which stops when the client goes away, also while there is nothing to send.

    `events` are blocks of one or more whole events; the generations that they come from are cancelled at the end.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], generations: list[Generation]):
        self.events, self.generations = events, generations

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        try:
            await unless_gone(receive, self._write(send))
        finally:
            cancel(self.generations)  # here, since a generator that has not begun does not clean up
            await self.events.aclose()

    async def _write(self, send: Callable) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),  # proxies that would collect the events
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for block in self.events:
            await send({"type": "http.response.body", "body": block, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
