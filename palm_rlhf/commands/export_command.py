"""The command ``palm-rlhf export``: the contents of a database of feedback, in files that the data side reads."""

import json
import sys
from typing import Annotated, Literal

from beartype import beartype
from tyro.conf import Positional, arg

from palm_rlhf.data.command_files import refuse_existing
from palm_rlhf.data.files.records import STANDARD


@beartype
def export(
    source: Annotated[Positional[str], arg(metavar="DATABASE")],
    out: Annotated[Positional[str], arg(metavar="OUT.jsonl[.gz]")],
    *,
    to: Literal["trees", "rankings", "preferences", "messages"],
    lang: Annotated[tuple[str, ...], arg(metavar="CODE ...", help_behavior_hint="(default: all)")] = (),
    states: tuple[Literal["initial_prompt_review", "growing", "ranking", "ready_for_export", "exported"], ...] = (
        "ready_for_export",
        "exported",
    ),
    people: Literal["pseudonyms", "names", "none"] = "pseudonyms",
    overwrite: bool = False,
) -> None:
    """Write what people gave to a database of feedback to a file that the other commands read.

    trees writes Open-Assistant's form: messages with labels, ranks, languages and models, nested by their replies.
    rankings writes {"prompt": [messages], "responses": [best first]}: the merged rankings of trees, comparisons,
    corrections, answers to one prompt with thumbs up and down, and imported preferences; preferences writes their
    pairs, {"prompt", "chosen", "rejected"}, and ties count for neither. messages writes {"messages": [{"role",
    "content"}]} to fine-tune on: the threads of trees, corrections, and answers with more thumbs up than down. Only
    accepted messages are written, and nothing that was taken back.

    The file appears when it is whole, and shows one moment of the database, which may be in use meanwhile. Complete
    trees are in the state exported once they were written as trees; later exports write them again. The last line of
    standard output is JSON that counts the records (of standard error, if the file is standard output).

    Args:
        source: The database: the path of a file, sqlite:///PATH, or postgresql://USER@HOST/NAME.
        out: Where to write; - is stdout. A name that ends in .gz is packed; .csv and .parquet are tables.
        to: What to write.
        lang: Write texts in one of these languages only, such as en pt-BR; pt is any Portuguese. The languages of texts
            outside the trees are detected.
        states: States of the trees to read: complete ones by default. Trees that were stopped are never written.
        people: Name people by numbers (person-1) that stay the same in later exports, by their names, or not at all.
        overwrite: Write over a file that exists.
    """
    from palm_rlhf.feedback.exchange.exporting import export_records, num_trees_by_state
    from palm_rlhf.feedback.store.database import Store
    from palm_rlhf.feedback.store.table_base import utc_now

    refuse_existing(overwrite, out)
    stream = sys.stderr if out == STANDARD else sys.stdout
    with Store(source, create=False) as store:
        counts = export_records(store, out, to, now=utc_now(), languages=lang, states=states, people=people)
        if not any(counts.values()):
            with store.reading() as session:
                trees = ", ".join(f"{number} {state}" for state, number in num_trees_by_state(session).items())
            print(f"there is nothing of this yet; trees: {trees or 'none'}", file=sys.stderr)
    print(json.dumps(dict(counts)), file=stream)
