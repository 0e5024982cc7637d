"""Clients that vanish, dawdle or send garbage: their places are free at once, and no one else feels it."""

import asyncio
import json
import socket
import struct

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, status_code_conformance

from palm_rlhf.serving.engine import Engine, EngineConfig
from palm_rlhf.serving.http.app import create_app
from palm_rlhf.serving.http.run_server import running

OPERATIONS = [
    ("/v1/chat/completions", "POST"),
    ("/v1/completions", "POST"),
    ("/v1/responses", "POST"),
    ("/v1/score", "POST"),
    ("/tokenize", "POST"),
    ("/detokenize", "POST"),
    ("/v1/models", "GET"),
    ("/v1/models/{model}", "GET"),
    ("/health", "GET"),
    ("/healthz", "GET"),
    ("/readyz", "GET"),
]
ENDLESS = {"model": "parrot", "prompt": "a", "max_tokens": 19_000, "logit_bias": {"256": -100}}


@pytest.fixture(scope="module")
def server(served_model):
    """A server whose replies may be so long that no test sees their end."""
    with Engine(served_model.palm, served_model.tokenizer, EngineConfig(max_batch=4, context=20_000)) as engine:
        with running(create_app(served_model, engine)) as url:
            yield url, engine


@pytest.fixture
def connect(server):
    """Opens connections, and sends what is given."""
    host, port = server[0].removeprefix("http://").split(":")
    connections = []

    def open_one(sent: bytes = b"") -> socket.socket:
        connection = socket.create_connection((host, int(port)), timeout=900)
        connections.append(connection)
        connection.sendall(sent)
        return connection

    yield open_one
    for connection in connections:
        connection.close()


def post(**options) -> bytes:
    body = json.dumps({**ENDLESS, **options}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Content-Type: application/json\r\n\r\n" + body


def hang_up(connection: socket.socket) -> None:
    connection.close()


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def half_close(connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("leave", [hang_up, reset, half_close])
@pytest.mark.parametrize("stream", [True, False])
def test_who_vanishes_frees_the_row(server, connect, eventually, leave, stream):
    _, engine = server
    sampled, cancelled = engine.counts["tokens"], engine.counts["finished_cancelled"]
    for count in range(1, 4):
        connection = connect(post(stream=stream))
        eventually(lambda: engine.num_running == 1)
        leave(connection)
        eventually(lambda: engine.num_running == 0)
        assert engine.counts["finished_cancelled"] == cancelled + count
    assert engine.counts["tokens"] - sampled < 19_000


def test_who_vanishes_from_the_queue_is_not_answered(server, connect, eventually):
    _, engine = server
    many = [connect(post(stream=True)) for _ in range(4)]
    eventually(lambda: engine.num_running == 4)
    waiting = [connect(post(stream=stream, user="waits")) for stream in (True, False)]
    eventually(lambda: engine.num_waiting == 2)
    for connection in waiting:
        hang_up(connection)
    eventually(lambda: engine.num_waiting == 0)
    for connection in many:
        hang_up(connection)
    eventually(lambda: engine.num_running == 0)


def test_replies_to_one_request_are_all_given_up(server, connect, eventually):
    _, engine = server
    connection = connect(post(stream=True, n=6))
    eventually(lambda: engine.num_running == 4)
    hang_up(connection)
    eventually(lambda: engine.num_running + engine.num_waiting == 0)


def test_who_does_not_read_holds_no_row(server, connect, eventually):
    _, engine = server
    finished = engine.counts["finished_length"]
    connection = connect(post(stream=True, logprobs=5, max_tokens=400))
    eventually(lambda: engine.counts["finished_length"] == finished + 1)
    assert engine.num_running == 0
    received = b""
    while b"[DONE]" not in received:
        received += connection.recv(1 << 16)


def test_half_requests_and_garbage_hold_nothing(server, connect, client):
    _, engine = server
    for sent in (b"", b"GET", post()[:30], post()[:-3], b"\x16\x03\x01\x00\x00", b"\0" * 99):
        connect(sent)
    assert client.completions.create(model="parrot", prompt="a", max_tokens=1).usage.completion_tokens == 1
    assert engine.num_running == 0


LONG_LISTS = [
    ("/v1/completions", b'"prompt": [%s]', b"1, "),
    (
        "/v1/chat/completions",
        b'"messages": [{"role": "user", "content": [%s]}]',
        b'{"type": "text", "text": "a"}, ',
    ),
]


@pytest.mark.parametrize("path, form, entry", LONG_LISTS)
def test_a_long_body_holds_up_no_one(server, served_model, path, form, entry):
    """While it is checked, which takes the most of a second, the event loop goes on with what others want."""
    app = create_app(served_model, server[1])
    long = b'{"model": "parrot", %s}' % (form % (entry * (3_500_000 // len(entry)) + b'"x"'))

    async def turns_of_the_loop(body: bytes) -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            headers = {"Content-Type": "application/json"}
            asked, turns = asyncio.ensure_future(client.post(path, content=body, headers=headers)), 0
            while not asked.done():
                await asyncio.sleep(0.001)
                turns += 1
        assert asked.result().status_code == 400
        return turns

    assert asyncio.run(turns_of_the_loop(long)) > asyncio.run(turns_of_the_loop(b"{}")) + 10


@pytest.fixture(scope="module")
def described(served_model):
    """The API as a server of short replies describes it."""
    with Engine(served_model.palm, served_model.tokenizer, EngineConfig(max_batch=4, context=64)) as engine:
        with running(create_app(served_model, engine)) as url:
            yield schemathesis.openapi.from_url(f"{url}/openapi.json")


@pytest.mark.slow(9)
@pytest.mark.parametrize("mode", [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE])
@pytest.mark.parametrize("path, method", OPERATIONS)
def test_no_request_finds_an_error_of_the_server(described, path, method, mode):
    """What the description allows, and what it forbids: the answer is one that it knows, and never a 500."""

    @settings(max_examples=25, suppress_health_check=list(HealthCheck))
    @given(described[path][method].as_strategy(generation_mode=mode))
    def ask(case):
        if mode is schemathesis.GenerationMode.POSITIVE and method == "POST":
            case.body["model"] = "parrot"  # the name of the one that is there, so that it is asked
        case.call_and_validate(checks=[not_a_server_error, status_code_conformance, content_type_conformance])

    try:
        ask()
    except Unsatisfiable:
        assert method == "GET"  # of which there is no wrong form


def test_every_path_is_asked(described):
    assert {(path, method.upper()) for path in described for method in described[path]} == set(OPERATIONS)
