"""Logins in the browser: sessions, invitations, the account, and the admins' page of people."""

import re
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from sqlalchemy import func, select

from palm_rlhf.feedback.people.accounts import open_session
from palm_rlhf.feedback.people.invitations import invite, invite_first_admin
from palm_rlhf.feedback.people.passwords import Passwords
from palm_rlhf.feedback.people.rate_limits import SiteLimits
from palm_rlhf.feedback.store.people_tables import Invitation, LoginSession, Participant
from palm_rlhf.feedback.store.table_base import utc_now
from palm_rlhf.feedback.web.session_cookies import cookie_name
from palm_rlhf.serving.http.access import Access
from tests.feedback.visiting import PASSWORD, QUICK, Visit, join, make_site, visit


def live(store) -> list[LoginSession]:
    with store.reading() as session:
        return list(session.scalars(select(LoginSession).where(LoginSession.ended_at.is_(None))))


def session_cookie(browser) -> str | None:
    return browser.cookies.get(cookie_name(browser.site, "session", is_https=browser.base_url.scheme == "https"))


def test_a_person_logs_in_and_out(store):
    site = make_site(store)
    join(site, "Alice")
    with visit(site) as browser:
        refused = browser.page("/account?x=%C3%A9&y=/")
        assert refused.status_code == 303
        assert refused.headers["location"] == "/login?next=%2Faccount%3Fx%3D%25C3%25A9%26y%3D%2F"
        assert browser.get("/account").status_code == 401  # in words for a script
        assert browser.get("/account", headers={"hx-request": "true"}).headers["hx-redirect"] == "/login"
        page = browser.page(refused.headers["location"])
        assert 'name="next" value="/account?x=%C3%A9&amp;y=/"' in page.text
        assert (wrong := browser.log_in("Alice", "not the password")).status_code == 401
        assert "there is nobody with this name and this password" in wrong.text
        assert browser.log_in("alice", next="/account").headers["location"] == "/account"
        assert "Alice" in browser.page("/account").text
        cookie = session_cookie(browser)
        assert browser.submit("/logout", "/account").headers["location"] == "/login"
        assert session_cookie(browser) is None and live(store) == []
        browser.cookies.set(cookie_name(site, "session", is_https=False), cookie)
        assert browser.get("/account").status_code == 401


def test_a_login_has_a_session_of_its_own(store):
    """Somebody who has put a session into a browser before the login, or knows it, has nothing after it."""
    site = make_site(store)
    join(site, "Alice")
    join(site, "Mallory")
    with visit(site, "Mallory") as browser:
        fixed = session_cookie(browser)
        assert browser.log_in("Alice").status_code == 303
        assert session_cookie(browser) != fixed
        assert [login.person_id for login in live(store)] == [browser_person(browser)]
        browser.cookies.clear()
        browser.cookies.set(cookie_name(site, "session", is_https=False), fixed)
        assert browser.get("/account").status_code == 401


def browser_person(browser) -> str:
    return browser.get("/account/data").json()["people"][0]["id"]


def test_the_cookie_is_not_read_by_scripts_and_stays_on_the_host(store):
    site = make_site(store, access=Access(("feedback.example.org",)))
    join(site, "Alice")
    with visit(site, address="https://feedback.example.org") as browser:
        response = browser.log_in("Alice")
        cookies = [cookie for cookie in response.headers.get_list("set-cookie") if "_session_" in cookie]
        assert len(cookies) == 1 and cookies[0].startswith("__Host-palm_rlhf_session_")
        parts = {part.strip().lower() for part in cookies[0].split(";")[1:]}
        assert {"httponly", "secure", "samesite=lax", "path=/", f"max-age={30 * 86400}"} == parts
        assert browser.get("/account").status_code == 200
    with visit(site, address="http://feedback.example.org") as browser:
        response = browser.log_in("Alice")
        [cookie] = [cookie for cookie in response.headers.get_list("set-cookie") if "_session_" in cookie]
        assert "httponly" in cookie.lower() and "secure" not in cookie.lower() and not cookie.startswith("__Host-")


def test_a_hash_of_another_cost_is_replaced_at_the_login(store):
    site = make_site(store)
    person = join(site, "Alice")
    site.passwords = Passwords(time_cost=2, memory_kib=16, parallelism=1)
    with visit(site, "Alice"):
        with store.reading() as session:
            hashed = session.get(Participant, person.id).password_hash
        assert "m=16,t=2,p=1" in hashed and site.passwords.verify(PASSWORD, hashed)
    with visit(site, "Alice"), store.reading() as session:
        assert session.get(Participant, person.id).password_hash == hashed


def test_wrong_passwords_are_counted(store):
    """Of a name that there is, and of one that there is not, with the same words."""
    site = make_site(store, limits=SiteLimits(guesses_per_name_and_address=3))
    join(site, "Alice")
    with visit(site) as browser:
        token = browser.token_of("/login")
        for name in ("Alice", "Nobody"):
            replies = [
                browser.submit("/login", "", token, name=name, password="wrong password " + str(i)) for i in range(4)
            ]
            assert [reply.status_code for reply in replies] == [401, 401, 401, 429]
            assert replies[3].headers["retry-after"] in ("199", "200")
            assert len({re.sub(r"(Alice|Nobody)", "", reply.text) for reply in replies[:3]}) == 1
        assert browser.submit("/login", "", token, name="alice", password=PASSWORD).status_code == 429
        join(site, "Bob")
        for _ in range(6):  # right ones are not
            assert browser.log_in("Bob").status_code == 303


def test_an_invited_person_joins_once(store):
    site = make_site(store)
    join(site, "Root", "admin")
    with visit(site, "Root") as admin, visit(site) as guest:
        page = admin.submit("/people/invite", "/people", role="moderator")
        link = re.search(r'value="(http://127\.0\.0\.1/join/[\w-]+)"', page.text)[1]
        path = link.removeprefix("http://127.0.0.1")
        secret = path.rpartition("/")[2]
        assert secret not in admin.page("/people").text  # shown once
        joining = guest.page(path)
        # the address is a secret of this site; with no-referrer browsers would send its form from the origin "null"
        assert joining.headers["referrer-policy"] == "same-origin"
        fields = {"secret": secret, "name": "Zoë", "password": PASSWORD, "again": PASSWORD}
        short = guest.submit("/join", path, **{**fields, "password": "short", "again": "short"})
        assert short.status_code == 422 and "expected 10 to 200" in short.text and 'value="Zoë"' in short.text
        assert guest.submit("/join", path, **{**fields, "name": "ROOT"}).status_code == 409
        assert guest.submit("/join", path, **fields).status_code == 303
        assert "Zoë" in guest.page("/account").text and guest.page("/people").status_code == 403
        assert guest.page(path).status_code == 410
        with store.reading() as session:
            assert session.scalars(select(Participant.role).where(Participant.name == "Zoë")).one() == "moderator"


def test_two_browsers_with_one_invitation_make_one_person(any_store):
    site = make_site(any_store)
    join(site, "Root", "admin")
    with any_store.writing() as session:
        root = session.scalars(select(Participant)).one()
        secret = invite(session, "contributor", utc_now(), created_by=root)
    browsers = [Visit(site) for _ in range(4)]
    tokens = [browser.token_of(f"/join/{secret}") for browser in browsers]

    def accept(number: int) -> int:
        fields = {"secret": secret, "name": f"Guest {number}", "password": PASSWORD, "again": PASSWORD}
        return browsers[number].submit("/join", "", tokens[number], **fields).status_code

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(accept, range(4))) == [303, 410, 410, 410]
    with any_store.reading() as session:
        assert session.scalar(select(func.count()).select_from(Participant)) == 2


def test_the_local_person_needs_no_login_until_there_are_others(store):
    site = make_site(store, is_local=True)
    with visit(site) as browser, visit(site) as other:
        assert browser.page("/").status_code == 200 and browser.page("/people").status_code == 200
        assert browser.submit("/people/invite", "/account", role="contributor").status_code == 409
        assert other.page("/").status_code == 200 and browser_person(other) == browser_person(browser)
        nameless = {"name": "", "password": PASSWORD, "again": PASSWORD}
        assert browser.submit("/account/password", "/account", **nameless).status_code == 422
        fields = {"name": "Owner", "password": PASSWORD, "again": PASSWORD}
        assert browser.submit("/account/password", "/account", **fields).status_code == 303
        assert "Owner" in browser.page("/people").text
        assert browser.submit("/people/invite", "/people", role="contributor").status_code == 200
        assert other.get("/").status_code == 401  # its session ended with the password
        with visit(site) as third:
            assert third.get("/").status_code == 401
            assert third.log_in("owner").status_code == 303
        with store.reading() as session:
            assert session.scalar(select(func.count()).select_from(Participant)) == 1


def test_browsers_that_come_at_once_are_one_local_person(any_store):
    site = make_site(any_store, is_local=True)
    browsers = [Visit(site) for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda browser: browser.get("/account").status_code, browsers)) == [200] * 6
    with any_store.reading() as session:
        assert session.scalar(select(func.count()).select_from(Participant)) == 1


def test_a_person_changes_the_account(store):
    site = make_site(store)
    join(site, "Alice")
    join(site, "Bob")
    with visit(site, "Alice") as browser, visit(site, "Alice") as other:
        assert browser.submit("/account/name", "/account", name="bob").status_code == 409
        assert browser.submit("/account/name", "/account", name="Alicia").status_code == 303
        assert browser.submit("/account/language", "/account", language="xx").status_code == 400
        assert browser.submit("/account/language", "/account", language="zh").status_code == 303
        assert '<html lang="zh"' in browser.page("/account").text
        changed = {"former": PASSWORD, "password": "another one 8", "again": "another one 8"}
        assert browser.submit("/account/password", "/account", **{**changed, "former": "x"}).status_code == 422
        assert other.get("/account").status_code == 200
        assert browser.submit("/account/password", "/account", **changed).status_code == 303
        assert browser.get("/account").status_code == 200 and other.get("/account").status_code == 401
        assert other.log_in("alicia", "another one 8").status_code == 303
        assert len(live(store)) == 2
        assert other.submit("/account/sessions/end", "/account").headers["location"] == "/login"
        assert live(store) == [] and browser.get("/account").status_code == 401


def test_a_person_reads_and_deletes_what_the_site_holds(store):
    site = make_site(store)
    alice = join(site, "Alice")
    join(site, "Root", "admin")
    with visit(site, "Alice") as browser:
        reply = browser.get("/account/data")
        assert reply.headers["content-disposition"].startswith("attachment")
        found = reply.json()
        assert found["people"][0]["name"] == "Alice" and len(found["sessions"]) == 1
        assert "argon2" not in reply.text and live(store)[0].id not in reply.text
        leave = {"password": PASSWORD, "contributions": "keep"}
        assert browser.submit("/account/delete", "/account", **{**leave, "password": "x"}).status_code == 422
        assert browser.submit("/account/delete", "/account", password=PASSWORD).status_code == 422
        assert browser.submit("/account/delete", "/account", **leave).headers["location"] == "/login"
        assert browser.get("/account").status_code == 401 and browser.log_in("Alice").status_code == 401
        with store.reading() as session:
            gone = session.get(Participant, alice.id)
            assert (gone.name, gone.password_hash) == ("", None) and gone.deleted_at is not None


def test_an_admin_rules_people(store):
    site = make_site(store)
    root, alice = join(site, "Root", "admin"), join(site, "Alice")
    with visit(site, "Root") as admin, visit(site, "Alice") as browser:
        assert admin.submit(f"/people/{alice.id}/role", "/people", role="root").status_code == 400
        assert admin.submit(f"/people/{root.id}/role", "/people", role="contributor").status_code == 409
        assert admin.submit(f"/people/{root.id}/delete", "/people", contributions="keep").status_code == 409
        assert admin.submit(f"/people/{alice.id}/role", "/people", role="admin").status_code == 303
        assert browser.page("/people").status_code == 200  # from the next request on
        assert admin.submit(f"/people/{alice.id}/role", "/people", role="contributor").status_code == 303
        assert browser.page("/people").status_code == 403
        assert "Alice" in admin.page(f"/people/{alice.id}/delete").text
        assert admin.submit(f"/people/{alice.id}/delete", "/people", contributions="remove").status_code == 303
        assert browser.get("/account").status_code == 401 and "Alice" not in admin.page("/people").text
        assert admin.submit(f"/people/{alice.id}/role", "/people", role="admin").status_code == 404
        admin.submit("/people/invite", "/people", role="contributor")
        with store.reading() as session:
            [invitation] = session.scalars(select(Invitation))
        assert admin.submit(f"/people/invitations/{invitation.id}/end", "/people").status_code == 303
        assert admin.submit(f"/people/invitations/{invitation.id}/end", "/people").status_code == 404


def test_a_session_that_has_expired_is_nobody_s(store):
    site = make_site(store)
    alice = join(site, "Alice")
    with visit(site) as browser:
        for age, status in ((timedelta(days=29), 200), (timedelta(days=30, seconds=1), 401)):
            with store.writing() as session:
                login = open_session(session, alice, utc_now() - age)
            signed = site.serializer("session").dumps(login.id)
            browser.cookies.set(cookie_name(site, "session", is_https=False), signed)
            assert browser.get("/account").status_code == status


def test_a_person_sends_a_limited_number_of_requests(store):
    site = make_site(store, limits=SiteLimits(requests_per_minute=5))
    join(site, "Alice")
    join(site, "Bob")
    with visit(site, "Alice") as browser, visit(site, "Bob") as other:
        replies = [browser.get("/account") for _ in range(6)]
        assert [reply.status_code for reply in replies] == [200] * 5 + [429]
        assert int(replies[5].headers["retry-after"]) in (11, 12)
        assert other.get("/account").status_code == 200


def test_the_first_admin_of_a_site_that_others_reach_is_invited(store):
    site = make_site(store)
    with store.writing() as session:
        secret = invite_first_admin(session, utc_now())
    with visit(site) as browser:
        fields = {"secret": secret, "name": "Root", "password": PASSWORD, "again": PASSWORD}
        assert browser.submit("/join", f"/join/{secret}", **fields).status_code == 303
        assert browser.page("/people").status_code == 200


@pytest.mark.parametrize("cost", [QUICK, Passwords(2, 8, 1)])
def test_a_password_is_hashed_for_a_name_that_nobody_has(store, monkeypatch, cost):
    """The times of a known and of an unknown name are one hash each, of the same cost."""
    site = make_site(store)
    site.passwords = cost
    join(site, "Alice")
    hashed = []
    real = Passwords.verify
    monkeypatch.setattr(
        Passwords, "verify", lambda self, password, known: hashed.append(known) or real(self, password, known)
    )
    with visit(site) as browser:
        for name in ("Alice", "Nobody"):
            assert browser.log_in(name, "not the password").status_code == 401
    assert len(hashed) == 2 and hashed[0].startswith("$argon2id") and hashed[1] is None
