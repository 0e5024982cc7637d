"""What the policy says to prompts, and what a reward makes of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from beartype import beartype
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..model.generate import new_token_limits, read_prompts
from ..model.palm import PaLM
from .reward import RewardModel
from .sequences import Sequences, join
from .turns import Conversation, Message, Turns

Reward = RewardModel | Callable[[Sequence, Sequence], Sequence[float | int | None]]
LARGEST = torch.finfo(torch.float32).max  # what a score can be


@dataclass(frozen=True)
class Sampling:
    """The distribution that responses are drawn from, and where they end.

    Exactly one of `max_new_tokens` and `max_seq_len`, which counts the prompt.
    """

    max_new_tokens: int | None = None
    max_seq_len: int | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    eos_token: int | None = None
    allowed_tokens: Tensor | None = field(default=None, compare=False)  # `v` bool, False for ids that are no tokens

    @property
    def truncation(self) -> dict[str, Any]:
        """What turns logits into that distribution."""
        options = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        return options if self.allowed_tokens is None else {**options, "allowed_tokens": self.allowed_tokens}

    def restricted_to(self, known: Tensor | None) -> "Sampling":
        """The same without the ids that are not known, `v` bool; the EOS can be sampled in any case."""
        if known is not None and self.eos_token is not None:
            known = known.index_fill(0, torch.tensor(self.eos_token), True)
        return replace(self, allowed_tokens=known)


@dataclass(frozen=True)
class Rollout:
    """Responses to prompts, those to one prompt next to each other."""

    sequences: Sequences
    logprobs: Tensor  # b t, of each action under the distribution that it was drawn from; 0 where there is none
    truncated: Tensor  # b, True where an EOS was looked for and the room ended first, or a conversation was cut off
    messages: list[list[Message]] | None = None  # of each conversation, where an environment answered


@torch.no_grad()
@beartype
def collect(
    palm: PaLM,
    prompts: Sequence[Tensor],
    sampling: Sampling,
    *,
    num_samples: int = 1,
    batch_size: int = 64,
    finetune_scope: str | None = None,
    generator: torch.Generator | None = None,
    turns: Turns | None = None,
) -> Rollout:
    """Draw `num_samples` responses to each prompt (1-d tensors of any lengths), up to `batch_size` rows at once.

    Every token is read once, through the cache; the responses to one prompt are drawn together, however many. What is
    kept does not grow with the vocabulary. With `turns` a response is all that follows the prompt in a conversation
    with an environment, whose every turn reads what came before anew; the room is that of the whole response.
    """
    if num_samples < 1 or batch_size < 1:
        raise ValueError(f"got num_samples={num_samples} and batch_size={batch_size}; expected at least 1 of each")

    def draw(contexts: Sequence[Tensor], num_samples: int, limits: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        responses, logprobs = [], []
        at_once = max(batch_size // num_samples, 1)
        for first in range(0, len(contexts), at_once):
            rows = slice(first, first + at_once)
            said, recorded = palm.generate(
                sampling.max_seq_len if limits is None else None,
                list(contexts[rows]),
                max_new_tokens=sampling.max_new_tokens if limits is None else limits[rows],
                eos_token=sampling.eos_token,
                num_samples=num_samples,
                generator=generator,
                return_logprobs=True,
                finetune_scope=finetune_scope,
                **sampling.truncation,
            )
            responses, logprobs = responses + said, logprobs + recorded
        return responses, logprobs

    if turns is not None:
        rooms = new_token_limits(read_prompts(palm, list(prompts), None), sampling.max_seq_len, sampling.max_new_tokens)
        options = {"num_samples": num_samples, "eos_token": sampling.eos_token}
        return _rollout_of(turns.converse(palm, draw, prompts, rooms, **options))
    responses, logprobs = draw(prompts, num_samples, None)
    repeated = [prompt.to(palm.device) for prompt in prompts for _ in range(num_samples)]
    truncated = [sampling.eos_token is not None and int(row[-1]) != sampling.eos_token for row in responses]
    return Rollout(
        join(repeated, responses),
        pad_sequence(logprobs, batch_first=True),
        torch.tensor(truncated, device=palm.device),
    )


def _rollout_of(conversations: list[Conversation]) -> Rollout:
    sequences = join(
        [talk.prompt for talk in conversations],
        [torch.cat(talk.parts) for talk in conversations],
        [torch.cat(talk.policy_mask) for talk in conversations],
    )
    return Rollout(
        sequences,
        pad_sequence([torch.cat(talk.logprobs) for talk in conversations], batch_first=True),
        torch.tensor([talk.truncated for talk in conversations], device=sequences.tokens.device),
        [talk.messages for talk in conversations],
    )


class Scores(NamedTuple):
    """What a reward says of each response: `b` float32, and whether it could say (the score is 0 where not)."""

    scores: Tensor
    valid: Tensor


@torch.no_grad()
@beartype
def score(
    reward: Reward,
    sequences: Sequences,
    *,
    tokenizer: Any = None,
    eos_token: int | None = None,
    batch_size: int = 64,
) -> Scores:
    """Score responses by a RewardModel, or by a function of prompts and completions.

    The function gets two lists, of texts where there is a tokenizer (without the EOS), else of 1-d tensors, and returns
    as many numbers, or None where it cannot say. ValueError where it returns something else; what it raises is raised
    again as RuntimeError that names the prompt; FloatingPointError where a score is not finite, in float32.
    """
    if isinstance(reward, RewardModel):
        scores = reward.score(sequences, batch_size=batch_size)
        numbers = scores.tolist()
    else:
        numbers = _call(reward, *spoken(sequences, tokenizer, eos_token))
    for row, number in enumerate(numbers):
        if number is not None and not abs(number) <= LARGEST:
            prompt, completion = (part[0] for part in spoken(sequences.select(slice(row, row + 1)), tokenizer))
            raise FloatingPointError(
                f"the reward is {number}, expected a finite number or None: for the prompt {_show(prompt)} "
                f"and the completion {_show(completion)}"
            )
    device = sequences.tokens.device
    return Scores(
        torch.tensor([number or 0.0 for number in numbers], dtype=torch.float32, device=device),
        torch.tensor([number is not None for number in numbers], device=device),
    )


def _call(reward: Callable, prompts: list, completions: list) -> list[float | int | None]:
    """The function's answers, checked."""
    try:
        answers = reward(prompts, completions)
    except Exception as error:
        raise RuntimeError(
            f"the reward function raised {error!r} {_culprit(error, reward, prompts, completions)}"
        ) from error
    try:
        rows = answers.tolist() if isinstance(answers, Tensor) else answers
        numbers = [None if row is None else float(row) for row in rows]
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"the reward function returned {answers!r:.200}; expected a number, or None, for each completion"
        ) from error
    if len(numbers) != len(prompts):
        raise ValueError(f"the reward function returned {len(numbers)} scores for {len(prompts)} completions")
    return numbers


def _culprit(error: Exception, reward: Callable, prompts: list, completions: list) -> str:
    """Which prompt a function that raised stumbles over, found by asking again for each alone."""
    for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        try:
            reward([prompt], [completion])
        except Exception as alone:
            differs = "" if repr(alone) == repr(error) else f", which alone raises {alone!r}"
            return f"for prompt {index}, {_show(prompt)}, and the completion {_show(completion)}{differs}"
    return f"for {len(prompts)} prompts together, from {_show(prompts[0])} on, though for none of them alone"


def _show(part: str | Tensor) -> str:
    return f"{part if isinstance(part, str) else part.tolist()!r:.200}"


@beartype
def spoken(sequences: Sequences, tokenizer: Any = None, eos_token: int | None = None) -> tuple[list, list]:
    """Prompts and completions: texts by the tokenizer's `decode`, completions without the EOS; else 1-d tensors."""
    prompts, completions = [], []
    for row, prompt, response in zip(
        sequences.tokens, sequences.prompt_lengths.tolist(), sequences.response_lengths.tolist(), strict=True
    ):
        said = row[prompt : prompt + response]
        if tokenizer is not None and eos_token is not None and int(said[-1]) == eos_token:
            said = said[:-1]
        # copies: who keeps one is not to keep the whole block
        prompts.append(row[:prompt].clone() if tokenizer is None else tokenizer.decode(row[:prompt].tolist()))
        completions.append(said.clone() if tokenizer is None else tokenizer.decode(said.tolist()))
    return prompts, completions


@torch.no_grad()
@beartype
def best_of_n(
    palm: PaLM,
    reward: Reward,
    prompt: Tensor,
    sampling: Sampling,
    *,
    num_samples: int,
    tokenizer: Any = None,
    finetune_scope: str | None = None,
    generator: torch.Generator | None = None,
    turns: Turns | None = None,
) -> Tensor:
    """The response of highest score among `num_samples`: prompt `n` -> `t`, its EOS included.

    With `turns` it is all that follows the prompt, an environment's replies included. ValueError where the reward can
    say of none.
    """
    rollout = collect(
        palm,
        [prompt],
        sampling,
        num_samples=num_samples,
        batch_size=num_samples,
        finetune_scope=finetune_scope,
        generator=generator,
        turns=turns,
    )
    scores, valid = score(reward, rollout.sequences, tokenizer=tokenizer, eos_token=sampling.eos_token)
    if not valid.any():
        raise ValueError(f"the reward returned None for all {num_samples} responses; expected a number for one of them")
    best = int(scores.masked_fill(~valid, -torch.inf).argmax())
    response = rollout.sequences.select(slice(best, best + 1))
    return response.tokens[0, int(response.prompt_lengths[0]) :]
