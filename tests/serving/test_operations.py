"""What watches over a server is told the truth, and the page is there for everyone."""

import re

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from palm_rlhf.serving.http.api_keys import ApiKeys
from palm_rlhf.serving.http.page_files import PAGE

HELLO = [{"role": "user", "content": "Hello"}]


def numbers(url: str) -> dict[str, float]:
    """The samples of /metrics, as Prometheus' own parser reads them, by name and labels."""
    reply = httpx.get(f"{url}/metrics")
    assert reply.headers["content-type"].startswith("text/plain")
    samples = (sample for family in text_string_to_metric_families(reply.text) for sample in family.samples)
    return {" ".join([sample.name, *map("=".join, sorted(sample.labels.items()))]): sample.value for sample in samples}


def test_metrics_add_up(start_server):
    url, _ = start_server()
    before = numbers(url)
    assert before["palm_rlhf_tokens_total kind=sampled"] == 0
    chat = {"model": "parrot", "messages": HELLO, "temperature": 0}
    for body in (chat, chat, {**chat, "max_tokens": 3}, {**chat, "n": 0}):
        httpx.post(f"{url}/v1/chat/completions", json=body)
    httpx.get(f"{url}/whatever")
    found = numbers(url)
    assert found["palm_rlhf_tokens_total kind=sampled"] == 2 * 23 + 3
    assert found["palm_rlhf_tokens_total kind=prompt"] == 3 * 8
    assert found["palm_rlhf_tokens_total kind=prompt_reused"] == 2 * 7
    assert found["palm_rlhf_replies_total finish_reason=stop"] == 2
    assert found["palm_rlhf_replies_total finish_reason=length"] == 1
    assert found["palm_rlhf_requests_total path=/v1/chat/completions status=200"] == 3
    assert found["palm_rlhf_requests_total path=/v1/chat/completions status=400"] == 1
    assert found["palm_rlhf_requests_total path=other status=404"] == 1
    assert found["palm_rlhf_time_to_first_token_seconds_count"] == 3
    assert found["palm_rlhf_time_per_token_seconds_count"] == 3
    assert found["palm_rlhf_queue_seconds_count"] == found["palm_rlhf_end_to_end_seconds_count"] == 3
    assert 0 < found["palm_rlhf_queue_seconds_sum"] < found["palm_rlhf_end_to_end_seconds_sum"]
    assert found["palm_rlhf_prompt_length_tokens_sum"] == 3 * 8
    assert found["process_resident_memory_bytes"] > 2**20
    assert "python_info" in " ".join(found)
    assert found["palm_rlhf_running"] == found["palm_rlhf_waiting"] == 0
    assert 0 < found["palm_rlhf_cache_bytes"] < found["palm_rlhf_max_cache_bytes"] == 2**31
    assert found["palm_rlhf_max_running"] == 16
    assert found["palm_rlhf_prefix_bytes"] > 0


def test_several_replies_have_one_prompt(start_server):
    url, _ = start_server()
    httpx.post(f"{url}/v1/completions", json={"model": "parrot", "prompt": ["a", "bc"], "n": 3, "max_tokens": 2})
    found = numbers(url)
    assert found["palm_rlhf_end_to_end_seconds_count"] == 6
    assert (found["palm_rlhf_prompt_length_tokens_count"], found["palm_rlhf_prompt_length_tokens_sum"]) == (2, 3)


def test_the_buckets_end_at_the_timeout_and_the_context(start_server):
    url, _ = start_server(timeout=70, context=100)
    bounds = {}
    for name in numbers(url):
        if match := re.match(r"palm_rlhf_(\w+)_bucket le=([\d.]+)$", name):
            bounds.setdefault(match[1], []).append(float(match[2]))
    assert bounds.pop("prompt_length_tokens") == [4, 16, 64, 100]
    assert set(bounds) == {
        "queue_seconds",
        "end_to_end_seconds",
        "time_to_first_token_seconds",
        "time_per_token_seconds",
    }
    for found in bounds.values():
        assert found[-3:] == [25, 50, 70]


def test_metrics_tell_no_client_from_another(start_server):
    url, _ = start_server(api_keys=ApiKeys([("alice", "secret-1"), ("bob", "secret-2")]))
    chat = {"model": "parrot", "messages": HELLO, "user": "someone", "max_tokens": 2}
    for key in ("secret-1", "secret-2"):
        httpx.post(f"{url}/v1/chat/completions", json=chat, headers={"Authorization": f"Bearer {key}"})
    text = httpx.get(f"{url}/metrics").text
    assert not any(word in text for word in ("alice", "bob", "secret", "someone", "127.0.0.1", "address", "key "))


def test_readiness_is_not_health(start_server, eventually):
    url, engine = start_server(max_batch=1, queue=0, context=20_000)
    endless = {"model": "parrot", "prompt": "a", "max_tokens": 19_000, "logit_bias": {"256": -100}, "stream": True}
    with httpx.Client(base_url=url) as client:
        assert client.get("/readyz").json()["status"] == "ready"
        with client.stream("POST", "/v1/completions", json=endless) as reply:
            body = reply.iter_bytes()  # held
            next(body)
            full = client.get("/readyz")
            assert (full.status_code, full.json()["error"]["code"]) == (503, "queue_full")
            assert client.get("/health").json() == client.get("/healthz").json()
            assert client.get("/health").status_code == 200
        eventually(lambda: client.get("/readyz").status_code == 200)
        engine.close()
        assert [client.get(path).status_code for path in ("/readyz", "/health", "/healthz")] == [503] * 3


def test_health_counts_those_who_run_and_wait(start_server):
    url, _ = start_server(max_batch=1, context=20_000)
    two = {"model": "parrot", "prompt": "a", "max_tokens": 19_000, "logit_bias": {"256": -100}, "stream": True, "n": 2}
    with httpx.Client(base_url=url) as client, client.stream("POST", "/v1/completions", json=two) as reply:
        body = reply.iter_bytes()  # held: without it httpx would hang up, and the server give both up
        next(body)
        assert client.get("/healthz").json() == {"status": "ok", "running": 1, "waiting": 1}


@pytest.mark.parametrize("keys", [(), ("secret",)])
def test_the_page_and_its_files_need_no_key(start_server, keys):
    url, _ = start_server(api_keys=keys)
    with httpx.Client(base_url=url) as client:
        page = client.get("/")
        assert page.status_code == 200
        assert page.headers["content-type"].startswith("text/html")
        assert "default-src 'self'" in page.headers["content-security-policy"]
        assert page.content == (PAGE / "index.html").read_bytes()
        for file in PAGE.glob("*.*"):
            part = client.get(f"/page/{file.name}")
            assert part.content == file.read_bytes() and part.headers["cache-control"] == "no-cache"
        for path in ("/page/nothing.js", "/page/../server.py", "/page/%2e%2e/server.py", "/page//etc/passwd"):
            assert client.get(path).status_code in (401, 404)
