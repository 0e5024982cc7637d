"""Bits per byte of held-out text, each token predicted exactly once."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import islice

import numpy as np
import torch
from beartype import beartype
from torch import nn

from palm_rlhf.model.modes import evaluating
from palm_rlhf.ops.cpu.threads import adapt
from palm_rlhf.training.token_windows import Window, read_windows


@beartype
def sliding_windows(length: int, seq_len: int, context: int) -> Iterator[tuple[int, int, int]]:
    """Triples (start, first, stop): the tokens from `first` on are predicted from those from `start` on.

    The windows hold at most `seq_len` + 1 tokens. Every token but the source's first is predicted once, and has at
    least `context` tokens before it in its window, one where that is 0, or all there are.
    """
    first = 1
    while first < length:
        start = max(first - max(context, 1), 0)
        stop = min(start + seq_len + 1, length)
        yield start, first, stop
        first = stop


@torch.no_grad()
@beartype
def total_nats(
    palm: nn.Module,
    arrays: Sequence[np.ndarray],
    *,
    seq_len: int,
    context: int,
    batch_size: int,
    shard: tuple[int, int] = (0, 1),
    autocast: Callable[[], AbstractContextManager],
) -> float:
    """The nats that `palm` spends on `arrays`; with `shard=(i, k)` on every k-th window from the i-th on only.

    A source's first token, which has nothing before it, costs log(num_tokens) nats as under a uniform guess, so that
    the sum over all shards is the length of a code from which the arrays could be decoded.
    """
    device = next(palm.parameters()).device
    index, num_shards = shard
    nats = len(arrays) * math.log(palm.num_tokens) if index == 0 else 0.0
    everything = (
        (Window(source, start, stop), first - start)
        for source, array in enumerate(arrays)
        for start, first, stop in sliding_windows(len(array), seq_len, context)
    )
    mine = islice(everything, index, None, num_shards)
    while batch := list(islice(mine, batch_size)):
        adapt(device.type)
        windows, num_given = zip(*batch, strict=True)
        tokens, mask = read_windows(arrays, windows, max(stop - start for _, start, stop in windows))
        loss_mask = torch.arange(tokens.shape[1]) >= torch.tensor(num_given)[:, None]
        loss_mask = loss_mask if mask is None else loss_mask & mask
        with evaluating(palm), autocast():
            loss = palm(tokens.to(device), return_loss=True, loss_mask=loss_mask.to(device), loss_denominator=1)
        nats += float(loss)
    return nats
