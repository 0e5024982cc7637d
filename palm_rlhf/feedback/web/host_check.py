"""The check of the names by which a server is asked, against pages of other sites (DNS rebinding)."""

from collections.abc import Callable
from typing import Any

from starlette.responses import JSONResponse

from palm_rlhf.serving.http.access import Access


class HostCheck:
    """An ASGI middleware that refuses requests under a strange host name, and those of pages of other sites."""

    def __init__(self, app: Callable[..., Any], access: Access):
        self.app, self.access = app, access

    async def __call__(self, scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        """Answer a request, or refuse it with status 403."""
        answering = self.app
        if scope["type"] == "http":
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            if error := self.access.refusal(headers):
                answering = JSONResponse(error.body, error.status)
        await answering(scope, receive, send)
