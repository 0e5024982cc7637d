"""The log-probabilities of a prompt's own tokens, which are computed while the prompt is read."""

import math

import torch
from torch import Tensor

from palm_rlhf.model.palm import PaLM
from palm_rlhf.ops.cross_entropy import CHUNK
from palm_rlhf.ops.logprobs import next_token_pairs
from palm_rlhf.serving.engine.sampler import Sampler, with_alternatives
from palm_rlhf.serving.generation import EngineError, Generation


def score_prompt(generation: Generation, start: int, embeds: Tensor, palm: PaLM, sampler: Sampler) -> None:
    """Add the log-probabilities of tokens of the prompt that were just read, with the likeliest alternatives.

    At most CHUNK logits are held at once, however long the prompt is. A token that was scored when the sequence was
    read for the first time is not scored again.

    Args:
        start: The position of the first token that was just read.
        embeds: Final embeddings of the tokens that were just read, `i e`.
    """
    prompt, scored = generation.request.prompt, generation.prompt_logprobs
    num_alternatives = generation.request.prompt_logprobs
    assert num_alternatives is not None  # else there is nothing to score
    _, targets = next_token_pairs(torch.tensor([prompt[start : start + len(embeds) + 1]], device=embeds.device))
    size = max(CHUNK // palm.num_tokens, 1)
    for first in range(len(scored) - start, targets.shape[1], size):
        rows = slice(first, first + size)
        logits = sampler.masked(palm.to_logits(embeds[: targets.shape[1]][rows]))
        found = with_alternatives(logits, targets[0, rows], num_alternatives)
        if any(one.logprob is None or math.isnan(one.logprob) for one in found):
            raise EngineError("the model computed logits that are not finite")
        scored += found
