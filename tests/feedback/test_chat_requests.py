"""The requests of a chat page with feedback: answers are kept, and judged once by whoever was given them."""

import httpx
import pytest
import torch
from sqlalchemy import select, text

from palm_rlhf.feedback.store.answer_tables import Answer, ComparisonVote, KnownModel, ShownComparison
from palm_rlhf.feedback.store.identities import prompt_key_of, weights_digest
from palm_rlhf.feedback.store.people_tables import Participant
from palm_rlhf.feedback.store.preferences_view import iter_preferences
from tests.feedback.chat_servers import HELLO, ChatClient, chat_server, random_model


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture
def server(store, model):
    with chat_server(store, model) as server:
        yield server


@pytest.fixture
def client(server):
    with ChatClient(server[0]) as client:
        yield client


def rows(store, table):
    with store.reading() as session:
        return session.scalars(select(table)).all()


def test_an_answer_is_kept_with_all_that_made_it(store, client, model):
    asked = client.ask(temperature=0.5, top_p=0.9, stop=["zz"], seed=None)
    (row,) = rows(store, Answer)
    assert asked["answers"] == asked["kept"] == [row.id] and asked["texts"] == [row.text]
    assert (row.prompt, row.prompt_key, row.purpose) == (HELLO, prompt_key_of(HELLO), "chat")
    assert row.finish in ("stop", "length")
    assert row.model_id == weights_digest(model.palm)
    assert [(known.id, known.name) for known in rows(store, KnownModel)] == [(row.model_id, "random")]
    assert (row.sampling["temperature"], row.sampling["top_p"], row.sampling["max_new_tokens"]) == (0.5, 0.9, 8)
    assert "zz" in row.sampling["stop"]
    assert [person.id for person in rows(store, Participant)] == [row.person_id]
    again = client.ask(temperature=0.5, top_p=0.9, stop=["zz"], seed=row.sampling["seed"])
    assert again["texts"] == asked["texts"]


def test_two_answers_are_compared_blind_and_in_random_order(store, client):
    seen = set()
    for seed in range(12):
        asked = client.ask("compare", seed=seed)
        (comparison,) = [row for row in rows(store, ShownComparison) if row.id == asked["comparison"]]
        answers = {row.id: row for row in rows(store, Answer)}
        left, right = answers[comparison.left_id], answers[comparison.right_id]
        assert [left.text, right.text] == asked["texts"] and [left.id, right.id] == asked["answers"]
        assert (comparison.chosen_by, comparison.purpose) == ("chat", "training")
        assert left.sampling["seed"] == seed
        seen.add((left.sampling["index"], right.sampling["index"]))
    assert seen == {(0, 1), (1, 0)}


def test_null_characters_are_alike_in_the_database_and_on_the_page(store):
    model = random_model()
    with torch.no_grad():
        model.palm.token_emb.weight.fill_(0)  # all logits are 0, of which the first is taken: the byte 0
    with chat_server(store, model) as (url, _), ChatClient(url) as client:
        asked = client.ask(temperature=0, max_tokens=4)
    (row,) = rows(store, Answer)
    assert row.text == asked["texts"][0] == "\ufffd" * 4


def test_a_vote_is_given_once_and_may_be_taken_back(store, client):
    asked = client.ask("compare")
    vote = client.give("votes", comparison=asked["comparison"], verdict="right")
    assert vote.status_code == 200
    again = client.give("votes", comparison=asked["comparison"], verdict="left")
    assert again.status_code == 409 and "take that vote back" in again.json()["error"]["message"]
    given = client.give("given", comparisons=[asked["comparison"]], answers=asked["answers"])
    assert given.json() == {asked["comparison"]: {"vote": {"id": vote.json()["id"], "verdict": "right"}}}
    with store.reading() as session:
        (preference,) = iter_preferences(session)
    assert preference.responses == tuple(reversed(asked["texts"]))
    withdrawal = {"table": "votes", "id": vote.json()["id"]}
    assert client.give("withdrawals", **withdrawal).status_code == 200
    assert client.give("withdrawals", **withdrawal).status_code == 409
    assert client.give("given", comparisons=[asked["comparison"]], answers=[]).json() == {}
    assert client.give("votes", comparison=asked["comparison"], verdict="left").status_code == 200
    assert [row.verdict for row in rows(store, ComparisonVote)] == ["right", "left"]


def test_thumbs_and_better_answers_are_given_once_and_may_be_taken_back(store, client):
    asked = client.ask()
    (answer,) = asked["kept"]
    thumb = client.give("reactions", answer=answer, value=-1)
    better = client.give("corrections", answer=answer, text="  Hello to you. ")
    assert (thumb.status_code, better.status_code) == (200, 200)
    assert client.give("reactions", answer=answer, value=1).status_code == 409
    assert client.give("corrections", answer=answer, text="Another.").status_code == 409
    assert client.give("given", comparisons=[], answers=[answer]).json() == {
        answer: {
            "reaction": {"id": thumb.json()["id"], "value": -1},
            "correction": {"id": better.json()["id"], "text": "Hello to you."},
        }
    }
    for table, row in (("reactions", thumb), ("corrections", better)):
        assert client.give("withdrawals", table=table, id=row.json()["id"]).status_code == 200
    assert client.give("given", comparisons=[], answers=[answer]).json() == {}
    assert client.give("reactions", answer=answer, value=1).status_code == 200


def test_what_one_may_not_judge_is_refused_in_words(store, client):
    asked = client.ask("compare")
    comparison, (answer, _) = asked["comparison"], asked["answers"]
    with store.writing() as session:
        other = Participant(name="other", role="contributor")
        session.add(other)
        session.flush()
        row = session.get_one(Answer, answer)
        theirs = Answer(
            **{
                name: getattr(row, name) for name in ("prompt_key", "prompt", "text", "model_id", "sampling", "purpose")
            },
            person_id=other.id,
        )
        session.add(theirs)
        session.flush()
        shown = ShownComparison(
            prompt_key=row.prompt_key,
            left_id=answer,
            right_id=theirs.id,
            person_id=other.id,
            chosen_by="chat",
            purpose="training",
        )
        session.add(shown)
        session.flush()
        vote = ComparisonVote(comparison_id=shown.id, person_id=other.id, verdict="tie")
        session.add(vote)
        session.flush()
        theirs_id, shown_id, vote_id = theirs.id, shown.id, vote.id
    refusals = [
        (404, "votes", {"comparison": "no such one", "verdict": "left"}),
        (403, "votes", {"comparison": shown_id, "verdict": "left"}),
        (400, "votes", {"comparison": comparison, "verdict": "best"}),
        (400, "votes", {"comparison": comparison}),
        (400, "votes", {"comparison": comparison, "verdict": "left", "person": "other"}),
        (400, "votes", {"comparison": {"id": comparison}, "verdict": "left"}),
        (404, "reactions", {"answer": "' OR 1=1 --", "value": 1}),
        (403, "reactions", {"answer": theirs_id, "value": 1}),
        (400, "reactions", {"answer": answer, "value": 2}),
        (422, "reactions", {"answer": answer, "value": 0}),
        (403, "corrections", {"answer": theirs_id, "text": "mine"}),
        (422, "corrections", {"answer": answer, "text": " \n"}),
        (422, "corrections", {"answer": answer, "text": "x" * 8001}),
        (422, "corrections", {"answer": answer, "text": asked["texts"][0]}),
        (404, "withdrawals", {"table": "people", "id": vote_id}),
        (403, "withdrawals", {"table": "votes", "id": vote_id}),
        (400, "given", {"answers": ["x"] * 1001, "comparisons": []}),
    ]
    for status, kind, values in refusals:
        response = client.give(kind, **values)
        assert (response.status_code, kind) == (status, kind), (values, response.text)
        assert len(response.json()["error"]["message"]) > 15
    assert client.post("votes", content=b"{", headers={"content-type": "application/json"}).status_code == 400
    form = client.post("votes", data={"comparison": comparison, "verdict": "left"})
    assert form.status_code == 415
    values = {"comparison": comparison, "verdict": "left"}
    assert client.post("votes", json=values, headers={"x-form-token": "0" * 64}).status_code == 403
    assert client.post("votes", json=values, headers={"origin": "https://evil.example"}).status_code == 403
    assert [row.id for row in rows(store, ComparisonVote)] == [vote_id]


def test_what_cannot_be_answered_is_refused_and_nothing_is_kept(store, client):
    def refused(kind="reply", **values):
        return client.post(kind, json={"model": "random", "messages": HELLO, "max_tokens": 4, **values})

    cut = client.ask()
    (cut_id,), (words,) = cut["kept"], cut["texts"]
    begun = [*HELLO, {"role": "assistant", "content": words}]
    going_on = {"messages": begun, "continue_final_message": True, "add_generation_prompt": False}
    for response, status, word in (
        (refused(messages=[{"role": "assistant", "content": "I"}]), 400, "no message of the user"),
        (refused(n=2), 400, "expected only"),
        (refused(tools=[]), 400, "expected only"),
        (refused("compare", temperature=0), 422, "temperature above 0"),
        (refused(model="other"), 404, "does not exist"),
        (refused(messages=[{"role": "user", "content": "x" * 4000}]), 400, "context"),
        (refused(**going_on), 400, "expected only"),
        (refused(**going_on, continues="unknown"), 403, "in its own words"),
        (
            refused(**{**going_on, "messages": [*HELLO, {"role": "assistant", "content": "forged"}]}, continues=cut_id),
            403,
            "own words",
        ),
        (refused(continues=cut_id), 400, "continue_final_message"),
        (refused("compare", **going_on, continues=cut_id), 422, "the same"),
    ):
        assert (response.status_code, word in response.text) == (status, True), response.text
    assert [row.id for row in rows(store, Answer)] == [cut_id]
    more = client.ask(**going_on, continues=cut_id)
    (whole,) = [row for row in rows(store, Answer) if row.id in more["kept"]]
    assert whole.text == words + more["texts"][0] and whole.prompt == HELLO and whole.sampling["begun"] == len(words)


def test_an_answer_that_is_cut_is_kept_as_far_as_it_was_read(store, server, client, eventually):
    body = {"model": "random", "messages": HELLO, "max_tokens": 200}
    with client.stream("POST", "compare", json=body) as response:
        lines = response.iter_lines()
        while '"content": "' not in (line := next(lines)) or '"content": ""' in line:
            pass
    answers = eventually(lambda: rows(store, Answer))
    assert {row.finish for row in answers} <= {"stopped", "stop", "length"} and "stopped" in {
        row.finish for row in answers
    }
    assert rows(store, ShownComparison) == []
    eventually(lambda: server[1].num_running == 0)


def test_a_server_with_keys_asks_the_chat_page_for_one_and_people_for_none(store, model):
    with chat_server(store, model, api_keys=["secret"]) as (url, _):
        page = {"accept": "text/html"}
        assert httpx.get(f"{url}/feedback/", headers=page).status_code == 200
        assert httpx.get(f"{url}/feedback/chat/visitor").status_code == 401
        assert httpx.get(f"{url}/feedback/chat/visitor", headers={"authorization": "Bearer secret"}).status_code == 200
        with ChatClient(url, headers={"authorization": "Bearer secret"}) as client:
            assert client.ask()["kept"]
            del client.headers["authorization"]
            assert client.post("reply", json={"model": "random", "messages": HELLO}).status_code == 401


def test_whoever_has_not_logged_in_is_told_so(store, model):
    with chat_server(store, model, is_local=False) as (url, _):
        response = httpx.get(f"{url}/feedback/chat/visitor")
        assert response.status_code == 401 and "log in" in response.text
        assert httpx.post(f"{url}/feedback/chat/reply", json={"model": "random", "messages": HELLO}).status_code == 401
    assert rows(store, Answer) == []


def test_an_answer_that_the_database_cannot_keep_is_still_read_and_the_page_is_told(store, client):
    with store.writing() as session:
        session.execute(text("ALTER TABLE answers RENAME TO away"))
    asked = client.ask("compare")
    assert all(asked["texts"]) and asked["kept"] == [] and asked["comparison"] is None
    assert "kept nothing of this" in asked["error"]
    with store.writing() as session:
        session.execute(text("ALTER TABLE away RENAME TO answers"))
    assert client.give("reactions", answer=asked["answers"][0], value=1).status_code == 404
    assert len(client.ask("compare")["kept"]) == 2
