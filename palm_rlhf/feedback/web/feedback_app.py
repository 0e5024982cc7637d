"""The feedback site as a FastAPI application, alone or below a path of another application."""

from collections.abc import Callable
from pathlib import Path

from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles

from palm_rlhf import serving
from palm_rlhf.feedback.web import (
    account_pages,
    compare_pages,
    home_pages,
    leaderboard_pages,
    login_pages,
    mine_pages,
    moderator_pages,
    people_pages,
    rounds_pages,
    statistics_pages,
    task_pages,
)
from palm_rlhf.feedback.web.page_headers import PageHeaders
from palm_rlhf.feedback.web.refusal_pages import add_refusals
from palm_rlhf.feedback.web.request_checks import RequestChecks
from palm_rlhf.feedback.web.site import WEB, Site

CHAT_PAGE = Path(serving.__file__).parent / "page"  # the feedback pages share its look, and its reader of Markdown
ROUTERS = (
    home_pages.router,
    login_pages.router,
    account_pages.router,
    people_pages.router,
    task_pages.router,
    compare_pages.router,
    mine_pages.router,
    leaderboard_pages.router,
    statistics_pages.router,
    rounds_pages.router,
    moderator_pages.router,
)


class FeedbackApp(FastAPI):
    """The application behind its checks; the replies of FastAPI's own layers have the headers too."""

    site: Site

    def build_middleware_stack(self) -> Callable:
        """Return the ASGI application around the routes."""
        return PageHeaders(RequestChecks(super().build_middleware_stack(), self.site), self.site)


def create_feedback_app(site: Site) -> FastAPI:
    """Return the application of a site; close the site's store after it."""
    app = FeedbackApp(title="palm-rlhf feedback", docs_url=None, redoc_url=None, openapi_url=None)
    app.site = app.state.site = site
    for router in ROUTERS:
        app.include_router(router)
    app.mount("/page", StaticFiles(directory=CHAT_PAGE), name="page")
    app.mount("/static", StaticFiles(directory=WEB / "static"), name="static")
    add_refusals(app)
    return app
