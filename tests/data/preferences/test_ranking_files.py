"""Every form of a preference says the same: this reply to this prompt is better than that one."""

import json
from collections import Counter
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palm_rlhf.data.preferences.ranking_files import fit_rankings, is_preference, pairs_of, parse_ranking, read_rankings
from palm_rlhf.training.ranked_data import Ranking


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


PROMPT, GOOD, BAD = [user("Is it blue?"), assistant("What?"), user("The sky.")], "Yes, it is.", "Yes, green."
DIALOGUE = "\n\nHuman: Is it blue?\n\nAssistant: What?\n\nHuman: The sky.\n\nAssistant:"


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": PROMPT, "chosen": GOOD, "rejected": BAD},
        {"prompt": PROMPT, "chosen": [assistant(GOOD)], "rejected": [assistant(BAD)]},
        {"prompt": PROMPT, "chosen": [*PROMPT, assistant(GOOD)], "rejected": [*PROMPT, assistant(BAD)]},
        {"prompt": PROMPT, "chosen": [assistant(GOOD)], "rejected": [*PROMPT, assistant(BAD)]},
        {"prompt": PROMPT[:1], "chosen": [*PROMPT[1:], assistant(GOOD)], "rejected": [*PROMPT[1:], assistant(BAD)]},
        {"chosen": [*PROMPT, assistant(GOOD)], "rejected": [*PROMPT, assistant(BAD)]},
        {"prompt": None, "chosen": [*PROMPT, assistant(GOOD)], "rejected": [*PROMPT, assistant(BAD)]},
        {"chosen": f"{DIALOGUE} {GOOD}", "rejected": f"{DIALOGUE} {BAD}"},
        {"chosen": f"{DIALOGUE} {GOOD}".lstrip(), "rejected": f"{DIALOGUE} {BAD}".lstrip()},
        {"prompt": DIALOGUE, "chosen": f" {GOOD}", "rejected": f" {BAD}"},
        {"prompt": DIALOGUE, "chosen": f"{DIALOGUE} {GOOD}", "rejected": f"{DIALOGUE} {BAD}"},
        {"prompt": DIALOGUE.removesuffix("\n\nAssistant:"), "chosen": GOOD, "rejected": BAD},
        {"prompt": PROMPT, "responses": [GOOD, BAD]},
        {"prompt": PROMPT, "responses": [assistant(GOOD), [assistant(BAD)]]},
        {"prompt": PROMPT, "responses": [BAD, GOOD], "ranking": [1, 0]},
        {"prompt": PROMPT, "responses": [BAD, GOOD], "ranking": [2, 1]},
        {"prompt": PROMPT, "responses": [BAD, GOOD], "ranks": [1, 0]},
        {"prompt": PROMPT, "responses": [BAD, GOOD], "ranks": [2, 1]},
        {"prompt": PROMPT, "responses": [BAD, GOOD], "scores": [-1.5, 2]},
        {"prompt": PROMPT, "responses": [BAD, GOOD], "rankings": [[1, 0], [0, 1], [1, 0]]},
        {"prompt": DIALOGUE, "responses": [GOOD, BAD]},
        {"prompt": PROMPT, "chosen": GOOD, "rejected": BAD, "chosen_score": 3, "id": "x", "scores": None},
    ],
)
def test_every_form_says_the_same(record):
    assert is_preference(record)
    assert parse_ranking(record) == {"prompt": PROMPT, "responses": [GOOD, BAD]}


@pytest.mark.parametrize(
    ("record", "prompt", "responses"),
    [
        ({"prompt": "Sky?", "chosen": "Blue.", "rejected": "Red."}, [user("Sky?")], ["Blue.", "Red."]),
        (
            {"prompt": "Sky?", "chosen": [user("Sky?"), assistant("B")], "rejected": [user("Sky?"), assistant("R")]},
            [user("Sky?")],
            ["B", "R"],
        ),
        ({"chosen": "The sky is blue.", "rejected": "The sky is black."}, [user("The sky is")], ["blue.", "black."]),
        ({"chosen": "Q: a?\nA: yes", "rejected": "Q: a?\nA: yes, it is"}, [user("Q: a?\nA:")], ["yes", "yes, it is"]),
        (
            {"prompt": [system("Be brief."), user("Sky?")], "chosen": "B", "rejected": "R"},
            [system("Be brief."), user("Sky?")],
            ["B", "R"],
        ),
        ({"prompt": "Hi", "chosen": "Hi there", "rejected": "Hi!"}, [user("Hi")], ["Hi there", "Hi!"]),
        (
            {"prompt": [user("Human: a")], "chosen": "Assistant: b\n\nHuman: c", "rejected": " Human: d"},
            [user("Human: a")],
            ["Assistant: b\n\nHuman: c", " Human: d"],
        ),
        # words like those of a dialogue inside a line are text
        (
            {
                "chosen": "Human: say Assistant: x\n\nAssistant: a",
                "rejected": "Human: say Assistant: x\n\nAssistant: b",
            },
            [user("say Assistant: x")],
            ["a", "b"],
        ),
        # the assistant's last turn may be all that differs
        (
            {"chosen": "Human: a\n\nAssistant: b\n\nc", "rejected": "Human: a\n\nAssistant: b\n\nd"},
            [user("a")],
            ["b\n\nc", "b\n\nd"],
        ),
    ],
)
def test_prompts_are_found(record, prompt, responses):
    assert parse_ranking(record) == {"prompt": prompt, "responses": responses}


SAME_START = {"chosen": "The sky is blue.", "rejected": "The sky is black."}
PAIR = ["The sky is blue.", "The sky is black."]
SYSTEM, ASKED = system("Be brief."), user("Which colour has the sky?")
BESIDE = {"messages": [SYSTEM, ASKED], "chosen": assistant(PAIR[0]), "rejected": assistant(PAIR[1])}


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({"question": ASKED["content"]}, [ASKED]),
        ({"question": ASKED["content"], "system": SYSTEM["content"]}, [SYSTEM, ASKED]),
        ({"question": ASKED["content"], "system": ""}, [ASKED]),
        ({"query": ASKED["content"], "system_prompt": SYSTEM["content"], "source": "a book of colours"},
         [SYSTEM, ASKED]),
        ({"instruction": "Name the colour.", "input": "the sky"}, [user("Name the colour.\nthe sky")]),
        ({"instruction": ASKED["content"], "history": [["Hi", "Ho"]]}, [user("Hi"), assistant("Ho"), ASKED]),
        ({"input": ASKED["content"], "system": SYSTEM["content"]}, [SYSTEM, ASKED]),
        ({"context": ASKED["content"]}, [ASKED]),
        ({"problem": ASKED["content"], "context": "A poem."}, [user(ASKED["content"] + "\nA poem.")]),
        ({"prompt": [ASKED], "system": SYSTEM["content"]}, [SYSTEM, ASKED]),
        ({"prompt": [system(" Be brief. "), ASKED], "system": SYSTEM["content"]}, [system(" Be brief. "), ASKED]),
        ({"prompt": ASKED["content"], "prompt_id": "a1", "messages": [ASKED, assistant(PAIR[0])], "score_chosen": 8.0},
         [ASKED]),  # as in UltraFeedback: the messages are those that were chosen
        ({"messages": [SYSTEM, ASKED]}, [SYSTEM, ASKED]),
        ({"conversations": [{"from": "human", "value": ASKED["content"]}], "system": "Be brief."}, [SYSTEM, ASKED]),
        ({"question": ASKED["content"], "bucket": "b2"}, [ASKED]),
        ({"id": 3, "source": "forum"}, [user("The sky is")]),
    ],
)  # fmt: skip
def test_the_prompt_is_found_under_every_name(fields, prompt):
    responses = PAIR if prompt != [user("The sky is")] else ["blue.", "black."]
    assert parse_ranking({**fields, **SAME_START}) == {"prompt": prompt, "responses": responses}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"question": ""}, "no prompt"),
        ({"question": " ", "id": 3}, "no prompt"),
        ({"system": "Be brief."}, "roles do not alternate"),
        ({"enquiry": "Which colour has the sky?"}, "unknown field 'enquiry'"),
        ({"subject": "sky"}, "unknown field 'subject'"),
        ({"title": "Which colour has the sky?"}, "unknown field 'title'"),
        ({"question": "Which colour?", "background": "A child asks."}, "unknown field 'background'"),
        ({"prompt": "Which colour?", "question": "Is it blue?"}, "two prompts, 'prompt' and 'question'"),
        ({"prompt": [SYSTEM, ASKED], "system": "Be long."}, "two system prompts"),
        ({"prompt": [ASKED, assistant("It?")]}, "roles do not alternate"),
    ],
)
def test_words_that_both_replies_share_are_no_prompt_where_a_field_could_be_one(fields, reason):
    with pytest.raises(ValueError) as error:
        parse_ranking({**fields, **SAME_START})
    assert str(error.value) == reason


@pytest.mark.parametrize(
    "record",
    [
        BESIDE,
        {**BESIDE, "chosen": [BESIDE["chosen"]], "rejected": PAIR[1]},
        {**BESIDE, "chosen": {"from": "gpt", "value": PAIR[0]}, "rejected": {"from": "gpt", "value": PAIR[1]}},
        {**BESIDE, "messages": [SYSTEM, {"role": "user", "content": [{"type": "text", "text": ASKED["content"]}]}]},
        {**BESIDE, "messages": [{**SYSTEM, "role": "developer"}, ASKED]},
        {**BESIDE, "messages": [ASKED], "system": "Be brief."},
        {"system": "Be brief.", "chosen": [ASKED, assistant(PAIR[0])], "rejected": [ASKED, assistant(PAIR[1])]},
        {"prompt": [SYSTEM], "chosen": [SYSTEM, ASKED, assistant(PAIR[0])], "rejected": [ASKED, assistant(PAIR[1])]},
        {"system": "Be brief.", "question": ASKED["content"], "response_j": PAIR[0], "response_k": PAIR[1]},
        {
            "system": "Be brief.",
            "chosen": f"Human: {ASKED['content']}\n\nAssistant: {PAIR[0]}",
            "rejected": f"Human: {ASKED['content']}\n\nAssistant: {PAIR[1]}",
        },
        {
            "prompt": [SYSTEM, ASKED],
            "answers": [{"answer": PAIR[1], "rank": 2.0}, {"answer": PAIR[0], "rank": 1.0, "model": "some model"}],
        },
        {
            "prompt": [SYSTEM, ASKED],
            "completions": [{"response": t, "overall_score": len(t)} for t in ["B", *PAIR][::-1]],
        },
    ],
)
def test_single_messages_dialogues_and_ranked_answers_say_the_same(record):
    found = parse_ranking(record)
    if "completions" in record:  # the longest is the best
        assert found["responses"] == [PAIR[1], PAIR[0], "B"]
        found["responses"] = PAIR
    assert is_preference(record)
    assert found == {"prompt": [SYSTEM, ASKED], "responses": PAIR}


def test_nectar_is_ranked_from_its_first_to_its_last():
    answers = [("It is blue.", 2), ("Blue.", 1), ("Green.", 4), ("I do not know.", 3), ("It is up.", 3)]
    record = {
        "prompt": "\n\nHuman: Which colour has the sky?\n\nAssistant: ",
        "answers": [{"answer": text, "model": "m", "rank": rank} for text, rank in answers],
        "turns": 1,
        "num_responses": 5,
        "source": ["anthropic-hh", "ultrafeedback"],
        "good_natured": True,
    }
    rejected = Counter()
    ranked = {"prompt": [ASKED], "responses": ["Blue.", "It is blue.", "I do not know.", "Green."]}
    assert parse_ranking(record, rejected) == ranked
    assert rejected == {"tied replies": 1}
    with pytest.raises(ValueError, match=r"^answers without ranks$"):
        parse_ranking({**record, "answers": [{"answer": text} for text, _ in answers]})
    record["answers"][0]["custom_system_prompt"] = "Be a poet of the sky."
    with pytest.raises(ValueError, match=r"^unknown field 'custom_system_prompt'$"):
        parse_ranking(record)
    assert parse_ranking(record, ignored=("custom_system_prompt",)) == ranked


def test_two_system_prompts_of_replies_are_no_pair():
    chosen, rejected = ([system(text), ASKED, assistant(text)] for text in ("Be brief.", "Be long."))
    with pytest.raises(ValueError, match=r"^two system prompts$"):
        parse_ranking({"chosen": chosen, "rejected": rejected})


def test_calls_of_tools_are_not_compared():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    with pytest.raises(ValueError, match=r"^calls of tools$"):
        parse_ranking({"prompt": [ASKED], "chosen": [call], "rejected": "No."})


@pytest.mark.parametrize(
    ("order", "responses"),
    [
        ({}, "abcd"),
        ({"ranking": [2, 0, 3, 1]}, "cadb"),
        ({"ranking": [3, 1, 4, 2]}, "cadb"),  # counted from 1
        ({"ranking": [2, 0]}, "ca"),
        ({"ranks": [2, 0, 3, 1]}, "bdac"),
        ({"ranks": [1, 0, 1, 3]}, "bad"),
        ({"scores": [2, 0, 3, 1]}, "cadb"),
        ({"scores": [0.5, 0.5, 0.7, 0.5]}, "ca"),
        ({"rankings": [[0, 1, 2, 3]] * 3 + [[1, 2, 0, 3]] * 2}, "abcd"),
        ({"rankings": [[0, 1], [1, 2], [2, 3]]}, "abcd"),
    ],
)
def test_one_more_key_orders_the_responses(order, responses):
    rejected = Counter()
    found = parse_ranking({"prompt": "?", "responses": list("abcd"), **order}, rejected)
    assert found["responses"] == list(responses)
    ties = 4 - len(responses) if "ranks" in order or "scores" in order else 0
    assert rejected == ({"tied replies": ties} if ties else {})


SAID = [user("a"), assistant("b")]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "x"}, "no preference"),
        ({"prompt": "x", "chosen": "a"}, "no preference"),
        ({"prompt": "x", "chosen": "a", "rejected": "a"}, "no two different replies"),
        ({"prompt": "x", "chosen": "a", "rejected": " "}, "no two different replies"),
        ({"prompt": "x", "responses": ["a"]}, "no two different replies"),
        ({"prompt": "x", "responses": ["a", "b"], "scores": [1, 1]}, "no two different replies"),
        ({"prompt": "x", "responses": ["a", "b"], "rankings": []}, "no two different replies"),
        ({"chosen": "yes", "rejected": "no"}, "no prompt"),
        ({"responses": ["a", "b"]}, "no prompt"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "no prompt"),
        ({"prompt": [], "chosen": "a", "rejected": "b"}, "no prompt"),
        ({"prompt": SAID, "chosen": "a", "rejected": "b"}, "roles do not alternate"),
        ({"prompt": [user("a"), user("b")], "chosen": "a", "rejected": "b"}, "roles do not alternate"),
        ({"prompt": [user("a"), system("b")], "chosen": "a", "rejected": "b"}, "roles do not alternate"),
        ({"prompt": [system("b")], "chosen": "a", "rejected": "b"}, "roles do not alternate"),
        ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, "no prompt"),
        ({"chosen": SAID, "rejected": [user("x"), assistant("b")]}, "replies differ in more than one turn"),
        ({"chosen": SAID, "rejected": [*SAID, user("c"), assistant("d")]}, "replies differ in more than one turn"),
        ({"chosen": [user("a")], "rejected": [user("b")]}, "no reply of the assistant"),
        ({"chosen": [], "rejected": []}, "replies differ in more than one turn"),
        ({"chosen": "Human: a\n\nHuman: b\n\nAssistant: c", "rejected": "Human: a\n\nHuman: b\n\nAssistant: d"},
         "roles do not alternate"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "malformed message"),
        ({"prompt": "x", "chosen": 3, "rejected": "b"}, "malformed preference"),
        ({"prompt": "x", "chosen": [{"role": "assistant"}], "rejected": "b"}, "malformed message"),
        ({"prompt": "x", "chosen": [{"role": ["a"], "content": "b"}], "rejected": "b"}, "unknown role"),
        ({"prompt": "x", "responses": "ab"}, "malformed preference"),
        ({"prompt": "x", "responses": ["a", 3]}, "malformed preference"),
        ({"prompt": "x", "responses": ["a", None]}, "no reply of the assistant"),
        ({"prompt": "x", "responses": ["a", "b"], "ranking": [0, 0]}, "malformed preference"),
        ({"prompt": "x", "responses": ["a", "b"], "ranking": [0, 2]}, "malformed preference"),
        ({"prompt": "x", "responses": ["a", "b"], "ranking": [True, False]}, "malformed preference"),
        ({"prompt": "x", "responses": ["a", "b"], "rankings": [0, 1]}, "malformed preference"),
        ({"prompt": "x", "responses": ["a", "b"], "ranks": [0]}, "malformed preference"),
        ({"prompt": "x", "responses": ["a", "b"], "scores": ["1", "2"]}, "malformed preference"),
        ({"prompt": "x", "responses": ["a", "b"], "scores": [1, 2], "ranks": [0, 1]}, "malformed preference"),
    ],
)  # fmt: skip
def test_what_nothing_can_be_learnt_from_says_why(record, reason):
    with pytest.raises(ValueError) as error:
        parse_ranking(record)
    assert str(error.value) == reason


WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(str.strip)
WORDS |= st.builds("{}: {}".format, st.sampled_from(["Human", "Assistant"]), WORDS)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | WORDS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content"]), inner | st.sampled_from(["user", "assistant"]))
    ),
    max_leaves=6,
)
KEYS = ["prompt", "chosen", "rejected", "responses", "ranking", "rankings", "ranks", "scores"]
KEYS += ["system", "question", "messages", "history", "answers", "input", "x"]


@settings(deadline=None, max_examples=120)
@given(record=st.dictionaries(st.sampled_from(KEYS), JSON))
def test_any_record_is_a_ranking_or_has_a_reason(record):
    try:
        ranking = parse_ranking(record)
    except ValueError as error:
        assert len(str(error)) < 60  # a name to count under, not a message of Python's
        return
    assert ranking["prompt"][-1]["role"] == "user"
    assert len(set(ranking["responses"])) == len(ranking["responses"]) >= 2


@st.composite
def ranked(draw):
    turns = draw(st.integers(0, 2))
    prompt = [part for _ in range(turns) for part in (user(draw(WORDS)), assistant(draw(WORDS)))]
    return {
        "prompt": [*prompt, user(draw(WORDS))],
        "responses": draw(st.lists(WORDS, min_size=2, max_size=5, unique=True)),
    }


@settings(deadline=None, max_examples=100)
@given(ranking=ranked(), data=st.data())
def test_what_is_written_is_read_back_whatever_the_order(ranking, data):
    assert parse_ranking(ranking) == ranking
    places = data.draw(st.permutations(range(len(ranking["responses"]))))
    shuffled = {"prompt": ranking["prompt"], "responses": [ranking["responses"][place] for place in places]}
    order = sorted(range(len(places)), key=places.__getitem__)
    orders = [
        {"ranking": order},
        {"ranks": places},
        {"scores": [-place for place in places]},
        {"rankings": [order, order]},
    ]
    for key in orders:
        assert parse_ranking({**shuffled, **key}) == parse_ranking(ranking)


@settings(deadline=None, max_examples=50)
@given(ranking=ranked())
def test_a_ranking_is_all_its_pairs_and_each_is_read_as_itself(ranking):
    pairs = list(pairs_of(ranking))
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == list(combinations(ranking["responses"], 2))
    for pair in pairs:
        assert parse_ranking(pair) == {"prompt": ranking["prompt"], "responses": [pair["chosen"], pair["rejected"]]}


def save(tmp_path, rows):
    path = tmp_path / "preferences.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_file_is_its_rankings_and_the_rest_is_counted(tmp_path):
    pair = {"prompt": "x", "chosen": "a", "rejected": "b"}
    rows = [pair, {**pair, "rejected": "a"}, {"id": 3}, {"prompt": "y", "responses": ["c", "d", "c", " "]}]
    rejected = Counter()
    found = list(read_rankings(save(tmp_path, rows), rejected=rejected))
    assert found == [
        {"prompt": [user("x")], "responses": ["a", "b"]},
        {"prompt": [user("y")], "responses": ["c", "d"]},
    ]
    assert rejected == {"no two different replies": 1, "no preference": 1, "equal replies": 1, "blank replies": 1}


def test_another_file_is_none(tmp_path):
    with pytest.raises(ValueError, match=r"line 1: got a record with the keys \['conversations'\], expected a pref"):
        list(read_rankings(save(tmp_path, [{"conversations": []}])))


# Truncation

TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=6)


def tensors(prompt, *responses, **options):
    return Ranking(torch.tensor(prompt), [torch.tensor(response) for response in responses], **options)


@settings(deadline=None, max_examples=150)
@given(
    prompt=TOKENS,
    responses=st.lists(TOKENS, min_size=2, max_size=4, unique_by=tuple),
    max_seq_len=st.integers(2, 12),
    max_response_len=st.none() | st.integers(1, 6),
)
def test_the_end_of_the_prompt_and_the_start_of_the_responses_are_kept(
    prompt, responses, max_seq_len, max_response_len
):
    rejected = Counter()
    found = list(
        fit_rankings([tensors(prompt, *responses)], max_seq_len, max_response_len=max_response_len, rejected=rejected)
    )
    limit = min(max_seq_len - 1, max_response_len or max_seq_len)
    cut = [tuple(response[:limit]) for response in responses]
    different = list(dict.fromkeys(cut))
    pairs = len(list(combinations(cut, 2))) - len(list(combinations(different, 2)))
    assert +rejected == ({"equal after truncation": pairs} if pairs else {})
    assert len(found) == (len(different) > 1)
    for ranking in found:
        assert [tuple(response.tolist()) for response in ranking.responses] == different
        kept = ranking.prompt.tolist()
        assert kept == prompt[len(prompt) - len(kept) :]
        assert len(kept) == min(len(prompt), max_seq_len - max(map(len, different)))


def test_margins_follow_the_responses_that_stay():
    ranking = tensors([1], [1, 1, 1], [2], [1, 1, 2], [3], margins=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    rejected = Counter()
    (found,) = fit_rankings([ranking], 3, rejected=rejected)
    assert [response.tolist() for response in found.responses] == [[1, 1], [2], [3]]
    assert found.pair_margins == [1.0, 3.0, 5.0]  # of the first, second and fourth
    assert rejected == {"equal after truncation": 3}


def test_the_weight_stays_with_what_is_left_of_a_ranking():
    (found,) = fit_rankings([replace(tensors([1], [1, 1, 1], [2], [1, 1, 2]), weight=0.25)], 3)
    assert (found.weight, len(found.responses)) == (0.25, 2)


def test_no_room_is_refused():
    for options in ({"max_seq_len": 1}, {"max_seq_len": 8, "max_response_len": 0}):
        with pytest.raises(ValueError, match="at least 2 and 1"):
            list(fit_rankings([], **options))
