"""A limit for long work on a request: no thread can be stopped from outside, so the work itself asks when to stop."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_stop_work: ContextVar[Callable[[], None] | None] = ContextVar("stop_work", default=None)


def check_deadline() -> None:
    """Raise what the limit of this work raises when it is reached; return at once where no limit is set.

    Work on texts of any size calls this function between its pieces.
    """
    stop_work = _stop_work.get()
    if stop_work is not None:
        stop_work()


@contextmanager
def limited_by(stop_work: Callable[[], None]) -> Iterator[None]:
    """Let `check_deadline` call `stop_work` within this context, which raises when the work has to end."""
    token = _stop_work.set(stop_work)
    try:
        yield
    finally:
        _stop_work.reset(token)
