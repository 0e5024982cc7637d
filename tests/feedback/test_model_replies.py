"""Replies of the model in trees: where they are wanted, what is kept, and the thread that gives them."""

import threading
import time

import pytest
import torch
from sqlalchemy import select

from palm_rlhf.data.tokenizer import ByteTokenizer
from palm_rlhf.feedback.store.answer_tables import KnownModel
from palm_rlhf.feedback.store.identities import remember_model, weights_digest
from palm_rlhf.feedback.store.tree_tables import TreeMessage
from palm_rlhf.feedback.trees.growth import SPARE_TRIES
from palm_rlhf.feedback.trees.model_replies import add_model_reply, messages_wanting_model_replies
from palm_rlhf.feedback.trees.reply_worker import ReplyWorker
from palm_rlhf.model.palm import PaLM
from palm_rlhf.serving.engine import Engine, EngineConfig
from palm_rlhf.serving.served_model import ServedModel
from tests.feedback.collection import SPAM, Collection


class WithModel(Collection):
    """A collection with a known model, whose replies the test writes."""

    def __init__(self, store, *names, **settings):
        super().__init__(store, *names, **{"num_reviews": 1, "num_model_replies": 1, **settings})
        with store.writing() as session:
            session.add(KnownModel(id="m", name="model"))

    def wanted(self):
        with self.store.reading() as session:
            found = messages_wanting_model_replies(session, self.settings, now=self.now)
        return {each.message_id: each for each in found}

    def add(self, message, text):
        with self.store.writing() as session:
            return add_model_reply(
                session,
                message.id,
                text,
                model_id="m",
                sampling={"seed": 1},
                settings=self.settings,
                now=self.now,
            )


def test_accepted_messages_of_users_want_replies_of_the_model(store):
    collection = WithModel(store, "ann", "bob", "cy", num_model_replies=2)
    prompt, bad = collection.prompt("ann", "How?"), collection.prompt("ann")
    assert collection.wanted() == {} and collection.add(prompt, "early") is None
    collection.review(prompt, "bob")
    collection.review(bad, "bob", labels=SPAM)
    (wanted,) = collection.wanted().values()
    assert (wanted.message_id, wanted.number, wanted.num_tries) == (prompt.id, 2, 0)
    assert wanted.conversation == [{"role": "user", "content": "How?"}]
    reply = collection.add(prompt, " Like this.\n")
    assert (reply.text, reply.role, reply.depth, reply.accepted) == ("Like this.", "assistant", 1, True)
    assert (reply.model_id, reply.person_id, reply.sampling, reply.task_id) == ("m", None, {"seed": 1}, None)
    assert (collection.wanted()[prompt.id].number, collection.wanted()[prompt.id].num_tries) == (1, 1)
    collection.add(prompt, "Or like this.")
    assert collection.wanted() == {} and collection.add(prompt, "too many") is None
    more = collection.reply("ann", reply, "And then?")
    collection.review(more, "bob")
    conversation = collection.wanted()[more.id].conversation
    assert [turn["role"] for turn in conversation] == ["user", "assistant", "user"]
    assert [turn["content"] for turn in conversation] == ["How?", "Like this.", "And then?"]
    collection.check()


def test_blank_replies_and_those_that_are_there_are_refused_and_the_model_tries_so_often(store):
    collection = WithModel(store, "ann", "bob", "cy")
    prompt = collection.prompt("ann")
    collection.review(prompt, "bob")
    said = collection.reply("bob", prompt, "The same.")
    for number, text in enumerate(["", "The same.", " \0 ", "The same. "]):
        assert collection.wanted()[prompt.id].num_tries == number
        assert collection.add(prompt, text).accepted is False
    assert SPARE_TRIES == 3
    assert collection.wanted() == {}  # the tree goes on without it
    collection.review(said, "ann")
    assert collection.available("cy")["rank_replies"] == 0
    collection.check()


def test_a_tree_keeps_room_for_the_model_and_waits_for_it(store):
    collection = WithModel(store, "ann", "bob", "cy", max_tree_size=3, max_open_trees=1, num_rankings=1)
    prompt = collection.prompt("ann")
    collection.review(prompt, "bob")
    mine = collection.reply("bob", prompt)
    assert collection.available("cy")["reply_as_assistant"] == 0
    collection.review(mine, "ann")
    assert collection.state(prompt.tree_id) == "growing"
    reply = collection.add(prompt, "the model's")
    assert collection.state(prompt.tree_id) == "ranking"
    task = collection.take("ann", "rank_replies")
    assert sorted(task.shown) == sorted([mine.id, reply.id])
    collection.rank("ann", task, [reply.id, mine.id])
    assert (collection.message(reply.id).rank, collection.message(mine.id).rank) == (0, 1)
    collection.check()


def test_at_the_greatest_depth_no_reply_is_wanted(store):
    collection = WithModel(store, "ann", "bob", max_depth=2)
    prompt = collection.prompt("ann")
    collection.review(prompt, "bob")
    collection.review(collection.reply("ann", collection.add(prompt, "yes")), "bob")
    assert collection.wanted() == {}


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.01)


@pytest.fixture
def served():
    torch.manual_seed(0)
    tokenizer = ByteTokenizer()
    palm = PaLM(num_tokens=tokenizer.num_tokens, dim=16, depth=1, heads=2, dim_head=8, max_seq_len=128)
    return ServedModel("tiny", palm, tokenizer)


def prompts_of(store, served, *texts, **settings):
    """A collection with accepted prompts, and the id of the model."""
    collection = Collection(store, "ann", "bob", num_reviews=1, num_model_replies=2, **settings)
    for text in texts:
        collection.review(collection.prompt("ann", text), "bob")
    model_id = weights_digest(served.palm)
    with store.writing() as session:
        remember_model(session, model_id, "tiny")
    return collection, model_id


def replies_in(store):
    with store.reading() as session:
        query = select(TreeMessage).where(TreeMessage.model_id.is_not(None))
        return list(session.scalars(query.order_by(TreeMessage.created_at)))


def test_the_worker_gives_different_samples_with_how_they_were_sampled(store, served):
    collection, model_id = prompts_of(store, served, "Good day!", "And?")
    with Engine(served.palm, served.tokenizer, EngineConfig(max_batch=2)) as engine:
        with ReplyWorker(store, served, engine, collection.settings, model_id=model_id, max_new_tokens=9, seed=5):
            wait_for(lambda: sum(bool(reply.accepted) for reply in replies_in(store)) == 4)
        threads = [thread.name for thread in threading.enumerate()]
        assert "palm-rlhf-replies" not in threads
        kept = [reply for reply in replies_in(store) if reply.accepted]
        assert len({(reply.parent_id, reply.text) for reply in kept}) == 4
        assert {reply.model_id for reply in kept} == {model_id}
        for reply in kept:
            assert reply.sampling["seed"] == 5 and reply.sampling["max_new_tokens"] == 9
            assert reply.sampling["temperature"] == 1.0
        by_parent = {}
        for reply in replies_in(store):
            by_parent.setdefault(reply.parent_id, []).append(reply.sampling["index"])
        assert all(indices == list(range(len(indices))) for indices in by_parent.values())
    collection.check()


def test_a_conversation_that_does_not_fit_is_given_up_and_others_are_answered(store, served):
    collection, model_id = prompts_of(store, served, "x" * 300, "short")
    with Engine(served.palm, served.tokenizer, EngineConfig(max_batch=2)) as engine:
        with ReplyWorker(store, served, engine, collection.settings, model_id=model_id, max_new_tokens=9):
            wait_for(lambda: len(replies_in(store)) >= 2 + 2 + SPARE_TRIES)
    assert sum(bool(reply.accepted) for reply in replies_in(store)) == 2
    refused = [reply for reply in replies_in(store) if "refused" in reply.sampling]
    assert len(refused) == 2 + SPARE_TRIES and not any(reply.accepted for reply in refused)
    assert sum(bool(reply.accepted) for reply in replies_in(store)) == 2
    assert "the context 128" in refused[0].sampling["refused"]
    with store.reading() as session:
        assert messages_wanting_model_replies(session, collection.settings, now=collection.now) == []


def test_a_worker_that_is_closed_while_it_generates_keeps_nothing_half(store, served):
    collection, model_id = prompts_of(store, served, "Good day!")
    with Engine(served.palm, served.tokenizer, EngineConfig(max_batch=2)) as engine:
        worker = ReplyWorker(store, served, engine, collection.settings, model_id=model_id, max_new_tokens=100)
        wait_for(lambda: engine.num_running > 0 or replies_in(store))
        worker.close()
        wait_for(lambda: engine.num_running == 0)
        assert len({reply.text for reply in replies_in(store)}) == len(replies_in(store))
        with ReplyWorker(store, served, engine, collection.settings, model_id=model_id, max_new_tokens=100):
            wait_for(lambda: sum(bool(reply.accepted) for reply in replies_in(store)) == 2)
