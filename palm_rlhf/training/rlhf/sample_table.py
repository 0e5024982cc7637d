"""Responses of a run for a person to read: samples.jsonl."""

from typing import Any

from beartype import beartype

from palm_rlhf.policy.rewards import Scores
from palm_rlhf.policy.rollout import Rollout
from palm_rlhf.policy.sequences import spoken
from palm_rlhf.training.run.log import append_lines, keep_lines
from palm_rlhf.training.run.run import Run

SAMPLES_FILE = "samples.jsonl"


class SampleTable:
    """The file samples.jsonl in a run's folder: some responses of a step, a line each."""

    @beartype
    def __init__(self, run: Run, num_kept: int, tokenizer: Any):
        self.run, self.num_kept, self.tokenizer = run, num_kept, tokenizer
        self.path = run.output_dir / SAMPLES_FILE if run.output_dir is not None and run.is_main else None
        if self.path is not None:
            keep_lines(self.path, run.step)

    @beartype
    def write(self, rollout: Rollout, scores: Scores, eos_token: int | None) -> None:
        """Add the first few responses of the main process: where there is a tokenizer, as texts without the EOS too.

        Those of conversations with an environment have their messages beside them.
        """
        if self.path is None:
            return
        rows = slice(0, self.num_kept)
        kept = rollout.sequences.select(rows)
        parts = dict(zip(("prompt", "completion"), spoken(kept, self.tokenizer, eos_token), strict=True))
        if self.tokenizer is not None:
            parts |= zip(("prompt_tokens", "completion_tokens"), spoken(kept), strict=True)
        if rollout.messages is not None:
            parts["messages"] = rollout.messages[rows]
        named = {name: part.numbers()[rows] for name, part in scores.by_name.items()}
        lines = []
        for place, (score, *row) in enumerate(zip(scores.numbers()[rows], *parts.values(), strict=True)):
            each = {"scores": {name: part[place] for name, part in named.items()}} if named else {}
            lines.append({"step": self.run.step, "score": score, **each, **dict(zip(parts, row))})
        append_lines(self.path, lines)
