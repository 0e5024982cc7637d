"""Work on a request before the engine gets it: in threads of its own, up to a deadline, while its client waits.

Reading JSON, rendering a conversation and cutting it into tokens take a millisecond for an ordinary request, and
seconds for a hostile one. A thread cannot be ended from outside: long work calls `check_deadline` between its pieces.
"""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any
from weakref import WeakValueDictionary

from palm_rlhf.serving.deadline import limited_by
from palm_rlhf.serving.protocol.errors import ApiError
from palm_rlhf.serving.protocol.event_stream import unless_gone

LONG, MANY = 2**16, 128  # a body of more bytes or more objects is large
NUM_THREADS = 4  # for ordinary bodies; large ones share one


class ClientGone(Exception):
    """The end of work whose client has left; nobody is told."""


class Preparation:
    """The threads for such work, in two lanes, so that large bodies do not hold up ordinary ones.

    In the lane of large bodies each client has one at a time, and clients take turns. `seconds` is the limit for one
    body.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._ordinary = ThreadPoolExecutor(NUM_THREADS, "palm-rlhf-requests")
        self._large = ThreadPoolExecutor(1, "palm-rlhf-large-requests")
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def run(
        self,
        client: str,
        receive: Callable[[], Awaitable[dict[str, Any]]],
        body: bytearray,
        work: Callable[[bytearray], Any],
    ) -> Any:
        """Return the result of `work` on a body, in one of the threads; None where the client has gone.

        Raises ApiError where it took too long.
        """
        stopped = threading.Event()
        large = len(body) > LONG or body.count(b"{") > MANY
        turn = self._turns.setdefault(client, asyncio.Lock()) if large else nullcontext()
        pool = self._large if large else self._ordinary

        def within_limits() -> Any:
            late = time.monotonic() + self.seconds

            def stop_work() -> None:
                if stopped.is_set():
                    raise ClientGone
                if time.monotonic() > late:
                    message = f"the request took longer than {self.seconds:g} seconds to read; send a shorter one"
                    raise ApiError(400, message, code="too_complex")

            with limited_by(stop_work):
                return work(body)

        async def in_turn() -> Any:
            async with turn:
                future = pool.submit(within_limits)
                try:
                    return await asyncio.wrap_future(future)
                finally:
                    stopped.set()

        return await unless_gone(receive, in_turn())
