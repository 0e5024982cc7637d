"""Running the application: until it is stopped, or beside the rest of a program."""

import asyncio
import math
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

from palm_rlhf.serving.http.connections import ConnectionLimits, limited_protocol
from palm_rlhf.serving.http.fastapi_import import fastapi_module

GRACE = 5  # seconds for running replies to end after the server is told to stop
LAST_WORDS = 5  # seconds after that for clients to read the error
# Seconds that an idle connection is kept, longer than clients keep it: a request on a connection that closes fails.
KEEP_ALIVE = 75
MAX_PORT = 2**16 - 1


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that waits for connections; port 0 takes any free port.

    Raises ValueError for a number that is not a port, and OSError where the port cannot be had.
    """
    if not 0 <= port <= MAX_PORT:
        raise ValueError(f"got port={port}, expected 0, which takes any free port, to {MAX_PORT}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=1024)


def url_of(listener: socket.socket) -> str:
    """Return the URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def make_server(
    app: Any,
    *,
    grace: float = GRACE,
    connections: ConnectionLimits | None = None,
    when_ready: Callable[[], None],
    when_late: Callable[[], None] = lambda: None,
) -> Any:
    """Return a uvicorn server.

    Args:
        grace: Seconds for running replies to end after the server is told to stop.
        connections: The limits of connections. The addresses that its proxies report of their clients are believed.
        when_ready: Called when the server takes requests.
        when_late: Called when replies outlast the grace, to end them.
    """
    fastapi_module()
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            when_ready()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            late = asyncio.get_running_loop().call_later(grace, when_late)
            try:
                await super().shutdown(sockets)
            finally:
                late.cancel()

    connections = connections or ConnectionLimits()
    config = uvicorn.Config(
        app,
        http=limited_protocol(connections),
        ws="none",
        proxy_headers=bool(connections.proxies),
        forwarded_allow_ips=list(connections.proxies),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=math.ceil(grace + LAST_WORDS),
    )
    return Server(config)


@contextmanager
def running(
    app: Any, *, host: str = "127.0.0.1", port: int = 0, connections: ConnectionLimits | None = None
) -> Iterator[str]:
    """Serve an application in a thread, and yield its URL."""
    ready = threading.Event()
    with closing(listen(host, port)) as listener:
        server = make_server(app, grace=1, connections=connections, when_ready=ready.set)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        ready.wait()
        try:
            yield url_of(listener)
        finally:
            server.should_exit = True
            thread.join()
