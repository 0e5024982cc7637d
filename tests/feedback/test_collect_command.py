"""The command collect: its settings reach the site, its model replies in the trees, and Ctrl-C ends it well."""

import re
import signal
import subprocess
import sys

import httpx
import pytest
import torch
from sqlalchemy import select

from palm_rlhf.cli import main
from palm_rlhf.data.tokenizer import ByteTokenizer
from palm_rlhf.feedback.store.answer_tables import KnownModel
from palm_rlhf.feedback.store.identities import weights_digest
from palm_rlhf.feedback.store.people_tables import Invitation
from palm_rlhf.feedback.store.tree_tables import TreeMessage
from palm_rlhf.model.palm import PaLM
from tests.feedback.collection import Collection
from tests.feedback.test_model_replies import wait_for

READY = re.compile(r"feedback is collected at (http://\S+)")


def started(*options, ready=READY):
    """The command in a process of its own, and its URL."""
    command = [sys.executable, "-m", "palm_rlhf.cli", "collect", *map(str, options), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    assert ready.search(line), process.communicate()
    return process, ready.search(line).group(1)


def interrupted(process):
    """The output of a process that Ctrl-C ends."""
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in errors, errors
    return output


@pytest.fixture
def model_folder(tmp_path):
    torch.manual_seed(0)
    tokenizer = ByteTokenizer()
    palm = PaLM(num_tokens=tokenizer.num_tokens, dim=16, depth=1, heads=2, dim_head=8, max_seq_len=128)
    for part in (palm, tokenizer):
        part.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_model_replies_in_the_trees_by_the_options_and_settings_reach_the_site(store, model_folder, tmp_path):
    collection = Collection(store, "ann", "bob", num_reviews=1)
    prompt = collection.prompt("ann", "Good day!")
    collection.review(prompt, "bob")
    process, url = started(
        model_folder,
        *("--database", tmp_path / "feedback.db", "--num-model-replies", "2", "--max-new-tokens", "7"),
        *("--temperature", "0.9", "--seed", "3", "--max-open-trees", "3", "--template", "plain"),
    )
    replies = []

    def both_are_there():
        replies[:] = [message for message in collection.messages() if message.model_id and message.accepted]
        return len(replies) == 2

    try:
        wait_for(both_are_there)
        page = httpx.get(url, headers={"accept": "text/html"})
        strange = httpx.get(url, headers={"host": "evil.example"})
    finally:
        interrupted(process)
    assert page.status_code == 200 and strange.status_code == 403
    for reply in replies:
        sampling = reply.sampling
        assert (sampling["temperature"], sampling["seed"], sampling["max_new_tokens"]) == (0.9, 3, 7)
        assert reply.parent_id == prompt.id
    with store.reading() as session:
        known = session.get_one(KnownModel, weights_digest(PaLM.from_pretrained(model_folder)))
        assert (known.name, known.folder) == ("model", str(model_folder))
        assert {reply.model_id for reply in replies} == {known.id}
    collection.settings = type(collection.settings)(num_model_replies=2, num_reviews=1)
    collection.check()


def test_a_site_for_other_machines_without_people_prints_a_link_for_its_first_admin(store, tmp_path):
    process, _ = started("--database", f"sqlite:///{tmp_path}/feedback.db", "--host", "0.0.0.0")
    output = process.stdout.readline() + interrupted(process)
    assert re.search(r"nobody can log in yet: open http://\S+/join/\S+ within a day to become the admin", output)
    with store.reading() as session:
        assert [row.role for row in session.scalars(select(Invitation))] == ["admin"]
        assert session.scalars(select(TreeMessage)).all() == []


@pytest.mark.parametrize(
    "options, words",
    [
        (["m", "--num-model-replies", "0"], "leave the model out"),
        (["--port", "70000"], "port=70000"),
        (["--temperature", "-1"], "temperature=-1"),
        (["m", "--max-new-tokens", "0"], "max_new_tokens=0"),
        (["--allowed-hosts", "a/b"], "'a/b'"),
    ],
)
def test_options_out_of_range_are_refused_in_words(options, words, tmp_path):
    with pytest.raises(SystemExit) as end:
        main(["collect", *options, "--database", f"{tmp_path}/feedback.db"])
    assert words in str(end.value)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"num_model_replies": -1}, "num_model_replies=-1, expected at least 0"),
        ({"max_user_replies": -1}, "max_user_replies=-1, expected at least 0"),
        ({"max_depth": 0}, "max_depth=0, expected at least 1"),
        ({"max_message_length": 0}, "max_message_length=0, expected at least 1"),
        ({"max_tasks_per_hour": 0}, "max_tasks_per_hour=0, expected at least 1"),
    ],
)
def test_settings_out_of_range_are_refused_in_words(options, words, store):
    with pytest.raises(ValueError, match=words):
        Collection(store, **options)
