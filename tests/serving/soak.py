"""Many clients at once, of which some are slow, some vanish or stop reading, some send garbage or ask for too much.

They have several keys, one of which wants every place that there is, all the time.

python tests/serving/soak.py                  # 5 minutes, 32 clients; needs palm-rlhf[serve] and httpx

Ends with a line of JSON, and with status 1 where the server failed at anything that was not the fault of a client.
"""

import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import torch
import tyro

from palm_rlhf.data.tokenizer import ByteTokenizer
from palm_rlhf.model.palm import PaLM

START = "import sys; from palm_rlhf.commands.serve_command import serve; import tyro; tyro.cli(serve)"
OPTIONS = ("--port", "0", "--max-batch", "8", "--queue", "24", "--cache-memory", "64MB", "--prefix-memory", "4MB")
OPTIONS += ("--write-timeout", "2", "--max-output", "20000")
KEYS = ("operator", "one", "two", "three", "unfair")  # of clients, but for the first
LONG_ENOUGH = 60  # seconds in which everything has to happen that these clients are for
SLOWEST_HEALTH = 20  # seconds
IMPATIENT = ("--header-timeout", "2", "--body-timeout", "5")  # with those who say half of what they want
READY = re.compile(r"answers at (http://\S+)")
CHATS = "/v1/chat/completions"
KINDS = ("patient", "patient", "plain", "slow", "vanishing", "hasty")
KINDS += ("garbage", "greedy", "hostile", "dangling", "stopped", "unfair")


@contextmanager
def serving(checkpoint: Path, log: Path, *options: str):
    """A server in a process of its own, as that process and its URL; interrupted at the end."""
    keys = log.with_name("keys")
    keys.write_text("".join(f"{key}: secret-{key}\n" for key in KEYS))
    command = [sys.executable, "-c", START, str(checkpoint), *OPTIONS, *IMPATIENT]
    command += ["--api-key-file", str(keys), *options]
    with open(log, "w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            line = process.stdout.readline()
            assert READY.search(line), log.read_text()
            yield process, READY.search(line).group(1)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(900)


def bearer(key: str) -> dict[str, str]:
    """The header that sends a key."""
    return {"Authorization": f"Bearer secret-{key}"}


def memory_of(process: subprocess.Popen) -> float:
    """Resident memory of a process, in MB."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status).group(1)) / 1024


@dataclass
class Record:
    """What the clients saw."""

    answers: Counter = field(default_factory=Counter)  # by kind of client and status
    failures: list[str] = field(default_factory=list)
    first_text: list[float] = field(default_factory=list)  # seconds, of patient clients
    health: list[float] = field(default_factory=list)  # seconds until /healthz has answered


class Client:
    """One client, which asks again and again until the time is over."""

    def __init__(self, number: int, http: httpx.AsyncClient, model: str, sayings: list[str], record: Record):
        self.random = random.Random(number)
        self.http, self.model, self.sayings, self.record = http, model, sayings, record
        self.kind = KINDS[number % len(KINDS)]
        self.headers = bearer("unfair" if self.kind == "unfair" else KEYS[1 + number // len(KINDS) % 3])

    async def run(self, until: float) -> None:
        """Asks until then."""
        while time.monotonic() < until:
            try:
                await getattr(self, self.kind)()
            except Exception as error:
                self.record.failures.append(f"{self.kind}: {error!r}")
            await asyncio.sleep(self.random.random() * 0.1)

    def body(self, **options) -> dict:
        messages = [{"role": "user", "content": self.random.choice(self.sayings)}]
        if self.random.random() < 0.5:
            messages.insert(0, {"role": "system", "content": "You are a parrot. " * 3})
        options = {"max_tokens": self.random.randint(1, 100), "temperature": self.random.choice([0, 1]), **options}
        return {"model": self.model, "messages": messages, **options}

    def answered(self, status: int, *expected: int) -> bool:
        """Counts an answer; one that is not expected is a failure. A full queue is told to anyone."""
        self.record.answers[f"{self.kind} {status}"] += 1
        if status not in (*expected, 429):
            self.record.failures.append(f"{self.kind}: status {status}")
        return status == 200

    async def patient(self, pause: float = 0.0, leave_after: int | None = None) -> None:
        """Reads a stream to its end, or leaves after some lines."""
        started, first, lines = time.monotonic(), None, []
        async with self.http.stream("POST", CHATS, json=self.body(stream=True), headers=self.headers) as reply:
            if not self.answered(reply.status_code, 200):
                return
            async for line in filter_lines(reply):
                lines.append(line)
                if first is None and '"delta": {"content"' in line:
                    first = time.monotonic() - started
                if leave_after is not None and len(lines) > leave_after:
                    return
                await asyncio.sleep(pause)
        if lines[-1] != "data: [DONE]" or any('"error"' in line for line in lines):
            self.record.failures.append(f"{self.kind}: a stream ended in {lines[-2:]}")
        if first is not None and self.kind == "patient":
            self.record.first_text.append(first)

    async def plain(self) -> None:
        """Waits for a whole reply, or for several."""
        reply = await self.http.post(CHATS, json=self.body(n=self.random.choice([1, 1, 3])), headers=self.headers)
        if self.answered(reply.status_code, 200):
            assert reply.json()["choices"][0]["finish_reason"] in ("stop", "length")

    async def slow(self) -> None:
        """Reads a stream slowly."""
        await self.patient(pause=0.05)

    async def vanishing(self) -> None:
        """Leaves a stream somewhere."""
        await self.patient(leave_after=self.random.randint(0, 20))

    async def hasty(self) -> None:
        """Leaves before the answer is there."""
        try:
            timeout = self.random.random() * 0.1 + 1e-3
            body = self.body(max_tokens=100, n=2)
            reply = await self.http.post(CHATS, json=body, headers=self.headers, timeout=timeout)
            self.answered(reply.status_code, 200)
        except httpx.TimeoutException:
            self.record.answers["hasty left"] += 1

    async def garbage(self) -> None:
        """Sends what is no request."""
        noise = self.random.randbytes(self.random.randint(0, 300))
        wrong = self.body(**self.random.choice([{"temperature": "hot"}, {"n": -1}, {"audio": {}}, {"stop": [""]}]))
        content = self.random.choice([noise, b"{" + noise, json.dumps(wrong).encode(), b"[" * 5000])
        kind = self.random.choice(["application/json", "application/json", "text/plain"])
        reply = await self.http.post(CHATS, content=content, headers={"Content-Type": kind, **self.headers})
        self.answered(reply.status_code, 400 if kind == "application/json" else 415)

    async def hostile(self) -> None:
        """Comes from a page of another site, or sends many tiny messages."""
        site = self.random.choice([{"Host": "evil.example.org"}, {"Origin": "https://evil.example.org"}])
        self.answered((await self.http.post(CHATS, json=self.body(), headers=site)).status_code, 403)
        tiny = [{"role": "user", "content": ""}] * self.random.choice([1_000, 50_000])
        self.answered((await self.http.post(CHATS, json=self.body(messages=tiny))).status_code, 400)

    async def dangling(self) -> None:
        """Sends half of a header or of a body, and waits for the server to end it."""
        key = self.headers["Authorization"]
        start = f"POST {CHATS} HTTP/1.1\r\nHost: localhost\r\nAuthorization: {key}\r\n"
        length = "Content-Type: application/json\r\nContent-Length: 1000000\r\n\r\n"
        sent = self.random.choice([start, start + length + " " * self.random.randint(0, 500_000)])
        reader, writer = await asyncio.open_connection(self.http.base_url.host, self.http.base_url.port)
        try:
            writer.write(sent.encode())
            status = (await asyncio.wait_for(reader.read(), 60)).split(b" ")[1:2]
            self.answered(int(status[0]) if status else 408, 408)
        finally:
            writer.close()

    async def greedy(self) -> None:
        """Asks for more than there is."""
        long = [{"role": "user", "content": "x" * 10**4}]
        told = {"logprobs": True, "top_logprobs": 20, "n": 10, "max_tokens": 100}
        over = self.random.choice([{"max_tokens": 10**6}, {"n": 128}, {"messages": long}, told])
        reply = await self.http.post(CHATS, json=self.body(**over), headers=self.headers)
        self.answered(reply.status_code, 400)
        headers = {"Content-Type": "application/json", **self.headers}
        large = await self.http.post(CHATS, content=b" " * 5_000_000, headers=headers)
        self.answered(large.status_code, 413)

    async def stopped(self) -> None:
        """Asks for a long stream, reads nothing of it, and stays until it is hung up on, or for a moment."""
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.setblocking(False)
        url = self.http.base_url
        body = json.dumps(self.body(stream=True, logprobs=True, top_logprobs=20, max_tokens=200)).encode()
        lines = [f"POST {CHATS} HTTP/1.1", f"Host: {url.host}:{url.port}", "Content-Type: application/json"]
        lines += [f"Content-Length: {len(body)}", *(f"{name}: {value}" for name, value in self.headers.items())]
        with connection:
            loop = asyncio.get_running_loop()
            await loop.sock_connect(connection, (url.host, url.port))
            await loop.sock_sendall(connection, "\r\n".join([*lines, "", ""]).encode() + body)
            await asyncio.sleep(self.random.choice([0.5, 6]))
        self.record.answers["stopped left"] += 1

    async def unfair(self) -> None:
        """Wants as many replies as there are rows, again and again."""
        body = self.body(n=8, max_tokens=100, logit_bias={"256": -100})
        reply = await self.http.post(CHATS, json=body, headers=self.headers)
        self.answered(reply.status_code, 200)


async def filter_lines(reply: httpx.Response):
    """The lines of a stream that say something."""
    async for line in reply.aiter_lines():
        if line:
            yield line


async def numbers(http: httpx.AsyncClient) -> dict[str, float]:
    """The server's metrics, by name and labels."""
    lines = (await http.get("/metrics")).text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


async def watch(http: httpx.AsyncClient, until: float, record: Record) -> None:
    """Asks again and again whether the server is well."""
    while time.monotonic() < until:
        started = time.monotonic()
        reply = await http.get("/healthz")
        record.health.append(time.monotonic() - started)
        if reply.status_code != 200:
            record.failures.append(f"healthz: {reply.text}")
        await asyncio.sleep(0.1)


async def load(url: str, process: subprocess.Popen, seconds: float, num_clients: int, sayings: list[str]) -> dict:
    """The report of so many clients for so many seconds."""
    record, memory = Record(), []
    limits = httpx.Limits(max_connections=2 * num_clients, max_keepalive_connections=num_clients)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits, headers=bearer(KEYS[0])) as http:
        model = (await http.get("/v1/models")).json()["data"][0]["id"]
        until = time.monotonic() + seconds
        clients = [Client(number, http, model, sayings, record) for number in range(num_clients)]
        tasks = asyncio.gather(watch(http, until, record), *(client.run(until) for client in clients))
        while time.monotonic() < until:
            await asyncio.sleep(min(seconds / 20, 5))
            memory.append(memory_of(process))
        await tasks
        deadline = time.monotonic() + 300
        while (left := await numbers(http))["palm_rlhf_running"] + left["palm_rlhf_waiting"] > 0:
            assert time.monotonic() < deadline, f"slots have leaked: {left}"
            await asyncio.sleep(0.05)
    first_text = sorted(record.first_text) or [float("inf")]
    ended = {key.split('"')[1]: value for key, value in left.items() if key.startswith("palm_rlhf_replies_total")}
    return {
        "seconds": seconds,
        "clients": num_clients,
        "answers": dict(sorted(record.answers.items())),
        "failures": record.failures,
        "replies": ended,
        "tokens": left['palm_rlhf_tokens_total{kind="sampled"}'],
        "paused": left["palm_rlhf_paused_total"],
        "preempted": left["palm_rlhf_preempted_total"],
        "memory_mb": [round(size) for size in memory],
        "slowest_health": max(record.health),
        "first_text_p50": first_text[len(first_text) // 2],
        "first_text_p99": first_text[min(int(len(first_text) * 0.99), len(first_text) - 1)],
    }


def verdict(report: dict, log: str) -> list[str]:
    """What was not the fault of a client."""
    wrong = list(report["failures"])
    wrong += [line for line in log.splitlines() if "Traceback" in line or " ERROR " in line]
    wrong += [f"replies ended in {reason}" for reason in ("error", "timeout") if report["replies"][reason]]
    if report["seconds"] >= LONG_ENOUGH:
        wrong += [f"nothing was {name}" for name in ("paused", "preempted", "hung_up") if not report[name]]
    if report["slowest_health"] > SLOWEST_HEALTH:
        wrong.append(f"/healthz took {report['slowest_health']:.1f} seconds")
    memory = report["memory_mb"]
    early, late = max(memory[len(memory) // 4 : len(memory) // 2]), max(memory[-len(memory) // 4 :])
    if late > early * 1.05 + 10:
        wrong.append(f"memory grew from {early} to {late} MB")
    return wrong


def soak(checkpoint: Path, seconds: float, num_clients: int, sayings: list[str]) -> tuple[dict, list[str]]:
    """The report of a server under load, and what was wrong with it."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with serving(checkpoint, log) as (process, url):
            report = asyncio.run(load(url, process, seconds, num_clients, sayings))
        if process.returncode != 0:
            report["failures"].append(f"the server ended with {process.returncode}")
        text = log.read_text()
        report["hung_up"] = text.count("it has read nothing for")
        print(text, file=sys.stderr)
        return report, verdict(report, text)


def train(folder: Path, sayings: list[str]) -> None:
    """Saves a model that says these in turn."""
    torch.manual_seed(0)
    palm = PaLM(num_tokens=ByteTokenizer().num_tokens, dim=128, depth=4, heads=4, dim_head=32, max_seq_len=512)
    tokens = torch.tensor([list("".join(sayings * 2).encode())])
    optimizer = torch.optim.AdamW(palm.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        palm(tokens, return_loss=True).backward()
        optimizer.step()
    palm.save_pretrained(folder)


def main(seconds: float = 300, clients: int = 32, checkpoint: Path | None = None) -> None:
    """Soak a server.

    Args:
        seconds: How long.
        clients: How many at once.
        checkpoint: The model; by default a small one is trained.
    """
    sayings = ["Hello there. ", "How are you today? ", "Write a line about the sea. ", "Count to one hundred. "]
    with tempfile.TemporaryDirectory() as folder:
        if checkpoint is None:
            checkpoint = Path(folder) / "parrot"
            train(checkpoint, sayings)
        report, wrong = soak(checkpoint, seconds, clients, sayings)
    print(json.dumps({**report, "wrong": wrong, "cores": os.cpu_count(), "torch": torch.__version__}))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    tyro.cli(main)
