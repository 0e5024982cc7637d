"""Files of conversations in any of the known formats."""

import logging
import os
from collections import Counter
from collections.abc import Collection, Iterator

from beartype import beartype

from palm_rlhf.data.files.json_record import Record
from palm_rlhf.data.files.records import MAX_RECORD_BYTES, read_records
from palm_rlhf.data.formats.conversation_records import is_conversation, parse_conversation
from palm_rlhf.data.formats.instructions import is_prompt
from palm_rlhf.data.formats.saved_pages import is_page, parse_page, read_page

log = logging.getLogger(__name__)


@beartype
def read_conversations(
    path: str | os.PathLike[str],
    *,
    skip_broken: bool = False,
    rejected: Counter[str] | None = None,
    mended: Counter[str] | None = None,
    ignored: Collection[str] = (),
    prompts: bool = False,
    max_record_bytes: int = MAX_RECORD_BYTES,
) -> Iterator[Record]:
    """The conversations of a file, `{"messages": [...]}`, with the `id` and `model` that they name.

    The file holds records of `parse_conversation`, or is one web page (`parse_page`). What is no conversation is
    counted in `rejected` by its reason; nothing is left out or mended otherwise but what `check_fields` allows.
    `skip_broken` and errors are those of `read_records`; `ValueError` also if the file starts with something
    else. A page without a conversation is broken. `prompts` is that of `parse_conversation`.
    """
    rejected = Counter() if rejected is None else rejected
    if is_page(path):
        try:
            page = parse_page(read_page(path, max_record_bytes))
        except ValueError as error:
            if not skip_broken:
                raise ValueError(f"{path}: {error}") from error
            log.warning("%s left out: %s", path, error)
            rejected["page without a conversation"] += 1
        else:
            yield page
        return
    options = {"skip_broken": skip_broken, "rejected": rejected, "max_record_bytes": max_record_bytes}
    first = True
    for line, record in read_records(path, **options):
        if first and not (is_conversation(record) or (prompts and is_prompt(record))):
            raise ValueError(
                f"{path}, line {line}: got a record with the keys {sorted(record)[:8]}, expected a conversation: "
                '{"conversations": [{"from", "value"}]}, {"messages": [{"role", "content"}]}, {"instruction", '
                '"output"} or an export of ChatGPT'
            )
        first = False
        try:
            yield parse_conversation(record, ignored=ignored, prompts=prompts, mended=mended)
        except ValueError as error:
            rejected[str(error)] += 1
