"""Bits per byte of held-out text, each token predicted exactly once."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import islice

import numpy as np
import torch
from beartype import beartype

from palm_rlhf.model.modes import evaluating
from palm_rlhf.model.palm import PaLM
from palm_rlhf.ops.cpu.threads import adapt
from palm_rlhf.training.token_windows import Window, read_windows


@beartype
def sliding_windows(length: int, seq_len: int, context: int) -> Iterator[tuple[int, int, int]]:
    """Yield triples (start, first, stop): tokens `first` to `stop` are predicted, from the tokens `start` onwards.

    The windows hold at most `seq_len` + 1 tokens. Every token but the source's first is predicted once, and has at
    least `context` tokens before it in its window (at least one), or all that the source has.
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
    palm: PaLM,
    arrays: Sequence[np.ndarray],
    *,
    seq_len: int,
    context: int,
    batch_size: int,
    shard: tuple[int, int] = (0, 1),
    autocast: Callable[[], AbstractContextManager],
) -> float:
    """Return the negative log-likelihood of `arrays` under `palm`, in nats.

    The first token of a source, which has no token before it, costs log(num_tokens) nats, as under a uniform guess. The
    sum over all shards is then the length of a code from which the arrays could be decoded.

    Args:
        palm: the model; evaluated without dropout.
        arrays: 1-d arrays of token ids, the sources.
        seq_len: most tokens that are predicted in one window.
        context: least tokens before a predicted token, where the source has as many.
        batch_size: windows in one forward.
        shard: `(i, k)` counts every k-th window from the i-th on alone, for the i-th of k processes.
        autocast: makes the context of a forward.
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
