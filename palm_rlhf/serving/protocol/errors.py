"""Errors in the form of OpenAI's protocol."""

import logging
from typing import Any

from palm_rlhf.serving.generation import EngineError, EngineFull

logger = logging.getLogger(__name__)
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 504: "timeout_error"}


class ApiError(Exception):
    """The error that a client is told: a status, and `{"error": {"message", "type", "param", "code"}}`."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the reply."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def as_api_error(error: BaseException) -> ApiError:
    """Return the error that a client is told, for an error of the engine."""
    match error:
        case ApiError():
            return error
        case EngineFull():
            headers = {"Retry-After": str(error.retry_after)}
            return ApiError(429, str(error), code="queue_full", headers=headers)
        case TimeoutError():
            return ApiError(504, str(error), code="timeout")
        case MemoryError():
            return ApiError(503, str(error), code="out_of_memory")
        case ValueError():
            return ApiError(400, str(error))
        case EngineError():
            return ApiError(503, str(error), code="unavailable")
    logger.error("a request failed by the server's fault", exc_info=error)
    return ApiError(500, "the server failed on this request; its log says why", code="internal_error")


def gone() -> ApiError:
    """Make the error for a client that has gone away, for the log and the metrics, with the status that nginx uses."""
    return ApiError(499, "the client went away")
