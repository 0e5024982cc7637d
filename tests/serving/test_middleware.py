"""The door of the server: who asks, whether they may, and what the log says of it."""

import asyncio
import logging
import re
import socket

import httpx
import pytest

from palm_rlhf.serving.http.access import Access
from palm_rlhf.serving.http.api_keys import ApiKeys
from palm_rlhf.serving.http.middleware import CLIENT, AccessMiddleware
from palm_rlhf.serving.http.prometheus import Metrics

CHATS = "/v1/chat/completions"
HELLO = {"model": "parrot", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0}
SITE = "https://chat.example.org"


@pytest.fixture
def client_of(start_engine):
    """The name of the client that stands in the scope of a request."""
    engine = start_engine()

    def make(*keys):
        seen = []

        async def app(scope, receive, send):
            seen.append(scope[CLIENT])
            await send({"type": "http.response.start", "status": 200, "headers": []})

        async def send(message):
            pass

        front = AccessMiddleware(app, ApiKeys((key, key) for key in keys), Access(), Metrics(engine))

        def ask(address="10.0.0.1", authorization=None):
            headers = [] if authorization is None else [(b"authorization", authorization)]
            scope = {"type": "http", "method": "GET", "path": "/", "headers": headers, "client": (address, 5000)}
            asyncio.run(front(scope, None, send))
            return seen.pop()

        return ask

    return make


def test_a_client_is_its_key_or_its_address(client_of):
    ask = client_of("one", "two")
    first = ask(authorization=b"Bearer one")
    assert ask("10.0.0.2", b"bearer  one ") == first
    names = {first, ask(authorization=b"Bearer two"), ask(authorization=b"Bearer three"), ask("10.0.0.2")}
    assert len(names) == 4
    assert ask() == ask(authorization=b"Basic one") == ask(authorization=b"Bearer three")
    assert not any("one" in name or "two" in name for name in names)


HOSTS = [
    ("localhost", 200),
    ("LocalHost:9", 200),
    ("127.0.0.1", 200),
    ("[::1]:18888", 200),
    ("evil.example.org", 403),
    ("evil.example.org:80", 403),
    ("localhost.evil.example.org", 403),
    ("127.0.0.1.evil.example.org", 403),
    ("169.254.169.254", 403),
    ("", 403),
]


@pytest.mark.parametrize("host, status", HOSTS)
def test_a_name_that_was_made_to_point_here_reads_nothing(server, host, status):
    """DNS rebinding: the browser sends the name of the page's own site as Host, and its Origin fits that."""
    for path in ("/healthz", "/v1/models", "/metrics", "/"):
        reply = httpx.get(server[0] + path, headers={"Host": host, "Origin": f"http://{host}"})
        assert reply.status_code == status, path
        if status == 403:
            assert reply.json()["error"]["code"] == "host_not_allowed" and "--allowed-hosts" in reply.text
    reply = httpx.post(server[0] + CHATS, json=HELLO, headers={"Host": host})
    assert reply.status_code == status


def test_hosts_are_allowed_by_name_by_port_and_below_a_name(start_server):
    url, _ = start_server(access=Access(hosts=("llm.example.org", "other.example.org:81", "*.wild.example.org")))
    for host, status in (
        ("llm.example.org", 200),
        ("llm.example.org:8000", 200),
        ("other.example.org:81", 200),
        ("other.example.org:82", 403),
        ("a.wild.example.org:1", 200),
        ("wild.example.org", 403),
        ("evilwild.example.org", 403),
        ("localhost", 403),
    ):
        assert httpx.get(f"{url}/healthz", headers={"Host": host}).status_code == status, host


def test_pages_of_other_sites_may_not_ask(server):
    own = server[0]
    for origin, status in (
        (own, 200),
        (own.replace("http:", "https:"), 200),  # behind a proxy with TLS
        (SITE, 403),
        ("null", 403),
        ("http://localhost", 403),  # another port is another site
        (own + ".evil.example.org", 403),
        ("http://evil.example.org/?" + own, 403),
    ):
        for method, path, body in (("POST", CHATS, HELLO), ("GET", "/v1/models", None)):
            reply = httpx.request(method, own + path, json=body, headers={"Origin": origin})
            assert reply.status_code == status, origin
            assert "access-control-allow-origin" not in reply.headers
    preflight = {"Origin": SITE, "Access-Control-Request-Method": "POST"}
    assert httpx.options(own + CHATS, headers=preflight).status_code == 403


def test_pages_of_allowed_sites_may_ask(start_server):
    url, _ = start_server(api_keys=["secret"], access=Access(origins=(SITE,)))
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    reply = httpx.options(url + CHATS, headers={"Origin": SITE, **asks})
    assert (reply.status_code, reply.content) == (204, b"")
    assert reply.headers["access-control-allow-origin"] == SITE
    assert "POST" in reply.headers["access-control-allow-methods"]
    assert reply.headers["access-control-allow-headers"] == "authorization,content-type"
    assert "access-control-allow-private-network" not in reply.headers
    asks["Access-Control-Request-Private-Network"] = "true"
    reply = httpx.options(url + CHATS, headers={"Origin": SITE, **asks})
    assert reply.headers["access-control-allow-private-network"] == "true"
    key = {"Authorization": "Bearer secret"}
    for headers, body, status in (
        (key, HELLO, 200),
        (key, {**HELLO, "stream": True}, 200),
        (key, {**HELLO, "n": 0}, 400),
        ({}, HELLO, 401),
    ):
        reply = httpx.post(url + CHATS, json=body, headers={"Origin": SITE, **headers})
        assert reply.status_code == status
        assert reply.headers["access-control-allow-origin"] == SITE
        assert "x-request-id" in reply.headers["access-control-expose-headers"]
        assert reply.headers["vary"] == "Origin"
    other = httpx.post(url + CHATS, json=HELLO, headers={"Origin": "https://evil.example.org", **key})
    assert other.status_code == 403 and "access-control-allow-origin" not in other.headers
    own = httpx.post(url + CHATS, json=HELLO, headers=key)
    assert own.status_code == 200 and "access-control-allow-origin" not in own.headers


def test_a_missing_key_is_asked_for(start_server):
    url, _ = start_server(api_keys=["secret"])
    assert httpx.get(f"{url}/v1/models").headers["www-authenticate"] == 'Bearer realm="palm-rlhf"'
    wrong = httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer other"})
    assert wrong.headers["www-authenticate"] == 'Bearer realm="palm-rlhf", error="invalid_token"'


def test_head_is_get_without_the_body(server):
    for path in ("/", "/health", "/healthz", "/readyz", "/v1/models", "/v1/models/parrot", "/page/app.js", "/metrics"):
        whole, head = httpx.get(server[0] + path), httpx.head(server[0] + path)
        assert (whole.status_code, head.status_code, head.content) == (200, 200, b""), path
        assert head.headers["content-type"] == whole.headers["content-type"]
        if path != "/metrics":
            assert head.headers["content-length"] == whole.headers["content-length"]
    assert httpx.head(server[0] + CHATS).status_code == 405
    assert httpx.head(server[0] + "/nothing").status_code == 404


def own_lines(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("palm_rlhf")]


def lines_of(caplog, *, path: str) -> list[str]:
    return [line for line in own_lines(caplog) if f"path='{path}'" in line]


def test_what_is_refused_is_logged_once_with_whose_it_is_and_why(start_server, caplog, eventually):
    caplog.set_level(logging.INFO)
    url, _ = start_server(api_keys=ApiKeys([("alice", "secret")]))
    bad = httpx.post(url + CHATS, json={**HELLO, "n": 0}, headers={"Authorization": "Bearer secret"})
    (line,) = eventually(lambda: lines_of(caplog, path=CHATS))
    assert f"request={bad.headers['x-request-id']} client='127.0.0.1' key='alice' status=400 method=POST" in line
    assert "reason='n is 0; expected an integer from 1 to 128'" in line
    httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer secret2"})
    (line,) = eventually(lambda: lines_of(caplog, path="/v1/models"))
    assert "key=- status=401 method=GET" in line and "the API key is missing or wrong" in line
    assert "secret" not in caplog.text
    caplog.clear()
    good = httpx.post(url + CHATS, json=HELLO, headers={"Authorization": "Bearer secret"})
    (line,) = eventually(lambda: [line for line in caplog.messages if "user=" in line])
    assert f"request={good.headers['x-request-id']} client='127.0.0.1' key='alice' user=None" in line
    assert not lines_of(caplog, path=CHATS)  # what went well has one line, too


def test_no_client_can_forge_a_line_of_the_log(server, caplog, eventually):
    caplog.set_level(logging.INFO)
    host, port = server[0].removeprefix("http://").split(":")
    forged = "%0A2026-01-01%20INFO%20request=req-0%1b%5b2J\u2028"
    with socket.create_connection((host, int(port)), timeout=900) as connection:
        request = f"GET /x{forged} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        connection.sendall(request.encode("latin-1", "replace"))
        assert b" 404 " in connection.recv(10_000)
    body = {**HELLO, "model": "x\n\x1b[2J"}
    httpx.post(server[0] + CHATS, json=body)
    found = eventually(lambda: len(own_lines(caplog)) > 1 and own_lines(caplog))
    assert len(found) == 2
    for line in found:
        assert line.isprintable() and line.isascii()
        assert re.match(r"request=req-[0-9a-f]{16} client=", line)


def test_a_failure_of_the_server_is_logged_with_its_reason(server, caplog, eventually):
    """Also by the outermost layer: what fails has an id and a line like all else."""
    caplog.set_level(logging.INFO)

    async def app(scope, receive, send):
        raise RuntimeError("broken\nhere")

    async def send(message):
        pass

    front = AccessMiddleware(app, ApiKeys(), Access(), Metrics(server[1]))
    scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "client": None}
    with pytest.raises(RuntimeError):
        asyncio.run(front(scope, None, send))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "client='unknown' key=- status=- method=GET" in record.message
    assert r"reason='RuntimeError: broken\nhere'" in record.message
