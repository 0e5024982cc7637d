"""The log-probabilities of a prompt's own tokens, which are computed while it is read."""

import math

import torch
from torch import Tensor

from palm_rlhf.model.palm import PaLM
from palm_rlhf.ops.cross_entropy import CHUNK
from palm_rlhf.ops.logprobs import next_token_pairs
from palm_rlhf.serving.engine.sampler import Sampler, with_alternatives
from palm_rlhf.serving.generation import EngineError, Generation


def score_prompt(generation: Generation, start: int, embeds: Tensor, palm: PaLM, sampler: Sampler) -> None:
    """Notes how likely each token of the prompt was after those just read, and the likeliest tokens in its place.

    No more than CHUNK logits are held at once, however long the prompt is. A token that was noted before, when the
    sequence was read for the first time, is not noted again.

    start: the place of the first token just read; embeds: `i e`, their final embeddings
    """
    prompt, scored = generation.request.prompt, generation.prompt_logprobs
    _, targets = next_token_pairs(torch.tensor([prompt[start : start + len(embeds) + 1]], device=embeds.device))
    size = max(CHUNK // palm.num_tokens, 1)
    for first in range(len(scored) - start, targets.shape[1], size):
        rows = slice(first, first + size)
        logits = sampler.masked(palm.to_logits(embeds[: targets.shape[1]][rows]))
        found = with_alternatives(logits, targets[0, rows], generation.request.prompt_logprobs)
        if any(math.isnan(one.logprob) for one in found):
            raise EngineError("the model computed logits that are no finite numbers")
        scored += found
