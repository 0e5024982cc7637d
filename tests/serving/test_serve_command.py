"""palm-rlhf serve, in a process of its own: it says where it answers, takes its options, and ends when interrupted."""

import dataclasses
import inspect
import json
import os
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import openai
import pytest

from palm_rlhf.cli import main
from palm_rlhf.commands.serve_command import serve
from palm_rlhf.serving.access_options import AccessOptions, is_loopback, num_bytes

RUN = "import sys, tyro; from palm_rlhf.commands.serve_command import serve; tyro.cli(serve, args=sys.argv[1:])"
HELLO = [{"role": "user", "content": "Hello"}]
SITE = "https://chat.example.org"


@pytest.fixture
def command(root, tmp_path):
    """Runs the command, as its process with its URL."""

    @contextmanager
    def run(*arguments, **environment):
        process = subprocess.Popen(
            [sys.executable, "-c", RUN, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": str(root), **environment},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            url = re.search(r" answers at (http://\S+)\n", process.stdout.readline())
            yield process, url and url.group(1)
        finally:
            process.kill()
            process.communicate()

    return run


def test_it_answers_until_it_is_interrupted(command, checkpoint, reward_folder, tmp_path):
    (tmp_path / "keys").write_text("one\n\n two \nalice: named\n")
    options = ("--port", 0, "--name", "bird", "--reward-model", reward_folder, "--api-key-file", tmp_path / "keys")
    more = ("--context", 100, "--max-batch", 2, "--queue", 1, "--prefix-memory", 0, "--cache-memory", "1MB")
    access = ("--allowed-hosts", "llm.example.org", "--cors-origin", SITE, "--forwarded-allow-ips", "127.0.0.1")
    more = (*more, *access, "--header-timeout", 0.5, "--grace", 1, "--device", "cpu", "--prefill-chunk", 32)
    with command(checkpoint, *options, *more, PALM_RLHF_API_KEYS="three,") as (process, url):
        assert url.startswith("http://127.0.0.1:")
        for key in ("one", "two", "three"):
            with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
                (model,) = client.models.list().data
                assert (model.id, model.max_model_len) == ("bird", 100)
                options = {"model": "bird", "messages": HELLO, "temperature": 0, "user": "someone"}
                options["metadata"] = {"team": "\n"}
                reply = client.chat.completions.create(**options, extra_body={"best_of": 2})
                assert reply.choices[0].message.content == "Hi there! How are you?"
                assert reply.usage.prompt_tokens_details.cached_tokens in (0, 7)  # from its twin, and never from before
        assert httpx.get(f"{url}/v1/models").status_code == 401
        named = {"Host": "llm.example.org", "Origin": SITE, "Authorization": "Bearer named"}
        reply = httpx.get(f"{url}/v1/models/nothing", headers={**named, "X-Forwarded-For": "203.0.113.7"})
        assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (404, SITE)
        assert httpx.get(f"{url}/healthz", headers={"Host": "other.example.org"}).status_code == 403
        host, number = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(number)), timeout=900) as half:
            assert b" 408 " in half.recv(1000)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0
        assert "Traceback" not in errors
        assert "client='203.0.113.7' key='alice' status=404 method=GET path='/v1/models/nothing'" in errors
        noted = """user='someone' metadata={"team": "\\n"} prompt_tokens=8 completion_tokens=46 replies=2 ended=stop"""
        assert noted in errors
        assert "at most 2 replies at once, 1000000 bytes of their keys and values, and 32 tokens of prompts" in errors


@pytest.mark.slow(7)
def test_replies_that_outlast_the_grace_are_told_so(command, checkpoint):
    endless = {"model": "parrot", "prompt": "a", "max_tokens": 90_000, "logit_bias": {"256": -100}}
    with command(checkpoint, "--port", 0, "--context", 100_000) as (process, url), ThreadPoolExecutor() as pool:
        with httpx.Client(base_url=url, timeout=900) as client:
            whole = pool.submit(client.post, "/v1/completions", json=endless)
            with client.stream("POST", "/v1/completions", json={**endless, "stream": True}) as reply:
                lines = filter(None, reply.iter_lines())
                next(lines)
                while client.get("/healthz").json()["running"] < 2:
                    next(lines)
                process.send_signal(signal.SIGINT)
                *_, error, done = lines
            assert json.loads(error.removeprefix("data: "))["error"]["code"] == "unavailable"
            assert done == "data: [DONE]"
            assert (whole.result().status_code, whole.result().json()["error"]["code"]) == (503, "unavailable")
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0
        assert "Traceback" not in errors


def test_a_port_in_use_is_said_before_the_model_is_read(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(OSError, match="in use"):
            serve(str(tmp_path / "nothing"), port=taken.getsockname()[1])
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        serve(str(tmp_path / "nothing"), port=0)


def test_a_number_that_is_no_port_is_refused_in_one_line(checkpoint):
    for port in ("80000", "-1"):
        with pytest.raises(SystemExit, match=f"^palm-rlhf: got port={port}, expected 0, .* to 65535$"):
            main(["serve", str(checkpoint), "--port", port])


def test_options_that_make_no_sense_are_refused(checkpoint, tmp_path):
    (tmp_path / "empty").write_text("\n")
    for options, expected in (
        ({"cache_memory": "much"}, "cache_memory='much', expected bytes"),
        ({"cache_memory": "10KB"}, "expected at least"),
        ({"max_batch": 0}, "max_batch=0"),
        ({"queue": -1}, "queue=-1"),
        ({"context": 1}, "context=1"),
        ({"timeout": 0.0}, "timeout=0"),
        ({"access": AccessOptions(api_key_file=tmp_path / "empty")}, "has no API key"),
        ({"access": AccessOptions(max_body="much")}, "max_body='much', expected bytes"),
        ({"access": AccessOptions(max_body="4MB", body_memory="7MB")}, "body_memory=7,000,000 bytes"),
        ({"access": AccessOptions(allowed_hosts=("http://a",))}, "got 'http://a', expected a name"),
        ({"access": AccessOptions(cors_origin=("https://a/path",))}, "got 'https://a/path', expected a scheme"),
        ({"device": "toaster"}, "device='toaster'"),
        ({"device": "cuda:99"}, "torch sees . GPUs"),
        ({"template": "vicuna"}, "lacks the special tokens"),
        ({"reward_model": str(checkpoint)}, "model_type"),
        ({"lora_scope": "pirate"}, "finetune scope 'pirate'"),
        ({"lora": ("a=b",), "feedback": str(tmp_path / "feedback.db")}, "got --lora with --feedback, expected one"),
    ):
        with pytest.raises(ValueError, match=expected):
            serve(str(checkpoint), port=0, **options)
    assert not (tmp_path / "feedback.db").exists()


def test_limits_that_make_no_sense_are_refused():
    for name in ("max_connections", "max_connections_per_client", "header_timeout", "body_timeout"):
        with pytest.raises(ValueError, match=f"{name}=0"):
            AccessOptions(**{name: 0 if name.startswith("max") else 0.0})
    with pytest.raises(ValueError, match="grace=-1"):
        AccessOptions(grace=-1.0)


def test_keys_come_from_a_file_and_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("PALM_RLHF_API_KEYS", raising=False)
    assert not AccessOptions().keys().secured
    (tmp_path / "keys").write_text("a\nb\n")
    monkeypatch.setenv("PALM_RLHF_API_KEYS", "c, d")
    keys = AccessOptions(api_key_file=tmp_path / "keys").keys()
    assert keys.secured and all(keys.owner(key) for key in (b"a", b"b", b"c", b"d"))
    assert [keys.owner(key) for key in (b"", b"e", b"c, d", b"a\nb")] == [None] * 4
    with pytest.raises(FileNotFoundError):
        AccessOptions(api_key_file=tmp_path / "nothing").keys()


def test_a_server_on_a_network_is_known_by_any_name_and_one_of_this_machine_by_its_own():
    assert AccessOptions().hosts_and_origins("0.0.0.0", loopback=False).knows("llm.example.org:8000")
    named = AccessOptions(allowed_hosts=("llm.example.org",)).hosts_and_origins("0.0.0.0", loopback=False)
    assert named.knows("llm.example.org:8000") and named.knows("localhost") and not named.knows("other.example.org")
    own = AccessOptions().hosts_and_origins("127.0.0.5", loopback=True)
    assert own.knows("127.0.0.5:80") and own.knows("localhost:80") and not own.knows("llm.example.org")
    assert AccessOptions().hosts_and_origins("::1", loopback=True).knows("[::1]:18888")
    assert (
        AccessOptions(allowed_hosts=("llm.example.org",))
        .hosts_and_origins("127.0.0.1", loopback=True)
        .knows("LLM.example.org:80")
    )


@pytest.mark.parametrize("name", ["Dockerfile", "palm-rlhf.service", "README.md", "nginx.conf"])
def test_the_files_for_deployment_name_options_that_there_are(root, name):
    """Of this command; those of other programs in the same files are listed."""
    known = {*inspect.signature(serve).parameters, *(field.name for field in dataclasses.fields(AccessOptions))}
    others = {
        "system",
        "create_home",
        "home",
        "now",
        "build_arg",
        "gpus",
        "rm",
        "stop_timeout",
        "no_install_recommends",
    }
    others |= {"no_cache_dir", "index_url", "start_period", "interval"}
    text = (root / "examples/deploy" / name).read_text()
    named = {option.replace("-", "_") for option in re.findall(r"(?<![\w-])--([a-z][a-z-]+)", text)}
    assert named <= known | others
    assert named & known


def test_sizes_and_hosts():
    assert [num_bytes("x", size) for size in ("0", "4096", "2MB", "1.5GiB")] == [0, 4096, 2_000_000, 3 * 2**29]
    assert [host for host in ("localhost", "127.0.0.1", "::1", "0.0.0.0", "example.org") if is_loopback(host)] == [
        "localhost",
        "127.0.0.1",
        "::1",
    ]


def test_feedback_is_kept_in_the_database_that_is_named(command, checkpoint, tmp_path):
    from palm_rlhf.feedback.store.answer_tables import Answer, KnownModel, Reaction
    from palm_rlhf.feedback.store.database import Store

    with command(checkpoint, "--port", 0, "--device", "cpu", "--feedback", "judged.db") as (process, url):
        assert 'data-feedback="feedback/"' in httpx.get(url).text
        with httpx.Client(base_url=f"{url}/feedback/chat/", timeout=600) as client:
            client.headers["x-form-token"] = client.get("visitor").json()["token"]
            body = {"model": "parrot", "messages": HELLO, "temperature": 0}
            opening, *_ = client.post("reply", json=body).text.split("\n\n")
            (answer,) = json.loads(opening.removeprefix("data: "))["feedback"]["answers"]
            assert client.post("reactions", json={"answer": answer, "value": 1}).status_code == 200
        process.kill()  # what was acknowledged is on the disk
    with Store(tmp_path / "judged.db") as store, store.reading() as session:
        assert session.get_one(Answer, answer).text == "Hi there! How are you?"
        (model,), (reaction,) = session.query(KnownModel).all(), session.query(Reaction).all()
    assert (model.name, model.folder, reaction.value) == ("parrot", str(checkpoint), 1)
