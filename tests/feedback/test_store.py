"""The store: one law for SQLite and PostgreSQL."""

from palm_rlhf.feedback.store.people_tables import Participant


def test_a_person_is_kept(any_store):
    with any_store.writing() as session:
        session.add(Participant(name="Ann", role="contributor"))
    with any_store.reading() as session:
        assert [person.name for person in session.query(Participant)] == ["Ann"]
