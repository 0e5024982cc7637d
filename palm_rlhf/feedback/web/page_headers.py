"""The headers of every reply: what a page may load and do, and the cookies of a new session."""

from collections.abc import Callable
from typing import Any

from starlette.datastructures import MutableHeaders

from palm_rlhf.feedback.web.session_cookies import add_cookie
from palm_rlhf.feedback.web.site import Site

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
FILES = (".js", ".css", ".svg")


class PageHeaders:
    """An ASGI middleware that adds the headers, and the cookies that a route has asked for.

    A route asks by `request.state.new_session` and `request.state.new_guest`: the id of the cookie, or an empty text,
    which deletes it.
    """

    def __init__(self, app: Callable, site: Site):
        self.app, self.site = app, site

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state = scope.setdefault("state", {})

        async def sending(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                # files are asked for again each time, so that a browser never mixes those of two versions
                headers.setdefault("Cache-Control", "no-cache" if scope["path"].endswith(FILES) else "no-store")
                is_https = scope.get("scheme") == "https"
                if (session_id := state.get("new_session")) is not None:
                    add_cookie(self.site, headers, "session", session_id, is_https=is_https)
                if (guest_id := state.get("new_guest")) is not None:
                    add_cookie(self.site, headers, "guest", guest_id, is_https=is_https)
            await send(message)

        await self.app(scope, receive, sending)
