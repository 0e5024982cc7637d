"""The door of the server: who asks, and whether they may."""

import asyncio

import pytest

from palm_rlhf.serving.front import CLIENT, Front
from palm_rlhf.serving.metrics import Metrics


@pytest.fixture
def client_of(start_engine):
    """The name of the client that stands in the scope of a request."""
    engine = start_engine()

    def make(keys=()):
        seen = []

        async def app(scope, receive, send):
            seen.append(scope[CLIENT])

        front = Front(app, keys=keys, metrics=Metrics(engine))

        def ask(address="10.0.0.1", authorization=None):
            headers = [] if authorization is None else [(b"authorization", authorization)]
            scope = {"type": "http", "path": "/", "headers": headers, "client": (address, 5000)}
            asyncio.run(front(scope, None, None))
            return seen.pop()

        return ask

    return make


def test_a_client_is_its_key_or_its_address(client_of):
    ask = client_of(keys=("one", "two"))
    first = ask(authorization=b"Bearer one")
    assert ask("10.0.0.2", b"bearer  one ") == first
    names = {first, ask(authorization=b"Bearer two"), ask(authorization=b"Bearer three"), ask("10.0.0.2")}
    assert len(names) == 4
    assert ask() == ask(authorization=b"Basic one") == ask(authorization=b"Bearer three")


def test_the_name_of_a_client_tells_nothing_of_its_key(client_of):
    one, other = (client_of(keys=("secret",))(authorization=b"Bearer secret") for _ in range(2))
    assert "secret" not in one
    assert one != other  # each server hashes with a salt of its own, so that no table of keys fits
    assert len(one) <= 32
