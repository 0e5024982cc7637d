"""How often a reward model prefers the chosen reply, on files of RewardBench's shape (Lambert et al. 2024)."""

import math
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from beartype import beartype

from palm_rlhf.data.conversation import Template, encode_prompt, encode_response
from palm_rlhf.data.files.json_record import Record
from palm_rlhf.data.files.records import read_records
from palm_rlhf.data.preferences.ranking_files import parse_ranking
from palm_rlhf.data.tokenizer import Tokenizer
from palm_rlhf.policy.reward_model import RewardModel
from palm_rlhf.policy.sequences import join
from palm_rlhf.training.reward_metrics import correctness, wilson_interval

HUMAN_EVAL = tuple(f"hep-{language}" for language in ("cpp", "go", "java", "js", "python", "rust"))
SECTIONS = {
    "Chat": ("alpacaeval-easy", "alpacaeval-length", "alpacaeval-hard", "mt-bench-easy", "mt-bench-med"),
    "Chat Hard": (
        "mt-bench-hard",
        "llmbar-natural",
        "llmbar-adver-neighbor",
        "llmbar-adver-GPTInst",
        "llmbar-adver-GPTOut",
        "llmbar-adver-manual",
    ),
    "Safety": (
        "refusals-dangerous",
        "refusals-offensive",
        "xstest-should-refuse",
        "xstest-should-respond",
        "donotanswer",
    ),
    "Reasoning": ("math-prm", *HUMAN_EVAL),
}
SECTION_OF = {subset: section for section, subsets in SECTIONS.items() for subset in subsets}
# Mathematics counts as much as all of code together: 447 pairs as the 984 of the six languages.
EQUAL_PARTS = {"Reasoning": (("math-prm",), HUMAN_EVAL)}


class Trio(NamedTuple):
    """A prompt with the reply that people chose and the one that they rejected."""

    prompt: list[dict[str, str]]
    chosen: str
    rejected: str
    subset: str


@dataclass(frozen=True)
class RewardBenchResult:
    """Accuracies; equal scores count a half."""

    subsets: dict[str, tuple[float, int]]
    """The accuracy and number of pairs of each subset."""
    sections: dict[str, float]
    """Subsets of RewardBench by section, weighted as it weights them; any other subset is a section of its own."""
    score: float
    """The mean over the sections."""
    accuracy: float
    """Of all pairs alike."""
    interval: tuple[float, float]
    """Of that accuracy (Wilson)."""
    num_pairs: int

    def numbers(self) -> dict[str, Any]:
        """All of them, as JSON has them."""
        return {**vars(self), "interval": list(self.interval), "subsets": {k: list(v) for k, v in self.subsets.items()}}


@beartype
def read_trios(path: str | os.PathLike[str], rejected: Counter[str] | None = None) -> list[Trio]:
    """The prompts with chosen and rejected replies of a file, in any form of preferences, with their `subset`.

    What is no pair is counted in `rejected` by its reason; ValueError where nothing is left.
    """
    rejected = Counter() if rejected is None else rejected
    trios = []
    for _, record in read_records(path):
        try:
            ranking = parse_ranking(record, rejected)
        except ValueError as error:
            rejected[str(error)] += 1
            continue
        best, *_, worst = ranking["responses"]
        trios.append(Trio(ranking["prompt"], best, worst, _subset(record)))
    if not trios:
        raise ValueError(f"{path} has no pair (left out: {dict(rejected)}), expected prompt, chosen, rejected, subset")
    return trios


@beartype
def score_trios(
    reward_model: RewardModel,
    tokenizer: Tokenizer,
    template: Template,
    trios: Sequence[Trio],
    *,
    batch_size: int = 16,
) -> RewardBenchResult:
    """Scores both replies of each pair and compares them."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1")
    differences = []
    for first in range(0, len(trios), batch_size):
        batch = trios[first : first + batch_size]
        prompts = [encode_prompt(trio.prompt, tokenizer, template) for trio in batch]
        responses = [
            [encode_response(trio.prompt, reply, tokenizer, template) for trio, reply in zip(batch, column)]
            for column in ([trio.chosen for trio in batch], [trio.rejected for trio in batch])
        ]
        sequences = join(prompts * 2, responses[0] + responses[1])
        chosen, rejected = reward_model.score(sequences, batch_size=batch_size, raw=True).double().cpu().chunk(2)
        differences.append(chosen - rejected)
    return accuracies([trio.subset for trio in trios], correctness(torch.cat(differences)).tolist())


@beartype
def accuracies(subsets: Sequence[str], correct: Sequence[float]) -> RewardBenchResult:
    """The accuracies by subset and section of pairs that are right (1), wrong (0) or tied (0.5)."""
    groups: dict[str, list[float]] = defaultdict(list)
    for subset, value in zip(subsets, correct, strict=True):
        groups[subset].append(value)
    by_subset = {subset: (math.fsum(values) / len(values), len(values)) for subset, values in sorted(groups.items())}
    by_section: dict[str, dict[str, tuple[float, int]]] = defaultdict(dict)
    for subset, result in by_subset.items():
        by_section[SECTION_OF.get(subset, subset)][subset] = result
    sections = {section: _section_score(section, parts) for section, parts in by_section.items()}
    accuracy = math.fsum(correct) / len(correct)
    return RewardBenchResult(
        subsets=by_subset,
        sections=sections,
        score=math.fsum(sections.values()) / len(sections),
        accuracy=accuracy,
        interval=wilson_interval(accuracy, len(correct)),
        num_pairs=len(correct),
    )


def _section_score(section: str, parts: Mapping[str, tuple[float, int]]) -> float:
    """The mean over the pairs, but over the parts of a section that count equally where it has such."""
    equal = EQUAL_PARTS.get(section, (tuple(parts),))
    means = []
    for names in equal:
        present = [parts[name] for name in names if name in parts]
        if present:
            means.append(math.fsum(mean * count for mean, count in present) / sum(count for _, count in present))
    return math.fsum(means) / len(means)


def _subset(record: Record) -> str:
    return "all" if record.get("subset") is None else str(record["subset"])
