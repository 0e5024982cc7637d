"""Accuracy of a reward model: how often it prefers the chosen reply, as in RewardBench (Lambert et al. 2024)."""

import math
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from beartype import beartype

from palm_rlhf.algorithms.win_rate import wilson_interval
from palm_rlhf.data.conversation import Template, encode_prompt, encode_response
from palm_rlhf.data.files.json_record import Record
from palm_rlhf.data.files.records import read_records
from palm_rlhf.data.preferences.ranking_files import parse_ranking
from palm_rlhf.data.tokenizer import Tokenizer
from palm_rlhf.policy.reward_model import RewardModel
from palm_rlhf.policy.sequences import join
from palm_rlhf.training.reward_metrics import correctness

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
# Mathematics (447 pairs) counts as much as all six programming languages together (984 pairs).
EQUAL_PARTS = {"Reasoning": (("math-prm",), HUMAN_EVAL)}


class Trio(NamedTuple):
    """A prompt with its chosen and its rejected reply."""

    prompt: list[dict[str, str]]
    chosen: str
    rejected: str
    subset: str


@dataclass(frozen=True)
class RewardBenchResult:
    """Accuracies of a reward model; equal scores count a half."""

    subsets: dict[str, tuple[float, int]]
    """The accuracy and number of pairs of each subset."""
    sections: dict[str, float]
    """Accuracy of each section, weighted as in RewardBench; a subset that it lacks is its own section."""
    score: float
    """The mean over the sections."""
    accuracy: float
    """Accuracy over all pairs."""
    interval: tuple[float, float]
    """Wilson interval of `accuracy`."""
    num_pairs: int

    def numbers(self) -> dict[str, Any]:
        """Return all figures as JSON values."""
        return {**vars(self), "interval": list(self.interval), "subsets": {k: list(v) for k, v in self.subsets.items()}}


@beartype
def read_trios(path: str | os.PathLike[str], rejected: Counter[str] | None = None) -> list[Trio]:
    """Read prompts with a chosen and a rejected reply, in any format of preferences, with their `subset`.

    Records that are no pair are counted in `rejected` by reason. Raises ValueError if no pair is left.
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
        raise ValueError(
            f"{path}: got no pair (left out: {dict(rejected)}), expected records of prompt, chosen, rejected and subset"
        )
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
    """Score both replies of each pair and compare them."""
    if batch_size < 1:
        raise ValueError(f"got batch_size {batch_size}, expected at least 1")
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
    """Compute the accuracies by subset and section; `correct` is 1 for a right, 0 for a wrong, 0.5 for a tied pair."""
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
    """Return the mean over the pairs; in a section with equal parts, the mean over the means of its parts."""
    equal = EQUAL_PARTS.get(section, (tuple(parts),))
    means = []
    for names in equal:
        present = [parts[name] for name in names if name in parts]
        if present:
            means.append(math.fsum(mean * count for mean, count in present) / sum(count for _, count in present))
    return math.fsum(means) / len(means)


def _subset(record: Record) -> str:
    return "all" if record.get("subset") is None else str(record["subset"])
