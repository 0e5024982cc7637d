"""What an update did to each token of a few responses: the records that `palm-rlhf inspect` shows."""

import json
from pathlib import Path
from typing import Any

import torch
from beartype import beartype
from torch import Tensor

from palm_rlhf.algorithms.kl import MAX_LOG_RATIO
from palm_rlhf.algorithms.ratios import log_ratio
from palm_rlhf.policy.actor_critic import ActorCritic, Reference
from palm_rlhf.policy.rewards import Scores
from palm_rlhf.policy.sequences import Sequences
from palm_rlhf.training.rlhf.config import PPOConfig
from palm_rlhf.training.rlhf.experience import Experience
from palm_rlhf.training.run.checkpoints import write_text, writing
from palm_rlhf.training.run.log import read_metrics
from palm_rlhf.training.run.run import Run
from palm_rlhf.training.run.sharding import whole

TOKENS_FILE = "tokens.jsonl"


class TokenTable:
    """Appends the tokens of the first few responses to tokens.jsonl in the run's folder, a line for each response.

    A line has the `step`, the `score` (null where the reward returned None), the `prompt` as a text (as ids where there
    is no tokenizer), and lists with an entry for each token of the response: `tokens` (ids), `pieces` (texts), and

    logprob            log-probability of the token, in nats, under the policy that drew it
    new_logprob        the same under the policy after the update
    ref_logprob        the same under the reference, left out where there is none
    advantage          that the update learnt from
    value, return      of the critic, left out where there is none
    ratio              of the probabilities after and before the update; of the whole response where the loss has it so
    clipped            1 where the loss no longer moves the token, because its ratio is beyond the clip range; with
                       CISPO, where the ratio that weighs the token is cut to that range
    in_loss            0 for a token that the loss leaves out; an environment's have log-probabilities of 0

    Lines of steps after the one that the run is at, left by a run that was cut off, are dropped.
    """

    @beartype
    def __init__(self, run: Run, actor_critic: ActorCritic, reference: Reference | None, num_kept: int, tokenizer: Any):
        self.run, self.actor_critic, self.reference = run, actor_critic, reference
        self.num_kept, self.tokenizer = num_kept, tokenizer
        self.path: Path | None = None
        if run.output_dir is not None and run.is_main:
            self.path = run.output_dir / TOKENS_FILE
            kept = [line for line in read_metrics(self.path) if line["step"] <= run.step]
            with writing(f"the tokens in {self.path}"):
                write_text(self.path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))

    @torch.no_grad()
    @beartype
    def write(self, experience: Experience, scores: Scores, config: PPOConfig, truncation: dict[str, Any]) -> None:
        """Add a line for each of the first few responses of the main process, after the update on `experience`.

        Every process takes part, for the policy that reads them once more may lie in shards.
        """
        if self.run.output_dir is None:
            return
        kept = experience.select(torch.arange(min(self.num_kept, len(experience.sequences)), device=self.run.device))
        with self.run.autocast(), whole(self.actor_critic):
            new_logprobs = self.actor_critic(kept.sequences, values=False, **truncation).logprobs
        if self.path is None:
            return
        columns = token_columns(kept, new_logprobs, config, has_reference=self.reference is not None)
        lines = []
        for row, length in enumerate(kept.sequences.response_lengths.tolist()):
            prompt, response = split(kept.sequences, row)
            line = {
                "step": self.run.step,
                "score": float(scores.scores[row]) if scores.valid[row] else None,
                "prompt": prompt if self.tokenizer is None else self.tokenizer.decode(prompt),
                "tokens": response,
            }
            if self.tokenizer is not None:
                line["pieces"] = pieces(self.tokenizer, response)
            for name, column in columns.items():
                line[name] = [short(number) for number in column[row, :length].tolist()]
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        with writing(f"the tokens in {self.path}"), open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(lines))


@torch.no_grad()
@beartype
def token_columns(
    kept: Experience, new_logprobs: Tensor, config: PPOConfig, *, has_reference: bool
) -> dict[str, Tensor]:
    """The numbers of each token, by their names in tokens.jsonl: `b t` each."""
    variant = config.variant
    logprobs, new_logprobs, ref_logprobs = (
        numbers.masked_fill(~kept.sequences.action_mask, 0.0)
        for numbers in (kept.logprobs, new_logprobs, kept.ref_logprobs)
    )
    moved = log_ratio(new_logprobs, logprobs, kept.action_mask, level=variant.ratio_level)
    ratio = moved.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    above, below = ratio > 1 + variant.clip_eps_high, ratio < 1 - variant.clip_eps
    is_cispo = config.grpo_variant == "cispo"
    clipped = (above & ((kept.advantages > 0) | is_cispo)) | (below & ((kept.advantages < 0) | is_cispo))
    columns = {
        "logprob": logprobs,
        "new_logprob": new_logprobs,
        "advantage": kept.advantages,
        "ratio": ratio,
        "clipped": (clipped & kept.action_mask).int(),
        "in_loss": kept.action_mask.int(),
    }
    if has_reference:
        columns["ref_logprob"] = ref_logprobs
    if config.algorithm == "ppo":
        columns |= {"value": kept.values, "return": kept.returns}
    return columns


def split(sequences: Sequences, row: int) -> tuple[list[int], list[int]]:
    """The ids of a row's prompt and of its response."""
    start, length = int(sequences.prompt_lengths[row]), int(sequences.response_lengths[row])
    tokens = sequences.tokens[row].tolist()
    return tokens[:start], tokens[start : start + length]


def pieces(tokenizer: Any, tokens: list[int]) -> list[str]:
    """The text that each token adds; "" where it adds none, as do the first bytes of a character.

    Tokens are decoded after all those before them: alone, many tokenizers leave out the space in front of a word.
    """
    found, shown = [], ""
    for end in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:end])
        unfinished = text.endswith("\ufffd") and end < len(tokens)
        piece = text[len(shown) :] if text.startswith(shown) and not unfinished else ""
        shown = text if piece else shown
        found.append(piece)
    return found


def short(number: float | int) -> float | int:
    """The number in six digits, which is more than a page shows."""
    return number if isinstance(number, int) else float(f"{number:.6g}")
