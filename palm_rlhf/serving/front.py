"""The door of the server, before every route: who asks, and whether they may."""

import hashlib
import hmac
import json
import secrets
from collections.abc import Callable, Sequence
from typing import Any

from palm_rlhf.serving.errors import ApiError
from palm_rlhf.serving.metrics import Metrics

OPEN_PATHS = ("/", "/healthz", "/metrics", "/openapi.json")  # for these, and the page's files, no key is asked
CLIENT = "palm_rlhf.client"  # where the ASGI scope names who asks


class Front:
    """An ASGI middleware: it asks for a key, says who the client is, and counts what was answered.

    `scope["palm_rlhf.client"]` is a short string, the same for all requests with one key, or from one address where no
    key was sent. A key cannot be found from it.
    """

    def __init__(self, app: Callable, keys: Sequence[str], metrics: Metrics):
        self.app, self.metrics = app, metrics
        self.salt = secrets.token_bytes(16)
        self.digests = [self._digest(key.encode()) for key in keys]

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counting_send(message: dict) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "other")
                self.metrics.observe_request(route, message["status"])
            await send(message)

        key = self._key(dict(scope["headers"]))
        if self.digests and key is None and self._needs_key(scope["path"]):
            message = "the API key is missing or wrong: send Authorization: Bearer KEY"
            await error_response(ApiError(401, message, code="invalid_api_key"))(scope, receive, counting_send)
            return
        address = scope["client"][0] if scope.get("client") else "unknown"
        scope[CLIENT] = f"address {address}" if key is None else f"key {key.hex()[:16]}"
        await self.app(scope, receive, counting_send)

    def _needs_key(self, path: str) -> bool:
        return path not in OPEN_PATHS and not path.startswith("/page/")

    def _key(self, headers: dict[bytes, bytes]) -> bytes | None:
        """The digest of the key that was sent, where it is one of the server's. The time to compare tells nothing."""
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        found = self._digest(given.strip())
        matches = [hmac.compare_digest(found, known) for known in self.digests]
        return found if any(matches) and scheme.lower() == b"bearer" else None

    def _digest(self, key: bytes) -> bytes:
        """A hash of a key, which means nothing outside of this process, and has one length for all keys."""
        return hmac.digest(self.salt, key, hashlib.sha256)


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Any:
    """A reply of JSON, in ASCII, so that no text that a client sent can break it."""
    from fastapi import Response

    return Response(json.dumps(value), status, headers=headers, media_type="application/json")


def error_response(error: ApiError) -> Any:
    """The reply that says an error."""
    return json_response(error.body, error.status, error.headers)
