"""The effect of an update on each token of a few responses: the records that `palm-rlhf inspect` shows."""

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
from palm_rlhf.training.run.log import append_lines, keep_lines
from palm_rlhf.training.run.run import Run
from palm_rlhf.training.run.sharding import whole

TOKENS_FILE = "tokens.jsonl"


class TokenTable:
    """The file tokens.jsonl in a run's folder: the tokens of the first few responses, a line for each response.

    A line has the `step`, the `score` (null where the reward returned None), the `prompt` as a text (as ids where there
    is no tokenizer), and lists with an entry for each token of the response: `tokens` (ids), `pieces` (texts), and

    logprob            log-probability of the token, in nats, under the policy that drew it
    new_logprob        the same under the policy after the update
    ref_logprob        the same under the reference, left out where there is none
    advantage          in the loss
    value, return      of the critic, left out where there is none
    ratio              of the probabilities after and before the update; of the whole response where the loss has that
    clipped            1 where the loss has no gradient, because the ratio is beyond the clip range; with CISPO, where
                       the weight of the token is cut to that range
    in_loss            0 for a token that the loss leaves out; tokens of an environment have log-probabilities of 0
    """

    @beartype
    def __init__(self, run: Run, actor_critic: ActorCritic, reference: Reference | None, num_kept: int, tokenizer: Any):
        self.run, self.actor_critic, self.reference = run, actor_critic, reference
        self.num_kept, self.tokenizer = num_kept, tokenizer
        self.path = run.output_dir / TOKENS_FILE if run.output_dir is not None and run.is_main else None
        if self.path is not None:
            keep_lines(self.path, run.step)

    @torch.no_grad()
    @beartype
    def write(self, experience: Experience, scores: Scores, config: PPOConfig, truncation: dict[str, Any]) -> None:
        """Add a line for each of the first few responses of the main process, after the update on `experience`.

        All processes take part, since the policy, which reads the responses again, may be in shards.
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
            lines.append(line)
        append_lines(self.path, lines)


@torch.no_grad()
@beartype
def token_columns(
    kept: Experience, new_logprobs: Tensor, config: PPOConfig, *, has_reference: bool
) -> dict[str, Tensor]:
    """Return the numbers of each token, by their names in tokens.jsonl: `b t` each."""
    variant = config.variant
    assert variant.clip_eps_high is not None
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
    """Return the token ids of a row's prompt and of its response."""
    start, length = int(sequences.prompt_lengths[row]), int(sequences.response_lengths[row])
    tokens = sequences.tokens[row].tolist()
    return tokens[:start], tokens[start : start + length]


def pieces(tokenizer: Any, tokens: list[int]) -> list[str]:
    """Return the text that each token adds; "" for a token that adds none, such as the first byte of a character.

    A token is decoded together with all tokens before it: alone, many tokenizers leave out the space before a word.
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
    """Return the number with six digits, which is more than a page shows."""
    return number if isinstance(number, int) else float(f"{number:.6g}")
