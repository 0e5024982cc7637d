"""The OpenAI-compatible server as a FastAPI application."""

from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from palm_rlhf import __version__
from palm_rlhf.serving.engine import Engine
from palm_rlhf.serving.http.access import Access
from palm_rlhf.serving.http.api_keys import ApiKeys
from palm_rlhf.serving.http.descriptions import described
from palm_rlhf.serving.http.fastapi_import import fastapi_module
from palm_rlhf.serving.http.handlers import Handlers
from palm_rlhf.serving.http.middleware import AccessMiddleware, error_response, json_response
from palm_rlhf.serving.http.page_files import FEEDBACK, add_page
from palm_rlhf.serving.http.prometheus import Metrics
from palm_rlhf.serving.http.request_bodies import RequestLimits
from palm_rlhf.serving.protocol.engine_requests import Kind
from palm_rlhf.serving.protocol.errors import ApiError
from palm_rlhf.serving.protocol.openai_parameters import CHAT, COMPLETION, SCORE
from palm_rlhf.serving.protocol.responses_parameters import RESPONSE
from palm_rlhf.serving.protocol.tokenize_api import DETOKENIZE, TOKENIZE
from palm_rlhf.serving.served_model import ServedModel


def create_app(
    model: ServedModel,
    engine: Engine,
    *,
    api_keys: Sequence[str] | ApiKeys = (),
    limits: RequestLimits | None = None,
    access: Access | None = None,
    feedback: Callable[[Handlers], Callable] | None = None,
) -> Any:
    """Return the FastAPI application; close the engine after it.

    Args:
        api_keys: Keys, one of which every path under /v1 requires; without any, no key is required.
        limits: The limits of single requests.
        access: The hosts and origins that are answered; by default only those of this machine.
        feedback: Makes the ASGI application of /feedback, which the chat page then uses, from the handlers of requests.
    """
    fastapi_module()  # an ImportError says how to install what is missing
    from fastapi import FastAPI

    keys = (
        api_keys
        if isinstance(api_keys, ApiKeys)
        else ApiKeys((f"key {i}", key) for i, key in enumerate(api_keys, start=1))
    )
    metrics, hosts_and_origins = Metrics(engine), access or Access()

    class App(FastAPI):
        """The application behind the middleware, which also sees the replies of FastAPI's own layers."""

        def build_middleware_stack(self) -> Callable:
            return AccessMiddleware(
                super().build_middleware_stack(), keys, hosts_and_origins, metrics, has_feedback=feedback is not None
            )

    handlers = Handlers(model, engine, metrics, limits or RequestLimits())
    # without FastAPI's pages about the API, which need a CDN
    app = App(title="palm-rlhf", version=__version__, docs_url=None, redoc_url=None)
    add_protocol(app, handlers, secured=keys.secured)
    add_operations(app, handlers, metrics)
    add_errors(app)
    add_page(app, has_feedback=feedback is not None)
    if feedback is not None:
        app.mount(FEEDBACK, feedback(handlers))
    return app


def add_protocol(app: Any, handlers: Handlers, *, secured: bool) -> None:
    """Add the paths of OpenAI's protocol, and the paths for scores and tokens."""
    from fastapi import Depends, Request, Response
    from fastapi.security import HTTPBearer

    # only for the description: AccessMiddleware has checked the key by then
    keyed = {"dependencies": [Depends(HTTPBearer(auto_error=False))] if secured else []}
    name = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}

    class Streamed(Response):
        """A response that is an ASGI application."""

        def __init__(self, stream: Callable[..., Awaitable[None]]):
            super().__init__()
            self.stream = stream

        async def __call__(self, scope: MutableMapping[str, Any], receive: Callable, send: Callable) -> None:
            await self.stream(scope, receive, send)

    async def generate(request: Request, kind: Kind) -> Response:
        return Streamed(await handlers.generate(request, kind))

    @app.post("/v1/chat/completions", **described(CHAT, stream=True), **keyed)
    async def create_chat_completion(request: Request) -> Response:
        """Answer a conversation."""
        return await generate(request, "chat")

    @app.post("/v1/completions", **described(COMPLETION, stream=True), **keyed)
    async def create_completion(request: Request) -> Response:
        """Continue a text."""
        return await generate(request, "completion")

    @app.post("/v1/responses", **described(RESPONSE, stream=True), **keyed)
    async def create_response(request: Request) -> Response:
        """Answer a text or a conversation, in the form of OpenAI's Responses API."""
        return await generate(request, "response")

    @app.post("/v1/score", **described(SCORE), **keyed)
    async def score(request: Request) -> Response:
        """Score replies by the reward model."""
        return json_response(await handlers.score(request))

    @app.post("/tokenize", **described(TOKENIZE), **keyed)
    async def tokenize(request: Request) -> Response:
        """Tell the tokens of a text or of a conversation."""
        return json_response(await handlers.tokenize(request))

    @app.post("/detokenize", **described(DETOKENIZE), **keyed)
    async def detokenize(request: Request) -> Response:
        """Tell the text of tokens."""
        return json_response(await handlers.detokenize(request))

    @app.get("/v1/models", **described(None), **keyed)
    async def list_models() -> Response:
        """List the models of this server: the base and its adapters."""
        return json_response(handlers.model_list())

    @app.get("/v1/models/{model:path}", **described(None, parameters=[name]), **keyed)
    async def retrieve_model(request: Request) -> Response:
        """Return the entry of a model."""
        return json_response(handlers.model_entry(request.path_params["model"]))


def add_operations(app: Any, handlers: Handlers, metrics: Metrics) -> None:
    """Add the paths by which a server is monitored."""
    from fastapi import Response

    @app.get("/health", operation_id="health", **described(None))
    @app.get("/healthz", **described(None))
    async def health() -> Response:
        """Tell whether the engine computes; where it does not, restart the server."""
        return json_response(handlers.health())

    @app.get("/readyz", **described(None))
    async def ready() -> Response:
        """Tell whether the server takes more requests now; where it does not, send them to another server."""
        return json_response(handlers.ready())

    @app.get("/metrics", include_in_schema=False)
    async def read_metrics() -> Response:
        text, content_type = metrics.page()
        return Response(text, media_type=content_type)


def add_errors(app: Any) -> None:
    """Answer every error in OpenAI's form."""

    @app.exception_handler(ApiError)
    async def refused(_: Any, error: ApiError) -> Any:
        return error_response(error)

    @app.exception_handler(404)
    async def unknown_path(request: Any, _: Any) -> Any:
        return error_response(ApiError(404, f"there is nothing at {request.url.path!a}"))

    @app.exception_handler(405)
    async def unknown_method(request: Any, error: Any) -> Any:
        message = f"{request.method} is not for {request.url.path!a}"
        return error_response(ApiError(405, message, headers=dict(error.headers or {})))

    @app.exception_handler(Exception)
    async def failed(_: Any, error: Exception) -> Any:
        return error_response(ApiError(500, "the server failed on this request; its log says why"))
