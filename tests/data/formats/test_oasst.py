"""What is learnt from a tree follows from its paths, in whatever form and order its messages come."""

import gzip
import json
import random
from collections import Counter
from math import comb
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palm_rlhf.data.curation.held_out import is_held_out, key_digest
from palm_rlhf.data.formats.oasst_messages import LANGUAGES, MessageFilter
from palm_rlhf.data.formats.oasst_trees import is_oasst, prompts, rankings, read_trees, threads, walk

ROLES = {"prompter": "user", "assistant": "assistant"}


def save(folder, rows, name="trees.jsonl"):
    path, content = Path(folder, name), "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


def learnt(path, top_k=None, wanted=None, **options):
    """All that comes out of a file, each part as sorted lines, and the rejections."""
    rejected, found = Counter(), {"threads": [], "rankings": [], "prompts": []}
    for root in read_trees(path, wanted, rejected=rejected):
        found["threads"] += threads(root, top_k)
        found["rankings"] += rankings(root, top_k, rejected=rejected, **options)
        found["prompts"] += prompts(root)
    return {name: sorted(map(json.dumps, rows)) for name, rows in found.items()}, rejected


def flattened(tree):
    """The messages of a tree record, each with the keys that a file of messages has."""
    ahead, found = [tree["prompt"]], []
    while ahead:
        message = ahead.pop()
        ahead += message["replies"]
        alone = {key: value for key, value in message.items() if key != "replies"}
        found.append({**alone, "message_tree_id": tree["message_tree_id"], "tree_state": tree["tree_state"]})
    return found


def nested(messages):
    """The tree records of messages that form trees."""
    by_id = {message["message_id"]: {**message, "replies": []} for message in messages}
    for message in by_id.values():
        if message["parent_id"] is not None:
            by_id[message["parent_id"]]["replies"].append(message)
    roots = [message for message in by_id.values() if message["parent_id"] is None]
    return [
        {"message_tree_id": root["message_id"], "tree_state": root.get("tree_state"), "prompt": root} for root in roots
    ]


# The real trees


COUNTS = {None: (529, 886, 207, 732, 658, 475), 1: (96, 142, 133, 510, 451, 475), 2: (273, 447, 169, 604, 540, 475)}


def counts(found):
    replies = [len(json.loads(row)["responses"]) for row in found["rankings"]]
    turns = [turn["role"] for row in found["threads"] for turn in json.loads(row)["messages"]]
    return (
        len(found["threads"]),
        turns.count("assistant"),
        len(replies),
        sum(comb(number, 2) for number in replies),
        sum(comb(min(number, 5), 2) for number in replies),
        len(found["prompts"]),
    )


@pytest.mark.parametrize("top_k", COUNTS)
def test_the_real_trees_give_their_counts_in_every_form(shared_data, tmp_path, top_k):
    path, english = shared_data("oasst_en_100_tree.jsonl"), MessageFilter(languages=["en"], tree_states=None)
    found, rejected = learnt(path, top_k, english)
    assert counts(found) == COUNTS[top_k]
    assert rejected == {"synthetic": 5, "below a message left out": 17}
    messages = [message for line in path.read_text().splitlines() for message in flattened(json.loads(line))]
    random.shuffle(messages)
    assert learnt(save(tmp_path, messages, "messages.jsonl.gz"), top_k, english) == (found, rejected)


def test_at_most_five_replies_of_the_real_trees(shared_data):
    path = shared_data("oasst_en_100_tree.jsonl")
    assert counts(learnt(path, max_replies=5)[0])[2:5] == (207, 658, 658)


def test_the_real_trees_hold_the_synthetic_messages_when_asked(shared_data):
    path, rejected = shared_data("oasst_en_100_tree.jsonl"), Counter()
    roots = read_trees(path, MessageFilter(synthetic=True), rejected=rejected)
    assert sum(1 for root in roots for _ in walk(root)) == 1167 and not rejected


# Trees of any shape, against the definitions


@st.composite
def forests(draw, max_messages=14):
    """Well-formed trees as messages in any order; ranks may be missing or double, any message may be unwanted."""
    num_messages = draw(st.integers(1, max_messages))
    names = draw(st.permutations([f"m{number}" for number in range(num_messages)]))
    depths, messages = [], []
    for number, name in enumerate(names):
        parent = draw(st.sampled_from([None, *range(max(0, number - 4), number)])) if number else None
        depths.append(0 if parent is None else depths[parent] + 1)
        role = "assistant" if depths[-1] % 2 else "prompter"
        messages.append(
            {
                "message_id": name,
                "parent_id": None if parent is None else names[parent],
                "text": draw(st.sampled_from(["yes", "no", " Ünï\n", name])),
                "role": role,
                "lang": draw(st.sampled_from(["en", "en", "en", "de"])),
                "rank": draw(st.none() | st.integers(0, 3)) if role == "assistant" else None,
                "deleted": draw(st.sampled_from([False] * 9 + [True])),
                "synthetic": draw(st.sampled_from([False] * 9 + [True])),
                "review_result": draw(st.sampled_from([True] * 9 + [None, False])),
                "tree_state": draw(st.sampled_from(["ready_for_export", "ready_for_export", "growing"]))
                if parent is None
                else None,
            }
        )
    return draw(st.permutations(messages))


ENGLISH = MessageFilter(languages=["en"])


def is_wanted(message):
    return (
        message["lang"] == "en"
        and message["tree_state"] in (None, "ready_for_export")
        and message["review_result"] is not False
        and not message["deleted"]
        and not message["synthetic"]
    )


class Definitions:
    """The words of the data set's description, message by message, with no thought for speed."""

    def __init__(self, messages, top_k):
        self.by_id, self.top_k = {message["message_id"]: message for message in messages}, top_k

    def path(self, message):
        parent = message["parent_id"]
        return [*([] if parent is None else self.path(self.by_id[parent])), message]

    def ranks(self, message):
        siblings = [other for other in self.by_id.values() if other["parent_id"] == message["parent_id"]]
        if self.top_k is None or message["role"] == "prompter":
            return True
        return message["rank"] < self.top_k if message["rank"] is not None else len(siblings) == 1

    def kept(self, role, ranked=True):
        return [
            message
            for message in self.by_id.values()
            if message["role"] == role
            and all(is_wanted(part) and (not ranked or self.ranks(part)) for part in self.path(message))
        ]

    def turns(self, message):
        return [{"role": ROLES[part["role"]], "content": part["text"]} for part in self.path(message)]

    def threads(self):
        kept = self.kept("assistant")
        inner = [part["message_id"] for message in kept for part in self.path(message)[:-1]]
        return [{"messages": self.turns(message)} for message in kept if message["message_id"] not in inner]

    def rankings(self):
        for message in self.kept("prompter"):
            replies = [
                reply
                for reply in self.by_id.values()
                if reply["parent_id"] == message["message_id"] and is_wanted(reply) and reply["rank"] is not None
            ]
            replies.sort(key=lambda reply: (reply["rank"], reply["message_id"]))
            best = {}
            for reply in replies:
                if reply["rank"] not in best and reply["text"] not in best.values():
                    best[reply["rank"]] = reply["text"]
            if len(best) > 1:
                yield {"prompt": self.turns(message), "responses": list(best.values())}

    def prompts(self):
        return [{"prompt": self.turns(message)} for message in self.kept("prompter", ranked=False)]


@settings(deadline=None, max_examples=80)
@given(messages=forests(), top_k=st.sampled_from([None, 1, 2, 3]), data=st.data())
def test_any_trees_give_what_the_definitions_say_in_both_forms(messages, top_k, data):
    expected = Definitions(messages, top_k)
    expected = {name: sorted(map(json.dumps, getattr(expected, name)())) for name in ("threads", "rankings", "prompts")}
    with TemporaryDirectory() as folder:
        found, rejected = learnt(save(folder, messages), top_k, ENGLISH)
        assert found == expected
        again = data.draw(st.permutations(messages))
        assert learnt(save(folder, again), top_k, ENGLISH) == (found, rejected)
        assert learnt(save(folder, nested(again)), top_k, ENGLISH) == (found, rejected)


@st.composite
def wrecks(draw):
    """Messages that point anywhere, with any role, some of them twice, some of them no messages at all."""
    names = [f"m{number}" for number in range(draw(st.integers(1, 8)))]
    rows = []
    for name in names:
        parent = draw(st.sampled_from([None, "nowhere", *names]))
        role = draw(st.sampled_from(["prompter", "assistant", "prompter", "assistant", "system"]))
        rows.append({"message_id": name, "parent_id": parent, "role": role, "text": draw(st.sampled_from("ab "))})
        rows[-1] |= draw(st.sampled_from([{}] * 8 + MALFORMED))
    rows += draw(st.lists(st.sampled_from(rows), max_size=3))
    return draw(st.permutations(rows))


MALFORMED = [
    {"message_id": None},
    {"message_id": ""},
    {"text": 3},
    {"rank": "first"},
    {"rank": -1},
    {"rank": 0.5},
    {"rank": True},
    {"lang": 3},
    {"deleted": "no"},
    {"review_result": "good"},
    {"parent_id": 7},
    {"tree_state": ["growing"]},
    {"labels": 3},
    {"labels": {"spam": {"value": "much"}}},
    {"labels": {"name": ["spam", "quality"], "value": [0.5]}},
    {"labels": {"name": [1], "value": [0.5]}},
    {"emojis": {"name": ["+1"]}},
]


@settings(deadline=None, max_examples=100)
@given(rows=wrecks(), data=st.data())
def test_every_message_of_a_wreck_is_in_a_tree_or_counted(rows, data):
    with TemporaryDirectory() as folder:
        rejected = Counter()
        roots = list(read_trees(save(folder, rows), rejected=rejected))
        kept = [message for root in roots for message in walk(root)]
        assert len(kept) + sum(rejected.values()) == len(rows)
        for message in kept:
            path = message.path()
            assert [part.role for part in path] == ["prompter", "assistant"] * (len(path) // 2) + ["prompter"] * (
                len(path) % 2
            )
            assert len({part.message_id for part in path}) == len(path)
            assert path[0].parent_id is None and all(part.text.strip() for part in path)
        assert len({message.message_id for message in kept}) == len(kept)
        found = learnt(save(folder, rows))
        assert learnt(save(folder, data.draw(st.permutations(rows)))) == found


JUNK = st.sampled_from([None, 3, "text", [], {}, {"replies": 3}, {"replies": [None]}])
NODES = st.recursive(
    st.sampled_from([{"role": "prompter"}, {"role": "assistant"}, *MALFORMED]),
    lambda inner: st.fixed_dictionaries({"replies": st.lists(inner | JUNK, max_size=3)}),
    max_leaves=8,
)


def count_nodes(node):
    replies = node.get("replies") or [] if isinstance(node, dict) else []
    return 1 + (sum(map(count_nodes, replies)) if isinstance(replies, list) else 1)


@settings(deadline=None, max_examples=100)
@given(node=NODES, data=st.data())
def test_every_part_of_a_wrecked_tree_is_in_it_or_counted(node, data):
    names = iter(range(1000))

    def complete(node):
        if not isinstance(node, dict):
            return node
        role = data.draw(st.sampled_from(["prompter", "assistant"]))
        replies = node.get("replies", [])
        replies = [complete(reply) for reply in replies] if isinstance(replies, list) else replies
        return {"message_id": str(next(names)), "role": role, "text": "x", **node, "replies": replies}

    tree, rejected = {"message_id": "root", "role": "prompter", "text": "x", **complete(node)}, Counter()
    with TemporaryDirectory() as folder:
        roots = list(read_trees(save(folder, [{"prompt": tree}]), rejected=rejected))
    assert sum(1 for root in roots for _ in walk(root)) + sum(rejected.values()) == count_nodes(tree)


# One thing at a time


def message(name, parent=None, role=None, **content):
    role = role or ("prompter" if parent is None else "assistant")
    return {"message_id": name, "parent_id": parent, "role": role, "text": f"text {name}", **content}


CHAIN = [message("a"), message("b", "a"), message("c", "b", "prompter"), message("d", "c")]


def kept_of(tmp_path, rows, wanted=None):
    rejected = Counter()
    roots = list(read_trees(save(tmp_path, rows), wanted, rejected=rejected))
    return "".join(part.message_id for root in roots for part in walk(root)), dict(rejected)


@pytest.mark.parametrize(
    ("rows", "kept", "rejected"),
    [
        (CHAIN, "abcd", {}),
        ([*CHAIN, message("x", "nowhere"), message("y", "x", "prompter")], "abcd", {"orphan": 2}),
        ([*CHAIN, message("x", "y"), message("y", "x", "prompter"), message("z", "x")], "abcd", {"cycle": 3}),
        ([*CHAIN, message("x", "x")], "abcd", {"cycle": 1}),
        ([*CHAIN, CHAIN[1]], "abcd", {"duplicate message": 1}),
        ([*CHAIN, message("a", "d", "prompter")], "abcd", {"duplicate message": 1}),
        ([*CHAIN, message("x", "a", "prompter"), message("y", "x")], "abcd", {
            "role does not alternate": 1, "below a message left out": 1}),
        ([*CHAIN, message("x", role="assistant")], "abcd", {"role does not alternate": 1}),
        ([*CHAIN, message("x", role="system")], "abcd", {"unknown role": 1}),
        ([*CHAIN, message("x", "a", text=" \n")], "abcd", {"no text": 1}),
        ([*CHAIN, message("x", "a", deleted=True)], "abcd", {"deleted": 1}),
        ([*CHAIN, message("x", "a", synthetic=True), message("y", "x", "prompter")], "abcd", {
            "synthetic": 1, "below a message left out": 1}),
        ([*CHAIN, message("x", "a", review_result=False)], "abcd", {"review": 1}),
        ([*CHAIN, message("x", tree_state="aborted_low_grade"), message("y", "x")], "abcd", {
            "tree state": 1, "below a message left out": 1}),
        ([*CHAIN, {"something": "else"}], "abcd", {"no tree or message": 1}),
    ],
)  # fmt: skip
def test_what_is_left_out_is_counted_by_its_reason(tmp_path, rows, kept, rejected):
    assert kept_of(tmp_path, rows) == (kept, rejected)


LABELLED = [
    message("a", labels={"quality": {"value": 0.5, "count": 3}, "spam": {"value": 0.1, "count": 3}}),
    message("b", "a", labels={"name": ["quality", "spam"], "value": [0.4, 0.1], "count": [3, 3]}),
    message("c", "a", labels={"name": ["quality", "spam"], "value": [0.6, 0.2], "count": [3, 3]}, emojis={"+1": 2}),
    message("d", "a", labels={"quality": 1.0}, emojis={"name": ["+1"], "count": [2]}),
    message("e", "a", labels=None, emojis=None),
]


@pytest.mark.parametrize(
    ("wanted", "kept"),
    [
        ({}, "abcde"),
        ({"min_labels": {"quality": 0.5}}, "acd"),
        ({"max_labels": {"spam": 0.1}}, "abde"),
        ({"max_labels": {"spam": 0}}, ""),
        ({"min_labels": {"quality": 0.5}, "max_labels": {"spam": 0.1}}, "ad"),
        ({"min_labels": {"humor": 0}}, ""),
    ],
)
def test_labels_bound_the_messages_in_both_forms(tmp_path, wanted, kept):
    assert kept_of(tmp_path, LABELLED, MessageFilter(**wanted))[0] == kept


def test_labels_and_emojis_are_the_same_in_both_forms(tmp_path):
    root = next(read_trees(save(tmp_path, LABELLED)))
    one, two, three, four = root.replies
    assert one.labels == {"quality": 0.4, "spam": 0.1} and two.labels == {"quality": 0.6, "spam": 0.2}
    assert two.emojis == three.emojis == {"+1": 2} and four.labels == four.emojis == {}


@pytest.mark.parametrize(
    ("languages", "kept"),
    [(None, "abcd"), (["en"], "a"), (["pt-BR"], "bd"), (["PT"], "bd"), (["en", "uk-UA"], "ac"), (["de"], "")],
)
def test_a_language_is_taken_with_or_without_its_region(tmp_path, languages, kept):
    rows = [message(name, lang=lang) for name, lang in zip("abcd", ["en", "pt-BR", "uk-UA", "pt-br"])]
    assert kept_of(tmp_path, rows, MessageFilter(languages=languages))[0] == kept


@pytest.mark.parametrize(("review", "kept"), [("passed", "a"), ("not_failed", "ab"), ("any", "abc")])
def test_reviews(tmp_path, review, kept):
    rows = [message("a", review_result=True), message("b"), message("c", review_result=False)]
    assert kept_of(tmp_path, rows, MessageFilter(review=review))[0] == kept


def test_tree_states(tmp_path):
    rows = [message("a", tree_state="ready_for_export"), message("b", tree_state="growing"), message("c")]
    assert kept_of(tmp_path, rows)[0] == "ac"
    assert kept_of(tmp_path, rows, MessageFilter(tree_states=["growing"]))[0] == "bc"
    assert kept_of(tmp_path, rows, MessageFilter(tree_states=None))[0] == "abc"


def test_there_are_35_languages_and_others_are_refused():
    assert len(set(LANGUAGES)) == 35
    with pytest.raises(ValueError, match=r"got the language 'eng', expected one of en, es, ru"):
        MessageFilter(languages=["eng"])
    with pytest.raises(ValueError, match="put it in a list"):
        MessageFilter(languages="en")


def test_ranks_may_be_written_as_in_a_column_with_gaps(tmp_path):
    rows = [message("a"), message("b", "a", rank=1.0), message("c", "a", rank=None), message("d", "a", rank=0.0)]
    root = next(read_trees(save(tmp_path, rows)))
    assert list(rankings(root)) == [
        {"prompt": [{"role": "user", "content": "text a"}], "responses": ["text d", "text b"]}
    ]


def test_double_ranks_and_equal_texts_are_left_out_and_counted(tmp_path):
    rows = [message("a"), message("c", "a", rank=0), message("b", "a", rank=0), message("d", "a", rank=1)]
    rows += [message("e", "a", rank=2, text="text d"), message("f", "a", rank=3)]
    rejected = Counter()
    (ranking,) = rankings(next(read_trees(save(tmp_path, rows))), rejected=rejected)
    assert ranking["responses"] == ["text b", "text d", "text f"]
    assert rejected == {"tied replies": 1, "equal replies": 1}


def test_the_best_replies_are_kept(tmp_path):
    rows = [message("a"), *(message(f"r{rank}", "a", rank=rank) for rank in (3, 0, 2, 1))]
    (ranking,) = rankings(next(read_trees(save(tmp_path, rows))), max_replies=3)
    assert ranking["responses"] == ["text r0", "text r1", "text r2"]


def test_a_thread_ends_where_top_k_ends_it(tmp_path):
    rows = [*CHAIN[:3], message("d", "c", rank=1), message("e", "c", rank=2)]
    root = next(read_trees(save(tmp_path, rows)))
    ends = {top_k: [thread["messages"][-1]["content"] for thread in threads(root, top_k)] for top_k in (None, 2, 1)}
    assert ends == {None: ["text d", "text e"], 2: ["text d"], 1: ["text b"]}


def test_a_reply_that_lost_its_siblings_to_a_filter_still_needs_a_rank(tmp_path):
    rows = [message("a"), message("b", "a"), message("c", "a", deleted=True)]
    root = next(read_trees(save(tmp_path, rows)))
    assert len(list(threads(root))) == 1
    assert list(threads(root, top_k=1)) == []


@pytest.mark.parametrize("depth", [1000, 1500])
def test_a_deep_chain_is_cut_and_counted(tmp_path, depth):
    roles = ["prompter", "assistant"]
    rows = [message(str(n), str(n - 1) if n else None, roles[n % 2]) for n in range(depth)]
    rejected = Counter()
    (root,) = read_trees(save(tmp_path, rows), rejected=rejected)
    assert sum(1 for _ in walk(root)) == 1000
    assert sum(rejected.values()) == depth - 1000 and rejected["too deep"] == (depth > 1000)
    (thread,) = threads(root)
    assert len(thread["messages"]) == 1000


def test_a_tree_that_comes_twice_counts_once(tmp_path):
    path, rejected = save(tmp_path, nested(CHAIN) * 2), Counter()
    roots = list(read_trees(path, rejected=rejected))
    assert len(roots) == 1 and rejected == {"duplicate message": 4}


def test_trees_come_as_they_are_read(tmp_path):
    path = save(tmp_path, nested(CHAIN))
    path.write_bytes(path.read_bytes() + b"broken\n")
    roots = read_trees(path)
    assert next(roots).message_id == "a"
    with pytest.raises(ValueError, match="line 2: broken JSON"):
        next(roots)
    rejected = Counter()
    assert len(list(read_trees(path, skip_broken=True, rejected=rejected))) == 1
    assert rejected == {"broken JSON": 1}


def test_another_file_is_no_tree(tmp_path):
    assert not is_oasst({"conversations": []}) and not is_oasst({"prompt": [{"role": "user", "content": "x"}]})
    assert is_oasst(CHAIN[0]) and is_oasst(nested(CHAIN)[0])
    with pytest.raises(
        ValueError, match=r"line 1: got a record with the keys \['conversations', 'id'\], expected an Open"
    ):
        list(read_trees(save(tmp_path, [{"id": 1, "conversations": []}])))


def test_bounds_that_mean_nothing_are_refused(tmp_path):
    root = next(read_trees(save(tmp_path, CHAIN)))
    with pytest.raises(ValueError, match="top_k=0"):
        list(threads(root, top_k=0))
    with pytest.raises(ValueError, match="max_replies=1"):
        list(rankings(root, max_replies=1))


def test_a_split_by_tree_shares_no_tree_and_is_the_same_in_both_forms(shared_data, tmp_path):
    path = shared_data("oasst_en_100_tree.jsonl")
    messages = [message for line in path.read_text().splitlines() for message in flattened(json.loads(line))]
    sides = []
    for source in (path, save(tmp_path, messages)):
        held_out = {True: set(), False: set()}
        for root in read_trees(source):
            held_out[is_held_out(key_digest(root.message_id), 0.2)] |= {message.message_id for message in walk(root)}
        sides.append(held_out)
    assert sides[0] == sides[1]
    assert not sides[0][True] & sides[0][False]
    assert 0.1 < len(sides[0][True]) / 1145 < 0.35
