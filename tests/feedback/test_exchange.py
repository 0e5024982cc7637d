"""Files that leave the database and come in: nothing is lost on the way, and the data side reads each of them."""

import gzip
import json
from collections import Counter
from datetime import datetime, timezone

import pytest
from sqlalchemy import func, select

from palm_rlhf.cli import main
from palm_rlhf.data.formats.oasst_messages import MessageFilter
from palm_rlhf.data.formats.oasst_trees import rankings, read_trees, threads, walk
from palm_rlhf.feedback.exchange.exporting import export_records, exported_records
from palm_rlhf.feedback.exchange.importing import import_file
from palm_rlhf.feedback.people.deletion import delete_person
from palm_rlhf.feedback.settings import CollectionSettings
from palm_rlhf.feedback.store.answer_tables import (
    Answer,
    ComparisonVote,
    Correction,
    KnownModel,
    Reaction,
    ShownComparison,
)
from palm_rlhf.feedback.store.identities import prompt_key_of
from palm_rlhf.feedback.store.invariants import broken_laws
from palm_rlhf.feedback.store.learning_tables import ImportedRanking
from palm_rlhf.feedback.store.people_tables import Participant
from palm_rlhf.feedback.store.preferences_view import iter_preferences
from palm_rlhf.feedback.store.tree_tables import MessageReview, ReplyRanking, Tree, TreeEvent, TreeMessage
from palm_rlhf.feedback.store.withdrawals import withdraw

NOON = datetime(2026, 1, 1, 12, tzinfo=timezone.utc)
EVERYTHING = MessageFilter(tree_states=None, synthetic=True)
QUESTION = "Why is the sky blue above us?"
PROMPT = [{"role": "user", "content": QUESTION}]


@pytest.fixture
def filled(any_store):
    """A tree with two replies, one of them a model's, and a chat with votes, a correction and thumbs."""
    with any_store.writing() as session:
        for name in ("ann", "bob", "eve"):
            session.add(Participant(id=name, name=name.title(), role="contributor", created_at=NOON))
        session.add(KnownModel(id="m" * 64, name="small model"))
        session.flush()
        tree = Tree(id="tree", language="en", state="ready_for_export", created_at=NOON)
        session.add(tree)
        session.flush()
        session.add(TreeEvent(tree_id="tree", state="ready_for_export", at=NOON))
        fields = {"tree_id": "tree", "language": "en", "accepted": True, "created_at": NOON}
        session.add(TreeMessage(id="prompt", role="prompter", text=QUESTION, depth=0, person_id="ann", **fields))
        session.flush()
        below = {"role": "assistant", "depth": 1, "parent_id": "prompt", **fields}
        session.add(TreeMessage(id="people's", text="Light scatters.", person_id="bob", **below))
        session.add(TreeMessage(id="model's", text="It is paint.", model_id="m" * 64, sampling={}, **below))
        session.add(TreeMessage(id="spam", text="Buy paint!", model_id="m" * 64, **{**below, "accepted": False}))
        session.flush()
        order = ["people's", "model's"]
        for person in ("ann", "eve"):
            session.add(ReplyRanking(parent_id="prompt", person_id=person, shown=order, best_first=order))
        for person, spam in (("bob", 0.0), ("eve", 1.0)):
            session.add(MessageReview(message_id="prompt", person_id=person, labels={"spam": spam, "quality": 0.5}))
        session.flush()
        chat(session)
    return any_store


def chat(session):
    fields = {"prompt_key": prompt_key_of(PROMPT), "prompt": PROMPT, "model_id": "m" * 64, "sampling": {}}
    texts = {"left": "Because of the air.", "right": "Because of the sea."}
    session.add_all([Answer(id=name, text=text, purpose="chat", **fields) for name, text in texts.items()])
    session.flush()
    shown = {"left_id": "left", "right_id": "right", "person_id": "ann", "chosen_by": "chat", "purpose": "training"}
    session.add(ShownComparison(id="shown", prompt_key=prompt_key_of(PROMPT), **shown))
    session.flush()
    session.add(ComparisonVote(comparison_id="shown", person_id="ann", verdict="right"))
    session.add(Correction(answer_id="left", person_id="ann", text="Because air scatters blue light."))
    for person, answer, value in (("ann", "left", 1), ("bob", "left", -1), ("ann", "right", 1)):
        session.add(Reaction(answer_id=answer, person_id=person, value=value))
    session.flush()


def records(store, to, **options):
    with store.reading() as session:
        return list(exported_records(session, to, **options))


def written(store, path, to, **options):
    counts = export_records(store, path, to, now=NOON, **options)
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        return counts, [json.loads(line) for line in file]


def by_id(record):
    """The messages of a nested tree by their ids, each without its replies, with those of its parent."""
    found, ahead = {}, [(record["prompt"], None)]
    while ahead:
        message, parent = ahead.pop()
        found[message["message_id"]] = {**message, "parent_id": parent, "replies": None}
        ahead += [(reply, message["message_id"]) for reply in message["replies"]]
    return found


def test_real_trees_come_out_as_they_came_in(any_store, tmp_path, shared_data):
    source = shared_data("oasst_en_100_tree.jsonl")
    counts = import_file(any_store, source, kind="people", source="oasst", now=NOON)
    assert counts == {"trees": 100, "messages": 1167, "already_there": 0}
    counts, out = written(any_store, tmp_path / "trees.jsonl.gz", "trees")
    assert counts == {"trees": 100, "messages": 1167}
    trees = [json.loads(line) for line in source.read_text("utf-8").splitlines()]
    assert {tree["message_tree_id"]: by_id(tree) for tree in out} == {
        tree["message_tree_id"]: by_id(tree) for tree in trees
    }
    ours, theirs = (
        {root.message_id: root for root in read_trees(path, EVERYTHING)}
        for path in (tmp_path / "trees.jsonl.gz", source)
    )
    assert {key: list(map(repr, walk(root))) for key, root in ours.items()} == {
        key: list(map(repr, walk(root))) for key, root in theirs.items()
    }
    with any_store.reading() as session:
        assert broken_laws(session, CollectionSettings(), NOON) == []
        assert set(session.scalars(select(Tree.state))) == {"exported"}
        assert {preference.origin for preference in iter_preferences(session)} == {"imported"}
    # the rankings, and the threads to fine-tune on, are those that the data side makes of the file
    ranked = Counter(json.dumps([each["prompt"], each["responses"]]) for each in records(any_store, "rankings"))
    assert ranked == Counter(
        json.dumps([each["prompt"], each["responses"]]) for root in theirs.values() for each in rankings(root)
    )
    spoken = Counter(json.dumps(each["messages"]) for each in records(any_store, "messages"))
    assert spoken == Counter(json.dumps(each["messages"]) for root in theirs.values() for each in threads(root))


def test_a_file_is_added_once(store, shared_data):
    source = shared_data("oasst_en_100_tree.jsonl")
    for already in (0, 100):
        counts = import_file(store, source, kind="ai", source="oasst", now=NOON)
        assert (counts["trees"], counts["already_there"]) == (100 - already, already)
    with store.reading() as session:
        assert session.scalar(select(func.count()).select_from(TreeMessage)) == 1167
        assert {preference.origin for preference in iter_preferences(session)} == {"ai"}


def test_a_tree_has_open_assistants_fields(filled, tmp_path):
    _, [tree] = written(filled, tmp_path / "trees.jsonl", "trees")
    prompt = tree.pop("prompt")
    assert tree == {"message_tree_id": "prompt", "tree_state": "ready_for_export"}
    best, other = prompt.pop("replies")
    assert prompt == {
        "message_id": "prompt",
        "created_date": "2026-01-01T12:00:00+00:00",
        "text": QUESTION,
        "role": "prompter",
        "lang": "en",
        "review_count": 2,
        "review_result": True,
        "deleted": False,
        "synthetic": False,
        "labels": {"quality": {"value": 0.5, "count": 2}, "spam": {"value": 0.5, "count": 2}},
        "user_id": "person-1",
    }
    wanted = ("message_id", "parent_id", "rank", "synthetic", "model_name", "user_id", "replies")
    assert [[reply.get(name) for name in wanted] for reply in (best, other)] == [
        ["people's", "prompt", 0, False, None, "person-2", []],
        ["model's", "prompt", 1, True, "small model", None, []],
    ]
    [root] = read_trees(tmp_path / "trees.jsonl", EVERYTHING)
    assert [message.text for message in walk(root)] == [QUESTION, "Light scatters.", "It is paint."]


@pytest.mark.parametrize("people, shown", [("pseudonyms", "person-1"), ("names", "Ann"), ("none", None)])
def test_people_have_names_in_a_file_only_where_that_is_asked_for(filled, people, shown):
    [tree] = records(filled, "trees", people=people)
    comparisons = [each for each in records(filled, "rankings", people=people) if each["kind"] == "comparison"]
    assert tree["prompt"].get("user_id") == shown
    assert [each.get("annotator") for each in comparisons] == [shown]
    everything = json.dumps([records(filled, to, people=people) for to in ("trees", "rankings", "preferences")])
    assert ("Ann" in everything) == (people == "names")


def test_deleted_people_have_no_names(filled):
    with filled.writing() as session:
        session.get(Participant, "ann").deleted_at = NOON
    [tree] = records(filled, "trees", people="names")
    assert [tree["prompt"]["user_id"], tree["prompt"]["replies"][0]["user_id"]] == ["person-1", "Bob"]


RANKED = {
    ("tree", "Light scatters.", "It is paint."),
    ("comparison", "Because of the sea.", "Because of the air."),
    ("correction", "Because air scatters blue light.", "Because of the air."),
}


def test_rankings_preferences_and_messages_are_read_by_the_data_side(filled, tmp_path, capsys):
    ranked, pairs, spoken = (tmp_path / f"{to}.jsonl" for to in ("rankings", "preferences", "messages"))
    for path in (ranked, pairs, spoken):
        main(["export", filled.url, str(path), "--to", path.stem])
    assert {(each["kind"], *each["responses"]) for each in map(json.loads, open(ranked))} == RANKED
    assert {(each["kind"], each["chosen"], each["rejected"]) for each in map(json.loads, open(pairs))} == RANKED
    assert all(each["prompt"] == PROMPT for each in map(json.loads, open(pairs)))
    texts = {each["messages"][-1]["content"] for each in map(json.loads, open(spoken))}
    assert texts == {  # the answer that one person liked and another did not is left out
        "Light scatters.",
        "It is paint.",
        "Because air scatters blue light.",
        "Because of the sea.",
    }
    for path, to, number in ((ranked, "rankings", 3), (pairs, "preferences", 3), (spoken, "sft", 4)):
        out = tmp_path / f"{to}-again.jsonl"
        main(["data", "convert", str(path), "--to", to, "--out", str(out)])
        assert len(out.read_text().splitlines()) == number
    assert '"rejected": {}' in capsys.readouterr().out.splitlines()[-1]


def test_nothing_that_was_taken_back_is_written(filled):
    with filled.writing() as session:
        for table in (TreeMessage, ComparisonVote, Correction, Reaction):
            for row in session.scalars(select(table).where(table.person_id.is_not(None))):
                withdraw(session, row, row.person_id, now=NOON)
    assert [records(filled, to) for to in ("trees", "rankings", "preferences", "messages")] == [[], [], [], []]


def test_languages_and_states_choose_trees(filled):
    with filled.writing() as session:
        session.add(Tree(id="more", language="pt-BR", state="growing"))
        session.flush()
        session.add(TreeMessage(tree_id="more", role="prompter", text="Oi", language="pt-BR", depth=0, accepted=True))

    def prompts(**options):
        return [tree["prompt"]["text"] for tree in records(filled, "trees", **options)]

    assert prompts() == prompts(languages=["en"]) == prompts(languages=["EN", "de"]) == [QUESTION]
    assert prompts(languages=["pt"]) == []
    assert prompts(languages=["pt"], states=["growing"]) == prompts(languages=["pt-BR"], states=["growing"]) == ["Oi"]
    assert sorted(prompts(states=["growing", "ready_for_export"])) == ["Oi", QUESTION]
    # the language of a text outside the trees is detected
    assert len(records(filled, "rankings", languages=["en"])) == 3
    assert records(filled, "rankings", languages=["de"]) == []


PREFERENCES = {
    "pairs.jsonl": [{"prompt": "Why?", "chosen": "So.", "rejected": "No."}],
    "hh.jsonl": [{"chosen": "\n\nHuman: Why?\n\nAssistant: So.", "rejected": "\n\nHuman: Why?\n\nAssistant: No."}],
    "ranked.json": [{"prompt": "Why?", "answers": [{"answer": "No.", "rank": 2}, {"answer": "So.", "rank": 1}]}],
    "scored.jsonl": [{"prompt": "Why?", "responses": ["No.", "So."], "scores": [1, 2]}],
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_preferences_of_every_form_are_added_once(any_store, tmp_path, name, capsys):
    path = tmp_path / name
    path.write_text("\n".join(map(json.dumps, PREFERENCES[name])))
    for added in (1, 0):
        main(["import", any_store.url, str(path), "--kind", "ai", "--source", "a judge"])
        output, errors = capsys.readouterr()
        assert json.loads(output) == {"rankings": added, "already_there": 1 - added, "rejected": {}}
        assert ("there already" in errors) == (not added)
    with any_store.reading() as session:
        [preference] = iter_preferences(session)
        assert (preference.prompt, preference.responses) == ([{"role": "user", "content": "Why?"}], ("So.", "No."))
        assert preference.origin == "ai"
        assert session.scalars(select(ImportedRanking.source)).all() == ["a judge"]


BROKEN = {
    "a broken line": ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": ', "line 2.*--skip-broken"),
    "conversations": ('{"messages": [{"role": "user", "content": "a"}]}', "expected Open-Assistant's trees"),
    "no format": ('{"x": 1}', "expected one of Open-Assistant"),
    "a zero": ('{"prompt": "a", "chosen": "b\\u0000", "rejected": "c"}', r"U\+0000"),
    "a tree with a zero": (
        '{"message_id": "x", "parent_id": null, "role": "prompter", "text": "b\\u0000", "lang": "en"}',
        r"U\+0000",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_cannot_be_read_adds_nothing(any_store, tmp_path, case):
    text, words = BROKEN[case]
    (tmp_path / "file.jsonl").write_text(text)
    with pytest.raises(SystemExit, match=words):
        main(["import", any_store.url, str(tmp_path / "file.jsonl"), "--kind", "people"])
    with any_store.reading() as session:
        assert [session.scalar(select(func.count()).select_from(table)) for table in (ImportedRanking, Tree)] == [0, 0]


def test_messages_one_by_one_with_other_ids_become_trees(store, tmp_path):
    """As in the tables of the hub: flat, with labels in columns; ids are UUIDs in the database, and come out again."""
    labels = {"name": ["spam"], "value": [0.0], "count": [3]}
    rows = [
        {"message_id": "a", "parent_id": None, "role": "prompter", "text": "Why?", "lang": "en", "labels": labels},
        {"message_id": "b", "parent_id": "a", "role": "assistant", "text": "So.", "lang": None, "rank": 1.0},
        {"message_id": "c", "parent_id": "a", "role": "assistant", "text": "No.", "lang": "en", "rank": 0.0},
        {"message_id": "d", "parent_id": "a", "role": "assistant", "text": "Gone", "lang": "en", "deleted": True},
        {"message_id": "e", "parent_id": None, "role": "prompter", "text": "Bad", "lang": "en", "review_result": False},
    ]
    source = tmp_path / "flat.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    rejected = Counter()
    counts = import_file(store, source, kind="people", source="flat", now=NOON, rejected=rejected)
    assert (counts["trees"], counts["messages"]) == (1, 3)
    assert rejected == {"deleted": 1, "review": 1}
    [tree] = records(store, "trees")
    assert tree["message_tree_id"] == "a"
    assert [
        (reply["message_id"], reply["parent_id"], reply["rank"], reply["lang"]) for reply in tree["prompt"]["replies"]
    ] == [
        ("c", "a", 0, "en"),
        ("b", "a", 1, None),
    ]
    assert tree["prompt"]["labels"] == labels


def test_an_export_that_is_refused_changes_nothing(store, tmp_path, capsys):
    (tmp_path / "there.jsonl").write_text("mine")
    with pytest.raises(SystemExit, match="exists already"):
        main(["export", store.url, str(tmp_path / "there.jsonl"), "--to", "trees"])
    assert (tmp_path / "there.jsonl").read_text() == "mine"
    with pytest.raises(SystemExit, match="does not exist"):
        main(["export", str(tmp_path / "missing.db"), str(tmp_path / "out.jsonl"), "--to", "trees"])
    assert not (tmp_path / "missing.db").exists()
    (tmp_path / "empty.db").touch()
    with pytest.raises(SystemExit, match="holds no feedback"):
        main(["export", str(tmp_path / "empty.db"), str(tmp_path / "out.jsonl"), "--to", "trees"])
    main(["export", store.url, str(tmp_path / "out.jsonl"), "--to", "trees"])
    output, errors = capsys.readouterr()
    assert (json.loads(output), "nothing of this yet" in errors) == ({"trees": 0}, True)


@pytest.mark.parametrize("source", ["people", " "])
def test_a_source_is_a_name_of_its_own(store, tmp_path, source):
    with pytest.raises(ValueError, match="name of the file's contents"):
        import_file(store, tmp_path / "x", kind="people", source=source, now=NOON)


RANKED_KINDS = {kind for kind, *_ in RANKED}


@pytest.mark.parametrize("gone", ["ann", "bob", "eve"])
def test_nothing_of_a_deleted_person_is_written(filled, gone):
    """Of the tree, the chat and what the others said of it there is what can stay without the person."""
    with filled.writing() as session:
        session.add(Participant(id="max", name="Max", role="admin", password_hash="x"))
        for answer in session.scalars(select(Answer)):
            answer.person_id = "ann"
        session.flush()
        texts = set(session.scalars(select(TreeMessage.text).where(TreeMessage.person_id == gone)))
        admin = session.get(Participant, "max")
        delete_person(session, gone, NOON, CollectionSettings(), keeps_contributions=False, by=admin)
    out = {to: records(filled, to) for to in ("trees", "rankings", "preferences", "messages")}
    everything = json.dumps(out)
    assert [text for text in texts if json.dumps(text)[1:-1] in everything] == []
    assert '"content": ""' not in everything
    assert '"prompt": []' not in everything
    assert {each["kind"] for each in out["rankings"]} == {"eve": RANKED_KINDS, "bob": RANKED_KINDS - {"tree"}}.get(
        gone, set()
    )
    with filled.reading() as session:
        assert broken_laws(session, CollectionSettings(), NOON) == []
