"""The command ``palm-rlhf import``: files of trees and preferences become part of a database of feedback."""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

from beartype import beartype
from tyro.conf import Positional, arg

from palm_rlhf.data.command_files import offers_to_skip, seekable
from palm_rlhf.data.files.records import STANDARD


@offers_to_skip
@beartype
def import_feedback(
    database: Annotated[Positional[str], arg(metavar="DATABASE")],
    file: Annotated[Positional[str], arg(metavar="FILE")],
    *,
    kind: Literal["people", "ai"],
    source: Annotated[str | None, arg(metavar="NAME")] = None,
    ignore_fields: Annotated[tuple[str, ...], arg(metavar="WORD ...", help_behavior_hint="(default: none)")] = (),
    skip_broken: bool = False,
) -> None:
    """Add Open-Assistant's trees, or a file of preferences, to a database of feedback.

    Trees become trees of the database, with their messages, labels and ranks: those that are ready for export, without
    messages that were deleted or failed their review. Preferences are chosen and rejected replies, ranked answers, or
    responses best first, in every form that `palm-rlhf data convert` reads. `palm-rlhf learn` learns from both, each
    kind by its weight, and `palm-rlhf export` writes them with the rest.

    All of a file is added, or where it cannot be read, nothing. What is there already is not added again. The last line
    of standard output is JSON that counts the trees, messages and rankings added, those that were there already, and
    records and messages that were left out, by the reason.

    Args:
        database: The database, which is made where there is none: the path of a file, sqlite:///PATH, or
            postgresql://USER@HOST/NAME.
        file: JSON, CSV or parquet, packed with gzip or not; - is stdin.
        kind: Who compared the replies: people, or an AI, such as a model that judged them.
        source: The name that is kept with the contents; by default that of the file.
        ignore_fields: Fields to leave out although they hold text that the format has no place for.
        skip_broken: Count and name records that cannot be read, and continue.
    """
    from palm_rlhf.feedback.exchange.importing import import_file
    from palm_rlhf.feedback.store.database import Store
    from palm_rlhf.feedback.store.table_base import utc_now

    rejected: Counter[str] = Counter()
    name = source if source is not None else "standard input" if file == STANDARD else Path(file).name
    with seekable(file) as path, Store(database) as store:
        counts = import_file(
            store,
            path,
            kind=kind,
            source=name,
            now=utc_now(),
            skip_broken=skip_broken,
            ignored=ignore_fields,
            rejected=rejected,
        )
    if counts["already_there"] == counts.total() > 0:
        print("nothing was added: all of it is there already", file=sys.stderr)
    print(json.dumps({**counts, "rejected": dict(sorted(rejected.items()))}))
