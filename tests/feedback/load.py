"""Many simulated people in the browserless pages of `palm-rlhf collect`, and what the database holds afterwards.

They log in, take tasks, hand them in, send some forms twice, skip some, leave some to expire, and hand some in late.
The server is killed (SIGKILL) and started again as often as `--kills` says, at random moments.

python tests/feedback/load.py                                       # 100 people, 2 minutes, SQLite
python tests/feedback/load.py --database postgresql://USER@HOST/NAME --kills 3

Ends with a line of JSON, and with status 1 where a law of the database is broken, work that was acknowledged is not in
it, or the server failed.
"""

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import httpx
import tyro
from sqlalchemy import func, select

from palm_rlhf.feedback.people.accounts import add_person
from palm_rlhf.feedback.people.passwords import Passwords
from palm_rlhf.feedback.settings import CollectionSettings
from palm_rlhf.feedback.store.database import Store
from palm_rlhf.feedback.store.invariants import broken_laws
from palm_rlhf.feedback.store.table_base import utc_now
from palm_rlhf.feedback.store.tree_tables import MessageReview, ReplyRanking, Task, Tree, TreeMessage
from tests.feedback.task_invariants import violations

SETTINGS = CollectionSettings(
    max_open_trees=30, max_tasks_per_hour=100_000, task_timeout=timedelta(seconds=20), num_model_replies=0
)
OPTIONS = ("--max-open-trees", "30", "--max-tasks-per-hour", "100000", "--task-timeout", "20")
PASSWORD = "correct horse battery"
READY = re.compile(r"collected at (http://\S+)")
TOKEN = re.compile(r'name="token" value="([^"]+)"')
TASK = re.compile(r"/tasks/([0-9a-f-]{36})")
FIELDS = re.compile('name="(spam|order)"')
ORDER = re.compile(r'name="order" value="([^"]+)"')
BUSY = 503  # where the writers before take more than half a minute: refused in words, and nothing is kept
PATIENCE = 60  # seconds in which a server answers


@dataclass
class Findings:
    """What the people have seen."""

    acknowledged: set[str] = field(default_factory=set)  # tasks
    statuses: Counter = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    unanswered: int = 0  # requests that a killed server did not answer


@dataclass
class Server:
    """The command in a process of its own, which is killed and started again at one port."""

    database: str
    folder: Path
    process: subprocess.Popen | None = None
    url: str = ""
    number: int = 0

    def start(self) -> None:
        port = self.url.rpartition(":")[2] or "0"
        command = [sys.executable, "-m", "palm_rlhf.cli", "collect", "--database", self.database, "--port", port]
        command += ["--secret-file", str(self.folder / "secret"), *OPTIONS]
        self.number += 1
        log = self.folder / f"log{self.number}"
        with open(log, "w") as errors:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        line = self.process.stdout.readline()
        assert READY.search(line), log.read_text()
        self.url = READY.search(line).group(1)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(PATIENCE)


class Person:
    """One person in a browser: a client with cookies, and the tasks that were left open."""

    def __init__(self, name: str, server: Server, findings: Findings, seed: int, think: float):
        self.name, self.server, self.findings, self.think = name, server, findings, think
        self.rng, self.texts = random.Random(f"{seed}/{name}"), 0
        self.client = httpx.AsyncClient(timeout=PATIENCE, headers={"accept": "text/html"})
        self.left: list[tuple[str, str, dict]] = []

    async def request(self, method: str, path: str, data=None) -> httpx.Response | None:
        """Send a request once; None where the server was killed."""
        started = time.monotonic()
        try:
            response = await self.client.request(method, self.server.url + path, data=data)
        except httpx.TransportError:
            self.findings.unanswered += 1
            await asyncio.sleep(0.3)
            return None
        self.findings.seconds.append(time.monotonic() - started)
        self.findings.statuses[f"{method} {response.status_code}"] += 1
        if response.status_code >= 500 and response.status_code != BUSY:
            self.findings.failures.append(f"{method} {path}: {response.status_code} {response.text[:300]}")
        return response

    async def log_in(self, few: asyncio.Semaphore) -> None:
        async with few:
            page = await self.request("GET", "/login")
            form = {"token": TOKEN.search(page.text).group(1), "name": self.name, "password": PASSWORD, "next": ""}
            reply = await self.request("POST", "/login", form)
            assert reply.status_code == 303, reply.text

    async def work(self, until: float) -> None:
        while time.monotonic() < until:
            await asyncio.sleep(self.rng.expovariate(1 / self.think))
            home = await self.request("GET", "/")
            if home is None:
                continue
            reply = await self.request("POST", "/tasks", {"token": TOKEN.search(home.text).group(1)})
            while reply is not None and reply.status_code == 303 and time.monotonic() < until:
                found = TASK.search(reply.headers["location"])
                if found is None:
                    break
                reply = await self.do(found.group(1))
        await self.client.aclose()

    async def do(self, task_id: str) -> httpx.Response | None:
        """Do a task, or not; the reply that leads to the next one."""
        path = f"/tasks/{task_id}"
        page = await self.request("GET", path)
        if page is None or page.status_code != 200 or not TOKEN.search(page.text):
            return None
        if "<textarea" not in page.text and not FIELDS.search(page.text):
            return None  # it expired before it was looked at
        chance, token = self.rng.random(), TOKEN.search(page.text).group(1)
        if chance < 0.05:
            return await self.request("POST", path + "/skip", {"token": token})
        form = {**self.fields(page.text), "token": token}
        if chance < 0.08:
            self.left.append((path, task_id, form))  # and goes on with others once it has expired
            await asyncio.sleep(21)
            if self.rng.random() < 0.5:
                return None
        await asyncio.sleep(self.rng.expovariate(1 / self.think))
        reply = await self.send(path, task_id, form)
        if reply is None or chance > 0.9:  # the same form again, as after a lost reply or a double click
            reply = await self.send(path, task_id, form)
        if self.left and chance > 0.8:
            await self.send(*self.left.pop())
        return reply

    async def send(self, path: str, task_id: str, form: dict) -> httpx.Response | None:
        reply = await self.request("POST", path, form)
        if reply is not None and reply.status_code == 303:
            self.findings.acknowledged.add(task_id)
        return reply

    def fields(self, page: str) -> dict:
        if order := ORDER.findall(page):
            self.rng.shuffle(order)
            return {"order": order}
        if 'name="spam"' in page:
            return {"spam": str(int(self.rng.random() < 0.1)), "lang_mismatch": "0", "quality": "0.75", "pii": "1"}
        self.texts += 1
        return {"text": f"Text {self.texts} of {self.name}\r\nwith <b>two</b> lines."}


def add_people(database: str, number: int) -> list[str]:
    """Add people with one password."""
    hashed = Passwords().hash(PASSWORD)
    names = [f"person {each}" for each in range(number)]
    with Store(database) as store, store.writing() as session:
        for name in names:
            add_person(session, name, "contributor", utc_now()).password_hash = hashed
    return names


async def crowd(server: Server, names: list[str], seconds: float, kills: int, seed: int, think: float) -> Findings:
    """Let people work, and kill the server now and then."""
    findings = Findings()
    people = [Person(name, server, findings, seed, think) for name in names]
    few = asyncio.Semaphore(4)  # logins cost much, so that passwords cannot be guessed
    await asyncio.gather(*(person.log_in(few) for person in people))
    findings.statuses.clear(), findings.seconds.clear()
    begun, rng = time.monotonic(), random.Random(seed)
    moments = sorted(rng.uniform(0.2, 0.8) * seconds for _ in range(kills))

    async def kill() -> None:
        for moment in moments:
            await asyncio.sleep(max(0.0, begun + moment - time.monotonic()))
            await asyncio.to_thread(server.kill)
            await asyncio.to_thread(server.start)

    await asyncio.gather(kill(), *(person.work(begun + seconds) for person in people))
    return findings


def checked(database: str, findings: Findings) -> dict:
    """What the database holds, and every law that is broken in it."""
    with Store(database) as store, store.reading() as session:
        broken = [*violations(session, SETTINGS, utc_now()), *broken_laws(session, SETTINGS, utc_now())]
        done = set(session.scalars(select(Task.id).where(Task.outcome == "done")))
        counts = {
            table.__tablename__: session.scalar(select(func.count()).select_from(table))
            for table in (TreeMessage, MessageReview, ReplyRanking, Task)
        }
        outcomes = Counter(map(str, session.scalars(select(Task.outcome))))
        trees = Counter(session.scalars(select(Tree.state)))
    return {
        "broken": broken,
        "lost": sorted(findings.acknowledged - done),
        "acknowledged": len(findings.acknowledged),
        "done": len(done),
        **counts,
        "outcomes": dict(outcomes),
        "trees": dict(trees),
    }


@contextmanager
def serving(database: str, folder: Path):
    """A server, interrupted at the end; it has to end well."""
    server = Server(database, folder)
    server.start()
    try:
        yield server
    except BaseException:
        server.kill()
        raise
    status = server.stop()
    assert status == 0, f"the server ended with status {status}: {(folder / f'log{server.number}').read_text()}"


def load(database: str, *, people: int, seconds: float, kills: int, seed: int = 0, think: float = 0.5) -> dict:
    """Let people work against a server, and return what they and the database say.

    Args:
        database: An empty database of feedback, or a place for one.
        people: Their number.
        seconds: How long they work.
        kills: How often the server is killed.
        seed: Of what people do.
        think: Mean seconds that a person thinks before a request.
    """
    names = add_people(database, people)
    with tempfile.TemporaryDirectory() as folder:
        with serving(database, Path(folder)) as server:
            findings = asyncio.run(crowd(server, names, seconds, kills, seed, think))
        logs = "".join(path.read_text() for path in sorted(Path(folder).glob("log*")))
    latencies = sorted(findings.seconds)
    return {
        "people": people,
        "seconds": seconds,
        "kills": kills,
        "requests": len(latencies),
        "unanswered": findings.unanswered,
        "median_seconds": round(latencies[len(latencies) // 2], 3),
        "p95_seconds": round(latencies[int(len(latencies) * 0.95)], 3),
        "statuses": dict(findings.statuses),
        "failures": findings.failures[:5],
        "tracebacks": logs.count("Traceback"),
        **checked(database, findings),
    }


def main(
    database: str | None = None,
    people: int = 100,
    seconds: float = 120.0,
    kills: int = 0,
    seed: int = 0,
    think: float = 0.5,
) -> None:
    """Load a server, and print what was found as a line of JSON.

    Args:
        database: The URL of an empty database; by default a file that is removed at the end.
        people: People at once.
        seconds: How long they work.
        kills: How often the server is killed and started again.
        seed: Seed of what people do.
        think: Mean seconds that a person thinks before a request.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        found = load(
            database or f"sqlite:///{folder}/feedback.db",
            people=people,
            seconds=seconds,
            kills=kills,
            seed=seed,
            think=think,
        )
    print(json.dumps(found))
    sys.exit(bool(found["broken"] or found["lost"] or found["failures"] or found["tracebacks"]))


if __name__ == "__main__":
    tyro.cli(main)
