"""Connections are few, and none may keep others out: by half a header, half a body, or nothing at all."""

import json
import logging
import socket
import subprocess
import sys
from contextlib import ExitStack
from urllib.parse import urlsplit

import httpx
import pytest

from palm_rlhf.serving.http.connections import ConnectionLimits, most_connections
from palm_rlhf.serving.http.request_bodies import RequestLimits

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
PING = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture
def connect():
    """Opens connections to a URL, and sends some bytes on each."""
    with ExitStack() as stack:

        def start(url: str, sent: bytes = b"") -> socket.socket:
            parts = urlsplit(url)
            connection = stack.enter_context(socket.create_connection((parts.hostname, parts.port), timeout=900))
            connection.sendall(sent)
            return connection

        yield start


def answer(connection: socket.socket) -> tuple[int, dict]:
    """The status and the JSON of a reply, after which the server closes the connection."""
    data = b""
    while part := connection.recv(65536):
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


@pytest.fixture
def lines(caplog):
    """What the server's log says of connections."""
    caplog.set_level(logging.INFO)
    return lambda: [line for line in caplog.messages if "connection closed" in line]


@pytest.mark.parametrize("sent", [b"", b"GET /healthz HTTP/1.1\r\nHost: loc"])
def test_half_a_header_is_not_waited_for_long(start_server, connect, lines, eventually, sent):
    url, _ = start_server(connections=ConnectionLimits(header_timeout=0.2))
    status, body = answer(connect(url, sent))
    assert status == 408 and "within 0.2 seconds" in body["error"]["message"]
    (line,) = eventually(lines)
    assert "client='127.0.0.1' status=408" in line


def test_half_of_a_later_header_is_not_waited_for_long(start_server, connect):
    url, _ = start_server(connections=ConnectionLimits(header_timeout=0.2))
    connection = connect(url, PING)
    assert b" 200 " in connection.recv(65536)
    connection.sendall(b"GET /hea")
    assert answer(connection)[0] == 408


def test_a_header_that_comes_slowly_does_not_start_the_time_anew(start_server, connect):
    url, _ = start_server(connections=ConnectionLimits(header_timeout=0.5))
    connection = connect(url, b"GET /healthz HTTP/1.1\r\n")
    connection.settimeout(0.05)
    data = b""
    for _ in range(1000):  # 50 seconds, if nobody ended it
        try:
            data += connection.recv(65536)
            break
        except TimeoutError:
            connection.sendall(b"A")
    assert b" 408 " in data


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 70_000,
        b"GET /" + b"x" * 70_000,
        b"GET /healthz HTTP/1.1\r\n" + b"".join(b"X%d: 1\r\n" % number for number in range(10_000)),
    ],
)
def test_a_header_has_a_size(start_server, connect, lines, eventually, sent):
    url, _ = start_server()
    assert answer(connect(url, sent))[0] == 431
    assert "65536 bytes" in eventually(lines)[0]


def test_a_body_of_many_chunks_is_no_header(server, connect):
    connection = connect(server[0], HEAD + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n")
    for _ in range(30):
        connection.sendall(b"1\r\n \r\n" * 1000)
    connection.sendall(b"0\r\n\r\n")
    assert answer(connection)[1]["error"]["code"] == "invalid_json"


def test_what_is_no_http_is_told_so(server, connect, lines, eventually):
    status, body = answer(connect(server[0], b"\x16\x03\x01 hello\r\n\r\n"))
    assert status == 400 and "expected an HTTP request" in body["error"]["message"]
    assert eventually(lines)


def test_a_body_nobody_waits_for_has_to_come_too(start_server, connect, lines, eventually, monkeypatch):
    """Its request was refused at once; the rest of the body does not keep the connection."""
    monkeypatch.setattr("palm_rlhf.serving.http.connections.LATE", 0.0)
    url, _ = start_server(connections=ConnectionLimits(body_timeout=0.2), api_keys=["secret"])
    connection = connect(url, HEAD + b"Content-Length: 1000\r\n\r\n{")
    data = b""
    while part := connection.recv(65536):
        data += part
    assert b" 401 " in data
    assert "the body did not arrive within 0.2 seconds" in eventually(lines)[0]


def test_connections_that_ask_nothing_keep_nobody_out(start_server, connect, lines, eventually):
    url, _ = start_server(connections=ConnectionLimits(total=20, each=20, header_timeout=600))
    idle = [connect(url, b"GET / HT") for _ in range(60)]
    assert httpx.get(f"{url}/healthz").status_code == 200
    assert answer(idle[0])[1]["error"]["message"].startswith("there are 20 connections")
    assert len(eventually(lambda: len(lines()) > 40 and lines())) == 41  # all but 20, and one for the client above


def test_an_address_has_a_share_unless_it_is_a_proxy(start_server, connect):
    limits = {"total": 20, "each": 2, "header_timeout": 600}
    url, _ = start_server(connections=ConnectionLimits(**limits))
    first, *_ = [connect(url) for _ in range(3)]
    assert "2 connections from one address" in answer(first)[1]["error"]["message"]
    url, _ = start_server(connections=ConnectionLimits(**limits, proxies=("127.0.0.0/8",)))
    several = [connect(url) for _ in range(5)]
    for connection in several:
        connection.sendall(PING)
        assert b" 200 " in connection.recv(65536)


@pytest.mark.parametrize(
    "proxies, client", [((), "127.0.0.1"), (("127.0.0.1",), "203.0.113.7"), (("*",), "203.0.113.7")]
)
def test_only_a_proxy_is_believed_whose_client_it_is(start_server, caplog, eventually, proxies, client):
    caplog.set_level(logging.INFO)
    url, _ = start_server(connections=ConnectionLimits(proxies=proxies))
    httpx.get(f"{url}/nothing", headers={"X-Forwarded-For": "203.0.113.7"})
    (line,) = eventually(lambda: [line for line in caplog.messages if "path='/nothing'" in line])
    assert f"client='{client}'" in line


def test_busy_connections_are_left_alone_and_the_new_one_is_refused(start_server, lines, eventually):
    url, _ = start_server(connections=ConnectionLimits(total=2, each=2), context=20_000)
    endless = {"model": "parrot", "prompt": "a", "max_tokens": 19_000, "logit_bias": {"256": -100}, "stream": True}
    with httpx.Client(base_url=url, timeout=900) as client:
        with client.stream("POST", "/v1/completions", json=endless) as one:
            with client.stream("POST", "/v1/completions", json=endless) as other:
                streams = [one.iter_bytes(), other.iter_bytes()]
                assert all(next(stream) for stream in streams)
                reply = httpx.get(f"{url}/healthz")
                assert reply.status_code == 503
                assert reply.json()["error"]["code"] == "too_many_connections"
                assert reply.headers["retry-after"] == "1"
                assert all(next(stream) for stream in streams)
        assert eventually(lines)
    eventually(lambda: httpx.get(f"{url}/healthz").status_code == 200)


def test_bodies_have_a_share_of_the_memory_and_a_whole(start_server, connect):
    keys = ["one", "two", "three"]
    limits = RequestLimits(max_body=1000, body_memory=2000, small_body=20)
    url, _ = start_server(limits=limits, api_keys=keys)

    def post(key: str, size: int) -> socket.socket:
        head = HEAD + b"Authorization: Bearer %s\r\nContent-Length: 1000\r\n\r\n" % key.encode()
        return connect(url, head + b" " * size)

    held = post("one", 900)
    status, body = answer(post("one", 900))  # 880 and 880 of the 1000 that one client may have
    assert (status, body["error"]["code"]) == (429, "too_many_bodies")
    other = post("two", 900)
    status, body = answer(post("three", 900))
    assert (status, body["error"]["code"]) == (503, "too_many_bodies")
    assert httpx.post(f"{url}/v1/score", json={"a": 1}, headers={"Authorization": "Bearer three"}).status_code == 400
    for connection in (held, other):  # a small body was read while there was no room for large ones
        connection.sendall(b" " * 100)
        assert b" 400 " in connection.recv(65536)  # no JSON, which is told once it is read
    assert b" 400 " in post("three", 1000).recv(65536)


def test_open_files_bound_the_connections():
    """In a process that may open 100 files, and one that may open 40."""
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]),) * 2)\n"
        "from palm_rlhf.serving.http.connections import most_connections; print(most_connections(1000))"
    )
    few, none = (
        subprocess.run([sys.executable, "-c", script, number], capture_output=True, text=True)
        for number in ("100", "40")
    )
    assert few.stdout == "36\n" and "100 files" in few.stderr
    assert "ValueError: this process may open 40 files" in none.stderr
    assert most_connections(1) == 1
