"""The summary of a command of `palm-rlhf data`: the records that it read, wrote, mended and rejected."""

import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from palm_rlhf.data.files.json_record import Record
from palm_rlhf.data.files.records import STANDARD
from palm_rlhf.data.formats.conversation_files import read_conversations
from palm_rlhf.data.formats.record_fields import UNKNOWN_FIELD


class CommandSummary:
    """Counts of the records that a command read, wrote, mended and rejected."""

    def __init__(self) -> None:
        self.read_or_written: Counter[str] = Counter()
        self.mended: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()

    def read(self, file: str, skip_broken: bool, ignored: Sequence[str]) -> Iterator[Record]:
        """Yield the conversations of a file, or of the files in a folder in the order of their names."""
        files = _files(Path(file)) if file != STANDARD and Path(file).is_dir() else [file]
        for path in files:
            for record in read_conversations(
                path, skip_broken=skip_broken, ignored=ignored, rejected=self.rejected, mended=self.mended
            ):
                self.read_or_written["conversations"] += 1
                yield record

    def written(self, records: Iterable[Record], prefix: str = "") -> Iterator[Record]:
        """Yield records on their way to a file, and count them; `prefix` begins the names of the counts."""
        for record in records:
            for name, number in _sizes(record).items():
                self.read_or_written[prefix + name] += number
            yield record

    def report(self, *outs: str | None) -> None:
        """Print a table, and then the counts as a line of JSON."""
        stream = sys.stderr if STANDARD in outs else sys.stdout
        mended, rejected = (dict(sorted((+counter).items())) for counter in (self.mended, self.rejected))
        for title, numbers in (("", self.read_or_written), ("mended", mended), ("rejected", rejected)):
            for name, number in numbers.items():
                print(f"{title:<9}{number:>12,}  {name.replace('_', ' ')}", file=stream)
                title = ""
        if unknown := sorted(reason.split(" ", 2)[2] for reason in rejected if reason.startswith(UNKNOWN_FIELD)):
            names = " ".join(name.strip("'") for name in unknown)
            print(f"to leave out such fields and keep their records: --ignore-fields {names}", file=sys.stderr)
        counts = {**self.read_or_written, "mended": mended, "rejected": rejected}
        print(json.dumps(counts), file=stream)


def _sizes(record: Record) -> dict[str, int]:
    """Return the counts of one record."""
    if "messages" in record:
        return {"threads": 1, "assistant_turns": sum(message["role"] == "assistant" for message in record["messages"])}
    if "conversations" in record:
        return {"threads": 1, "assistant_turns": sum(turn["from"] == "gpt" for turn in record["conversations"])}
    if "instruction" in record:
        return {"threads": 1, "assistant_turns": 1 + len(record["history"])}
    if "responses" in record:
        return {"rankings": 1, "pairs": math.comb(len(record["responses"]), 2)}
    if "completion" in record:
        return {"replies": 1, "desirable": int(record["label"])}
    return {"pairs": 1} if "chosen" in record else {"prompts": 1}


def _files(folder: Path) -> list[str]:
    """Return the files in a folder and below, in the order of their names, without hidden ones."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    found = [str(path) for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not found:
        raise FileNotFoundError(
            f"{folder} has no files, expected conversations as JSON, JSON lines or web pages: name another folder"
        )
    return found
