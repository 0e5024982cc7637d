"""Tabs of headless Chromium, and servers: of a model that says what it was given to say, and of odd bytes."""

import json
import re
import time
from collections.abc import Sequence
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tokenizers
import torch
import torch.nn.functional as F
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

import palm_rlhf.serving
from palm_rlhf.data.templates import ChatTemplate
from palm_rlhf.data.tokenizer import EOS, HuggingFaceTokenizer
from palm_rlhf.model.palm import PaLM
from palm_rlhf.serving.engine import Engine, EngineConfig
from palm_rlhf.serving.http.app import create_app
from palm_rlhf.serving.http.run_server import running
from palm_rlhf.serving.served_model import ServedModel

FILES = Path(palm_rlhf.serving.__file__).with_name("page")
USER, SYSTEM = "<|user|>", "<|system|>"
HOSTILE = "<img src=x onerror='document.title=1'>"
SCRIPT = {
    "Hello": ["Hi ", "**there**, ", "how ", "are ", "you?"],
    "Hello again": ["Hi once more."],
    "attack": [HOSTILE, "<script>document.title = 1</script>", "[click](javascript:document.title=1)"],
    "code": ["Here:\n\n```python\nprint(", "'<b>'", ")\n```\n"],
    "loop": ["tick ", "tock ", "tick "],
    "wide": ["| a | b |\n|---|---|\n| " + "x" * 300 + " | y |\n\n", "```\n" + "y" * 400 + "\n```\n", "z" * 400],
    "nothing": [],
    "<unk>": ["I know nothing of that."],
}


@pytest.fixture(scope="session")
def scripted() -> ServedModel:
    """A model whose next token follows from the last one alone: each message in SCRIPT is a token, and so are its
    replies' pieces. Its feed-forward layer is solved for that; its attention adds nothing.
    """
    words = list(dict.fromkeys(word for said, reply in SCRIPT.items() for word in (said, *reply)))
    ids = {word: index for index, word in enumerate(words)}
    template = ChatTemplate((SYSTEM, ""), (USER, ""), ("", EOS), special_tokens=(EOS, SYSTEM, USER))
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    pieces = tokenizers.Regex("|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(pieces, "isolated")  # a reply that is cut has its tokens
    backend.decoder = tokenizers.decoders.Fuse()
    tokenizer = HuggingFaceTokenizer(backend, template.special_tokens, eos_token=EOS)
    following = torch.arange(tokenizer.num_tokens)
    for said, reply in SCRIPT.items():
        chain = [said, *reply]
        for word, after in zip(chain, [*chain[1:], None]):
            following[ids[word]] = tokenizer.eos_token if after is None else ids[after]
    following[ids["tick "]] = ids["tock "]  # and so on
    torch.manual_seed(0)
    size = tokenizer.num_tokens
    options = {"heads": 1, "dim_head": 8, "ff_inner_dim": 2 * size, "logit_scale": 10, "max_seq_len": 100_000}
    palm = PaLM(num_tokens=size, dim=64, depth=1, **options)
    with torch.no_grad():
        (layer,), embeddings = palm.layers, palm.token_emb.weight
        _, gate, value = layer.in_proj(layer.norm(embeddings)).split(layer.sizes, dim=-1)
        wanted = 3 * embeddings[following] - embeddings
        layer.ff_out.weight.copy_(torch.linalg.lstsq(F.silu(gate) * value, wanted).solution.T)
        layer.attn_out.weight.zero_()
    return ServedModel("scripted", palm, tokenizer, template)


@contextmanager
def serving(served_model: ServedModel, api_keys: Sequence[str] = (), **config):
    with Engine(served_model.palm, served_model.tokenizer, EngineConfig(**config)) as engine:
        with running(create_app(served_model, engine, api_keys=api_keys)) as url:
            yield url, engine


@pytest.fixture
def serve(scripted):
    """`with serve(context=32) as (url, engine)` is another server of that model."""
    return partial(serving, scripted)


@pytest.fixture(scope="session")
def scripted_server(scripted):
    with serving(scripted) as server:
        yield server


class Page:
    """A tab with the page in it."""

    def __init__(self, browser, url: str):
        self.browser = browser
        browser.get(url)
        self.js(
            "window.asked = []; const real = window.fetch;"
            "window.fetch = (path, options) => {"
            "  if (options?.body) asked.push(JSON.parse(options.body)); return real(path, options); }"
        )

    def js(self, script: str, *arguments):
        return self.browser.execute_script(script, *arguments)

    def until(self, condition: str):
        """Waits for an expression to be true, and returns it: ten minutes, or longer where the machine stood still."""
        deadline, tries = time.monotonic() + 600, 0
        while time.monotonic() < deadline or tries < 50:
            if found := self.js(f"return {condition}"):
                return found
            tries += 1
            time.sleep(0.01)
        raise AssertionError(f"never true: {condition}; the page says {self.find('main').text!r}")

    def find(self, selector: str):
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def click(self, selector: str) -> None:
        self.find(selector).click()

    def press(self, *keys: str) -> None:
        self.browser.switch_to.active_element.send_keys(*keys)

    def send(self, text: str) -> None:
        self.find("#input").send_keys(text, Keys.ENTER)

    def wait(self) -> None:
        self.until("document.querySelector('#thread').ariaBusy === 'false'")

    def ask(self, text: str) -> str:
        """Sends a message and returns the reply, when it is there."""
        self.send(text)
        self.wait()
        return self.said()[-1][1]

    def said(self) -> list[list[str]]:
        """Who said what, as it is seen."""
        return self.js(
            "return [...document.querySelectorAll('.message')]"
            ".map(m => [m.getAttribute('aria-label'), m.querySelector('.text').innerText])"
        )

    def asked(self) -> list[dict]:
        """What was sent to the server."""
        return self.js("return asked")

    def texts(self, selector: str) -> list[str]:
        return self.js("return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", selector)

    def color(self) -> str:
        return self.js("return getComputedStyle(document.body).backgroundColor")

    def render(self, *texts: str) -> list[str]:
        """The HTML of Markdown, each text by itself."""
        return [html for (html,) in self.render_growing([[text] for text in texts])]

    def render_growing(self, lists: list[list[str]]) -> list[list[str]]:
        """The HTML after each of the texts that an element shows in turn."""
        script = """
            const [lists, done] = arguments;
            import(new URL("page/markdown.js", location)).then(({ show }) => done(lists.map((texts) => {
                const element = document.createElement("div");
                return texts.map((text) => { show(element, text); return element.innerHTML; });
            })));"""
        return self.browser.execute_async_script(script, lists)


@pytest.fixture
def open_page(browser):
    """Opens tabs, and closes them; ends with an error where a script of theirs failed or broke the policy."""
    first = browser.current_window_handle
    tabs = []

    def start(url: str) -> Page:
        browser.switch_to.new_window("tab")
        tabs.append(browser.current_window_handle)
        return Page(browser, url)

    yield start
    errors = []
    for tab in tabs:
        browser.switch_to.window(tab)
        errors += [entry for entry in browser.get_log("browser") if entry["source"] != "network"]
        browser.execute_script("localStorage.clear()")
        browser.close()
    browser.switch_to.window(first)
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert errors == []


@pytest.fixture
def page(open_page, scripted_server) -> Page:
    return open_page(scripted_server[0])


@pytest.fixture(scope="module")
def renderer(browser, scripted_server):
    """A tab for the many examples of a file."""
    first = browser.current_window_handle
    browser.switch_to.new_window("tab")
    yield Page(browser, scripted_server[0])
    browser.close()
    browser.switch_to.window(first)


@pytest.fixture
def odd_server(run_server):
    """`odd_server(parts, change)` is the URL of a server whose every reply is these bytes, and which has the page's
    files with the changes to their text.
    """

    def start(parts: list[bytes] = (), change: dict[str, str] | None = None) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                if self.path == "/v1/models":
                    models = {"data": [{"id": "odd"}, {"id": "other"}]}
                    return self.answer(json.dumps(models).encode(), "application/json")
                file = FILES / (self.path.removeprefix("/page/") if self.path != "/" else "index.html")
                text = file.read_text(encoding="utf-8")
                for old, new in (change or {}).items():
                    text = text.replace(old, new)
                kinds = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
                return self.answer(text.encode(), kinds[file.suffix])

            def answer(self, body: bytes, kind: str):
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_POST(self):
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
                for part in parts:
                    self.wfile.write(part)
                    self.wfile.flush()

            def log_message(self, *_):
                pass

        server = run_server(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        return f"http://127.0.0.1:{server.server_port}"

    return start
