"""Databases of feedback, empty for each test: SQLite's in its folder, and PostgreSQL's in a cluster of this process."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest
import sqlalchemy as sa

from palm_rlhf.feedback.store.database import Store
from tests.conftest import NEEDS_POSTGRES

POSTGRES_FOLDERS = "/usr/lib/postgresql/*/bin"  # of Debian, which puts only clients on the PATH
# Tests kill servers of the store, never PostgreSQL itself: nothing has to reach the disk.
POSTGRES_OPTIONS = {
    "fsync": "off",
    "full_page_writes": "off",
    "synchronous_commit": "off",
    "listen_addresses": "",
    "max_connections": "120",
    "shared_buffers": "16MB",
}


class PostgresServer:
    """A running cluster; it listens in a socket of its folder only, and asks for the password of its user."""

    user, password = "palm", "a secret"

    def __init__(self, folder: Path):
        self.folder = folder
        self.numbers = count()

    def url(self, database: str, *, password: str | None = None) -> str:
        address = sa.URL.create(
            "postgresql",
            self.user,
            self.password if password is None else password,
            database=database,
            query={"host": str(self.folder)},
        )
        return address.render_as_string(hide_password=False)

    def run(self, *statements: str) -> None:
        """Run statements outside any transaction."""
        address = sa.make_url(self.url("postgres")).set(drivername="postgresql+psycopg")
        engine = sa.create_engine(address, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
        with engine.connect() as connection:
            for statement in statements:
                connection.exec_driver_sql(statement)

    @contextmanager
    def database(self, template: str = "template1"):
        """The URL of a new database, a copy of another one, which is dropped at the end."""
        name = f"test_{next(self.numbers)}"
        self.run(f"CREATE DATABASE {name} TEMPLATE {template}")
        yield self.url(name)
        self.run(f"DROP DATABASE {name} WITH (FORCE)")


def postgres_programs() -> Path | None:
    """The folder of PostgreSQL's newest programs here, or None."""

    def version(folder: Path) -> float:
        return float(folder.parent.name) if folder.parent.name.replace(".", "").isdigit() else 0

    folders = sorted(Path("/").glob(POSTGRES_FOLDERS.lstrip("/")), key=version, reverse=True)
    if on_path := shutil.which("initdb"):
        folders.append(Path(on_path).resolve().parent)
    return next((folder for folder in folders if (folder / "initdb").exists() and (folder / "postgres").exists()), None)


@pytest.fixture(scope="session")
def postgres_server():
    """PostgreSQL, started once in each process that runs tests; the test skips where it is not installed."""
    programs = postgres_programs()
    if programs is None:
        pytest.skip(f"{NEEDS_POSTGRES}: apt-get install postgresql")
    folder = Path(tempfile.mkdtemp(prefix="palm-postgres-"))  # short, for the path of a socket has 107 bytes
    account = {}
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        nobody = pwd.getpwnam("nobody")
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        account = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": ()}
    secret = folder / "password"
    secret.write_text(PostgresServer.password)
    secret.chmod(0o644)
    data, log = folder / "data", folder / "log"
    made = [
        programs / "initdb",
        "--no-sync",
        "--no-instructions",
        "--encoding=UTF8",
        "--locale=C",
        "--auth=scram-sha-256",
    ]
    made += [f"--username={PostgresServer.user}", f"--pwfile={secret}", data]
    subprocess.run(made, check=True, cwd=folder, stdout=subprocess.DEVNULL, **account)
    options = {**POSTGRES_OPTIONS, "unix_socket_directories": folder}
    flags = [f"--{name}={value}" for name, value in options.items()]
    with open(log, "wb") as output:
        command = [programs / "postgres", "-D", data, *flags]
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, **account)
    try:
        server = PostgresServer(folder)
        _wait_until_ready(server, process, log)
        yield server
    finally:
        process.send_signal(signal.SIGQUIT)  # at once, whoever is still connected
        process.wait(60)
        shutil.rmtree(folder)


def _wait_until_ready(server: PostgresServer, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            return server.run("SELECT 1")
        except sa.exc.OperationalError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL did not start: {log.read_text()}") from error
            time.sleep(0.02)


@pytest.fixture(scope="session")
def migrated_postgres(postgres_server):
    """The server; its database `migrated` is one of feedback without rows, to be copied."""
    postgres_server.run("CREATE DATABASE migrated")
    Store(postgres_server.url("migrated")).close()
    return postgres_server


@pytest.fixture(scope="session")
def migrated_file(tmp_path_factory) -> Path:
    """A database file without rows, to be copied."""
    path = tmp_path_factory.mktemp("migrated") / "feedback.db"
    Store(path).close()
    return path


@pytest.fixture
def postgres_url(migrated_postgres):
    """The URL of an empty database of feedback in PostgreSQL."""
    with migrated_postgres.database("migrated") as url:
        yield url


@pytest.fixture
def store(migrated_file, tmp_path):
    """An empty store in `tmp_path / "feedback.db"`."""
    with Store(shutil.copy(migrated_file, tmp_path / "feedback.db")) as store:
        yield store


@pytest.fixture(params=["sqlite", "postgresql"])
def any_store(request):
    """An empty store: in SQLite, and once more in PostgreSQL where that is installed."""
    if request.param == "sqlite":
        yield request.getfixturevalue("store")
        return
    with Store(request.getfixturevalue("postgres_url")) as store:
        yield store
