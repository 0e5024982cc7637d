"""The requests of the chat page, below /chat of the feedback site."""

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from sqlalchemy.orm import Session

from palm_rlhf.feedback.chat.chat_requests import (
    CORRECTION,
    GIVEN,
    REACTION,
    VOTE,
    WITHDRAWAL,
    ChatServer,
)
from palm_rlhf.feedback.chat.kept_answers import KeptWriter, keeping
from palm_rlhf.feedback.judgments.contributions import take_back
from palm_rlhf.feedback.judgments.judging import correct, given, react, vote
from palm_rlhf.feedback.store.table_base import utc_now
from palm_rlhf.feedback.web.site import site_of
from palm_rlhf.feedback.web.visitors import Visitor, checked_form, visitor_of
from palm_rlhf.serving.http.handlers import client_of
from palm_rlhf.serving.http.middleware import error_response, json_response
from palm_rlhf.serving.protocol.errors import ApiError
from palm_rlhf.serving.protocol.event_stream import EventStream
from palm_rlhf.serving.protocol.openai_requests import read_json
from palm_rlhf.serving.protocol.schema import check

Known = Annotated[Visitor, Depends(visitor_of)]
Sender = Annotated[Visitor, Depends(checked_form)]
router = APIRouter(prefix="/chat")


def add_chat(app: FastAPI, chat: ChatServer) -> None:
    """Let the feedback site answer the chat page of its server."""
    app.state.chat = chat
    app.include_router(router)

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return error_response(error)


class _Streamed(Response):
    """A response that is an ASGI application."""

    def __init__(self, stream: EventStream):
        super().__init__()
        self.stream = stream

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.stream(scope, receive, send)


@router.get("/visitor")
def who_is_here(visitor: Known) -> Response:
    """Tell the page who is here, and the token that its requests have to send; status 401 before a login."""
    return json_response({"name": visitor.person.name, "token": visitor.form_token})


@router.post("/reply")
async def reply(request: Request, visitor: Sender) -> Response:
    """Answer a conversation, and keep the answer."""
    return await _answered(request, visitor, 1)


@router.post("/compare")
async def compare(request: Request, visitor: Sender) -> Response:
    """Answer a conversation twice, in a random order, and keep both answers and the comparison."""
    return await _answered(request, visitor, 2)


async def _answered(request: Request, visitor: Visitor, number: int) -> Response:
    chat: ChatServer = request.app.state.chat
    handlers, client = chat.handlers, client_of(dict(request.scope))
    read = lambda body: chat.read(body, client, visitor.person.id, number)  # noqa: E731
    parsed, asked = await handlers.prepared(request, read)
    writer = KeptWriter("chat", handlers.model.name, handlers.model.tokenizer)
    stream = handlers.stream(writer, parsed, list(asked.requests))
    return _Streamed(keeping(stream, writer, asked, chat.store, utc_now))


@router.post("/given")
async def what_was_given(request: Request, visitor: Sender) -> Response:
    """Tell what the person has given on answers and comparisons."""
    values = await _checked(request, GIVEN)

    def work() -> dict[str, Any]:
        with site_of(request).store.reading() as session:
            return given(session, visitor.person.id, values["answers"], values["comparisons"])

    return json_response(await run_in_threadpool(work))


@router.post("/reactions")
async def give_reaction(request: Request, visitor: Sender) -> Response:
    """Take a thumb."""
    values = await _checked(request, REACTION)
    act = lambda session: react(session, visitor.person.id, values["answer"], values["value"], now=utc_now())  # noqa: E731
    return await _written(request, act)


@router.post("/corrections")
async def give_correction(request: Request, visitor: Sender) -> Response:
    """Take a better answer."""
    values, settings = await _checked(request, CORRECTION), site_of(request).settings
    whose = visitor.person.id, values["answer"], values["text"], settings
    return await _written(request, lambda session: correct(session, *whose, now=utc_now()))


@router.post("/votes")
async def give_vote(request: Request, visitor: Sender) -> Response:
    """Take a verdict on a comparison."""
    values = await _checked(request, VOTE)
    whose = visitor.person.id, values["comparison"], values["verdict"]
    return await _written(request, lambda session: vote(session, *whose, now=utc_now()))


@router.post("/withdrawals")
async def withdraw_one(request: Request, visitor: Sender) -> Response:
    """Take something back that the person has given."""
    values, settings = await _checked(request, WITHDRAWAL), site_of(request).settings
    whose = visitor.person.id, values["table"], values["id"], settings
    return await _written(request, lambda session: take_back(session, *whose, now=utc_now()))


async def _checked(request: Request, schema: dict[str, Any]) -> dict[str, Any]:
    return check(read_json(await request.body()), schema)


async def _written(request: Request, act: Callable[[Session], Any]) -> Response:
    """Return the reply for a change: the id of the new row, once it is in the database."""

    def work() -> dict[str, Any]:
        with site_of(request).store.writing() as session:
            return {"id": getattr(act(session), "id", None)}

    return json_response(await run_in_threadpool(work))
