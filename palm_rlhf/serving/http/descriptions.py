"""The description of the server's paths in OpenAPI, which other programs read."""

from collections.abc import Sequence
from typing import Any

from palm_rlhf.serving.protocol.errors import ERROR_SCHEMA

ERRORS = {
    400: "The request cannot be answered.",
    401: "The API key is missing or wrong.",
    403: "The Host or the Origin is not allowed.",
    404: "There is no such model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The Content-Type is not application/json.",
    429: "The queue is full, or your share of it is: try again after Retry-After seconds.",
    499: "The client went away.",
    500: "The server failed.",
    503: "The engine has stopped, or the server is full.",
    504: "The reply took too long.",
}


def described(
    body: dict[str, Any] | None,
    *,
    stream: bool = False,
    parameters: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Return FastAPI's options for the description of a path."""
    content = {"application/json": {"schema": {"type": "object"}}}
    if stream:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    extra: dict[str, Any] = {}
    if body is not None:
        extra["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    if parameters:
        extra["parameters"] = list(parameters)
    errors = {
        status: {"description": text, "content": {"application/json": {"schema": ERROR_SCHEMA}}}
        for status, text in ERRORS.items()
    }
    return {"responses": {200: {"description": "The reply.", "content": content}, **errors}, "openapi_extra": extra}
