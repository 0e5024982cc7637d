"""What the log says of one request, whoever answers it: its id, whose it is, and why it was refused or failed."""

import secrets
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass
class RequestRecord:
    """One request: `key` is the name of its API key, `reason` that of a refusal or failure, `status` that of the reply.

    `client` is the address that it came from.
    """

    client: str = "unknown"
    key: str | None = None
    status: int | None = None
    reason: str | None = None
    id: str = field(default_factory=lambda: f"req-{secrets.token_hex(8)}")

    @property
    def who(self) -> str:
        """The start of a line of the log. What a client could have written is escaped: it cannot forge a line."""
        return f"request={self.id} client={self.client!a} key={'-' if self.key is None else ascii(self.key)}"


_current: ContextVar[RequestRecord | None] = ContextVar("record", default=None)


def begin(record: RequestRecord) -> None:
    """Makes it the record of the request that this task answers."""
    _current.set(record)


def current() -> RequestRecord:
    """The record of the request that is being answered; an empty one outside of a request."""
    return _current.get() or RequestRecord()


def note_reason(reason: str) -> None:
    """Says why the request that is being answered was refused or failed."""
    current().reason = reason
