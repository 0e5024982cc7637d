"""A judge on the loopback that counts what it is asked, and the commands as people call them."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import tyro

COMMAND_LINE = """
import sys, tyro
from palm_rlhf.evaluation.evaluate_command import evaluate

tyro.extras.subcommand_cli_from_dict({"evaluate": evaluate, "nothing": lambda: None}, prog="palm-rlhf")
"""


class JudgeServer(ThreadingHTTPServer):
    """Speaks the chat-completions protocol; `say(body)` is the text of each reply.

    Each request follows the next of `plans` ({} when none is left): `status` with `headers` answers with an error,
    `raw` with these bytes, `hang` not at all. `calls` are the bodies of all requests that were answered with a text,
    `attempts` of all, `hold` makes them wait until so many are there at once.
    """

    daemon_threads = True

    def __init__(self, say):
        super().__init__(("127.0.0.1", 0), Handler)
        self.say, self.plans, self.calls, self.attempts, self.keys = say, [], [], [], []
        self.lock, self.closing = threading.Lock(), threading.Event()
        self.barrier = None
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            plan = server.plans.pop(0) if server.plans else {}
            server.attempts.append(body)
            server.keys.append(self.headers.get("Authorization"))
        if self.path != "/v1/chat/completions":
            plan = {"status": 404}
        if server.barrier is not None:
            server.barrier.wait(timeout=900)
        if "hang" in plan:
            server.closing.wait()
            self.close_connection = True
        elif "status" in plan:
            self.answer(plan["status"], b'{"error": {"message": "as planned"}}', plan.get("headers", {}))
        elif "raw" in plan:
            self.answer(200, plan["raw"])
        else:
            text = server.say(body)
            with server.lock:
                server.calls.append(body)
            message = {"role": "assistant", "content": text}
            usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
            self.answer(200, json.dumps({"choices": [{"index": 0, "message": message}], "usage": usage}).encode())

    def answer(self, status, content, headers=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def judge_server(run_server):
    """Starts a `JudgeServer` that says what the function given makes of the request's body."""
    return lambda say: run_server(JudgeServer(say))


@pytest.fixture
def evaluate(capsys):
    """Runs a command in this process: its last line of JSON, and all that it printed."""
    from palm_rlhf.evaluation.evaluate_command import evaluate as command

    def call(*arguments):
        subcommands = {"evaluate": command, "nothing": lambda: None}
        tyro.extras.subcommand_cli_from_dict(subcommands, prog="palm-rlhf", args=["evaluate", *map(str, arguments)])
        printed = capsys.readouterr().out
        return json.loads(printed.splitlines()[-1]), printed

    return call


@pytest.fixture
def start_evaluate(start_python):
    """Starts a command as a process of its own."""
    return lambda *arguments, stdin=None: start_python(COMMAND_LINE, "evaluate", *arguments, stdin=stdin)


@pytest.fixture
def write_lines():
    """Writes records as lines of JSON, and returns the path."""

    def write(path, records):
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return path

    return write


@pytest.fixture
def bench(tmp_path, write_lines):
    """Files of six questions, of which the last two have two turns, and of the answers of two models."""
    questions, first, second = [], [], []
    for place in range(6):
        turns = [f"Question {place}?", f"And then {place}?"][: 1 if place < 4 else 2]
        questions.append({"question_id": place, "category": "easy" if place < 3 else "hard", "turns": turns})
        for records, model in ((first, "alpha"), (second, "beta")):
            replies = [f"{model} says {turn}-{place}" for turn in range(1, len(turns) + 1)]
            records.append({"question_id": place, "model_id": model, "choices": [{"turns": replies}]})
    return tuple(
        write_lines(tmp_path / f"{name}.jsonl", records)
        for name, records in (("questions", questions), ("alpha", first), ("beta", second))
    )
