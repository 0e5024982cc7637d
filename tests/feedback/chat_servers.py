"""Servers whose chat page asks for feedback, and the requests of that page."""

import json
from contextlib import contextmanager

import httpx
import torch

from palm_rlhf.data.templates import PRESETS
from palm_rlhf.data.tokenizer import ByteTokenizer
from palm_rlhf.feedback.chat.chat_site import chat_site
from palm_rlhf.feedback.web.site import Site
from palm_rlhf.model.palm import PaLM
from palm_rlhf.serving.engine import Engine, EngineConfig
from palm_rlhf.serving.http.app import create_app
from palm_rlhf.serving.http.run_server import running
from palm_rlhf.serving.served_model import ServedModel

HELLO = [{"role": "user", "content": "Hello"}]


def random_model() -> ServedModel:
    """A model whose answers are random bytes."""
    torch.manual_seed(0)
    tokenizer = ByteTokenizer()
    palm = PaLM(num_tokens=tokenizer.num_tokens, dim=16, depth=1, heads=1, dim_head=16, max_seq_len=256)
    return ServedModel("random", palm.eval(), tokenizer, PRESETS["default"])


@contextmanager
def chat_server(store, model, *, api_keys=(), is_local=True, **config):
    """The URL of a server with feedback, and its engine."""
    with Engine(model.palm, model.tokenizer, EngineConfig(**config)) as engine:
        app = create_app(model, engine, api_keys=api_keys, feedback=chat_site(Site(store, is_local=is_local), model))
        with running(app) as url:
            yield url, engine


class ChatClient(httpx.Client):
    """The requests of one person's chat page."""

    def __init__(self, url: str, **options):
        super().__init__(base_url=f"{url}/feedback/chat/", timeout=600, **options)

    def __enter__(self) -> "ChatClient":
        super().__enter__()
        self.headers["x-form-token"] = self.get("visitor").json()["token"]
        return self

    def give(self, kind: str, **values) -> httpx.Response:
        return self.post(kind, json=values)

    def ask(self, kind: str = "reply", messages=HELLO, **values) -> dict:
        """The ids of answers, their texts from left to right, and what is kept of them."""
        body = {"model": "random", "messages": messages, "max_tokens": 8, "seed": 0, **values}
        response = self.post(kind, json=body)
        assert response.status_code == 200, response.text
        assert response.text.endswith("data: [DONE]\n\n")
        events = [json.loads(part.removeprefix("data: ")) for part in response.text.split("\n\n")[:-2]]
        opening, *chunks, closing = events
        texts = {}
        for chunk in chunks:
            for choice in chunk["choices"]:
                texts[choice["index"]] = texts.get(choice["index"], "") + choice["delta"].get("content", "")
        return {**opening["feedback"], **closing["feedback"], "texts": [texts[index] for index in sorted(texts)]}
