"""Files of conversations in any of the known formats."""

import logging
import os
from collections import Counter
from collections.abc import Collection, Iterator

from beartype import beartype

from palm_rlhf.data.files.json_record import Record
from palm_rlhf.data.files.records import MAX_RECORD_BYTES, parsed_records
from palm_rlhf.data.formats.conversation_records import is_conversation, parse_conversation
from palm_rlhf.data.formats.instructions import is_prompt
from palm_rlhf.data.formats.saved_pages import is_page, parse_page, read_page

EXPECTED = (
    'a conversation: {"conversations": [{"from", "value"}]}, {"messages": [{"role", "content"}]}, {"instruction", '
    '"output"} or an export of ChatGPT'
)

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
    """Yield the conversations of a file, `{"messages": [...]}`, with their `id` and `model` if the file names them.

    The file holds records of `parse_conversation`, or is one web page (`parse_page`). A record that is no conversation
    is counted in `rejected` by its reason. Nothing else is left out or mended, except as `check_fields` allows.

    Raises the errors of `read_records`, and ValueError if the first record has no known format.

    Args:
        path: The file; `-` is standard input.
        skip_broken: See `read_records`; a page without a conversation is broken, too.
        rejected: Counts the records that are left out by their reasons.
        mended: Counts the changes by their kinds.
        ignored: Fields to leave out although they may hold text.
        prompts: Whether a question may lack its answer.
        max_record_bytes: The longest record to read.
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
    yield from parsed_records(
        path,
        lambda record: parse_conversation(record, ignored=ignored, prompts=prompts, mended=mended),
        is_known=lambda record: is_conversation(record) or (prompts and is_prompt(record)),
        expected=EXPECTED,
        skip_broken=skip_broken,
        rejected=rejected,
        max_record_bytes=max_record_bytes,
    )
