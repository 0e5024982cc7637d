"""A field is known, describes a record, repeats what is said, or has its record refused: no text is lost unsaid."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palm_rlhf.data.formats.instructions import ANSWERS
from palm_rlhf.data.formats.messages import TEXTS
from palm_rlhf.data.formats.prompt_fields import FIELDS
from palm_rlhf.data.formats.record_fields import TEXT_FIELDS, check_fields, is_metadata
from palm_rlhf.data.preferences.ranking_files import LISTS, PAIRS

SAID = ["What is the capital\nof France?", "Paris, of course."]


@pytest.mark.parametrize(
    "name, value",
    [
        ("messages", "known to the form"),
        ("source", "a forum of the nineties"),
        ("Prompt ID", "what is it"),
        ("chosen-model", "some model of theirs"),
        ("quality_score", "very good indeed"),
        ("views", 7),
        ("missing", None),
        ("blank", " "),
        ("prompt", "What is the capital"),
        (
            "text",
            "### Human: What is the capital of France?\nWhat is the capital\nof France?\n### Bot: Paris, of course.",
        ),
        ("steps", ["Paris,", {"then": "of course."}]),
    ],
)
def test_nothing_is_lost_with_what_describes_or_repeats(name, value):
    mended = Counter()
    check_fields({name: value}, {"messages"}, SAID, mended=mended)
    assert not mended


@pytest.mark.parametrize(
    "name, value",
    [
        ("background", "The user is a child."),
        ("note", ["Answer", {"how": "in French please"}]),
        ("hinweis", "Größe"),
        ("背景", "用法语回答"),
        ("persona", "pirate"),
        ("response", "Rome"),
        ("text", "What is the capital\nof France? Rome, of course."),
        ("notes", "What is the capital\nof France? Paris, of course. But it was Rome before."),
    ],
)
def test_other_text_refuses_its_record_by_the_name_of_the_field(name, value):
    with pytest.raises(ValueError) as error:
        check_fields({"id": 1, name: value}, (), SAID)
    assert str(error.value) == f"unknown field {name!r}"
    check_fields({"id": 1, name: value}, (), SAID, ignored=(name,))


def test_labels_are_left_out_and_counted():
    mended = Counter()
    check_fields({"bucket": "a7", "see": ["https://x.org/?q=1", "b"]}, (), SAID, mended=mended)
    assert mended == {"field 'bucket' left out": 1, "field 'see' left out": 1}


VALUES = st.recursive(
    st.none() | st.integers() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(name=st.text(max_size=40), value=VALUES)
def test_any_field_is_refused_counted_or_harmless(name, value):
    def texts(part):
        if isinstance(part, dict | list):
            return [text for item in (part.values() if isinstance(part, dict) else part) for text in texts(item)]
        return [part.strip()] if isinstance(part, str) and part.strip() else []

    mended = Counter()
    try:
        check_fields({name: value}, (), SAID, mended=mended)
    except ValueError as error:
        assert str(error).startswith("unknown field ") and len(str(error)) < 60
        return
    unsaid = [text for text in texts(value) if not any(text in part for part in SAID)]
    assert mended.total() == bool(unsaid and not is_metadata(name))
    assert is_metadata(name) or not any(" " in text for text in unsaid)


def test_every_name_that_a_form_reads_holds_text():
    """A word under such a name is no label, whichever form the record has."""
    read = {*FIELDS, *ANSWERS, *TEXTS, *LISTS, *(name for pair in PAIRS for name in pair), "responses"}
    assert read <= TEXT_FIELDS
    assert not any(map(is_metadata, read))
