"""Attacks that are tried and refused: forged cookies, forms of others, SQL in texts, paths, and guessed ids."""

import ast
import re
from pathlib import Path

import pytest
from sqlalchemy import event, func, select

import palm_rlhf.feedback
from palm_rlhf.feedback.people.invitations import invite
from palm_rlhf.feedback.settings import CollectionSettings
from palm_rlhf.feedback.store.people_tables import LoginSession, Participant
from palm_rlhf.feedback.store.table_base import Base, utc_now
from palm_rlhf.feedback.store.tree_tables import Task, TreeMessage
from palm_rlhf.feedback.web.login_pages import own_path
from palm_rlhf.feedback.web.session_cookies import cookie_name, form_token
from tests.feedback.visiting import PAGE, PASSWORD, enter, join, make_site, routes_of, visit

ROOM = Path(palm_rlhf.feedback.__file__).parent
SQL = (
    "' OR '1'='1",
    "'; DROP TABLE people; --",
    '" OR ""="',
    "x' UNION SELECT password_hash FROM people --",
    "%' OR name LIKE '%",
    "\\'; DELETE FROM people; --",
    "1); DELETE FROM sessions; --",
)


def session_id(store) -> str:
    with store.reading() as session:
        return session.scalars(select(LoginSession.id)).one()


def test_a_cookie_that_this_site_has_not_signed_is_nobody_s(store):
    site, other = make_site(store), make_site(store)
    with visit(site) as browser:
        enter(browser, join(site, "Alice"))
        name, real = cookie_name(site, "session", is_https=False), session_id(store)
        signed = site.serializer("session").dumps(real)
        payload, _, _ = signed.rpartition(".")
        forged = {
            "plain": real,
            "empty": "",
            "cut": signed[:-1],
            "half": signed[: len(signed) // 2],
            "turned": signed[:-5] + ("A" if signed[-5] != "A" else "B") + signed[-4:],
            "unsigned": payload,
            "of another site": other.serializer("session").dumps(real),
            "of another kind": site.serializer("guest").dumps(real),
            "of another type": site.serializer("session").dumps([real]),
            "of a number": site.serializer("session").dumps(1),
            "unknown": site.serializer("session").dumps("unknown"),
            "SQL": site.serializer("session").dumps(SQL[0]),
            "long": "A" * 8000,
        }
        for what, cookie in forged.items():
            browser.cookies.clear()
            browser.cookies.set(name, cookie)
            assert browser.get("/account").status_code == 401, what
        browser.cookies.clear()
        browser.cookies.set(cookie_name(other, "session", is_https=False), forged["of another site"])
        assert browser.get("/account").status_code == 401
        browser.cookies.clear()
        browser.cookies.set(name, signed)
        assert browser.get("/account").status_code == 200


def test_a_form_needs_the_token_of_its_own_session(store):
    site = make_site(store)
    alice, mallory = join(site, "Alice"), join(site, "Mallory")
    with visit(site) as browser, visit(site) as other:
        token, foreign = enter(browser, alice), enter(other, mallory)
        guests = other.token_of("/login")
        for wrong in ("", "é", token.upper(), token[:-1], foreign, guests, form_token(site, "guest", alice.id)):
            assert browser.submit("/account/name", "", wrong, name="Pwned").status_code == 403
        assert browser.post("/account/name?token=" + token, data={"name": "Pwned"}).status_code == 403
        assert browser.post("/account/name", json={"token": token, "name": "Pwned"}).status_code in (403, 422)
        assert browser.submit("/account/name", "", token, name="Alicia").status_code == 303
        for wrong in ("", token, foreign):  # a login that somebody else's page has begun
            assert other.submit("/login", "", wrong, name="Alicia", password=PASSWORD).status_code == 403
    with store.reading() as session:
        assert sorted(session.scalars(select(Participant.name))) == ["Alicia", "Mallory"]


def test_fields_that_nobody_asked_for_change_nothing(store):
    site = make_site(store)
    root = join(site, "Root", "admin")
    with store.writing() as session:
        secret = invite(session, "contributor", utc_now(), created_by=root)
    more = {"role": "admin", "is_admin": "1", "id": root.id, "person_id": root.id, "created_at": "2020-01-01"}
    with visit(site) as browser:
        fields = {"secret": secret, "name": "Eve", "password": PASSWORD, "again": PASSWORD}
        assert browser.submit("/join", f"/join/{secret}", **fields, **more).status_code == 303
        assert browser.submit("/account/name", "/account", name="Evelyn", **more).status_code == 303
        changed = {"former": PASSWORD, "password": "another one 8", "again": "another one 8"}
        assert (
            browser.submit("/account/password", "/account", **changed, **{**more, "name": "Root 2"}).status_code == 303
        )
        assert browser.get("/people").status_code == 403
    with store.reading() as session:
        eve = session.scalars(select(Participant).where(Participant.id != root.id)).one()
        assert (eve.name, eve.role) == ("Evelyn", "contributor")
        assert session.get(Participant, root.id).name == "Root"


def rows(store) -> dict[str, int]:
    with store.reading() as session:
        return {
            table.name: session.scalar(select(func.count()).select_from(table)) for table in Base.metadata.sorted_tables
        }


def test_sql_in_any_parameter_is_a_text_like_any_other(any_store):
    site = make_site(any_store)
    with visit(site) as browser:
        token = enter(browser, join(site, "Root", "admin"))
        join(site, "Alice")
        for text in SQL:
            assert browser.log_in(text, text).status_code == 401
        token = enter(browser, person(any_store, "Root"))
        before = rows(any_store)
        ending = {"/logout", "/account/sessions/end", "/account/name", "/people/invite", "/tasks", "/join"}
        for number, route in enumerate(routes_of(browser.app)):
            text = SQL[number % len(SQL)]
            path = route.path
            for each in route.dependant.path_params:
                path = path.replace(f"{{{each.name}}}", text.replace("/", "").replace("%", "%25").replace("?", ""))
            query = {each.name: text for each in route.dependant.query_params}
            fields = {"token": token, **{each.name: text for each in route.dependant.body_params}, "only": text}
            if route.path in ending and "POST" in route.methods:
                continue
            if "GET" in route.methods:
                reply = browser.get(path, params=query, headers=PAGE)
            else:
                reply = browser.post(path, data={**fields, "order": text, "text": text}, headers=PAGE)
            assert reply.status_code < 500, (path, reply.status_code)
        assert rows(any_store) == before


def person(store, name) -> Participant:
    with store.reading() as session:
        return session.scalars(select(Participant).where(Participant.name == name)).one()


def test_no_sql_is_built_from_strings():
    """Statements are made by SQLAlchemy or written out; only settings of a connection hold constants of ours."""
    found = []
    for path in ROOM.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("text", "exec_driver_sql", "literal_column", "execute", "executescript"):
                statement = ast.unparse(node.args[0])
                is_setting = (
                    re.match(r"f['\"](SET LOCAL |PRAGMA |\{switch\}O)", statement) and path.parent.name == "store"
                )
                is_built = isinstance(node.args[0], (ast.JoinedStr, ast.BinOp)) or ".format(" in statement
                if is_built and not is_setting:
                    found.append(f"{path.name}:{node.lineno}: {statement}")
    assert found == []


def test_tasks_of_others_are_not_there(store):
    site = make_site(store, settings=CollectionSettings(num_model_replies=0))
    with visit(site) as browser, visit(site) as other:
        mine, foreign = enter(browser, join(site, "Alice")), enter(other, join(site, "Mallory"))
        shown = browser.submit("/tasks", "", mine, kind="write_prompt")
        path = shown.headers["location"].partition("?")[0]
        unknown = other.page("/tasks/none")
        for way in ("", "/skip"):
            assert other.submit(path + way, "", foreign, text="stolen").status_code == 404
        assert other.page(path).status_code == 404 and words(other.page(path)) == words(unknown)
        assert browser.submit(path, "", mine, text="A prompt of mine").status_code == 303
        assert browser.submit(path, "", mine, text="A second one").status_code == 303  # replayed: kept once
        with store.reading() as session:
            assert list(session.scalars(select(TreeMessage.text))) == ["A prompt of mine"]
            assert session.get(Task, path.rpartition("/")[2]).outcome == "done"


def words(reply) -> str:
    return re.search(r'role="alert">(.*?)<', reply.text)[1]


@pytest.mark.parametrize(
    "address",
    [
        "//evil.example",
        "///evil.example",
        "/\\evil.example",
        "\\\\evil.example",
        "https://evil.example",
        "https:/evil.example",
        "javascript:alert(1)",
        "/\t/evil.example",
        "/\n/evil.example",
        "/\r\nSet-Cookie: a=b",
        " //evil.example",
        "evil.example",
        "/a\\..\\b",
        "",
    ],
)
def test_a_login_leads_to_this_site_only(store, address):
    site = make_site(store)
    join(site, "Alice")
    assert own_path(address) == "" and own_path("/tasks/1?after=2") == "/tasks/1?after=2"
    with visit(site) as browser:
        reply = browser.log_in("Alice", next=address)
        assert (reply.status_code, reply.headers["location"]) == (303, "/")
        assert "a" not in [cookie.split("=")[0] for cookie in reply.headers.get_list("set-cookie")]


@pytest.mark.parametrize(
    "path",
    [
        "/static/../site.py",
        "/static/%2e%2e/site.py",
        "/static/..%2fsite.py",
        "/static/..%5csite.py",
        "/static//etc/passwd",
        "/static/%2fetc%2fpasswd",
        "/page/../http/app.py",
        "/page/%2e%2e/terminal.py",
        "/static/",
        "/static/../../../../../../etc/passwd",
    ],
)
def test_files_beside_the_static_ones_are_not_sent(store, path):
    with visit(make_site(store, is_local=True)) as browser:
        browser_request = browser.build_request("GET", "http://127.0.0.1" + path)
        browser_request.url = browser_request.url.copy_with(raw_path=path.encode())
        reply = super(type(browser), browser).send(browser_request)
        assert reply.status_code in (404, 405), reply.text[:100]


def test_a_full_disk_is_told_on_the_page(store):
    site = make_site(store)
    with visit(site) as browser:
        token = enter(browser, join(site, "Alice"))
        with store.reading() as session:
            pages = session.connection().exec_driver_sql("PRAGMA page_count").scalar()

        @event.listens_for(store.engine, "begin")
        def fill(connection):
            connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")

        long = {"text": "a" * 8000, "token": token}
        replies = []
        for number in range(20):
            shown = browser.submit("/tasks", "", token, kind="write_prompt")
            if shown.status_code != 303:
                replies.append(shown)
                break
            path = shown.headers["location"].partition("?")[0]
            replies.append(browser.post(path, data={**long, "text": f"{number} " + "a" * 7000}, headers=PAGE))
            if replies[-1].status_code != 303:
                break
        assert replies[-1].status_code == 507 and "its disk is full" in replies[-1].text
        assert browser.page("/account").status_code == 200
