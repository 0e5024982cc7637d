"""The open connections of a server: how many there may be, and how long each may take to say what it wants."""

import asyncio
import ipaddress
import json
import logging
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from palm_rlhf.serving.http.errors import ApiError

SPARE_FILES = 64  # of those that the process may open, for all but connections
LATE = 5.0  # seconds after which a body's connection is closed, where the application has not answered by then
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ConnectionLimits:
    """`total`: connections at once. `each`: those from one address, but for `proxies`, through which many come.

    `header_timeout` and `body_timeout`: seconds in which the header and the body of a request have to come, from the
    first byte, or for the first request from the connection. `header_bytes`: what a header may hold. `write_timeout`:
    seconds after which a client that reads nothing of what waits for it is hung up on. `send_buffer`: bytes that the
    system holds of what a client has yet to read, beside those of one part of a reply that the server holds.
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
        """Whether an address is a proxy's."""
        if "*" in self.proxies:
            return True
        try:
            found = ipaddress.ip_address(address)
            return any(found in ipaddress.ip_network(proxy, strict=False) for proxy in self.proxies)
        except ValueError:
            return address in self.proxies


def most_connections(wanted: int) -> int:
    """So many connections, or fewer where the process may not open as many files; ValueError where it may open none."""
    import resource

    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    possible = files - SPARE_FILES if files != resource.RLIM_INFINITY else wanted
    if possible < 1:
        raise ValueError(
            f"this process may open {files} files, of which {SPARE_FILES} are for other things; expected more: raise "
            "the limit, as by ulimit -n 1024"
        )
    if possible < wanted:
        logger.warning("%d connections at once, since this process may open %d files (ulimit -n)", possible, files)
    return min(wanted, possible)


class Connections:
    """Those of one server. Where they are at a limit, a new one takes the place of the one that waits longest to ask.

    So connections that say nothing, or half of a header, keep nobody out. Where all are busy, the new one is refused.
    """

    def __init__(self, limits: ConnectionLimits):
        self.limits = limits
        self.counts: Counter[str] = Counter()  # by address
        self.waiting: dict[Any, str] = {}  # those that have asked nothing yet, longest first, and their addresses

    def admit(self, connection: Any, address: str) -> str | None:
        """Takes a connection in; else why not."""
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
            evicted.end(ApiError(503, f"there are {reason}, and this one has asked for nothing"))
        self.counts[address] += 1
        self.waiting[connection] = address
        return None

    def busy(self, connection: Any) -> None:
        """A connection has asked for something."""
        self.waiting.pop(connection, None)

    def idle(self, connection: Any, address: str) -> None:
        """A connection has its answer."""
        self.waiting[connection] = address

    def leave(self, connection: Any, address: str) -> None:
        """A connection has ended."""
        self.waiting.pop(connection, None)
        self.counts[address] -= 1
        if not self.counts[address]:
            del self.counts[address]


class LimitedConnection:
    """One connection, as a mixin of uvicorn's protocol, which is an extra.

    `timer` is that of the header or body that is being read, `unread` the bytes of a header so far. `write_timer` runs
    while `unwritten` bytes of a reply wait for the client.
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
        """Takes the connection in, or refuses it."""
        super().connection_made(transport)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.limits.send_buffer)
        transport.set_write_buffer_limits(high=0)  # so that any byte that waits sets the timer, and holds up the next
        self.address = self.client[0] if self.client else "unknown"
        reason = self.register.admit(self, self.address)
        if reason is not None:
            self.end(ApiError(503, reason, code="too_many_connections", headers={"Retry-After": "1"}))
            return
        self.admitted = True
        self.wait(self.limits.header_timeout, self.no_header)

    def connection_lost(self, exc: Exception | None) -> None:
        """Makes room for another."""
        self.stop_waiting()
        self.stop_write_timer()
        if self.admitted:
            self.admitted = False
            self.register.leave(self, self.address)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Reads more of a request."""
        if self.transport.is_closing():
            return
        if self.timer is None and not self.in_body and (self.cycle is None or self.cycle.response_complete):
            self.wait(self.limits.header_timeout, self.no_header)
        self.unread += len(data)
        super().data_received(data)
        if self.in_body:
            self.unread = 0
        elif self.unread > self.limits.header_bytes and not self.transport.is_closing():
            self.end(ApiError(431, f"the header of the request is above {self.limits.header_bytes} bytes"))

    def on_headers_complete(self) -> None:
        """From here on the time of the body counts."""
        self.stop_waiting()
        self.in_body, self.unread = True, 0
        self.register.busy(self)
        super().on_headers_complete()
        self.wait(self.limits.body_timeout + LATE, self.no_body)

    def on_message_complete(self) -> None:
        """From here on the client waits, and not the server."""
        self.stop_waiting()
        self.in_body, self.unread = False, 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """The connection may give way to others again."""
        if self.admitted and not self.pipeline:
            self.register.idle(self, self.address)
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Ends a connection that does not speak HTTP."""
        self.end(ApiError(400, "what came is no HTTP request"))

    def pause_writing(self) -> None:
        """From here on the client has to read."""
        super().pause_writing()
        self.stop_write_timer()
        self.unwritten = self.transport.get_write_buffer_size()
        self.write_timer = self.loop.call_later(self.limits.write_timeout, self.not_read)

    def resume_writing(self) -> None:
        """The client has read all there was."""
        self.stop_write_timer()
        super().resume_writing()

    def stop_write_timer(self) -> None:
        """Takes the timer of what is written back."""
        if self.write_timer is not None:
            self.write_timer.cancel()
            self.write_timer = None

    def not_read(self) -> None:
        """Hangs up on a client that has read nothing, and waits on for one that is slow."""
        size = self.transport.get_write_buffer_size()
        if size < self.unwritten:
            self.unwritten = size
            self.write_timer = self.loop.call_later(self.limits.write_timeout, self.not_read)
            return
        seconds = self.limits.write_timeout
        logger.info("client=%s hung up: it has read nothing for %g seconds", ascii(self.address), seconds)
        self.transport.abort()

    def wait(self, seconds: float, late: Any) -> None:
        """Sets the timer."""
        self.timer = self.loop.call_later(seconds, late)

    def stop_waiting(self) -> None:
        """Takes the timer back."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def no_header(self) -> None:
        """Ends a connection whose request has not come."""
        self.end(ApiError(408, f"the header of a request did not come within {self.limits.header_timeout:g} seconds"))

    def no_body(self) -> None:
        """Ends a connection whose body has not come, whether or not the application waits for it."""
        self.end(ApiError(408, f"the body did not come within {self.limits.body_timeout:g} seconds"))

    def end(self, error: ApiError) -> None:
        """Closes the connection, and says why where no reply has begun."""
        self.stop_waiting()
        self.register.busy(self)
        if self.transport.is_closing():
            return
        logger.info("client=%s status=%d connection closed: %s", ascii(self.address), error.status, error)
        if self.cycle is None or self.cycle.response_complete:
            self.transport.write(refusal(error))
        self.transport.close()


def limited_protocol(limits: ConnectionLimits) -> type:
    """uvicorn's protocol with these limits."""
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    own = {"register": Connections(limits), "limits": limits}
    return type("LimitedProtocol", (LimitedConnection, HttpToolsProtocol), own)


def refusal(error: ApiError) -> bytes:
    """An error as the bytes of a reply, for when there is no application to write it."""
    body = json.dumps(error.body).encode()
    head = [
        f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}".encode(),
        b"content-type: application/json",
        b"content-length: %d" % len(body),
        b"connection: close",
        *(f"{name.lower()}: {value}".encode() for name, value in error.headers.items()),
    ]
    return b"\r\n".join([*head, b"", body])
