"""Refusals in words: a page for a browser, JSON for a script."""

from typing import Any
from urllib.parse import urlencode

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse
from starlette.exceptions import HTTPException

from palm_rlhf.feedback.refusals import FeedbackError
from palm_rlhf.feedback.store.database import StoreError
from palm_rlhf.feedback.web.catalogues import N_
from palm_rlhf.feedback.web.site import site_of
from palm_rlhf.feedback.web.visitors import LoginNeeded


def refusal_response(request: Request, error: FeedbackError) -> Response:
    """Return the reply for a refusal."""
    headers = {} if error.retry_after is None else {"Retry-After": f"{error.retry_after:.0f}"}
    if _is_page(request):
        site = site_of(request)
        page = site.render(request, "refused.html", status=error.status, message=site.translate(request, error))
        page.headers.update(headers)
        return page
    return JSONResponse({"error": {"message": str(error)}}, status_code=error.status, headers=headers)


def add_refusals(app: FastAPI) -> None:
    """Answer all errors of an application in words."""

    @app.exception_handler(LoginNeeded)
    async def login_needed(request: Request, error: LoginNeeded) -> Response:
        login = request.url_for("login").path
        if request.headers.get("hx-request") == "true":
            return Response(status_code=error.status, headers={"HX-Redirect": login})
        if request.method == "GET" and _is_page(request):
            here = request.url.path + (f"?{request.url.query}" if request.url.query else "")
            return RedirectResponse(f"{login}?{urlencode({'next': here})}", status_code=303)
        return refusal_response(request, error)

    @app.exception_handler(FeedbackError)
    async def refused(request: Request, error: FeedbackError) -> Response:
        return refusal_response(request, error)

    @app.exception_handler(StoreError)
    async def not_kept(request: Request, error: StoreError) -> Response:
        return refusal_response(request, FeedbackError(str(error), error.status))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        found = [f"{'.'.join(map(str, part['loc'][1:]))}: {part['msg']}" for part in error.errors()[:5]]
        message = "this request cannot be read: {reasons}"
        return refusal_response(request, FeedbackError(message, 422, reasons="; ".join(found)))

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> Response:
        message = N_("there is nothing here") if error.status_code == 404 else str(error.detail)
        response = refusal_response(request, FeedbackError(message, error.status_code))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def failed(request: Request, _: Exception) -> Response:
        return refusal_response(request, FeedbackError("the server failed on this request; its log says why", 500))


def _is_page(request: Request) -> Any:
    return "text/html" in request.headers.get("accept", "") or request.headers.get("hx-request") == "true"
