"""The options of the serve command that say who may connect, and how much of the server a client may use."""

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

from beartype import beartype

from palm_rlhf.model.weights_writer import parse_size
from palm_rlhf.serving.http.access import LOOPBACK, Access
from palm_rlhf.serving.http.api_keys import KEYS_VARIABLE, ApiKeys, keys_of_environment
from palm_rlhf.serving.http.connections import ConnectionLimits, most_connections
from palm_rlhf.serving.http.request_bodies import RequestLimits


@beartype
@dataclass(frozen=True)
class AccessOptions:
    """Who may connect, and how much of the server a client may use."""

    api_key_file: Path | None = None
    """A file with lines NAME: KEY, or KEY alone. It is read again when it changes; the log shows the names."""
    allowed_hosts: tuple[str, ...] = ()
    """Host names by which clients may reach the server, with or without a port; *.NAME is every name below NAME, * is
    any name. On a loopback address the names of this machine are allowed too; on others all are, unless some are
    given."""
    cors_origin: tuple[str, ...] = ()
    """Web pages of other sites that may send requests, such as https://chat.example.org; * is any."""
    forwarded_allow_ips: str = ""
    """Addresses or networks of proxies in front, separated by commas, whose X-Forwarded-For and X-Forwarded-Proto are
    believed; * is any."""
    max_connections: int = 1000
    """The most connections at once, as far as the limit of open files allows."""
    max_connections_per_client: int = 256
    """The most connections from one address, except from proxies."""
    header_timeout: float = 20.0
    """Seconds in which the header of a request has to arrive."""
    body_timeout: float = 30.0
    """Seconds in which the body of a request has to arrive."""
    max_body: str = "4MB"
    """The largest body of a request."""
    body_memory: str = "64MB"
    """Memory for all bodies that are being read, of which one client may use half."""
    write_timeout: float = 30.0
    """Seconds after which the connection of a client that reads nothing of its reply is closed."""
    max_n: int = 128
    """The most replies that one request may ask for; one client may also have at most half of all places."""
    max_output: int = 131072
    """The most tokens and log-probabilities that the replies to one request may hold together."""
    grace: float = 5.0
    """Seconds for running replies to end after the server is told to stop."""

    def __post_init__(self):
        for name in ("max_connections", "max_connections_per_client"):
            if getattr(self, name) < 1:
                raise ValueError(f"got {name}={getattr(self, name)}, expected at least 1")
        for name in ("header_timeout", "body_timeout", "write_timeout"):
            if getattr(self, name) <= 0:
                raise ValueError(f"got {name}={getattr(self, name)}, expected seconds above 0")
        if self.grace < 0:
            raise ValueError(f"got grace={self.grace}, expected seconds of at least 0")

    def hosts_and_origins(self, host: str, *, loopback: bool) -> Access:
        """Return the hosts and origins from which a server that listens on `host` may be asked."""
        own = (*LOOPBACK, f"[{host}]" if ":" in host else host)
        hosts = (*own, *self.allowed_hosts) if loopback or self.allowed_hosts else ("*",)
        return Access(hosts, self.cors_origin)

    def keys(self) -> ApiKeys:
        """Return the API keys of the file and of the environment."""
        return ApiKeys(keys_of_environment(os.environ.get(KEYS_VARIABLE, "")), self.api_key_file)

    def limits(self) -> RequestLimits:
        """Return the limits of single requests."""
        return RequestLimits(
            max_body=num_bytes("max_body", self.max_body),
            body_memory=num_bytes("body_memory", self.body_memory),
            body_timeout=self.body_timeout,
            max_n=self.max_n,
            max_output=self.max_output,
        )

    def connections(self) -> ConnectionLimits:
        """Return the limits of connections."""
        return ConnectionLimits(
            total=most_connections(self.max_connections),
            each=self.max_connections_per_client,
            proxies=tuple(filter(None, map(str.strip, self.forwarded_allow_ips.split(",")))),
            header_timeout=self.header_timeout,
            body_timeout=self.body_timeout,
            write_timeout=self.write_timeout,
        )


def num_bytes(name: str, size: str) -> int:
    """Return the bytes of a size such as "2GB" or "4096"; ValueError that names the option."""
    if size.isascii() and size.isdigit():
        return int(size)
    try:
        return parse_size(size)
    except ValueError as error:
        raise ValueError(f'got {name}={size!r}, expected bytes, or a size such as "2GB" or "512MiB"') from error


def is_loopback(host: str) -> bool:
    """Return whether an address is reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
