"""The checks of every request before the routes: host, origin, address and body."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import Request
from starlette.datastructures import Headers

from palm_rlhf.feedback.refusals import FeedbackError
from palm_rlhf.feedback.web.body_checks import check_body, check_encoded
from palm_rlhf.feedback.web.refusal_pages import refusal_response
from palm_rlhf.feedback.web.site import Site
from palm_rlhf.serving.http.request_bodies import BodyReader, RequestLimits
from palm_rlhf.serving.protocol.errors import ApiError

READS = ("GET", "HEAD", "OPTIONS")
Receive = Callable[[], Awaitable[dict[str, Any]]]


class RequestChecks:
    """An ASGI middleware that refuses requests of other sites' pages, and bodies that no route could read.

    Forms have tokens besides: this is the outer wall.
    """

    def __init__(self, app: Callable, site: Site):
        self.app, self.site = app, site
        limits = site.limits
        self.bodies = BodyReader(RequestLimits(max_body=limits.max_body, body_timeout=limits.body_timeout))

    async def __call__(self, scope: dict, receive: Receive, send: Callable) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check_source(scope["method"], headers)
            check_encoded(scope.get("query_string", b""), "the address")
            if "\0" in scope["path"]:
                raise FeedbackError("the address holds the character NUL")
            if scope["method"] in READS:
                await self.app(scope, receive, send)
                return
            client = scope["client"][0] if scope.get("client") else "unknown"
            async with self.bodies.read(client, receive) as content:
                body = bytes(content)
            check_body(headers.get("content-type", ""), body)
        except ApiError as error:
            wait = error.headers.get("Retry-After")
            refusal = FeedbackError(str(error), error.status, retry_after=None if wait is None else float(wait))
        except FeedbackError as error:
            refusal = error
        else:
            await self.app(scope, _again(body, receive), send)
            return
        await refusal_response(Request(scope), refusal)(scope, receive, send)

    def _check_source(self, method: str, headers: Mapping[str, str]) -> None:
        """Check the Host, and that pages of other sites ask for nothing; they may link to a page here.

        The server's CORS options open its API to other sites, never these pages.
        """
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self.site.access.knows(host):
            message = "this server is not known as {host!a:.80}; name the host by the option --allowed-hosts"
            raise FeedbackError(message, 403, host=host)
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            raise FeedbackError(f"pages of {origin!a:.80} may not use this site", 403)
        if headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
            return
        is_link = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
        if method not in READS or not is_link:
            raise FeedbackError("pages of other sites may not use this site, only link to it", 403)


def _again(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that begins with a body that was read."""
    is_read = False

    async def again() -> dict[str, Any]:
        nonlocal is_read
        if is_read:
            return await receive()
        is_read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
