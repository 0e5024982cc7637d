"""Which hosts and which web pages may use a server: browsers send the server's name as Host, the page's site as Origin.

A page of any site can send requests to any address that its browser reaches. It is refused by its Origin, or by the
Host where its own name was made to point here (DNS rebinding).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from palm_rlhf.serving.protocol.errors import ApiError

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
HOST = re.compile(r"\*|(\*\.)?[\w.-]+(:\d+)?|\[[0-9a-fA-F:.]+\](:\d+)?")
ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/\s]+")
METHODS = "GET, HEAD, POST"
EXPOSED = "x-request-id, retry-after"
KEPT = "600"  # seconds for which a browser keeps the reply to a preflight request


@dataclass(frozen=True)
class Access:
    """The hosts and origins that a server answers; `*` is any.

    Args:
        hosts: Names by which clients may reach the server, with or without a port; `*.name` is every name below it.
        origins: Sites whose pages may send requests, such as https://chat.example.org.
    """

    hosts: Sequence[str] = LOOPBACK
    origins: Sequence[str] = ()

    def __post_init__(self):
        for values, pattern, expected in (
            (self.hosts, HOST, "a name such as llm.example.org, with or without a port"),
            (self.origins, ORIGIN, "a scheme and a name, such as https://chat.example.org, without a path"),
        ):
            for value in values:
                if not pattern.fullmatch(value):
                    raise ValueError(f"got {value!r}, expected {expected}, or *")

    def refusal(self, headers: Mapping[str, str]) -> ApiError | None:
        """Return why a request may not be answered, or None."""
        host, origin = headers.get("host"), headers.get("origin")
        if host is not None and not self.knows(host):
            message = f"this server is not known as {host!a:.80}; name the host by the option --allowed-hosts"
            return ApiError(403, message, code="host_not_allowed")
        if origin is None or self.allows(origin) or origin.partition("://")[2] == host:
            return None
        message = f"pages of {origin!a:.80} may not ask this server; allow them by the option --cors-origin"
        return ApiError(403, message, code="origin_not_allowed")

    def knows(self, host: str) -> bool:
        """Return whether a Host is one of the server's names."""
        host = host.lower()
        name = host if host.endswith("]") else re.sub(r":\d*$", "", host)
        for known in map(str.lower, self.hosts):
            if known in ("*", host, name) or (known.startswith("*.") and (name.endswith(known[1:]))):
                return True
        return False

    def allows(self, origin: str) -> bool:
        """Return whether pages of another site may send requests."""
        return origin in self.origins or "*" in self.origins

    def cors(self, headers: Mapping[str, str]) -> dict[str, str]:
        """Return the headers with which a browser hands a reply to a page of another site."""
        origin = headers.get("origin")
        if not self.origins:
            return {}
        if origin is None or not self.allows(origin):
            return {"vary": "Origin"}
        return {"vary": "Origin", "access-control-allow-origin": origin, "access-control-expose-headers": EXPOSED}

    def preflight(self, method: str, headers: Mapping[str, str]) -> dict[str, str] | None:
        """Return the headers of the reply to a browser's preflight request; None for any other request."""
        if method != "OPTIONS" or "access-control-request-method" not in headers:
            return None
        found = {"access-control-allow-methods": METHODS, "access-control-max-age": KEPT}
        if wanted := headers.get("access-control-request-headers"):
            found["access-control-allow-headers"] = wanted
        if headers.get("access-control-request-private-network") == "true":
            found["access-control-allow-private-network"] = "true"
        return found
