"""The feedback site as a FastAPI application, alone or below a path of another application."""

from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse
from fastapi.staticfiles import StaticFiles

from palm_rlhf import serving
from palm_rlhf.feedback.refusals import FeedbackError
from palm_rlhf.feedback.store.database import StoreError
from palm_rlhf.feedback.web import home_pages
from palm_rlhf.feedback.web.site import WEB, Site, site_of
from palm_rlhf.feedback.web.visitors import COOKIE, LoginNeeded, set_cookie

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
CHAT_PAGE = Path(serving.__file__).parent / "page"  # the feedback pages share its look, and its reader of Markdown
ROUTERS = (home_pages.router,)


def create_feedback_app(site: Site) -> FastAPI:
    """Return the application of a site; close the site's store after it."""
    app = FastAPI(title="palm-rlhf feedback", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.site = site
    for router in ROUTERS:
        app.include_router(router)
    app.mount("/page", StaticFiles(directory=CHAT_PAGE), name="page")
    app.mount("/static", StaticFiles(directory=WEB / "static"), name="static")
    add_headers(app)
    add_refusals(app)
    return app


def add_headers(app: FastAPI) -> None:
    """Put the security headers, and the cookie of a session that has just begun, on every response."""

    @app.middleware("http")
    async def with_headers(request: Request, call_next: Any) -> Response:
        response = await call_next(request)
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        if request.url.path.endswith((".js", ".css", ".svg")):
            response.headers["Cache-Control"] = "no-cache"
        new_session = getattr(request.state, "new_session", None)
        if new_session is not None and COOKIE not in response.headers.get("set-cookie", ""):
            set_cookie(site_of(request), response, new_session)
        return response


def add_refusals(app: FastAPI) -> None:
    """Answer refusals in words: as a page to a browser, as JSON to a script."""

    def answer(request: Request, message: str, status: int) -> Response:
        if "text/html" in request.headers.get("accept", ""):
            return site_of(request).render(request, "refused.html", status=status, message=message)
        return JSONResponse({"error": {"message": message}}, status_code=status)

    @app.exception_handler(LoginNeeded)
    async def login_needed(request: Request, error: LoginNeeded) -> Response:
        if request.method == "GET" and "text/html" in request.headers.get("accept", ""):
            return RedirectResponse(request.url_for("login").path, status_code=303)
        return answer(request, str(error), error.status)

    @app.exception_handler(FeedbackError)
    async def refused(request: Request, error: FeedbackError) -> Response:
        return answer(request, str(error), error.status)

    @app.exception_handler(StoreError)
    async def not_kept(request: Request, error: StoreError) -> Response:
        return answer(request, str(error), error.status)

    @app.exception_handler(404)
    async def unknown(request: Request, _: Exception) -> Response:
        return answer(request, "there is nothing here", 404)
