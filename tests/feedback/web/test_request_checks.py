"""Requests that no route gets: of other hosts and sites, too large, too deep, or not text."""

import json
from urllib.parse import parse_qsl, unquote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sqlalchemy import func, select

from palm_rlhf.feedback.people.rate_limits import SiteLimits
from palm_rlhf.feedback.refusals import FeedbackError
from palm_rlhf.feedback.store.people_tables import LoginSession
from palm_rlhf.feedback.web.body_checks import FORM, JSON, check_body, check_encoded
from palm_rlhf.feedback.web.catalogues import Catalogues
from palm_rlhf.feedback.web.message_extraction import LOCALES
from palm_rlhf.feedback.web.page_headers import HEADERS
from palm_rlhf.serving.http.access import Access
from tests.feedback.visiting import PAGE, enter, join, make_site, visit


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil", "", "evil:80", "[::2]"])
def test_a_name_that_somebody_has_made_to_point_here_is_refused(store, host):
    """As by DNS rebinding: the browser believes that the page and the local site are one."""
    site = make_site(store, is_local=True)
    with visit(site) as browser:
        reply = browser.get("/", headers={"host": host, **PAGE})
        assert reply.status_code == 403 and "this server is not known as" in reply.text
        assert "set-cookie" not in reply.headers
    with store.reading() as session:
        assert session.scalar(select(func.count()).select_from(LoginSession)) == 0


@pytest.mark.parametrize("host", ["localhost:18889", "127.0.0.1", "[::1]:8", "LOCALHOST"])
def test_the_names_of_this_machine_are_known(store, host):
    with visit(make_site(store, is_local=True)) as browser:
        assert browser.get("/account", headers={"host": host}).status_code == 200


CATALOGUES = Catalogues(LOCALES)
FOREIGN = [
    {"origin": "https://evil.example"},
    {"origin": "null"},
    {"origin": "http://127.0.0.1:8080"},
    {"origin": "http://127.0.0.1.evil.example"},
    {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"},
    {"sec-fetch-site": "same-site", "sec-fetch-mode": "cors", "sec-fetch-dest": "empty"},
]


@pytest.mark.parametrize("headers", FOREIGN)
def test_pages_of_other_sites_change_nothing(store, headers):
    """Even where they know the token; a list of CORS is for the API of a server, not for these pages."""
    site = make_site(store, access=Access(origins=["https://evil.example"]))
    with visit(site) as browser:
        token = enter(browser, join(site, "Alice"))
        data = {"token": token, "name": "Mallory"}
        assert browser.post("/account/name", data=data, headers=headers).status_code == 403
        own = {"origin": "http://127.0.0.1", "sec-fetch-site": "same-origin"}
        assert browser.post("/account/name", data=data, headers=own).status_code == 303


def test_pages_of_other_sites_may_link_here_and_load_nothing(store):
    site = make_site(store, is_local=True)
    with visit(site) as browser:
        for mode, destination, status in (
            ("navigate", "document", 200),
            ("navigate", "iframe", 403),
            ("no-cors", "image", 403),
            ("cors", "empty", 403),
        ):
            headers = {"sec-fetch-site": "cross-site", "sec-fetch-mode": mode, "sec-fetch-dest": destination}
            assert browser.get("/account", headers=headers).status_code == status
            assert browser.get("/static/feedback.css", headers=headers).status_code == status


def test_every_reply_has_the_headers_that_keep_a_browser_safe(store):
    site = make_site(store, is_local=True)
    with visit(site, raise_server_exceptions=False) as browser:

        @browser.app.get("/broken")
        def broken():
            raise RuntimeError("a secret of the server")

        for path, status in (
            ("/", 200),
            ("/account/data", 200),
            ("/nothing", 404),
            ("/tasks/none", 404),
            ("/broken", 500),
            ("/static/feedback.css", 200),
            ("/page/theme.css", 200),
        ):
            for headers in ({}, PAGE):
                reply = browser.get(path, headers=headers)
                assert reply.status_code == status
                assert {name: reply.headers[name] for name in HEADERS} == HEADERS
                assert reply.headers["cache-control"] == ("no-cache" if path.endswith(".css") else "no-store")
                assert "a secret" not in reply.text
        assert browser.put("/account").status_code == 405
        policy = HEADERS["Content-Security-Policy"]
        assert "unsafe" not in policy and "frame-ancestors 'none'" in policy and "default-src 'none'" in policy
        assert HEADERS["X-Frame-Options"] == "DENY"


FORM_HEADERS = {"content-type": FORM}
JSON_HEADERS = {"content-type": JSON}
BODIES = [
    (b"name=" + b"a" * 3000, FORM_HEADERS, 413, "above the limit of 2048 bytes"),
    (b"&".join([b"a"] * 1000), FORM_HEADERS, 413, "more than 200 fields"),
    (b"name=%ff", FORM_HEADERS, 400, "not UTF-8"),
    (b"name=\xc3\xa9", FORM_HEADERS, 400, "not UTF-8"),
    (b"name=%ed%a0%80", FORM_HEADERS, 400, "not UTF-8"),
    (b"name=a%00b", FORM_HEADERS, 400, "the character NUL"),
    (b"%00=a", FORM_HEADERS, 400, "the character NUL"),
    (b'{"a": "\\u0000"}', JSON_HEADERS, 400, "the character NUL"),
    (b'{"a": "\\ud800"}', JSON_HEADERS, 400, "half of a surrogate pair"),
    (b'{"\\udc00": 1}', JSON_HEADERS, 400, "half of a surrogate pair"),
    (b"[" * 900 + b"]" * 900, JSON_HEADERS, 413, "deeper than 20"),
    (b'{"a": NaN}', JSON_HEADERS, 400, "is not JSON"),
    (b'{"a": 1e999}', JSON_HEADERS, 400, "cannot be kept"),
    (b'{"a": 99999999999999999999}', JSON_HEADERS, 400, "cannot be kept"),
    (b'{"a": ' + b"9" * 1900 + b"}", JSON_HEADERS, 400, "cannot be kept"),
    (b"\xff", JSON_HEADERS, 400, "is not JSON"),
    (b"", JSON_HEADERS, 400, "is not JSON"),
    (b'{"a": 1}', {"content-type": "text/plain"}, 415, "text/plain"),
    (b'{"a": 1}', {}, 415, "expected application/x-www-form-urlencoded or application/json"),
    (b"--x--", {"content-type": "multipart/form-data; boundary=x"}, 415, "multipart/form-data"),
    (b"<a/>", {"content-type": "application/xml"}, 415, "application/xml"),
]


def test_bodies_that_no_route_can_read_are_refused_in_words(store):
    site = make_site(store, limits=SiteLimits(max_body=2048))
    with visit(site) as browser:
        for body, headers, status, words in BODIES:
            for sent in (body, iter([body[:9], body[9:]])):  # with its length, and in parts without one
                reply = browser.post("/login", content=sent, headers=headers)
                assert reply.status_code == status, (body[:40], reply.text)
                assert words in reply.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/login?next=%ff", "/login?next=%00", "/tasks/%00", "/login?" + "a&" * 300])
def test_addresses_that_are_no_text_are_refused(store, path):
    with visit(make_site(store, is_local=True)) as browser:
        assert browser.get(path).status_code in (400, 413)


TEXTS = st.one_of(
    st.binary(max_size=60),
    st.text(alphabet="a&=%+;0fFcC3\x00é\ud800", max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass")),
)


@given(TEXTS)
@example(b"%C3&a=%A9")
@example(b"a=%u0000")
def test_the_fields_of_a_form_that_passes_are_texts_that_can_be_kept(body):
    try:
        check_body(FORM, body)
    except FeedbackError as error:
        assert error.status in (400, 413)
        return
    for field in parse_qsl(body.decode("ascii"), keep_blank_values=True, errors="strict"):
        for text in field:
            assert "\0" not in text
            text.encode("utf-8")
    check_encoded(body, "x")
    assert "\ufffd" not in unquote(body.decode()) or b"%EF%BF%BD" in body.upper()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(alphabet=st.characters(exclude_categories=[])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


@given(VALUES.map(json.dumps) | st.text(max_size=30))
def test_the_json_that_passes_can_be_kept(text):
    body = text.encode("utf-8", "surrogatepass")
    try:
        check_body(JSON, body)
    except FeedbackError as error:
        assert error.status in (400, 413)
        return
    again = json.dumps(json.loads(body), ensure_ascii=False, allow_nan=False)
    again.encode("utf-8")
    assert "\\u0000" not in again


@given(st.text(max_size=40))
@example("zh-;q=,*,-")
def test_any_wish_for_a_language_is_answered(header):
    assert CATALOGUES.choose(header, f"{header},en") in CATALOGUES.names
