"""Opening a site: where its secret comes from, who reads it, and how the first admin comes in."""

import logging
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import select

from palm_rlhf.feedback.store.people_tables import Participant
from palm_rlhf.feedback.web.site_setup import SECRET_VARIABLE, first_words, open_site, opened_site
from palm_rlhf.serving.http.access import Access
from tests.feedback.visiting import PASSWORD, QUICK, enter, join, visit

ANY = {"access": Access(("*",)), "is_loopback": False, "passwords": QUICK}
LOCAL = {"access": Access(), "is_loopback": True, "passwords": QUICK}


def secret_of(database, **options) -> str:
    with opened_site(database, **{**LOCAL, **options}) as site:
        return site.secret


def test_the_secret_is_made_once_and_read_by_its_owner_only(tmp_path, migrated_file, caplog):
    database = tmp_path / "feedback.db"
    database.write_bytes(migrated_file.read_bytes())
    with caplog.at_level(logging.DEBUG):
        secret = secret_of(database)
        assert secret_of(f"sqlite:///{database}") == secret and len(secret) >= 32
    file = tmp_path / "feedback.db.secret"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and file.read_text() == secret + "\n"
    assert secret not in caplog.text
    file.chmod(0o644)
    assert secret_of(database) == secret and f"chmod 600 {file}" in caplog.text
    assert sorted(path.name for path in tmp_path.glob("*.secret*")) == ["feedback.db.secret"]


def test_processes_that_start_at_once_have_one_secret(tmp_path, migrated_file):
    database = tmp_path / "feedback.db"
    database.write_bytes(migrated_file.read_bytes())
    with ThreadPoolExecutor(6) as pool:
        assert len(set(pool.map(lambda _: secret_of(database), range(6)))) == 1


def test_a_secret_of_a_file_or_of_the_environment(tmp_path, migrated_file, monkeypatch):
    database, file = tmp_path / "feedback.db", tmp_path / "a secret"
    database.write_bytes(migrated_file.read_bytes())
    made = secret_of(database, secret_file=file)
    assert file.read_text().strip() == made and not (tmp_path / "feedback.db.secret").exists()
    monkeypatch.setenv(SECRET_VARIABLE, "e" * 32)
    assert secret_of(database) == "e" * 32 and secret_of(database, secret_file=file) == made
    monkeypatch.setenv(SECRET_VARIABLE, "short")
    with pytest.raises(ValueError, match="got a secret of 5 characters from the environment variable PALM_RLHF"):
        secret_of(database)
    file.write_text("short too\n")
    with pytest.raises(ValueError, match="expected at least 32"):
        secret_of(database, secret_file=file)


def test_the_secret_of_a_site_in_postgresql_lasts_as_long_as_the_process(postgres_url, caplog):
    assert secret_of(postgres_url) != secret_of(postgres_url)
    assert "--secret-file" in caplog.text


def test_a_session_lives_on_after_a_restart(tmp_path, migrated_file):
    database = tmp_path / "feedback.db"
    database.write_bytes(migrated_file.read_bytes())
    with opened_site(database, **LOCAL) as site, visit(site) as browser:
        enter(browser, join(site, "Alice"))
        cookies = dict(browser.cookies)
    with opened_site(database, **LOCAL) as site, visit(site) as browser:
        browser.cookies.update(cookies)
        assert "Alice" in browser.page("/account").text


def test_the_first_admin_gets_a_link_where_others_reach_the_site(tmp_path, migrated_file):
    database = tmp_path / "feedback.db"
    database.write_bytes(migrated_file.read_bytes())
    with opened_site(database, **LOCAL) as site:
        assert first_words(site, "http://127.0.0.1:1") is None
    with opened_site(database, **ANY) as site:
        words = [first_words(site, "http://0.0.0.0:18889") for _ in range(2)]
        assert all("within a day to become the admin" in text and "0.0.0.0" not in text for text in words)
        secrets = [text.split("/join/")[1].split()[0] for text in words]
        with visit(site) as browser:
            assert browser.get("/account").status_code == 401  # nobody is local here
            fields = {"secret": secrets[0], "name": "Root", "password": PASSWORD, "again": PASSWORD}
            assert browser.submit("/join", f"/join/{secrets[0]}", **fields).status_code == 303
            assert browser.page("/people").status_code == 200
            assert browser.page(f"/join/{secrets[1]}").status_code == 410
        assert first_words(site, "http://h") is None
    with opened_site(database, **LOCAL) as site, visit(site) as browser:
        assert browser.get("/account").status_code == 401  # nor anywhere, once somebody has a password


def test_the_password_of_the_admin_may_come_from_a_file(tmp_path, migrated_file):
    database, file = tmp_path / "feedback.db", tmp_path / "password"
    database.write_bytes(migrated_file.read_bytes())
    for password in (PASSWORD, "another one 8"):
        file.write_text(password + "\n")
        with opened_site(database, **ANY, admin_password_file=file) as site, visit(site) as browser:
            assert first_words(site, "http://h") is None
            assert browser.log_in("admin", password).status_code == 303
            assert browser.page("/people").status_code == 200
            with site.store.reading() as session:
                assert list(session.scalars(select(Participant.role))) == ["admin"]
    file.write_text("short")
    with pytest.raises(ValueError, match="got a password of 5 characters, expected 10 to 200"):
        open_site(database, **ANY, admin_password_file=file)
