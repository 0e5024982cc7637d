"""The open connections of a server: how many there may be, and how long each may take to send its request."""

import asyncio
import ipaddress
import json
import logging
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from palm_rlhf.serving.protocol.errors import ApiError

if TYPE_CHECKING:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol as UvicornProtocol
else:  # an extra: `limited_protocol` adds it as a base class
    UvicornProtocol = object

SPARE_FILES = 64  # open files that are left for anything but connections
LATE = 5.0  # seconds beyond the limit of a body in which the application may answer before the connection is closed
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ConnectionLimits:
    """The limits of connections.

    Args:
        total: The most connections at once.
        each: The most connections from one address, except from `proxies`, through which many clients come.
        header_timeout: Seconds in which the header of a request has to arrive, from its first byte, or for the first
            request from the start of the connection.
        header_bytes: The largest header.
        body_timeout: Seconds in which the body of a request has to arrive.
        write_timeout: Seconds after which the connection of a client that reads nothing of its reply is closed.
        send_buffer: Bytes of a reply that the system holds for a client, beside one part that the server holds.
    """

    total: int = 1000
    each: int = 256
    proxies: Sequence[str] = ()
    header_timeout: float = 20.0
    header_bytes: int = 2**16
    body_timeout: float = 30.0
    write_timeout: float = 30.0
    send_buffer: int = 2**17

    def exempts(self, address: str) -> bool:
        """Return whether an address belongs to a proxy."""
        if "*" in self.proxies:
            return True
        try:
            found = ipaddress.ip_address(address)
            return any(found in ipaddress.ip_network(proxy, strict=False) for proxy in self.proxies)
        except ValueError:
            return address in self.proxies


def most_connections(wanted: int) -> int:
    """Return the number of connections wanted, or fewer where the process may not open as many files.

    Raises ValueError where it may open none.
    """
    import resource

    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    possible = files - SPARE_FILES if files != resource.RLIM_INFINITY else wanted
    if possible < 1:
        raise ValueError(
            f"this process may open {files} files, of which {SPARE_FILES} are reserved; expected more: raise the "
            "limit, as by ulimit -n 1024"
        )
    if possible < wanted:
        logger.warning("%d connections at once, since this process may open %d files (ulimit -n)", possible, files)
    return min(wanted, possible)


class Connections:
    """The connections of one server.

    At a limit, a new connection takes the place of the one that has waited longest without a request, so that silent
    connections and half headers keep nobody out. Where every connection is busy, the new one is refused.
    """

    def __init__(self, limits: ConnectionLimits):
        self.limits = limits
        self.counts: Counter[str] = Counter()  # by address
        self.waiting: dict[Any, str] = {}  # connections without a request, longest first, and their addresses

    def admit(self, connection: Any, address: str) -> str | None:
        """Admit a connection; return why not where it is refused."""
        limits = self.limits
        if self.counts[address] >= limits.each and not limits.exempts(address):
            reason, candidates = f"{limits.each} connections from one address", [address]
        elif self.counts.total() >= limits.total:
            reason, candidates = f"{limits.total} connections", None
        else:
            reason, candidates = None, []
        if reason is not None:
            found = (c for c, a in self.waiting.items() if candidates is None or a in candidates)
            evicted = next(found, None)
            if evicted is None:
                return f"there are {reason}, all of them busy; try again later"
            evicted.end(ApiError(503, f"there are {reason}, and this one has sent no request"))
        self.counts[address] += 1
        self.waiting[connection] = address
        return None

    def busy(self, connection: Any) -> None:
        """Note that a connection has begun a request."""
        self.waiting.pop(connection, None)

    def idle(self, connection: Any, address: str) -> None:
        """Note that a connection has its reply."""
        self.waiting[connection] = address

    def leave(self, connection: Any, address: str) -> None:
        """Note that a connection has ended."""
        self.waiting.pop(connection, None)
        self.counts[address] -= 1
        if not self.counts[address]:
            del self.counts[address]


class LimitedConnection(UvicornProtocol):
    """One connection: a mixin for uvicorn's protocol, which is an extra.

    `timer` limits the header or body that is being read, and `unread` counts the bytes of a header so far.
    `write_timer` runs while `unwritten` bytes of a reply wait for the client.
    """

    register: Connections
    limits: ConnectionLimits

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.address, self.admitted, self.in_body = "unknown", False, False
        self.timer: asyncio.TimerHandle | None = None
        self.write_timer: asyncio.TimerHandle | None = None
        self.unread = self.unwritten = 0

    def connection_made(self, transport: Any) -> None:
        """Admit the connection, or refuse it."""
        super().connection_made(transport)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.limits.send_buffer)
        transport.set_write_buffer_limits(high=0)  # so that any byte that waits starts the timer
        self.address = self.client[0] if self.client else "unknown"
        reason = self.register.admit(self, self.address)
        if reason is not None:
            self.end(ApiError(503, reason, code="too_many_connections", headers={"Retry-After": "1"}))
            return
        self.admitted = True
        self.wait(self.limits.header_timeout, self.no_header)

    def connection_lost(self, exc: Exception | None) -> None:
        """Make room for another connection."""
        self.stop_waiting()
        self.stop_write_timer()
        if self.admitted:
            self.admitted = False
            self.register.leave(self, self.address)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read more of a request."""
        if self.transport.is_closing():
            return
        if self.timer is None and not self.in_body and (self.cycle is None or self.cycle.response_complete):
            self.wait(self.limits.header_timeout, self.no_header)
        self.unread += len(data)
        super().data_received(data)
        if self.in_body:
            self.unread = 0
        elif self.unread > self.limits.header_bytes and not self.transport.is_closing():
            self.end(ApiError(431, f"the header of the request is above the limit of {self.limits.header_bytes} bytes"))

    def on_headers_complete(self) -> None:
        """Begin to limit the time of the body."""
        self.stop_waiting()
        self.in_body, self.unread = True, 0
        self.register.busy(self)
        super().on_headers_complete()
        self.wait(self.limits.body_timeout + LATE, self.no_body)

    def on_message_complete(self) -> None:
        """End the limit of the request: from here on the client waits for the server."""
        self.stop_waiting()
        self.in_body, self.unread = False, 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Let the connection give way to others again."""
        if self.admitted and not self.pipeline:
            self.register.idle(self, self.address)
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """End a connection that does not speak HTTP."""
        self.end(ApiError(400, "got bytes that are not HTTP; expected an HTTP request"))

    def pause_writing(self) -> None:
        """Begin to limit the time in which the client has to read."""
        super().pause_writing()
        self.stop_write_timer()
        self.unwritten = self.transport.get_write_buffer_size()
        self.write_timer = self.loop.call_later(self.limits.write_timeout, self.not_read)

    def resume_writing(self) -> None:
        """End that limit: the client has read everything."""
        self.stop_write_timer()
        super().resume_writing()

    def stop_write_timer(self) -> None:
        """Cancel the timer for reading the reply."""
        if self.write_timer is not None:
            self.write_timer.cancel()
            self.write_timer = None

    def not_read(self) -> None:
        """Close the connection of a client that has read nothing; wait longer for one that reads slowly."""
        size = self.transport.get_write_buffer_size()
        if size < self.unwritten:
            self.unwritten = size
            self.write_timer = self.loop.call_later(self.limits.write_timeout, self.not_read)
            return
        seconds = self.limits.write_timeout
        logger.info("client=%s hung up: it has read nothing for %g seconds", ascii(self.address), seconds)
        self.transport.abort()

    def wait(self, seconds: float, late: Any) -> None:
        """Start the timer for the request."""
        self.timer = self.loop.call_later(seconds, late)

    def stop_waiting(self) -> None:
        """Cancel the timer for the request."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def no_header(self) -> None:
        """End a connection whose header did not arrive in time."""
        self.end(ApiError(408, f"the header of a request did not arrive within {self.limits.header_timeout:g} seconds"))

    def no_body(self) -> None:
        """End a connection whose body did not arrive in time, whether or not the application waits for it."""
        self.end(ApiError(408, f"the body did not arrive within {self.limits.body_timeout:g} seconds"))

    def end(self, error: ApiError) -> None:
        """Close the connection, with the error as its reply where no reply has begun."""
        self.stop_waiting()
        self.register.busy(self)
        if self.transport.is_closing():
            return
        logger.info("client=%s status=%d connection closed: %s", ascii(self.address), error.status, error)
        if self.cycle is None or self.cycle.response_complete:
            self.transport.write(refusal(error))
        self.transport.close()


def limited_protocol(limits: ConnectionLimits) -> type:
    """Return uvicorn's protocol with these limits."""
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    own = {"register": Connections(limits), "limits": limits}
    return type("LimitedProtocol", (LimitedConnection, HttpToolsProtocol), own)


def refusal(error: ApiError) -> bytes:
    """Return an error as the bytes of a reply, for use without an application."""
    body = json.dumps(error.body).encode()
    head = [
        f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}".encode(),
        b"content-type: application/json",
        b"content-length: %d" % len(body),
        b"connection: close",
        *(f"{name.lower()}: {value}".encode() for name, value in error.headers.items()),
    ]
    return b"\r\n".join([*head, b"", body])
