"""What was acknowledged stays: when a writer is killed, when the disk is full, and when a file cannot grow."""

import random
import signal

import pytest
import sqlalchemy as sa

from palm_rlhf.feedback.store.database import Store, StoreError
from palm_rlhf.feedback.store.people_tables import LoginSession, Participant

WRITE = """
import sys
from palm_rlhf.feedback.store.database import Store
from palm_rlhf.feedback.store.people_tables import LoginSession, Participant
from palm_rlhf.feedback.store.table_base import utc_now

store = Store(sys.argv[1])
for number in range(10**9):
    name = f"{sys.argv[2]}-{number}"
    with store.writing() as session:  # two rows, which belong together
        session.add(Participant(id=name, name=name + "x" * 3000, role="contributor"))
        session.flush()
        session.add(LoginSession(person_id=name, expires_at=utc_now()))
    print(name, flush=True)
"""


def test_a_killed_writer_loses_nothing_that_it_acknowledged(tmp_path, start_python):
    """Killed twice at random moments, in the middle of its transactions or of what SQLite does after them."""
    path, acknowledged, chance = tmp_path / "feedback.db", set(), random.Random(0)
    for run in range(2):
        process = start_python(WRITE, path, run)
        for _ in range(chance.randrange(100, 400)):
            acknowledged.add(process.stdout.readline().strip())
        process.send_signal(signal.SIGKILL)
        rest, errors = process.communicate()
        assert errors == ""
        acknowledged.update(line for line in rest.split("\n")[:-1])
        with Store(path) as store, store.reading() as session:
            people = set(session.scalars(sa.select(Participant.id)))
            assert acknowledged <= people
            assert len(people - acknowledged) <= run + 1  # of each run the transaction that it was about to print
            assert set(session.scalars(sa.select(LoginSession.person_id))) == people
            assert session.execute(sa.text("PRAGMA integrity_check")).scalar() == "ok"


def fill(store):
    """Write people until the database refuses; return their number, and the error."""
    for number in range(10**6):
        try:
            with store.writing() as session:
                session.add(Participant(name=str(number) + "x" * 50_000, role="contributor"))
        except StoreError as error:
            return number, error
    raise AssertionError("the disk is never full")


def test_a_full_disk_says_so_and_keeps_what_was_written(store):
    pages = 200

    @sa.event.listens_for(store.engine, "checkout")
    def limit(connection, *_):
        connection.execute(f"PRAGMA max_page_count={pages}")

    kept, error = fill(store)
    assert kept > 5
    assert error.status == 507
    assert "its disk is full: make room on it" in str(error)
    assert store.name in str(error)
    with store.reading() as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(Participant)) == kept
    pages = 100_000  # somebody made room
    with store.writing() as session:
        session.add(Participant(name="Ann", role="contributor"))
    with store.reading() as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(Participant)) == kept + 1


def test_a_full_disk_of_postgresql_says_so(migrated_postgres, postgres_url):
    """PostgreSQL's own error, raised by it with the code that a full disk has."""
    full = "RAISE EXCEPTION 'could not extend file: No space left on device' USING ERRCODE = '53100'"
    with Store(postgres_url) as store, pytest.raises(StoreError, match="disk of PostgreSQL is full") as error:
        with store.writing() as session:
            session.add(Participant(name="Ann", role="contributor"))
            session.flush()
            session.execute(sa.text(f"DO $$ BEGIN {full}; END $$"))
    assert error.value.status == 507
    with Store(postgres_url) as store, store.reading() as session:
        assert session.scalars(sa.select(Participant)).all() == []


FILL = """
import resource, sys
from palm_rlhf.feedback.store.database import Store, StoreError
from palm_rlhf.feedback.store.people_tables import Participant

store = Store(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, resource.RLIM_INFINITY))
kept = 0
try:
    while True:
        with store.writing() as session:
            session.add(Participant(name="x" * 50_000, role="contributor"))
        kept += 1
except StoreError as error:
    print(kept, error.status, error)
"""


def test_a_file_that_cannot_grow_says_so_and_keeps_what_was_written(store, start_python):
    output, errors = start_python(FILL, store.url).communicate()
    assert errors == ""
    kept, status, words = output.split(" ", 2)
    assert (int(kept) > 5, status) == (True, "507")
    assert "disk is full or damaged" in words
    with store.reading() as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(Participant)) == int(kept)


def test_a_damaged_file_is_named(store):
    with store.writing() as session:
        session.add(Participant(name="x" * 50_000, role="contributor"))
    store.close()
    with open(store.name, "r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 4096 * 40)
    with pytest.raises(StoreError, match="damaged: put back a copy") as error, Store(store.url) as again:
        fill(again)
    assert error.value.status == 503
