"""The middleware before every route: access, the name of the client, and the log of refused requests."""

import json
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from palm_rlhf.serving.http.access import Access
from palm_rlhf.serving.http.api_keys import ApiKeys, KeyOwner
from palm_rlhf.serving.http.page_files import FEEDBACK
from palm_rlhf.serving.http.prometheus import Metrics
from palm_rlhf.serving.http.request_log import RequestRecord, begin, note_reason
from palm_rlhf.serving.protocol.errors import ApiError

# no key is required for these paths, nor for the files of the page
OPEN_PATHS = ("/", "/health", "/healthz", "/readyz", "/metrics", "/openapi.json")
CLIENT = "palm_rlhf.client"  # the entry of the ASGI scope that names the client
WITH_BODY = ("POST", "PUT", "PATCH")
logger = logging.getLogger(__name__)


class AccessMiddleware:
    """An ASGI middleware around all others: it checks access, names the client, and logs refusals and failures.

    `scope["palm_rlhf.client"]` is a short string, the same for all requests with one key, or from one address where no
    key was sent. The key cannot be found from it. Every reply has an `x-request-id`, which the log shows too. A HEAD
    request is answered as a GET without its body.

    The pages of the feedback, where the server `has_feedback`, have logins and forms of their own, and so need neither
    a key nor JSON; requests of the chat page (/feedback/chat) need both.
    """

    def __init__(self, app: Callable, keys: ApiKeys, access: Access, metrics: Metrics, *, has_feedback: bool = False):
        self.app, self.keys, self.access, self.metrics = app, keys, access, metrics
        self.has_feedback = has_feedback

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        record = RequestRecord(client=scope["client"][0] if scope.get("client") else "unknown")
        begin(record)
        started = time.monotonic()
        method = scope["method"]
        scope = {**scope, "method": "GET" if method == "HEAD" else method, CLIENT: f"address {record.client}"}
        sending = self._sending(scope, headers, record, send, with_body=method != "HEAD")
        try:
            await self._answering(scope, headers, record)(scope, receive, sending)
        except Exception as error:
            record.reason = f"{type(error).__name__}: {error}"
            raise
        finally:
            self._log(method, scope["path"], record, time.monotonic() - started)

    def _answering(self, scope: dict, headers: Mapping[str, str], record: RequestRecord) -> Callable:
        """Return the application for a request that may be answered, else the reply that refuses it."""
        if error := self.access.refusal(headers):
            return error_response(error)
        if (found := self.access.preflight(scope["method"], headers)) is not None:
            return empty_response(found)
        if owner := self._owner(headers):
            record.key, scope[CLIENT] = owner.name, f"key {owner.id}"
        elif self.keys.secured and self._needs_key(scope["path"]):
            return error_response(unauthorized(headers))
        if scope["method"] in WITH_BODY and not self._is_page_of_feedback(scope["path"]):
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if (
                kind != "application/json"
            ):  # the browser lets pages of other sites send some other types without a preflight
                got = f"is {kind!a:.80}" if kind else "is missing"
                message = f"the Content-Type {got}; expected application/json"
                return error_response(ApiError(415, message, code="invalid_content_type"))
        return self.app

    def _sending(
        self, scope: dict, headers: Mapping[str, str], record: RequestRecord, send: Callable, *, with_body: bool
    ) -> Callable:
        """Return `send` with more headers for each reply, whose status goes to the record and the metrics."""
        more = {"x-request-id": record.id, **self.access.cors(headers)}
        encoded = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in more.items()]

        async def sending(message: dict) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                self.metrics.observe_request(getattr(scope.get("route"), "path", "other"), message["status"])
                message = {**message, "headers": [*message.get("headers", ()), *encoded]}
            elif not with_body:
                message = {**message, "body": b""}
            await send(message)

        return sending

    def _needs_key(self, path: str) -> bool:
        is_open = path in OPEN_PATHS or path.startswith("/page/") or self._is_page_of_feedback(path)
        return not is_open

    def _is_page_of_feedback(self, path: str) -> bool:
        _, first, *rest = [*path.split("/"), ""]
        return self.has_feedback and f"/{first}" == FEEDBACK and rest[0] != "chat"

    def _owner(self, headers: Mapping[str, str]) -> KeyOwner | None:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        return self.keys.owner(given.strip().encode("latin-1")) if scheme.lower() == "bearer" else None

    def _log(self, method: str, path: str, record: RequestRecord, seconds: float) -> None:
        """Write a line for a request that was refused or failed, also while its reply was being sent."""
        if record.reason is None and record.status is not None and record.status < 400:
            return
        level = logging.WARNING if record.status is None or record.status >= 500 else logging.INFO
        line = "%s status=%s method=%s path=%s seconds=%.3f reason=%s"
        path, reason = ascii(path[:200]), ascii(record.reason or "")
        logger.log(level, line, record.who, record.status or "-", method, path, seconds, reason)


def unauthorized(headers: Mapping[str, str]) -> ApiError:
    """Make the error that asks for a key, in the form of RFC 6750."""
    challenge = 'Bearer realm="palm-rlhf"' + (', error="invalid_token"' if "authorization" in headers else "")
    message = "the API key is missing or wrong: send the header Authorization: Bearer KEY"
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": challenge})


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Any:
    """Return a reply of JSON, in ASCII, so that no text from a client can break it."""
    from fastapi import Response

    return Response(json.dumps(value), status, headers=headers, media_type="application/json")


def empty_response(headers: dict[str, str]) -> Any:
    """Return a reply that has headers only."""
    from fastapi import Response

    return Response(status_code=204, headers=headers)


def error_response(error: ApiError) -> Any:
    """Return the reply for an error, and note it for the log."""
    note_reason(str(error))
    return json_response(error.body, error.status, error.headers)
