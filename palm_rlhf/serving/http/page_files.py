"""The files of the chat page, and the rules that browsers keep about them."""

from pathlib import Path
from typing import Any

from palm_rlhf.serving.protocol.errors import ApiError

PAGE = Path(__file__).parents[1] / "page"
# The page may only reach this server, so that no reply of a model can make it call others.
PAGE_POLICY = "default-src 'self'; frame-ancestors 'none'"
FEEDBACK = "/feedback"  # where the pages of the feedback are, if the server has them
ROOT = b'<html lang="en"'  # the page's own element, whose data attributes its scripts read


def add_page(app: Any, *, has_feedback: bool) -> None:
    """Add the chat page at /, and its files under /page; it offers feedback where the server `has_feedback`."""
    from fastapi import Response
    from fastapi.staticfiles import StaticFiles

    class PageFiles(StaticFiles):
        """Files that a browser asks for again each time, so that it never mixes the files of two versions."""

        def file_response(self, *args: Any, **kwargs: Any) -> Response:
            response = super().file_response(*args, **kwargs)
            response.headers["Cache-Control"] = "no-cache"
            return response

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        file = PAGE / "index.html"
        if not file.is_file():
            raise ApiError(404, "there is no page here; the API is under /v1")
        text = file.read_bytes()
        if has_feedback:
            text = text.replace(ROOT, ROOT + b' data-feedback="%s/"' % FEEDBACK.lstrip("/").encode(), 1)
        headers = {"Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-cache"}
        return Response(text, media_type="text/html; charset=utf-8", headers=headers)

    if PAGE.is_dir():
        app.mount("/page", PageFiles(directory=PAGE), name="page")
