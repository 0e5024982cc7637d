"""Large replies and slow readers: what is asked for is bounded, what waits is bounded, and no one else is held up."""

import json
import logging
import socket
import threading
import time

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from palm_rlhf.data.tokenizer import ByteTokenizer
from palm_rlhf.serving.access_options import AccessOptions
from palm_rlhf.serving.engine import Engine, EngineConfig
from palm_rlhf.serving.http.app import create_app
from palm_rlhf.serving.http.connections import ConnectionLimits
from palm_rlhf.serving.http.request_bodies import RequestLimits
from palm_rlhf.serving.http.run_server import running
from palm_rlhf.serving.protocol.event_stream import PATIENCE
from palm_rlhf.serving.protocol.openai_replies import ENCODED_LEVELS, json_pieces

TEXTS, CHATS = "/v1/completions", "/v1/chat/completions"
ENDLESS = {"model": "parrot", "prompt": "a", "temperature": 0, "logit_bias": {"256": -100}}
CONTEXT = 20_000
SMALL = ConnectionLimits(send_buffer=4096)  # what the system holds of a reply is soon full


def post(url: str, path: str, body: dict) -> socket.socket:
    """Sends a request by hand, on a connection whose answers nobody has read, and few of which the system holds."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(60)
    connection.connect((host, int(port)))
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


def read_all(connection: socket.socket, size: int = 2**20, pause: float = 0) -> str:
    """What comes until the server closes, so many bytes at a time, without the marks of its chunks."""
    found = b""
    while part := connection.recv(size):
        found += part
        time.sleep(pause)
    head, _, rest = found.partition(b"\r\n\r\n")
    if b"chunked" not in head:
        return rest.decode()
    text = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        text, rest = text + rest[: int(size or b"0", 16)], rest[int(size or b"0", 16) + 2 :]
    return text.decode()


def events(text: str) -> list[dict]:
    """The events of a stream that has ended well."""
    *lines, done, nothing = text.split("\n\n")
    assert (done, nothing) == ("data: [DONE]", "")
    return [json.loads(line.removeprefix("data: ")) for line in lines]


@pytest.mark.parametrize("n", [1, 3])
def test_replies_wait_for_a_reader_that_has_stopped_and_go_on_when_it_reads(start_server, eventually, n):
    url, engine = start_server(max_batch=4, context=CONTEXT, connections=SMALL)
    tokens = 600
    body = {**ENDLESS, "max_tokens": tokens, "n": n, "stream": True, "logprobs": 5}
    with post(url, TEXTS, body) as connection:
        eventually(lambda: engine.counts["paused"] >= n and (engine.num_running, engine.num_waiting) == (0, n))
        # their rows are free, and others are answered
        assert httpx.post(url + TEXTS, json={**ENDLESS, "max_tokens": 50}, timeout=900).status_code == 200
        assert engine.counts["tokens"] - 50 < n * tokens
        assert engine.counts["finished_length"] == 1
        assert httpx.get(f"{url}/healthz").status_code == 200
        found = events(read_all(connection))
    texts = [""] * n
    for chunk in found:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    alone = httpx.post(url + TEXTS, json={**ENDLESS, "max_tokens": tokens}, timeout=900).json()["choices"][0]["text"]
    assert texts == [alone] * n


def test_what_waits_for_a_reader_is_bounded(start_server, eventually):
    """Beyond what the system holds of a connection, there are the pieces of the inbox and one block."""
    url, engine = start_server(max_batch=4, context=CONTEXT, connections=SMALL)
    held = []
    for index in range(2):
        body = {**ENDLESS, "prompt": f"{index}", "max_tokens": 19_000, "stream": True}
        held.append(post(url, TEXTS, body))
        eventually(lambda index=index: engine.counts["paused"] > index)
    eventually(lambda: engine.num_running == 0)
    assert 2 * PATIENCE < engine.counts["tokens"] < 2 * 19_000 / 10
    for connection in held:
        connection.close()
    eventually(lambda: engine.counts["finished_cancelled"] == 2)


@pytest.fixture
def impatient(served_model):
    """A server that hangs up on those who read nothing for a moment."""
    with Engine(served_model.palm, served_model.tokenizer, EngineConfig(max_batch=4, context=CONTEXT)) as engine:
        limits = ConnectionLimits(write_timeout=0.5, send_buffer=4096)
        with running(create_app(served_model, engine), connections=limits) as url:
            yield url, engine


def test_a_reader_that_has_stopped_is_hung_up_on(impatient, eventually, caplog):
    url, engine = impatient
    body = {**ENDLESS, "max_tokens": 19_000, "stream": True}
    with caplog.at_level(logging.INFO), post(url, TEXTS, body) as connection:
        eventually(lambda: engine.counts["finished_cancelled"] == 1)
        assert (engine.num_running, engine.num_waiting) == (0, 0)
        eventually(lambda: "it has read nothing for 0.5 seconds" in caplog.text)
        assert "[DONE]" not in read_all(connection)


def test_a_whole_reply_that_nobody_reads_is_given_up(impatient, eventually, caplog):
    url, engine = impatient
    body = {**ENDLESS, "max_tokens": 500, "logprobs": 5}
    with caplog.at_level(logging.INFO), post(url, TEXTS, body) as connection:
        eventually(lambda: engine.counts["finished_length"] == 1)
        eventually(lambda: "it has read nothing for 0.5 seconds" in caplog.text)
        with pytest.raises(ValueError):
            json.loads(read_all(connection))


def test_a_slow_reader_is_waited_for(start_server):
    """It reads a little every now and then, and takes far longer for all than it may read nothing."""
    url, _ = start_server(context=CONTEXT, connections=ConnectionLimits(write_timeout=1.5, send_buffer=4096))
    body = {**ENDLESS, "max_tokens": 400, "logprobs": 5}
    expected = httpx.post(url + TEXTS, json=body, timeout=900).json()["choices"]
    started = time.monotonic()
    with post(url, TEXTS, body) as connection:
        text = read_all(connection, size=2048, pause=0.06)
    assert time.monotonic() - started > 1.5
    assert json.loads(text)["choices"] == expected


# what one request may ask for


@pytest.mark.parametrize(
    "path, more",
    [
        (CHATS, {"n": 8, "logprobs": True, "top_logprobs": 20, "max_tokens": 100}),
        (CHATS, {"n": 8, "max_tokens": 150}),
        (TEXTS, {"logprobs": 5, "max_tokens": 150}),
        (TEXTS, {"echo": True, "logprobs": 5, "max_tokens": 1, "prompt": "a" * 200}),
        (TEXTS, {"prompt": ["a", "b", "c"], "logprobs": 5, "max_tokens": 60}),
        (TEXTS, {"prompt_logprobs": 5, "max_tokens": 1, "prompt": "a" * 200}),
        (TEXTS, {"best_of": 8, "max_tokens": 150}),
    ],
)
def test_what_the_replies_to_one_request_may_hold_is_bounded(start_server, path, more):
    url, engine = start_server(limits=RequestLimits(max_output=1000))
    start = {"messages": [{"role": "user", "content": "Hello"}]} if path == CHATS else {"prompt": "a"}
    reply = httpx.post(url + path, json={"model": "parrot", **start, **more})
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (400, "too_much_output", "max_tokens")
    assert "expected at most 1,000" in error["message"]
    assert engine.counts["prompt_tokens"] == 0


def test_a_length_that_nobody_asked_for_is_what_the_bound_leaves(start_server):
    url, _ = start_server(limits=RequestLimits(max_output=330))
    chat = {"model": "parrot", "messages": [{"role": "user", "content": "Hello"}], "logit_bias": {"256": -100}}

    def lengths(**options) -> list[tuple[int, str]]:
        reply = httpx.post(url + CHATS, json={**chat, "stop": [], "ignore_eos": True, **options}, timeout=900).json()
        usage = reply["usage"]["completion_tokens"]
        return usage, {choice["finish_reason"] for choice in reply["choices"]}

    assert lengths() == (248, {"length"})  # the context
    assert lengths(n=3) == (330, {"length"})
    assert lengths(logprobs=True, top_logprobs=20) == (330 // 22, {"length"})


def test_the_number_of_replies_is_bounded(start_server):
    url, _ = start_server(limits=RequestLimits(max_n=4))
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        assert len(client.completions.create(model="parrot", prompt="a", n=4, max_tokens=1).choices) == 4
        with pytest.raises(openai.BadRequestError, match="n asks for 5 replies in all; expected at most 4"):
            client.completions.create(model="parrot", prompt="a", n=5, max_tokens=1)


def test_the_options_of_the_command_are_the_limits():
    access = AccessOptions(max_n=3, max_output=77, write_timeout=1.5)
    limits, connections = access.limits(), access.connections()
    assert (limits.max_n, limits.max_output, connections.write_timeout) == (3, 77, 1.5)
    for name in ("max_n", "max_output"):
        with pytest.raises(ValueError, match=f"{name}=0, expected at least 1"):
            AccessOptions(**{name: 0}).limits()
    with pytest.raises(ValueError, match="write_timeout=0"):
        AccessOptions(write_timeout=0.0)


class Watched(ByteTokenizer):
    """Notes which threads spell single tokens, which only replies with log-probabilities need."""

    def __init__(self):
        super().__init__()
        self.threads = set()

    def decode_bytes(self, tokens, **options):
        if options.get("with_special_tokens"):
            self.threads.add(threading.current_thread().name)
        return super().decode_bytes(tokens, **options)


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_are_written_off_the_loop(served_model, stream):
    from dataclasses import replace

    watched = replace(served_model, tokenizer=Watched())
    with (
        Engine(served_model.palm, watched.tokenizer, EngineConfig()) as engine,
        running(create_app(watched, engine)) as url,
    ):
        body = {**ENDLESS, "max_tokens": 200, "logprobs": 5, "stream": stream}
        assert httpx.post(url + TEXTS, json=body, timeout=900).status_code == 200
    names = {name.rpartition("_")[0] for name in watched.tokenizer.threads}
    assert names == {"palm-rlhf-replies"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(JSON)
def test_json_in_pieces_is_json(value):
    for levels in (0, 1, ENCODED_LEVELS, 20):
        assert "".join(json_pieces(value, levels)) == json.dumps(value)


def test_no_piece_of_a_large_reply_is_long():
    entry = {"token": "a", "logprob": -1.0, "bytes": [97], "top_logprobs": [{"token": "b", "logprob": -2.0}] * 20}
    reply = {"choices": [{"index": 0, "logprobs": {"content": [entry] * 5000, "refusal": None}}] * 3}
    assert max(map(len, json_pieces(reply, ENCODED_LEVELS))) < 2000
