"""What a page of another site can make a browser send to a server on this machine, tried in a real one."""

from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from palm_rlhf.serving.engine import Engine, EngineConfig
from palm_rlhf.serving.http.access import Access
from palm_rlhf.serving.http.app import create_app
from palm_rlhf.serving.http.run_server import running

ASK = """
    const [url, kind, stream, done] = arguments;
    const body = JSON.stringify({model: "scripted", stream, messages: [{role: "user", content: "Hello"}]});
    const ways = {
        "blob": {method: "POST", body: new Blob([body])},
        "no-cors": {method: "POST", body: new Blob([body]), mode: "no-cors"},
        "text": {method: "POST", body, mode: "no-cors", headers: {"Content-Type": "text/plain"}},
        "json": {method: "POST", body, headers: {"Content-Type": "application/json"}},
        "get": {},
    };
    if (kind === "beacon") {
        done(navigator.sendBeacon(url, new Blob([body])));
    } else {
        fetch(url, ways[kind]).then(async (reply) => done([reply.type, reply.status, await reply.text()]))
            .catch((error) => done(String(error)));
    }"""


@pytest.fixture
def other_site(run_server):
    """The URL of a page of another site."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>other</title>")

        def log_message(self, *_):
            pass

    server = run_server(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
    return f"http://127.0.0.1:{server.server_port}"


@pytest.fixture
def ask_from(browser):
    """Sends a request from the page at a URL, and returns what its script is told."""
    first = browser.current_window_handle
    browser.switch_to.new_window("tab")

    def ask(page: str, url: str, kind: str, *, stream: bool = False):
        if browser.current_url != page + "/":
            browser.get(page)
        return browser.execute_async_script(ASK, url, kind, stream)

    yield ask
    browser.get_log("browser")  # what the browser refused is no error of the tabs to come
    browser.close()
    browser.switch_to.window(first)


def counts(engine: Engine) -> int:
    """Replies that were begun."""
    return engine.counts["prompt_tokens"]


@pytest.fixture
def own_server(scripted):
    """`own_server(access)` is the URL and the engine of a server."""
    with ExitStack() as stack:

        def start(access: Access):
            engine = stack.enter_context(Engine(scripted.palm, scripted.tokenizer, EngineConfig(context=64)))
            return stack.enter_context(running(create_app(scripted, engine, access=access))), engine

        yield start


@pytest.mark.parametrize("kind", ["blob", "no-cors", "text", "json", "beacon", "get"])
def test_a_page_of_another_site_drives_nothing(own_server, other_site, ask_from, kind, eventually):
    url, engine = own_server(Access())
    path = "/v1/models" if kind == "get" else "/v1/chat/completions"
    told = ask_from(other_site, url + path, kind)
    if kind == "beacon":
        assert told is True  # that it was sent
    elif kind in ("no-cors", "text"):
        assert told[:2] == ["opaque", 0]
    else:
        assert told == "TypeError: Failed to fetch"
    ask_from(url, url + "/healthz", "get")  # sent after it, on a server that answers in turn
    assert counts(engine) == 0


def test_a_name_that_points_here_reads_nothing(own_server, ask_from):
    """DNS rebinding: chromium resolves every name below .localhost to this machine, as a hostile name server would."""
    url, engine = own_server(Access())
    page = url.replace("127.0.0.1", "evil.localhost")
    kind, status, text = ask_from(page, page + "/v1/chat/completions", "json")
    assert (kind, status) == ("basic", 403)  # of the page's own site, as the browser sees it
    assert "host_not_allowed" in text and "evil.localhost" in text
    assert counts(engine) == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_page_of_an_allowed_site_is_answered(own_server, other_site, ask_from, stream):
    url, _ = own_server(Access(origins=(other_site,)))
    kind, status, text = ask_from(other_site, url + "/v1/chat/completions", "json", stream=stream)
    assert (kind, status) == ("cors", 200)
    assert "**there**" in text and ("data: [DONE]" in text) == stream
    kind, status, text = ask_from(other_site, url + "/v1/nothing", "json")
    assert (kind, status) == ("cors", 404) and "there is nothing at" in text


def test_the_page_asks_its_own_server(own_server, open_page):
    url, _ = own_server(Access())
    assert "there" in open_page(url).ask("Hello")
    named = url.replace("127.0.0.1", "localhost")
    assert "there" in open_page(named).ask("Hello")
