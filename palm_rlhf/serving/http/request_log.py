"""The record of one request for the log: its id, its client, and why it was refused or failed."""

import secrets
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass
class RequestRecord:
    """The record of one request.

    Args:
        client: The address that the request came from.
        key: The name of its API key.
        status: The status of the reply.
        reason: Why the request was refused or failed.
        id: The id of the request, which the reply has too.
    """

    client: str = "unknown"
    key: str | None = None
    status: int | None = None
    reason: str | None = None
    id: str = field(default_factory=lambda: f"req-{secrets.token_hex(8)}")

    @property
    def who(self) -> str:
        """The start of a line of the log. Text from the client is escaped, so that it cannot forge a line."""
        return f"request={self.id} client={self.client!a} key={'-' if self.key is None else ascii(self.key)}"


_current: ContextVar[RequestRecord | None] = ContextVar("record", default=None)


def begin(record: RequestRecord) -> None:
    """Set the record of the request that this task answers."""
    _current.set(record)


def current() -> RequestRecord:
    """Return the record of the request that is being answered; an empty one outside a request."""
    return _current.get() or RequestRecord()


def note_reason(reason: str) -> None:
    """Note why the request that is being answered was refused or failed."""
    current().reason = reason
