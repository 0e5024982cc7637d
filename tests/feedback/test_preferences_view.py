"""What the rows of the database say about replies, and that it says nothing once they are taken back."""

from datetime import datetime, timedelta, timezone

import pytest

from palm_rlhf.feedback.refusals import FeedbackError
from palm_rlhf.feedback.store.answer_tables import Answer, ComparisonVote, Correction, KnownModel, ShownComparison
from palm_rlhf.feedback.store.identities import prompt_key_of
from palm_rlhf.feedback.store.kept_trees import kept_trees
from palm_rlhf.feedback.store.learning_tables import ImportedRanking
from palm_rlhf.feedback.store.people_tables import Participant
from palm_rlhf.feedback.store.preferences_view import iter_preferences
from palm_rlhf.feedback.store.tree_tables import ReplyRanking, Tree, TreeMessage
from palm_rlhf.feedback.store.withdrawals import is_withdrawn, withdraw

NOON = datetime(2026, 1, 1, 12, tzinfo=timezone.utc)
PROMPT = [{"role": "user", "content": "Why is the sky blue?"}]


def people(session, *names, role="contributor"):
    rows = [Participant(id=name, name=name, role=role) for name in names]
    session.add_all(rows)
    session.flush()
    return rows


def comparison(session, *texts, purpose="training", chosen_by="random"):
    """A comparison of two answers that Ann was shown."""
    if session.get(KnownModel, "model") is None:
        session.add(KnownModel(id="model", name="a model"))
        session.flush()
    answers = [
        Answer(
            prompt_key=prompt_key_of(PROMPT), prompt=PROMPT, text=text, model_id="model", sampling={}, purpose=purpose
        )
        for text in texts
    ]
    session.add_all(answers)
    session.flush()
    shown = ShownComparison(
        prompt_key=prompt_key_of(PROMPT),
        left_id=answers[0].id,
        right_id=answers[1].id,
        person_id="ann",
        chosen_by=chosen_by,
        purpose=purpose,
    )
    session.add(shown)
    session.flush()
    return shown


def vote(session, shown, verdict, minute=0):
    row = ComparisonVote(
        comparison_id=shown.id, person_id="ann", verdict=verdict, created_at=NOON + timedelta(minutes=minute)
    )
    session.add(row)
    session.flush()
    return row


def tree(session, state="ready_for_export", texts=("one", "two", "three"), **values):
    """A tree of a prompt and accepted replies, `message-0` and so on."""
    row = Tree(language="en", state=state, **values)
    session.add(row)
    session.flush()
    fields = {"tree_id": row.id, "language": "en", "person_id": "ann", "accepted": True}
    prompt = TreeMessage(role="prompter", text=PROMPT[0]["content"], depth=0, **fields)
    session.add(prompt)
    session.flush()
    replies = [
        TreeMessage(id=f"message-{place}", role="assistant", text=text, depth=1, parent_id=prompt.id, **fields)
        for place, text in enumerate(texts)
    ]
    session.add_all(replies)
    session.flush()
    return prompt, replies


def rank(session, prompt, replies, orders):
    for person, order in orders.items():
        ids = [replies[place].id for place in order]
        session.add(ReplyRanking(parent_id=prompt.id, person_id=person, shown=sorted(ids), best_first=ids))
    session.flush()


def responses(session):
    return [preference.responses for preference in iter_preferences(session)]


def test_the_newest_vote_on_a_comparison_counts_until_it_is_taken_back(any_store):
    with any_store.writing() as session:
        people(session, "ann")
        shown = comparison(session, "left", "right", purpose="evaluation", chosen_by="uncertainty")
        vote(session, shown, "right")
        second = vote(session, shown, "left", minute=1)
        [preference] = iter_preferences(session)
        assert preference.responses == ("left", "right")
        assert (preference.prompt, preference.prompt_key) == (PROMPT, prompt_key_of(PROMPT))
        assert (preference.kind, preference.origin, preference.person_id) == ("comparison", "people", "ann")
        assert (preference.chosen_by, preference.purpose) == ("uncertainty", "evaluation")
        assert (preference.row_id, preference.created_at) == (second.id, NOON + timedelta(minutes=1))
        withdraw(session, second, "ann", now=NOON)
        assert responses(session) == [("right", "left")]


@pytest.mark.parametrize("verdict, texts", [("tie", ("a", "b")), ("both_bad", ("a", "b")), ("left", ("same", "same"))])
def test_a_vote_that_prefers_nothing_is_no_preference(store, verdict, texts):
    with store.writing() as session:
        people(session, "ann")
        vote(session, comparison(session, *texts), verdict)
        assert responses(session) == []


def test_the_rankings_of_a_complete_tree_are_merged(any_store):
    with any_store.writing() as session:
        people(session, "ann", "bob", "eve")
        prompt, replies = tree(session)
        # two of three put 2 before 0, and 0 before 1
        rank(session, prompt, replies, {"ann": (2, 0, 1), "bob": (2, 0, 1), "eve": (1, 0, 2)})
        [preference] = iter_preferences(session)
        assert preference.responses == ("three", "one", "two")
        assert list(preference.pairs()) == [("three", "one"), ("three", "two"), ("one", "two")]
        assert (preference.prompt, preference.kind, preference.origin) == (PROMPT, "tree", "people")
        withdraw(session, replies[0], "ann", now=NOON)
        assert responses(session) == [("three", "two")]


def test_a_ranking_that_was_taken_back_has_no_voice(store):
    with store.writing() as session:
        people(session, "ann", "bob")
        prompt, replies = tree(session)
        rank(session, prompt, replies, {"ann": (0, 1, 2), "bob": (2, 1, 0)})
        withdraw(session, session.query(ReplyRanking).filter_by(person_id="ann").one(), "ann", now=NOON)
        assert responses(session) == [("three", "two", "one")]


@pytest.mark.parametrize("state", ["growing", "ranking", "halted_by_moderator", "aborted_low_grade"])
def test_only_complete_trees_are_ranked(store, state):
    with store.writing() as session:
        people(session, "ann")
        rank(session, *tree(session, state), {"ann": (0, 1, 2)})
        assert responses(session) == []


def test_a_message_that_was_refused_hides_those_below_it(store):
    with store.writing() as session:
        people(session, "ann")
        prompt, replies = tree(session)
        for parent, text in zip(replies, ("deep", "deeper"), strict=False):
            session.add(
                TreeMessage(
                    tree_id=prompt.tree_id,
                    parent_id=parent.id,
                    role="prompter",
                    text=text,
                    language="en",
                    depth=2,
                    accepted=True,
                )
            )
        replies[0].accepted = False
        session.flush()
        [(_, root)] = kept_trees(session)
        assert [message.row.text for message in root.walk()] == [PROMPT[0]["content"], "two", "deeper", "three"]
        withdraw(session, prompt, "ann", now=NOON)
        assert list(kept_trees(session)) == []


def test_imported_trees_have_the_ranks_of_their_file(store):
    with store.writing() as session:
        people(session, "ann")
        _, replies = tree(session, source="oasst", ranked_by="ai")
        for reply, place in zip(replies, (1, 0, 1), strict=True):  # a tie: the first of them is ranked
            reply.rank, reply.imported = place, {}
        session.flush()
        [preference] = iter_preferences(session)
        assert (preference.responses, preference.origin) == (("two", "one"), "ai")


@pytest.mark.parametrize("kind, origin", [("people", "imported"), ("ai", "ai")])
def test_files_and_corrections_are_preferences(store, kind, origin):
    with store.writing() as session:
        people(session, "ann")
        shown = comparison(session, "poor", "other")
        for minute, text in enumerate(("good", "better")):
            created = NOON + timedelta(minutes=minute)
            session.add(Correction(answer_id=shown.left_id, person_id="ann", text=text, created_at=created))
        session.add(ImportedRanking(digest="0", source="a file", kind=kind, prompt=PROMPT, responses=["x", "y", "z"]))
        session.flush()
        correction, imported = iter_preferences(session)
        assert (correction.responses, correction.kind, correction.origin) == (
            ("better", "poor"),
            "correction",
            "people",
        )
        assert (imported.responses, imported.kind, imported.origin) == (("x", "y", "z"), "file", origin)


def test_contributions_are_taken_back_once_by_their_people_or_a_moderator(any_store):
    with any_store.writing() as session:
        people(session, "ann", "bob")
        people(session, "max", role="moderator")
        first, second = (vote(session, comparison(session, "a", "b"), "left") for _ in range(2))
        with pytest.raises(FeedbackError, match="somebody else's") as refusal:
            withdraw(session, first, "bob", now=NOON)
        assert refusal.value.status == 403
        withdrawal = withdraw(session, first, "ann", reason="a slip", now=NOON)
        assert (withdrawal.table, withdrawal.row_id, withdrawal.reason) == ("votes", first.id, "a slip")
        with pytest.raises(FeedbackError, match="already"):
            withdraw(session, first, "ann", now=NOON)
        assert not is_withdrawn(session, second)
        withdraw(session, second, "max", now=NOON)
        assert is_withdrawn(session, second)
