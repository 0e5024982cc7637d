"""The command ``palm-rlhf export``: a database of feedback as files of records, and a model for other libraries."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from beartype import beartype
from tyro.conf import Positional, arg

from palm_rlhf.data.command_files import refuse_existing
from palm_rlhf.data.files.records import STANDARD

OF_A_DATABASE = {"lang": (), "states": ("ready_for_export", "exported"), "people": "pseudonyms"}  # and their defaults
OF_A_MODEL = {"type": None, "output": None, "max_shard_size": None}
To = Literal["trees", "rankings", "preferences", "messages"]
Type = Literal["f16", "q8_0", "bf16", "f32"]
State = Literal["initial_prompt_review", "growing", "ranking", "ready_for_export", "exported"]


@beartype
def export(
    source: Annotated[Positional[str], arg(metavar="DATABASE|MODEL")],
    out: Annotated[Positional[str | None], arg(metavar="[OUT.jsonl[.gz]]", help_behavior_hint="")] = None,
    *,
    to: Annotated[To | None, arg(metavar="{trees,rankings,preferences,messages}", help_behavior_hint="")] = None,
    format: Annotated[Literal["gguf", "hf"] | None, arg(metavar="{gguf,hf}", help_behavior_hint="")] = None,
    type: Annotated[Type | None, arg(metavar="{f16,q8_0,bf16,f32}", help_behavior_hint="")] = None,
    output: Annotated[str | None, arg(metavar="FILE.gguf|FOLDER", help_behavior_hint="")] = None,
    max_shard_size: Annotated[str | None, arg(metavar="BYTES", help_behavior_hint="(default: 5GB)")] = None,
    lang: Annotated[tuple[str, ...], arg(metavar="CODE ...", help_behavior_hint="(default: all)")] = (),
    states: tuple[State, ...] = ("ready_for_export", "exported"),
    people: Literal["pseudonyms", "names", "none"] = "pseudonyms",
    overwrite: bool = False,
) -> None:
    """Write a database of feedback to a file of records, or a model for llama.cpp or Hugging Face.

    A database: palm-rlhf export DATABASE OUT.jsonl --to trees|rankings|preferences|messages. trees writes
    Open-Assistant's form: messages with labels, ranks, languages and models, nested by their replies. rankings writes
    {"prompt": [messages], "responses": [best first]}: the merged rankings of trees, comparisons, corrections, answers
    to one prompt with thumbs up and down, and imported preferences; preferences writes their pairs, {"prompt",
    "chosen", "rejected"}, and ties count for neither. messages writes {"messages": [{"role", "content"}]} to fine-tune
    on: the threads of trees, corrections, and answers with more thumbs up than down. Only accepted messages are
    written, and nothing that was taken back. The file appears when it is whole, and shows one moment of the database,
    which may be in use meanwhile. Complete trees are in the state exported once they were written as trees; later
    exports write them again. The last line of standard output is JSON that counts the records (of standard error, if
    the file is standard output).

    A model: palm-rlhf export MODEL --format gguf --output FILE.gguf writes a file for llama.cpp, whose architecture is
    command-r for the parallel block of PaLM, and llama, qwen2 or qwen3 for the serial block. --format hf --output
    FOLDER writes a folder for transformers and vLLM, of the architecture cohere, or llama, qwen2 or qwen3. Both have
    the weights, the tokenizer and the chat template. The last line of standard output is JSON with the architecture,
    the type and the bytes.

    Args:
        source: The database: the path of a file, sqlite:///PATH, or postgresql://USER@HOST/NAME. Or the model: the
            folder of a run or of a model, a GGUF file, an adapter of PEFT, a hub id or a known name.
        out: Of a database: where to write; - is stdout. A name that ends in .gz is packed; .csv and .parquet are
            tables.
        to: Of a database: what to write.
        format: Of a model: the format to write.
        type: Of a model: the type of its weights. By default f16 in a GGUF file, where q8_0 makes matrices half as
            large, and in a folder, which has no q8_0, that of MODEL.
        output: Of a model: where to write.
        max_shard_size: Of a model, in a folder: larger weights are split into several files, such as 500MB.
        lang: Write texts in one of these languages only, such as en pt-BR; pt is any Portuguese. The languages of texts
            outside the trees are detected.
        states: States of the trees to read: complete ones by default. Trees that were stopped are never written.
        people: Name people by numbers (person-1) that stay the same in later exports, by their names, or not at all.
        overwrite: Write over a file that exists, or over an earlier export in a folder.
    """
    of_a_model = {"type": type, "output": output, "max_shard_size": max_shard_size}
    given = {**of_a_model, "lang": lang, "states": states, "people": people}
    if (to is None) == (format is None):
        raise ValueError(
            f"got --to {to} and --format {format}, expected one of them: --to for a database of feedback, --format for "
            "a model"
        )
    foreign = OF_A_DATABASE if to is None else OF_A_MODEL
    if names := [name for name, default in foreign.items() if given[name] != default]:
        kind = "a model" if to is None else "a database"
        raise ValueError(f"got --{' --'.join(names)} in an export of {kind}, expected none: leave them out")
    if to is None:
        if output is None or out is not None:
            place = "FILE.gguf" if format == "gguf" else "FOLDER"
            raise ValueError(f"got --output {output} and OUT {out}, expected the place of a model: --output {place}")
        write_model(source, Path(output), format, type, max_shard_size, overwrite)
        return
    if out is None:
        raise ValueError("got no file to write, expected: palm-rlhf export DATABASE OUT.jsonl --to KIND")
    refuse_existing(overwrite, out)
    export_database(source, out, to, languages=lang, states=states, people=people)


def export_database(source: str, out: str, to: To, **choices: Any) -> None:
    """Write a database of feedback to a file, and print the number of its records."""
    from palm_rlhf.feedback.exchange.exporting import export_records, num_trees_by_state
    from palm_rlhf.feedback.store.database import Store
    from palm_rlhf.feedback.store.table_base import utc_now

    stream = sys.stderr if out == STANDARD else sys.stdout
    with Store(source, create=False) as store:
        counts = export_records(store, out, to, now=utc_now(), **choices)
        if not any(counts.values()):
            with store.reading() as session:
                trees = ", ".join(f"{number} {state}" for state, number in num_trees_by_state(session).items())
            print(f"there is nothing of this yet; trees: {trees or 'none'}", file=sys.stderr)
    print(json.dumps(dict(counts)), file=stream)


def write_model(
    source: str, output: Path, format: str | None, type: Type | None, max_shard_size: str | None, overwrite: bool
) -> None:
    """Write a model to a GGUF file or to a folder, and print its architecture and size."""
    from palm_rlhf.commands.export_model import export_gguf, export_hf

    if format == "hf":
        export_hf(source, output, type, max_shard_size=max_shard_size or "5GB", overwrite=overwrite)
    elif max_shard_size is not None:
        raise ValueError(f"got --max-shard-size {max_shard_size} with --format gguf, expected none: it is one file")
    else:
        export_gguf(source, output, type or "f16", overwrite=overwrite)
