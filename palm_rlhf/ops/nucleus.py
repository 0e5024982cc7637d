"""The logits at which top-k and top-p cut a distribution off, found without sorting a large vocabulary."""

from typing import NamedTuple

import torch
from torch import Tensor

SORTED = 2048  # below this vocabulary, sorting is as fast as counting
BINS = 1024
NATS = 32.0  # below the likeliest token, which the bins span; tokens further down hold no mass and share the last bin
CHUNK = 1 << 18  # logits that are processed at once, so that they stay in a CPU's cache
GPU_CHUNK = 1 << 24  # the same on a GPU, where sorting takes some 20 bytes a logit


class Cut(NamedTuple):
    """The place where a distribution is cut off; both tensors are `... 1`.

    Tokens of logits above `floor` stay; of the tokens at exactly this logit, those of ids up to `last` stay.
    """

    floor: Tensor
    last: Tensor

    def keeps(self, logits: Tensor) -> Tensor:
        """Return True for the tokens that stay, and for NaN: `... v` -> `... v` bool."""
        kept = (logits < self.floor).logical_not_()
        final = logits.shape[-1] - 1
        # a GPU would wait for the answer, and a CUDA graph cannot
        if torch.compiler.is_compiling() or logits.device.type != "cpu" or (self.last < final).any():
            kept &= (logits != self.floor) | (torch.arange(final + 1, device=logits.device) <= self.last)
        return kept


@torch.no_grad()
def top_k_cut(logits: Tensor, k: int) -> Cut:
    """Cut below the k-th largest logit; all tokens that equal it stay: `... v`."""
    floor = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]
    return Cut(floor, torch.full_like(floor, logits.shape[-1] - 1, dtype=torch.int64))


def truncates(top_k: int | None, top_p: float | None) -> bool:
    """Return whether top-k or top-p leaves any token out."""
    return top_k is not None or (top_p is not None and top_p < 1.0)


def find_cut(logits: Tensor, *, top_k: int | None = None, top_p: float | None = None) -> Cut:
    """Return the cut of top-p among the tokens that top-k keeps, for options that `truncates` is True of: `... v`."""
    if top_k is not None:
        of_top_k = top_k_cut(logits, top_k)
        if top_p is None or top_p >= 1.0:
            return of_top_k
        logits = torch.where(of_top_k.keeps(logits), logits, -torch.inf)
    assert top_p is not None, "top-k or top-p truncates"
    return nucleus_cut(logits, top_p)


@torch.no_grad()
def nucleus_cut(logits: Tensor, p: float | Tensor) -> Cut:
    """Cut below the smallest set of tokens that holds at least p of the mass (Holtzman et al. 2019, section 3.1).

    The set has one token at least; of tokens with equal logits, those with the smaller ids come first. A GPU sorts a
    large vocabulary. A CPU counts its masses in bins, and sorts the tokens of a single bin only.

    logits: `... v`, p: a number, or one for each row, `... 1`
    """
    rows = logits.flatten(0, -2) if logits.ndim > 1 else logits.unsqueeze(0)
    on_cpu = rows.device.type == "cpu"
    sorts = rows.shape[-1] < SORTED or not on_cpu or torch.compiler.is_compiling()
    find = _by_sorting if sorts else _by_counting
    parts = rows.split(max((CHUNK if on_cpu else GPU_CHUNK) // rows.shape[-1], 1))
    shares = p.reshape(-1, 1).split(len(parts[0])) if isinstance(p, Tensor) else [p] * len(parts)
    cuts = map(find, parts, shares)
    return Cut(*(torch.cat(column).view(*logits.shape[:-1], 1) for column in zip(*cuts, strict=True)))


def _by_sorting(logits: Tensor, p: float | Tensor) -> Cut:
    """Find the cut by its definition: `b v`."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probs = ordered.softmax(dim=-1)
    num_kept = (probs.cumsum(dim=-1) - probs < p).sum(dim=-1, keepdim=True).clamp_(min=1)
    return _after(num_kept, ordered, order, logits.shape[-1])


def _by_counting(logits: Tensor, p: float | Tensor) -> Cut:
    """Find the bin of logits in which the share p is reached, and the place within the bin: `b v`.

    Masses are added in float64, where the order of the sum hardly matters.
    """
    largest, smallest = logits.amax(dim=-1, keepdim=True), logits.amin(dim=-1, keepdim=True)
    below = largest - logits
    masses = below.neg().exp_().double()
    width = (largest - smallest).clamp_(max=NATS) / BINS
    bins = below.div_(width).nan_to_num_(nan=0.0).clamp_(max=BINS - 1).long()  # NaN where all are equal
    held = masses.new_zeros(len(logits), BINS).scatter_add_(-1, bins, masses)
    reached = held.cumsum(dim=-1)
    share = p * reached[:, -1:]
    decisive = torch.searchsorted(reached, share).clamp_(max=BINS - 1)
    in_bin = bins == decisive
    counts = in_bin.sum(dim=-1)
    most = int(counts.max())
    if most > logits.shape[-1] // 8:  # many logits are equal
        return _by_sorting(logits, p)

    row, token = in_bin.nonzero(as_tuple=True)
    place = torch.arange(len(row)) - (counts.cumsum(dim=0) - counts)[row]
    candidates, tokens = logits.new_full((len(logits), most), -torch.inf), counts.new_zeros(len(logits), most)
    candidates[row, place], tokens[row, place] = logits[row, token], token
    ordered, order = candidates.sort(dim=-1, descending=True, stable=True)
    masses = (ordered - largest).exp_().double()
    inside = (reached - held).gather(-1, decisive) + masses.cumsum(dim=-1) - masses < share
    num_kept = torch.minimum(inside.sum(dim=-1), counts).clamp_(min=1).unsqueeze(-1)
    return _after(num_kept, ordered, tokens.gather(-1, order), logits.shape[-1])


def _after(num_kept: Tensor, ordered: Tensor, tokens: Tensor, num_tokens: int) -> Cut:
    """Return the cut after the first `num_kept`, `b 1`, of the ordered logits, `b n`, of the given tokens, `b n`."""
    floor = ordered.gather(-1, num_kept - 1)
    follower = ordered.gather(-1, num_kept.clamp(max=ordered.shape[-1] - 1))
    last = tokens.gather(-1, num_kept - 1).masked_fill_(follower != floor, num_tokens - 1)
    return Cut(floor, last)
