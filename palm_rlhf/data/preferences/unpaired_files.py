"""Files of single replies that people wanted or did not, for KTO: `{"prompt", "completion", "label"}`."""

import os
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

from beartype import beartype

from palm_rlhf.data.files.json_record import Record
from palm_rlhf.data.files.records import MAX_RECORD_BYTES, parsed_records
from palm_rlhf.data.formats.conversation_records import is_conversation, parse_conversation
from palm_rlhf.data.preferences.candidate_replies import plain_turns
from palm_rlhf.data.preferences.ranking_files import check_prompt

LABELS = {"true": True, "1": True, "false": False, "0": False}  # by the text of JSON values and cells of tables


@beartype
def read_unpaired(
    path: str | os.PathLike[str],
    *,
    skip_broken: bool = False,
    rejected: Counter[str] | None = None,
    mended: Counter[str] | None = None,
    ignored: Collection[str] = (),
    max_record_bytes: int = MAX_RECORD_BYTES,
) -> Iterator[Record]:
    """Yield the labelled replies of a file as `{"prompt": [...], "completion": str, "label": bool}`.

    The formats are those of `parse_unpaired`. A record that has none of them is counted in `rejected` by its reason.
    Raises the errors of `read_records`, and ValueError if the first record is no reply. The arguments are those of
    `read_rankings`.
    """
    rejected = Counter() if rejected is None else rejected
    return parsed_records(
        path,
        lambda record: parse_unpaired(record, mended=mended, ignored=ignored),
        is_known=is_conversation,
        expected="a labelled reply: prompt, completion and label, or messages and label",
        skip_broken=skip_broken,
        rejected=rejected,
        max_record_bytes=max_record_bytes,
    )


@beartype
def parse_unpaired(record: Record, *, mended: Counter[str] | None = None, ignored: Collection[str] = ()) -> Record:
    """Return a labelled reply as `{"prompt": [...], "completion": str, "label": bool}`.

    The record is a question with its answer, or a conversation that ends on the assistant (see `parse_conversation`),
    as text or as messages. Its `label` is true, or 1, for a reply that people wanted, and false, or 0, for one that
    they did not. Raises ValueError with the reason if it is no labelled reply.
    """
    label = _label(record.get("label"))
    conversation = parse_conversation({**record, "label": None}, mended=mended, ignored=ignored)
    if "tools" in conversation:
        raise ValueError("calls of tools")
    *prompt, reply = plain_turns(conversation["messages"])
    if reply["role"] != "assistant":
        raise ValueError("no reply of the assistant")
    check_prompt(prompt)
    if not reply["content"].strip():
        raise ValueError("blank replies")
    return {"prompt": prompt, "completion": reply["content"], "label": label}


@beartype
def unpaired_of(ranking: Record) -> Iterator[Record]:
    """Yield the best reply of a ranking as a wanted one, and the worst as an unwanted one."""
    for place, label in ((0, True), (-1, False)):
        yield {"prompt": ranking["prompt"], "completion": ranking["responses"][place], "label": label}


def _label(value: Any) -> bool:
    label = LABELS.get(str(value).strip().lower()) if isinstance(value, bool | int | str) else None
    if label is None:
        raise ValueError("no label")
    return label
