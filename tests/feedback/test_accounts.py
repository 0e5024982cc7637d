"""Accounts: names, passwords, invitations, sessions and limits, by functions that are told the time."""

from datetime import datetime, timedelta, timezone

import pytest
from argon2 import PasswordHasher
from hypothesis import given
from hypothesis import strategies as st

from palm_rlhf.feedback.people import rate_limits
from palm_rlhf.feedback.people.accounts import (
    add_person,
    checked_name,
    end_session,
    end_sessions,
    has_accounts,
    live_session,
    live_sessions,
    local_person,
    name_key,
    open_session,
    person_of_name,
    set_admin,
    set_name,
    set_role,
)
from palm_rlhf.feedback.people.invitations import accept, end_invitation, invite, invite_first_admin, open_invitations
from palm_rlhf.feedback.people.passwords import Passwords, check_password
from palm_rlhf.feedback.people.rate_limits import RateLimit, SiteLimits, Throttle, network_of
from palm_rlhf.feedback.people.roles import has_role
from palm_rlhf.feedback.refusals import FeedbackError
from palm_rlhf.feedback.store.people_tables import Invitation, Participant
from tests.feedback.visiting import PASSWORD, QUICK

NOW = datetime(2026, 5, 1, 12, tzinfo=timezone.utc)
DAY = timedelta(days=1)


def refusal(function, *arguments, **options) -> FeedbackError:
    with pytest.raises(FeedbackError) as caught:
        function(*arguments, **options)
    return caught.value


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("  Alice   B. ", "Alice B."),
        ("E\u0301mile", "Émile"),
        ("李小龙", "李小龙"),
        ("a" * 40, "a" * 40),
        ("<b>x", "<b>x"),
    ],
)
def test_a_name_has_one_form(name, kept):
    assert checked_name(name) == kept


@pytest.mark.parametrize(
    "name",
    ["", "   ", "a" * 41, "...", "a\nb", "a\r\nSet-Cookie: x=1", "a\0b", "a\u202eb", "a\u200bb", "\ud800a", "a\u2028b"],
)
def test_a_name_that_misleads_is_refused(name):
    assert refusal(checked_name, name).status == 422


@given(st.text(alphabet=st.characters(), max_size=60))
def test_a_kept_name_is_kept_as_it_is(name):
    try:
        kept = checked_name(name)
    except FeedbackError:
        return
    assert checked_name(kept) == kept and len(kept) <= 40 and kept.isprintable()
    assert name_key(kept) == name_key(f" {kept} ")
    kept.encode()


def test_a_name_belongs_to_one_person(any_store):
    with any_store.writing() as session:
        alice = add_person(session, "Alice", "contributor", NOW)
        add_person(session, "Bob", "contributor", NOW)
        for name in ("alice", " ALICE ", "Alice", "\uff21lice"):
            assert refusal(add_person, session, name, "contributor", NOW).status == 409
        assert refusal(set_name, session, alice, "bob").status == 409
        set_name(session, alice, "ALICE")
        assert person_of_name(session, "aLiCe") is alice and alice.name == "ALICE"
        assert refusal(add_person, session, "x", "root", NOW).status == 400


def test_the_hash_of_a_password_is_of_the_cost_asked_for():
    hashed = Passwords(time_cost=2, memory_kib=16, parallelism=1).hash(PASSWORD)
    assert hashed.startswith("$argon2id$v=19$m=16,t=2,p=1$")
    assert PasswordHasher().verify(hashed, PASSWORD)
    assert Passwords(2, 16, 1).verify(PASSWORD, hashed) and not Passwords(2, 16, 1).verify(PASSWORD + "x", hashed)
    assert QUICK.hash(PASSWORD) != QUICK.hash(PASSWORD)  # by their salts
    assert QUICK.is_outdated(hashed) and not Passwords(2, 16, 1).is_outdated(hashed)
    assert QUICK.verify("é" * 10, QUICK.hash("e\u0301" * 10))  # however the keyboard composes
    assert "m=65536,t=3,p=4" in Passwords().hash(PASSWORD)


def test_nobody_s_password_is_hashed_too(monkeypatch):
    verified = []
    passwords = Passwords(1, 8, 1)
    real = PasswordHasher.verify
    monkeypatch.setattr(PasswordHasher, "verify", lambda self, *found: verified.append(found[0]) or real(self, *found))
    assert not passwords.verify("anything", None) and not passwords.verify("\0", None)
    assert not passwords.verify("anything", "not a hash")
    assert not passwords.verify("a" * 10**6, passwords.hash(PASSWORD))
    assert len(verified) == 4 and all("m=8,t=1,p=1" in hashed for hashed in verified if hashed != "not a hash")


@pytest.mark.parametrize("password", ["short", "a" * 201, "aaaaaaaaaaaa", "Alice B. long"])
def test_a_poor_password_is_refused(password):
    assert refusal(check_password, password, password, "alice b. LONG").status == 422
    assert refusal(check_password, PASSWORD, PASSWORD + "x", "Alice").status == 422


def test_an_invitation_makes_one_person(any_store):
    with any_store.writing() as session:
        admin = add_person(session, "Root", "admin", NOW)
        secret = invite(session, "moderator", NOW, created_by=admin)
        row = session.query(Invitation).one()
        assert secret not in row.secret_hash and len(secret) == 32
    with any_store.writing() as session:
        assert refusal(accept, session, secret[:-1], "Eve", "hash", NOW).status == 410
        assert refusal(accept, session, secret, "root", "hash", NOW).status == 409  # the link lives on
        person = accept(session, secret, "Alice", "hash", NOW + timedelta(days=7) - timedelta(seconds=1))
        assert (person.role, person.password_hash) == ("moderator", "hash")
        assert refusal(accept, session, secret, "Bob", "hash", NOW).status == 410
    with any_store.reading() as session:
        used = session.query(Invitation).one()
        assert (used.created_by, used.used_by) == (admin.id, person.id)


def test_an_invitation_ends(store):
    with store.writing() as session:
        late, taken_back = (invite(session, "contributor", NOW, created_by=None, lasts=DAY) for _ in range(2))
        session.flush()
        admin = add_person(session, "Root", "admin", NOW)
        admin.password_hash = "hash"
        third = invite(session, "contributor", NOW, created_by=admin)
        session.flush()
        assert len(open_invitations(session, NOW)) == 3 and len(open_invitations(session, NOW + DAY)) == 1
        assert refusal(accept, session, late, "Eve", "hash", NOW + DAY).status == 410
        assert (
            refusal(accept, session, taken_back, "Eve", "hash", NOW).status == 410
        )  # of nobody, and there is an admin
        [row] = session.query(Invitation).filter(Invitation.created_by == admin.id)
        end_invitation(session, row.id, NOW)
        assert refusal(accept, session, third, "Eve", "hash", NOW).status == 410
        assert refusal(end_invitation, session, row.id, NOW).status == 404
        assert refusal(invite, session, "root", NOW, created_by=admin).status == 400


def test_only_the_first_admin_is_invited_by_nobody(any_store):
    with any_store.writing() as session:
        local = local_person(session, NOW)
        assert local_person(session, NOW) is local and not has_accounts(session)
        first, second = (invite_first_admin(session, NOW) for _ in range(2))
        session.flush()
        assert accept(session, second, "Alice", "hash", NOW).role == "admin"
        assert has_accounts(session) and invite_first_admin(session, NOW) is None
        assert refusal(accept, session, first, "Eve", "hash", NOW).status == 410


def test_a_site_keeps_an_admin(store):
    with store.writing() as session:
        admin = set_admin(session, "admin", PASSWORD, QUICK, NOW)
        other = add_person(session, "Other", "admin", NOW)  # who cannot log in
        assert refusal(set_role, session, admin, "contributor").status == 409
        set_role(session, other, "moderator")
        other.password_hash = "hash"
        set_role(session, other, "admin")
        set_role(session, admin, "contributor")
        assert has_role(other, "moderator") and not has_role(admin, "moderator")
        assert set_admin(session, "Admin", PASSWORD, QUICK, NOW) is admin and admin.role == "admin"


def test_a_changed_password_of_the_admin_ends_the_sessions(store):
    with store.writing() as session:
        admin = set_admin(session, "admin", PASSWORD, QUICK, NOW)
        login = open_session(session, admin, NOW)
        set_admin(session, "admin", PASSWORD, QUICK, NOW)
        assert live_session(session, login.id, NOW)
        set_admin(session, "admin", PASSWORD + "!", QUICK, NOW)
        assert not live_session(session, login.id, NOW)
        assert QUICK.verify(PASSWORD + "!", admin.password_hash)


def test_a_session_ends_by_time_by_logout_and_with_its_person(any_store):
    with any_store.writing() as session:
        alice = add_person(session, "Alice", "contributor", NOW)
        first, second, third = (open_session(session, alice, NOW) for _ in range(3))
        assert live_session(session, first.id, NOW + 30 * DAY - timedelta(seconds=1)) == (first, alice)
        assert live_session(session, first.id, NOW + 30 * DAY) is None
        assert live_session(session, "unknown", NOW) is None
        end_session(session, first.id, NOW)
        assert live_session(session, first.id, NOW) is None and len(live_sessions(session, alice, NOW)) == 2
        end_sessions(session, alice, NOW)
        assert live_session(session, second.id, NOW) is None
        again = open_session(session, alice, NOW)
        alice.deleted_at = NOW
        assert live_session(session, again.id, NOW) is None and live_session(session, third.id, NOW) is None


def test_a_rate_is_kept_for_each_key():
    limit = RateLimit(3, 60)
    assert [limit.use("a", 0.0) for _ in range(3)] == [0, 0, 0]
    assert limit.use("a", 0.0) == pytest.approx(20) and limit.use("b", 0.0) == 0
    assert limit.use("a", 19.9) == pytest.approx(0.1) and limit.use("a", 20.0) == 0
    limit.give_back("a")
    assert limit.use("a", 20.0) == 0 and limit.use("a", 20.0) > 0
    assert [limit.use("a", 1000.0) for _ in range(4)][:3] == [0, 0, 0]


@given(st.lists(st.floats(0, 30), min_size=1, max_size=60), st.integers(1, 5))
def test_a_rate_never_admits_more_than_its_burst_and_its_pace(pauses, most):
    limit, now, admitted = RateLimit(most, 10.0), 0.0, []
    for pause in pauses:
        now += pause
        if not limit.use("key", now):
            admitted.append(now)
    for begin in admitted:  # in any span of t seconds: the burst, and one more in each 10 / most seconds
        inside = [time for time in admitted if begin <= time]
        for number, time in enumerate(inside, start=1):
            assert number <= most + (time - begin) * most / 10.0 + 1e-6


def test_the_memory_of_limits_is_bounded(monkeypatch):
    monkeypatch.setattr(rate_limits, "MOST_KEYS", 10)
    limit = RateLimit(1, 60)
    for number in range(50):
        limit.use(str(number), 0.0)
    assert limit.use("49", 0.0) > 0 and limit.use("3", 0.0) == 0


def test_guesses_are_counted_by_name_and_by_address():
    throttle = Throttle(SiteLimits(guesses_per_name_and_address=2, guesses_per_address=5, guesses_per_name=3))
    for _ in range(2):
        throttle.count_guess("alice", "1.1.1.1", 0.0)
    error = refusal(throttle.count_guess, "alice", "1.1.1.1", 0.0)
    assert error.status == 429 and error.retry_after == 300
    throttle.count_guess("alice", "2.2.2.2", 0.0)
    assert refusal(throttle.count_guess, "alice", "3.3.3.3", 0.0).retry_after == 1200  # by the name, from anywhere
    for name in "bcd":
        throttle.count_guess(name, "1.1.1.1", 0.0)
    assert refusal(throttle.count_guess, "e", "1.1.1.1", 0.0).retry_after == 120  # by the address, for any name
    throttle.forgive_guess("d", "1.1.1.1")
    throttle.count_guess("e", "1.1.1.1", 0.0)
    assert network_of("2001:db8::1") == network_of("2001:db8::2") != network_of("2001:db8:0:1::1")
    with pytest.raises(ValueError, match="got max_body=0, expected more than 0"):
        SiteLimits(max_body=0)


def test_the_defaults_of_a_person(store):
    with store.writing() as session:
        person = add_person(session, "Alice", "contributor", NOW, language="zh")
    with store.reading() as session:
        kept = session.get(Participant, person.id)
        assert (kept.name, kept.name_key, kept.language, kept.password_hash) == ("Alice", "alice", "zh", None)
