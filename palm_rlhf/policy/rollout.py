"""Rollouts: responses that the policy samples to prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, cast

import torch
from beartype import BeartypeConf, beartype
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from palm_rlhf.model.palm import PaLM
from palm_rlhf.model.prompts import new_token_limits, read_prompts
from palm_rlhf.ops.sampling import Sampling
from palm_rlhf.policy.sequences import Sequences, join
from palm_rlhf.policy.turns import Conversation, Message, Turns


@beartype(conf=BeartypeConf(is_pep484_tower=True))
@dataclass(frozen=True)
class ResponseSampling(Sampling):
    """The distribution that responses are drawn from, and where they end.

    Args:
        max_new_tokens: the most tokens of a response; give this or `max_seq_len`.
        max_seq_len: the most tokens of prompt and response together.
        eos_token: ends a response, which keeps it; None: every response is as long as it can be.
        allowed_tokens: `v` bool, False for ids that are never sampled, such as those that the tokenizer lacks.
    """

    max_new_tokens: int | None = None
    max_seq_len: int | None = None
    eos_token: int | None = None
    allowed_tokens: Tensor | None = field(default=None, compare=False)

    @property
    def options(self) -> dict[str, Any]:
        """The options of the distribution and its end by their names, as `PaLM.generate` takes them."""
        return {**super().options, "eos_token": self.eos_token, "allowed_tokens": self.allowed_tokens}

    @property
    def truncation(self) -> dict[str, Any]:
        """The options under which `response_logprobs` computes the log-probabilities of the responses again.

        Raises ValueError where min-p or a penalty is set, since `response_logprobs` has neither.
        """
        known = ("temperature", "top_k", "top_p")
        for option in fields(Sampling):
            value = getattr(self, option.name)
            if option.name not in known and value != option.default:
                raise ValueError(
                    f"got {option.name}={value}, expected {option.default}: log-probabilities of responses can be "
                    f"computed again for {', '.join(known)} only"
                )
        options = {name: getattr(self, name) for name in known}
        return options if self.allowed_tokens is None else {**options, "allowed_tokens": self.allowed_tokens}

    def restricted_to(self, known: Tensor | None) -> "ResponseSampling":
        """Return the same sampling of known ids only, `v` bool; the EOS can be sampled in any case."""
        if known is not None and self.eos_token is not None:
            known = known.index_fill(0, torch.tensor(self.eos_token), True)
        return replace(self, allowed_tokens=known)


@dataclass(frozen=True)
class Rollout:
    """Responses to prompts; the responses to one prompt are neighbours."""

    sequences: Sequences
    logprobs: Tensor  # b t, of each action under the distribution it was drawn from; 0 at other tokens
    truncated: Tensor  # b, True where a response reached its length limit before its EOS, or a conversation was cut off
    messages: list[list[Message]] | None = None  # of each conversation, where an environment answered
    columns: Mapping[str, list] = field(default_factory=dict)  # further columns, one entry for each response

    @property
    def keywords(self) -> dict[str, list]:
        """The columns that reward functions can ask for beside the tokens, one entry for each response."""
        messages = {} if self.messages is None else {"messages": self.messages}
        return {**self.columns, "truncated": self.truncated.tolist(), **messages}


@torch.no_grad()
@beartype
def collect(
    palm: PaLM,
    prompts: Sequence[Tensor],
    sampling: ResponseSampling,
    *,
    num_samples: int = 1,
    batch_size: int = 64,
    columns: Mapping[str, Sequence] | None = None,
    finetune_scope: str | None = None,
    generator: torch.Generator | None = None,
    turns: Turns | None = None,
) -> Rollout:
    """Draw `num_samples` responses to each prompt (1-d tensors of any lengths), up to `batch_size` rows at once.

    Every token is read once, through the cache, and the prompt of several responses once for all of them. The memory of
    a rollout does not grow with the vocabulary.

    Args:
        columns: further columns of the prompts; each response gets the entries of its prompt.
        turns: a conversation with an environment. A response is then all that follows the prompt, every turn reads the
            conversation so far again, and the length limit is that of the whole response.
    """
    if num_samples < 1 or batch_size < 1:
        raise ValueError(f"got num_samples={num_samples} and batch_size={batch_size}, expected at least 1 of each")

    def draw(contexts: Sequence[Tensor], num_samples: int, limits: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        responses: list[Tensor] = []
        logprobs: list[Tensor] = []
        at_once = max(batch_size // num_samples, 1)
        for first in range(0, len(contexts), at_once):
            rows = slice(first, first + at_once)
            drawn = palm.generate(
                sampling.max_seq_len if limits is None else None,
                list(contexts[rows]),
                max_new_tokens=sampling.max_new_tokens if limits is None else limits[rows],
                num_samples=num_samples,
                generator=generator,
                return_logprobs=True,
                finetune_scope=finetune_scope,
                **sampling.options,
            )
            tokens, recorded = cast(tuple[list[Tensor], list[Tensor]], drawn)
            responses, logprobs = responses + tokens, logprobs + recorded
        return responses, logprobs

    repeated_columns = {
        name: [value for value in values for _ in range(num_samples)] for name, values in (columns or {}).items()
    }
    if turns is not None:
        rooms = new_token_limits(read_prompts(palm, list(prompts), None), sampling.max_seq_len, sampling.max_new_tokens)
        conversations = turns.converse(
            palm,
            draw,
            prompts,
            rooms,
            num_samples=num_samples,
            eos_token=sampling.eos_token,
            columns=repeated_columns,
        )
        return _rollout_of(conversations, repeated_columns)
    responses, logprobs = draw(prompts, num_samples, None)
    repeated = [prompt for prompt in (row.to(palm.device) for row in prompts) for _ in range(num_samples)]
    sequences = join(repeated, responses)
    last = torch.stack([row[-1] for row in responses])
    return Rollout(
        sequences,
        pad_sequence(logprobs, batch_first=True),
        torch.zeros_like(last, dtype=torch.bool) if sampling.eos_token is None else last != sampling.eos_token,
        columns=repeated_columns,
    )


def _rollout_of(conversations: list[Conversation], columns: Mapping[str, list]) -> Rollout:
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
        columns,
    )
