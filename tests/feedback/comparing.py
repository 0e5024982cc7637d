"""People, rounds, answers and votes of the tests of comparisons."""

from datetime import datetime, timedelta, timezone

from palm_rlhf.feedback.store.answer_tables import Answer, AnswerScore, ComparisonVote, KnownModel, ShownComparison
from palm_rlhf.feedback.store.identities import prompt_key_of
from palm_rlhf.feedback.store.learning_tables import Round
from palm_rlhf.feedback.store.people_tables import Participant

NOW = datetime(2026, 3, 1, 12, tzinfo=timezone.utc)
OLD, NEW = "0" * 64, "1" * 64


def add_models(session):
    session.add_all([KnownModel(id=OLD, name="old"), KnownModel(id=NEW, name="new")])
    session.flush()


def add_person(session, name, role="contributor"):
    person = Participant(name=name, role=role, created_at=NOW)
    session.add(person)
    session.flush()
    return person


def add_round(session, number, base=OLD):
    row = Round(number=number, base_model_id=base, settings={}, created_at=NOW + timedelta(days=number))
    session.add(row)
    session.flush()
    return row


def add_answers(session, round_, prompt, texts, purpose="training", models=None, scores=None, scored_in=None):
    """Answers to one prompt; their ids in order. `scores` are kept as those of the round `scored_in`."""
    messages = [{"role": "user", "content": prompt}]
    answers = [
        Answer(
            prompt_key=prompt_key_of(messages),
            prompt=messages,
            text=text,
            model_id=model,
            sampling={},
            purpose=purpose,
            round_id=round_.id,
            created_at=NOW,
        )
        for text, model in zip(texts, models or [OLD] * len(texts), strict=True)
    ]
    session.add_all(answers)
    session.flush()
    for answer, score in zip(answers, scores or []):
        session.add(AnswerScore(answer_id=answer.id, round_id=(scored_in or round_).id, score=score))
    session.flush()
    return [answer.id for answer in answers]


def add_comparison(session, person, left, right, purpose="training", round_=None, chosen_by="random", at=NOW):
    comparison = ShownComparison(
        prompt_key=session.get(Answer, left).prompt_key,
        left_id=left,
        right_id=right,
        person_id=person.id,
        chosen_by=chosen_by,
        purpose=purpose,
        round_id=round_.id if round_ else None,
        created_at=at,
    )
    session.add(comparison)
    session.flush()
    return comparison


def add_vote(session, comparison, verdict="left", at=NOW):
    vote = ComparisonVote(comparison_id=comparison.id, person_id=comparison.person_id, verdict=verdict, created_at=at)
    session.add(vote)
    session.flush()
    return vote
