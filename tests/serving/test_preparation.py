"""Work on a request before the engine gets it: it stays linear, ends in time, and holds up nobody else."""

import asyncio
import sys
import threading

import httpx
import pytest

from palm_rlhf.data.conversation import encode_prompt
from palm_rlhf.data.templates import PRESETS, JinjaTemplate
from palm_rlhf.data.tokenizer import ByteTokenizer
from palm_rlhf.serving.deadline import check_deadline
from palm_rlhf.serving.http.preparation import LONG, MANY, ClientGone, Preparation
from palm_rlhf.serving.http.request_bodies import RequestLimits
from palm_rlhf.serving.protocol.engine_requests import score_tokens
from palm_rlhf.serving.protocol.errors import ApiError
from palm_rlhf.serving.protocol.openai_requests import read_chat

EMPTY = {"role": "user", "content": ""}
CHATS = "/v1/chat/completions"


async def never() -> dict:
    """The `receive` of a client that stays and says nothing."""
    await asyncio.Event().wait()


def num_calls(function) -> int:
    """How many calls of Python functions something makes: work, counted the same on every machine."""
    count = 0

    def see(frame, event, argument):
        nonlocal count
        count += event == "call"

    sys.setprofile(see)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("roles", [["user"], ["user", "assistant"], ["system", "assistant"]])
def test_twice_the_messages_are_twice_the_work(roles):
    tokenizer, template = ByteTokenizer(), PRESETS["default"]

    def work(count: int) -> int:
        messages = [{"role": role, "content": ""} for role in roles] * (count // len(roles))
        return num_calls(lambda: encode_prompt(messages, tokenizer, template))

    work(10)  # what is made once
    assert work(400) < 2.2 * work(200)


def test_messages_that_cannot_fit_are_refused_unread(server):
    body = {"model": "parrot", "messages": [EMPTY] * 12_000}
    reply = httpx.post(server[0] + CHATS, json=body, timeout=900)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")
    assert "12000" in error["message"] and "256 tokens" in error["message"]


def test_work_that_takes_too_long_is_ended(served_model):
    preparation = Preparation(seconds=-1)  # over when it begins
    jinja = JinjaTemplate(PRESETS["default"].to_jinja())
    works = {
        "a template of ours": lambda _: served_model.encode_chat([EMPTY]),
        "a template in Jinja": lambda _: encode_prompt(
            [EMPTY], served_model.tokenizer, jinja, checkpoint=check_deadline
        ),
        "replies to be scored": lambda _: score_tokens(served_model, 256, "a", ["b"]),
        "the replies to a chat": lambda _: served_model.encode_reply([EMPTY], "b"),
        "the check of values": lambda _: read_chat({"model": "parrot", "messages": [EMPTY]}),
    }
    for name, work in works.items():
        with pytest.raises(ApiError, match="took longer than") as caught:
            asyncio.run(preparation.run("me", never, bytearray(), work))
        assert caught.value.code == "too_complex", name
    check_deadline()  # here nothing has ended


def test_a_server_takes_its_limit_for_such_work(start_server):
    url, _ = start_server(limits=RequestLimits(prepare_timeout=1e-9))
    reply = httpx.post(url + CHATS, json={"model": "parrot", "messages": [EMPTY]}, timeout=900)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "too_complex")


def test_work_ends_when_the_client_has_gone():
    began, ended = threading.Event(), threading.Event()

    def endless(_):
        try:
            while True:
                began.set()
                check_deadline()
        except ClientGone:
            ended.set()

    async def receive():
        while not began.is_set():
            await asyncio.sleep(0.001)
        return {"type": "http.disconnect"}

    assert asyncio.run(Preparation(seconds=600).run("me", receive, bytearray(), endless)) is None
    assert ended.wait(900)


@pytest.mark.parametrize("large", [bytearray(b"x" * (LONG + 1)), bytearray(b"{" * (MANY + 1))])
def test_large_bodies_do_not_hold_up_ordinary_ones(large):
    answered, preparation = threading.Event(), Preparation(seconds=600)

    async def ask():
        works = [
            preparation.run(f"client {number}", never, large, lambda _: answered.wait(900)) for number in range(20)
        ]
        held_up = asyncio.gather(*works)
        await asyncio.sleep(0)
        assert await preparation.run("me", never, bytearray(b"{}"), lambda body: body.decode()) == "{}"
        assert not held_up.done()
        answered.set()
        assert await held_up == [True] * 20

    asyncio.run(ask())


def test_clients_with_large_bodies_take_turns():
    order, preparation, large = [], Preparation(seconds=600), bytearray(LONG + 1)
    queued = threading.Event()

    async def ask():
        works = [("many", 1), ("many", 2), ("many", 3), ("one", 1)]

        def note(work):
            queued.wait(900)
            order.append(work)
            return True

        running = asyncio.gather(
            *(preparation.run(work[0], never, large, lambda _, work=work: note(work)) for work in works)
        )
        for _ in range(10):
            await asyncio.sleep(0)
        queued.set()
        await running

    asyncio.run(ask())
    assert order.index(("one", 1)) < order.index(("many", 2)) < order.index(("many", 3))
