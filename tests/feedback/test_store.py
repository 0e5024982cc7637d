"""The store: the same laws for SQLite and PostgreSQL, and clear words where there is no database."""

import math
import shutil
import sqlite3
import subprocess
import threading
from datetime import datetime, timedelta, timezone

import pytest
import sqlalchemy as sa

from palm_rlhf.feedback.refusals import FeedbackError
from palm_rlhf.feedback.store import migrating
from palm_rlhf.feedback.store.answer_tables import Answer, KnownModel
from palm_rlhf.feedback.store.database import Store, StoreError
from palm_rlhf.feedback.store.learning_tables import ImportedRanking
from palm_rlhf.feedback.store.people_tables import LoginSession, Participant
from palm_rlhf.feedback.store.tree_tables import Task


def person(name="Ann", **values):
    return Participant(name=name, role="contributor", **values)


def names(session):
    return list(session.scalars(sa.select(Participant.name).order_by(Participant.name)))


def test_a_transaction_is_kept_whole_or_not_at_all(any_store):
    with any_store.writing() as session:
        session.add(person("Ann"))
    with pytest.raises(FeedbackError, match="no"), any_store.writing() as session:
        session.add(person("Bob"))
        session.flush()
        raise FeedbackError("no")
    with Store(any_store.url) as again, again.reading() as session:
        assert names(session) == ["Ann"]


def test_reading_sees_one_state(any_store):
    with any_store.writing() as session:
        session.add(person("Ann"))
    with any_store.reading() as before:
        assert names(before) == ["Ann"]
        with any_store.writing() as session:
            session.add(person("Bob"))
        assert names(before) == ["Ann"]
        with any_store.reading() as after:
            assert names(after) == ["Ann", "Bob"]


def test_reading_changes_nothing(any_store):
    with pytest.raises(StoreError), any_store.reading() as session:
        session.execute(sa.insert(Participant).values(name="Ann", role="admin"))
    with pytest.raises(RuntimeError, match=r"Store\.writing"), any_store.reading() as session:
        session.add(person())
    with any_store.writing() as session:  # on the connection that could change nothing before
        assert names(session) == []
        session.add(person())


def test_writers_take_turns(any_store):
    """Each adds one to what it has read: none is lost, in two stores as of two processes, by four threads each."""
    with any_store.writing() as session:
        session.add(person("0"))

    def count(store):
        for _ in range(5):
            with store.writing() as session:
                row = session.scalars(sa.select(Participant)).one()
                row.name = str(int(row.name) + 1)

    with Store(any_store.url) as other:
        threads = [threading.Thread(target=count, args=(store,)) for store in (any_store, other) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with any_store.reading() as session:
        assert names(session) == ["40"]


def test_writing_within_writing_is_refused_at_once(store):
    with store.writing(), pytest.raises(RuntimeError, match="wait for itself"), store.writing():
        pass


def test_a_writer_that_waits_too_long_is_told(any_store, monkeypatch):
    for module in ("database", "transactions"):
        monkeypatch.setattr(f"palm_rlhf.feedback.store.{module}.BUSY_SECONDS", 0.05)
    monkeypatch.setattr("palm_rlhf.feedback.store.database_address.BUSY_SECONDS", 0.05)
    with Store(any_store.url) as other, any_store.writing():
        with pytest.raises(StoreError, match="others have been writing") as busy, other.writing():
            pass  # another process
        assert busy.value.status == 503
        waiting = []

        def wait():
            try:
                with any_store.writing():
                    pass
            except StoreError as error:
                waiting.append(str(error))

        thread = threading.Thread(target=wait)
        thread.start()
        thread.join()
        assert "others have been writing" in waiting[0]


def test_references_are_checked(any_store):
    with pytest.raises(sa.exc.IntegrityError), any_store.writing() as session:
        session.add(Task(kind="write_prompt", person_id="nobody", language="en", expires_at=datetime.now(timezone.utc)))


def test_times_come_back_in_utc_to_the_microsecond(any_store):
    east = timezone(timedelta(hours=8))
    times = [datetime(2026, 1, 2, 3, 4, 5, 678901, east), datetime(2026, 1, 1, 19, 4, 6, tzinfo=timezone.utc)]
    with any_store.writing() as session:
        session.add(person(id="ann"))
        session.flush()
        session.add_all([LoginSession(person_id="ann", created_at=time, expires_at=time) for time in times])
    with any_store.reading() as session:
        found = list(session.scalars(sa.select(LoginSession.expires_at).order_by(LoginSession.expires_at)))
        assert found == times
        assert all(time.tzinfo == timezone.utc for time in found)
        earlier = session.scalars(sa.select(LoginSession).where(LoginSession.expires_at < times[1])).all()
        assert [row.expires_at for row in earlier] == times[:1]
    with pytest.raises(ValueError, match="without a zone"), any_store.writing() as session:
        session.add(LoginSession(person_id="ann", expires_at=datetime(2026, 1, 1)))


JSON = {"deep": [{"中": '🙂 \\u0000 "quoted" \\'}, 1.5, None, True], "big": 2**53, "n": 7}


def test_json_comes_back_and_none_is_null(any_store):
    with any_store.writing() as session:
        session.add_all([person(id="ann"), KnownModel(id="m", name="m")])
        session.flush()
        fields = {"prompt_key": "0", "text": "𝒯", "model_id": "m", "purpose": "chat"}
        session.add(Answer(id="a", prompt=[JSON], sampling=JSON, **fields))
        task = Task(kind="k", person_id="ann", language="en", shown=None, expires_at=datetime.now(timezone.utc))
        session.add(task)
    with any_store.reading() as session:
        answer = session.get(Answer, "a")
        assert (answer.prompt, answer.sampling, answer.text) == ([JSON], JSON, "𝒯")
        assert session.scalar(sa.select(Task.id).where(Task.shown.is_(None))) == task.id
        assert session.scalar(sa.select(Answer.id).where(Answer.sampling["n"].as_integer() == 7)) == "a"


@pytest.mark.parametrize("text, word", [("a\0b", r"U\+0000"), ("a\ud800b", "surrogate")])
def test_characters_that_no_database_keeps_are_refused_in_words(any_store, text, word):
    ranking = {"digest": "0", "source": "s", "kind": "ai", "responses": []}
    for row in (person(text), ImportedRanking(prompt=[{"content": text}], **ranking)):
        with pytest.raises(FeedbackError, match=word), any_store.writing() as session:
            session.add(row)


def test_numbers_that_are_not_finite_are_refused(any_store):
    with pytest.raises(ValueError, match="JSON"), any_store.writing() as session:
        session.add(ImportedRanking(digest="0", source="s", kind="ai", prompt=[math.nan], responses=[]))


def test_the_migrations_make_the_tables_of_the_code(any_store):
    from alembic.autogenerate import compare_metadata
    from alembic.runtime.migration import MigrationContext

    from palm_rlhf.feedback.store.migrating import VERSION_TABLE
    from palm_rlhf.feedback.store.table_base import Base

    with any_store.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE, "compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


OPEN = """
import sys
from palm_rlhf.feedback.store.database import Store
from palm_rlhf.feedback.store.people_tables import Participant
print("ready", flush=True)
sys.stdin.readline()
with Store(sys.argv[1]) as store, store.writing() as session:
    session.add(Participant(name=sys.argv[2], role="contributor"))
print("kept")
"""


def start_at_once(start_python, url, people):
    processes = [start_python(OPEN, url, name, stdin=subprocess.PIPE) for name in people]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        assert process.communicate() == ("kept\n", "")
    with Store(url) as store, store.reading() as session:
        assert names(session) == list(people)


def test_processes_that_start_at_once_make_one_file(tmp_path, start_python):
    start_at_once(start_python, str(tmp_path / "new.db"), "abc")


def test_processes_that_start_at_once_make_the_tables_once(postgres_server, start_python):
    with postgres_server.database() as url:
        start_at_once(start_python, url, "ab")


def test_the_database_of_a_newer_version_is_refused(any_store):
    with any_store.writing() as session:
        session.execute(sa.text("UPDATE palm_rlhf_version SET version_num = '9999'"))
    with pytest.raises(ValueError, match=r"newer palm-rlhf \(revision 9999\).*upgrade palm-rlhf"):
        Store(any_store.url)


def test_the_database_of_another_program_is_refused_and_stays_as_it_was(tmp_path, postgres_server):
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE songs (title TEXT)")
    with postgres_server.database() as url:
        engine = sa.create_engine(sa.make_url(url).set(drivername="postgresql+psycopg"))
        with engine.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE songs (title TEXT)")
        for database in (path, url):
            with pytest.raises(ValueError, match=r"another program.*songs"):
                Store(database)
        assert sa.inspect(engine).get_table_names() == ["songs"]
        engine.dispose()
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("songs",)]


@pytest.mark.parametrize(
    "database, words",
    [
        ("{folder}/missing/feedback.db", "in a folder that does not exist"),
        ("sqlite:///{folder}/missing/feedback.db", "in a folder that does not exist"),
        ("{folder}", "got the folder .* as a database, expected a file"),
        ("{folder}/text.db", "no SQLite database"),
        ("sqlite://", "without a file"),
        ("sqlite:///:memory:", "without a file"),
        ("mysql://me:secret@host/name", "got the database mysql.*expected a path, sqlite:///PATH, or postgresql"),
        ("postgresql://host:port/name", "cannot be read"),
    ],
)
def test_a_place_for_no_database_is_refused_in_words(tmp_path, database, words):
    (tmp_path / "text.db").write_text("I am not a database, whatever my name says.")
    with pytest.raises(ValueError, match=words) as refusal:
        Store(database.format(folder=tmp_path))
    assert "secret" not in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["text.db"]


def test_a_path_may_have_any_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("100% feed?back#1 中.db", "plain.db"):
        with Store(name) as store, store.writing() as session:
            session.add(person())
        assert (tmp_path / name).stat().st_size > 0
        with Store(tmp_path / name) as store, store.reading() as session:
            assert names(session) == ["Ann"]


def test_a_server_that_cannot_be_reached_is_named_without_its_password(postgres_server):
    with pytest.raises(StoreError, match="password authentication failed") as refusal:
        Store(postgres_server.url("postgres", password="wrong-one"))
    assert "wrong-one" not in str(refusal.value)
    with pytest.raises(StoreError, match=r"database.*does not exist"):
        Store(postgres_server.url("nowhere"))
    with pytest.raises(StoreError, match="look whether it is running") as refusal:
        Store("postgresql://palm:s3cret@127.0.0.1:1/name")
    assert "s3cret" not in str(refusal.value)


def test_postgresql_may_start_anew_between_transactions(migrated_postgres, postgres_url):
    with Store(postgres_url) as store:
        with store.writing() as session:
            session.add(person())
        others = "datname <> 'postgres' AND pid <> pg_backend_pid()"
        migrated_postgres.run(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}")
        with store.reading() as session:
            assert names(session) == ["Ann"]


MIGRATION = """
import sqlalchemy as sa
from alembic import op

revision, down_revision = {revision!r}, {before!r}


def upgrade():
    with op.batch_alter_table("people") as table:  # SQLite copies the table, to which others refer
        table.add_column(sa.Column({column!r}, sa.Text(), nullable=False, server_default="none"))
    {last}
"""


def add_migration(folder, revision, before, column, last="pass"):
    text = MIGRATION.format(revision=revision, before=before, column=column, last=last)
    (folder / "versions" / f"{revision}_more.py").write_text(text)


def test_an_older_database_is_brought_up_to_date_or_stays_as_it_was(any_store, tmp_path, monkeypatch):
    with any_store.writing() as session:
        session.add(person(id="ann"))
        session.flush()
        session.add(LoginSession(person_id="ann", expires_at=datetime.now(timezone.utc)))
    folder = shutil.copytree(migrating.MIGRATIONS, tmp_path / "migrations")
    monkeypatch.setattr(migrating, "MIGRATIONS", folder)
    add_migration(folder, "0002", "0001", "colour")
    with Store(any_store.url) as store:
        with store.reading() as session:
            assert session.execute(sa.text("SELECT name, colour FROM people")).all() == [("Ann", "none")]
            assert session.scalar(sa.select(LoginSession.person_id)) == "ann"
        with pytest.raises(sa.exc.IntegrityError), store.writing() as session:  # on the connection that migrated
            session.execute(sa.text("DELETE FROM people"))
    add_migration(folder, "0003", "0002", "shape", last="raise RuntimeError('the power fails')")
    with pytest.raises(RuntimeError, match="the power fails"):
        Store(any_store.url)
    columns = {column["name"] for column in sa.inspect(any_store.engine).get_columns("people")}
    assert "colour" in columns
    assert "shape" not in columns
    (folder / "versions" / "0003_more.py").unlink()
    Store(any_store.url).close()  # it is at 0002 still, and nobody holds a lock


def test_foreign_keys_are_checked_in_a_new_file(tmp_path):
    with Store(tmp_path / "new.db") as store, pytest.raises(sa.exc.IntegrityError), store.writing() as session:
        session.add(LoginSession(person_id="nobody", expires_at=datetime.now(timezone.utc)))
