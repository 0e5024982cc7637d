"""Which implementation of attention is fastest where: the table in `attention_choices.json`, and how it is read.

The table has an entry for each generation of GPUs, for CPUs, and for all else. An entry says how it came about
(`measured`, with card, versions and date, or `by default`, without figures) and has

- `rows`, one for each kind of work that was measured: the implementations, best first, with their figures;
- `defaults`, by pass and mask, for work that has no row of its own: a guess, also in an entry that was measured.

Rows rank implementations instead of naming one, for the best may not run here. `auto` takes the first that does.
`python benchmarks/attention.py --write-table` measures an entry anew; the environment variable
`PALM_RLHF_ATTENTION_CHOICES` names a table to be read instead of the one in the package.
"""

import json
import math
import os
from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

PACKAGED = Path(__file__).with_suffix(".json")
VARIABLE = "PALM_RLHF_ATTENTION_CHOICES"
IMPLEMENTATIONS = ("fused", "chunked", "flex", "triton", "eager")
PASSES = ("sequence", "extend", "decode")
MASKS = ("none", "padding", "documents")
GROUPS = ("multi-head", "grouped", "multi-query")
HOW = ("measured", "by default")
HALF = ("bfloat16", "float16")  # which take the same kernels


class AttentionWork(NamedTuple):
    """A description of one call of attention, by which the table is searched; numbers only, no tensors.

    pass_name: `sequence`, as many queries as keys, in training and without gradients; `extend`, several new queries
        over a longer cache; `decode`, one query.
    mask: `none` but the causal one; `padding`, a key mask; `documents`, with or without a key mask.
    dtype: "bfloat16", for example.
    dim: of a head.
    group: `multi-head`, `multi-query`, or `grouped`.
    length: keys.
    batch: rows.
    """

    pass_name: str
    mask: str
    dtype: str
    dim: int
    group: str
    length: int
    batch: int


class ChoiceTable:
    """A table of measured choices; raises ValueError for one that is not whole."""

    def __init__(self, entries: Mapping[str, Mapping[str, Any]]):
        for generation, entry in entries.items():
            _check_entry(generation, entry)
        for needed in ("cpu", "other", "sm_80"):
            if needed not in entries:
                raise ValueError(
                    f"got a table of choices for {', '.join(entries) or 'nothing'}, expected one for {needed} as well; "
                    "benchmarks/attention.py writes whole ones"
                )
        self.entries = entries
        self.ranking = lru_cache(maxsize=4096)(self._ranking)

    @classmethod
    def load(cls, path: str | Path) -> "ChoiceTable":
        """Read a table of JSON."""
        return cls(json.loads(Path(path).read_text(encoding="utf-8")))

    def to_json(self) -> str:
        """Return the table as JSON, a row a line."""
        entries = []
        for generation, entry in self.entries.items():
            lines = [f'    "{key}": {json.dumps(value)}' for key, value in entry.items() if key not in _BLOCKS]
            by_pass = [f'      "{name}": {json.dumps(value)}' for name, value in entry["defaults"].items()]
            lines.append('    "defaults": {\n' + ",\n".join(by_pass) + "\n    }")
            rows = ",\n".join(f"      {json.dumps(row)}" for row in entry["rows"])
            lines.append(f'    "rows": [\n{rows}\n    ]' if rows else '    "rows": []')
            entries.append(f'  "{generation}": {{\n' + ",\n".join(lines) + "\n  }")
        return "{\n" + ",\n".join(entries) + "\n}\n"

    def entry_of(self, generation: str) -> str:
        """Return the entry that holds for a generation of devices.

        A GPU of NVIDIA without an entry has that of the newest one before it, or of the oldest; one of AMD has that of
        gfx942; any other device has `other`.
        """
        if generation in self.entries:
            return generation
        if generation.startswith("sm_"):
            known = sorted((name for name in self.entries if name.startswith("sm_")), key=_number)
            return max((name for name in known if _number(name) <= _number(generation)), key=_number, default=known[0])
        return "gfx942" if generation.startswith("gfx") and "gfx942" in self.entries else "other"

    def _ranking(self, generation: str, work: AttentionWork) -> tuple[str, ...]:
        """Return all implementations, best first, as the nearest row and then the defaults rank them."""
        entry = self.entries[self.entry_of(generation)]
        row = nearest(entry["rows"], work)
        names = [*(row["ranking"] if row else ()), *entry["defaults"][work.pass_name][work.mask], *IMPLEMENTATIONS]
        return tuple(dict.fromkeys(names))


def group_of(heads: int, kv_heads: int) -> str:
    """Return the name of the table for how query heads share key heads."""
    return "multi-head" if heads == kv_heads else "multi-query" if kv_heads == 1 else "grouped"


_BLOCKS = ("defaults", "rows")


def _number(generation: str) -> int:
    return int(generation.removeprefix("sm_"))


def _check_entry(generation: str, entry: Mapping[str, Any]) -> None:
    """Raise ValueError for an entry in which something is missing or unknown."""
    place = f"in the table of choices, at {generation}: "
    if entry.get("how") not in HOW:
        raise ValueError(f"{place}got how={entry.get('how')!r}, expected one of {HOW}")
    for name in PASSES:
        for mask in MASKS:
            if not entry.get("defaults", {}).get(name, {}).get(mask):
                raise ValueError(f"{place}got no default for {name} with mask {mask}, expected a ranking")
    rankings = [ranking for by_mask in entry["defaults"].values() for ranking in by_mask.values()]
    for row in entry["rows"]:
        for key, known in (("pass", PASSES), ("mask", MASKS), ("group", GROUPS)):
            if row.get(key) not in known:
                raise ValueError(f"{place}got a row with {key}={row.get(key)!r}, expected one of {known}")
        rankings.append(row["ranking"])
    for name in (name for ranking in rankings for name in ranking):
        if name not in IMPLEMENTATIONS:
            raise ValueError(f"{place}got the implementation {name!r}, expected one of {IMPLEMENTATIONS}")


def nearest(rows: list[Mapping[str, Any]], work: AttentionWork) -> Mapping[str, Any] | None:
    """Return the row that is most like a kind of work, or None if none is of its pass, mask and width of numbers.

    The type of the numbers counts first, then the dimension of a head, the group, the length, and of decoding the
    batch, numbers by their ratio. The batch of whole sequences does not count: responses are scored in large batches
    and trained on in small ones, and their log-probabilities are compared bit by bit.
    """

    def distance(row: Mapping[str, Any]) -> tuple[float, ...]:
        groups = abs(GROUPS.index(row["group"]) - GROUPS.index(work.group))
        dim, length, batch = (_ratio(row[key], getattr(work, key)) for key in ("dim", "length", "batch"))
        return row["dtype"] != work.dtype, dim, groups, length, batch if work.pass_name == "decode" else 0.0

    alike = (
        row
        for row in rows
        if row["pass"] == work.pass_name
        and row["mask"] == work.mask
        and (row["dtype"] == work.dtype or (row["dtype"] in HALF and work.dtype in HALF))
    )
    return min(alike, key=distance, default=None)


def _ratio(one: int | None, other: int) -> float:
    return 0.0 if one is None else abs(math.log2(one / max(other, 1)))


@cache
def generation_of(device: torch.device) -> str:
    """Return the generation of a device as the table names it: `sm_90`, `gfx942`, `cpu`, or the type of the device."""
    if device.type != "cuda":
        return device.type
    if not torch.cuda.is_available():  # tensors without memory, of a GPU that is not here
        return "sm_80"
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


_current: ChoiceTable | None = None


def current_table() -> ChoiceTable:
    """Return the table that `auto` reads: that of `use_table`, of the environment variable, or of the package."""
    global _current
    if _current is None:
        _current = ChoiceTable.load(os.environ.get(VARIABLE) or PACKAGED)
    return _current


def use_table(table: ChoiceTable | None) -> None:
    """Let `auto` read another table from now on; None brings back the one that a new process reads."""
    global _current
    _current = table
