"""Single replies that people wanted or did not, as KTO learns from: `{"prompt", "completion", "label"}`."""

import os
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

from beartype import beartype

from palm_rlhf.data.files.json_record import Record
from palm_rlhf.data.files.records import MAX_RECORD_BYTES, read_records
from palm_rlhf.data.formats.conversation_records import is_conversation, parse_conversation
from palm_rlhf.data.preferences.candidate_replies import plain_turns
from palm_rlhf.data.preferences.ranking_files import check_prompt

LABELS = {"true": True, "1": True, "false": False, "0": False}  # as text in the cells of a table, else in JSON


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
    """The labelled replies of a file as `{"prompt": [...], "completion": str, "label": bool}`.

    The forms are those of `parse_unpaired`; what has none of them is counted in `rejected` by its reason.
    `skip_broken` and errors are those of `read_records`; `ValueError` also if the first record is no reply.
    """
    rejected = Counter() if rejected is None else rejected
    options = {"skip_broken": skip_broken, "rejected": rejected, "max_record_bytes": max_record_bytes}
    first = True
    for line, record in read_records(path, **options):
        if first and not is_conversation(record):
            raise ValueError(
                f"{path}, line {line}: got a record with the keys {sorted(record)[:8]}, expected a labelled reply: "
                "prompt, completion and label, or messages and label"
            )
        first = False
        try:
            yield parse_unpaired(record, mended=mended, ignored=ignored)
        except ValueError as error:
            rejected[str(error)] += 1


@beartype
def parse_unpaired(record: Record, *, mended: Counter[str] | None = None, ignored: Collection[str] = ()) -> Record:
    """A labelled reply as `{"prompt": [...], "completion": str, "label": bool}`; `ValueError` says why it is none.

    The record is a question with its answer, or a conversation that ends on the assistant (`parse_conversation`),
    as a text or as messages. Its `label` is true for a reply that is wanted, false for one that is not; 1 and 0 are
    the same.
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
    """The best reply of a ranking as one that is wanted, and the worst as one that is not."""
    for place, label in ((0, True), (-1, False)):
        yield {"prompt": ranking["prompt"], "completion": ranking["responses"][place], "label": label}


def _label(value: Any) -> bool:
    label = LABELS.get(str(value).strip().lower()) if isinstance(value, bool | int | str) else None
    if label is None:
        raise ValueError("no label")
    return label
