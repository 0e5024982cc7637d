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

GRACE = 5  # seconds that replies have to end after the server was told to
LAST_WORDS = 5  # seconds that clients have to read what they are told when those are over
# Seconds that an idle connection is kept, longer than clients do: closing one just as it is used fails what is sent.
KEEP_ALIVE = 75
MAX_PORT = 2**16 - 1


def listen(host: str, port: int) -> socket.socket:
    """A socket that waits for connections; port 0 takes any that is free.

    ValueError for a number that is no port, OSError where the port cannot be had.
    """
    if not 0 <= port <= MAX_PORT:
        raise ValueError(f"port is {port}; expected 0, which takes any that is free, to {MAX_PORT}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=1024)


def url_of(listener: socket.socket) -> str:
    """Where a socket is found."""
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
    """A uvicorn server, which calls a function when it takes requests, and one to end what outlasts the grace.

    The addresses that the proxies among `connections` tell of their clients are believed.
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
    """Serves an application in a thread, and gives its URL."""
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
