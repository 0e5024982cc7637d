"""Attention in chunks of queries: matrix products, forward and backward, in memory linear in the length.

On a CPU the backward of PyTorch's fused attention is far slower than its matrix products. Here the heads that share a
key head are packed into the rows of one product (row = query * group + head). Each chunk of queries meets all the keys
that it may see at once, so that no online softmax is needed: only the scores of one chunk are in memory, and only the
mask of one chunk.
"""

import math
from collections.abc import Iterator

import torch
from einops import rearrange, repeat
from torch import Tensor

from palm_rlhf.ops.attention_fused import for_every_head
from palm_rlhf.ops.attention_reference import Masks, full_precision, visibility
from palm_rlhf.ops.cpu import native_attention

# Scores of one chunk: few enough for the cache of a CPU, many enough for efficient products.
CHUNK_ELEMENTS = 1 << 21


class _Plan:
    """How the queries of one attention are cut into chunks, and which keys each chunk does not see."""

    def __init__(self, q: Tensor, k: Tensor, causal: bool, key_mask: Tensor | None, document_ids: Tensor | None):
        self.batch, heads, self.num_queries, _ = q.shape
        self.kv_heads, self.num_keys = k.shape[1:3]
        self.group = heads // self.kv_heads
        self.masks: Masks = {"causal": causal, "key_mask": key_mask, "document_ids": document_ids}
        queries = CHUNK_ELEMENTS // (self.batch * heads * self.num_keys)
        self.size = min(self.num_queries, max(16, min(256, queries // 16 * 16)))

    def pack(self, x: Tensor) -> Tensor:
        """Pack the heads that share a key head into rows: `b (hk g) i d -> (b hk) (i g) d`."""
        return rearrange(x, "b (k g) i d -> (b k) (i g) d", k=self.kv_heads)

    def unpack(self, x: Tensor) -> Tensor:
        """Undo `pack`: `(b hk) (i g) d -> b (hk g) i d`."""
        return rearrange(x, "(b k) (i g) d -> b (k g) i d", b=self.batch, g=self.group)

    def chunks(self) -> Iterator[tuple[slice, slice, int]]:
        """Yield the queries of each chunk, its rows, and how many keys it meets."""
        for start in range(0, self.num_queries, self.size):
            stop = min(start + self.size, self.num_queries)
            num_keys = stop + self.num_keys - self.num_queries if self.masks["causal"] else self.num_keys
            yield slice(start, stop), slice(start * self.group, stop * self.group), num_keys

    def hide_(self, scores: Tensor, queries: slice, value: float) -> Tensor:
        """Overwrite the scores of the keys that a query does not see: `(b hk) (i g) j`."""
        view = scores.unflatten(1, (-1, self.group)).unflatten(0, (self.batch, -1))  # b k i g j
        if self.masks["key_mask"] is None and self.masks["document_ids"] is None:
            if self.masks["causal"]:  # only the last keys of a chunk can be later than a query of it
                size = queries.stop - queries.start
                future = torch.ones(size, size, dtype=torch.bool, device=scores.device).triu_(1)
                view[..., -size:].masked_fill_(repeat(future, "i j -> i g j", g=self.group), value)
            return scores
        visible = visibility(self.num_queries, self.num_keys, **self.masks, queries=queries, device=scores.device)
        assert visible is not None  # since there is a mask
        view.masked_fill_(~rearrange(visible[..., : scores.shape[-1]], "b i j -> b 1 i 1 j"), value)
        return scores

    def buffer(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Allocate the scores of one chunk for all chunks to use: allocating memory costs more than the arithmetic."""
        num_rows = self.batch * self.kv_heads * self.group * self.size
        return torch.empty(num_rows * self.num_keys, dtype=dtype, device=device)


def _forward(q: Tensor, k: Tensor, v: Tensor, plan: _Plan) -> tuple[Tensor, Tensor]:
    """Return attention, and the logarithm of the sum of exponentials of each row: `b h i d` and `b h i`.

    The products are in float32: in bfloat16 the scores would be rounded before the softmax.
    """
    compute = torch.promote_types(q.dtype, torch.float32)
    rows = plan.pack(q).to(compute) * q.shape[-1] ** -0.5
    keys, values = k.flatten(0, 1).to(compute), v.flatten(0, 1)
    out = torch.empty(rows.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(*rows.shape[:2], 1, dtype=compute, device=q.device)
    for queries, r, num_keys in plan.chunks():
        scores = plan.hide_(rows[:, r] @ keys[:, :num_keys].mT, queries, -torch.inf)
        lse[:, r] = torch.logsumexp(scores, dim=-1, keepdim=True)
        weights = scores.sub_(lse[:, r].clamp(min=torch.finfo(compute).min)).exp_()
        out[:, r] = weights.to(v.dtype) @ values[:, :num_keys]
    return plan.unpack(out), plan.unpack(lse).squeeze(-1)


class ChunkedAttention(torch.autograd.Function):
    """Attention with a backward of matrix products over chunks of queries (Dao et al. 2022, section 3.1)."""

    @staticmethod
    def forward(ctx, q, k, v, causal, key_mask, document_ids):
        masks: Masks = {"causal": causal, "key_mask": key_mask, "document_ids": document_ids}
        unmasked, square = key_mask is None and document_ids is None, q.shape[2] == k.shape[2]
        is_native = native_attention.why_not(q, k, v) is None and native_attention.is_faster()
        ctx.spans = native_attention.key_spans(q, k, **masks) if is_native else None
        if ctx.spans is not None:
            out, lse = native_attention.forward_native(q, k, v, ctx.spans)
        elif unmasked and (square or not causal) and q.device.type == "cpu":
            # the operator behind F.scaled_dot_product_attention, which does not return the lse that the backward needs
            # older versions of it take no groups
            shared = [for_every_head(t, q.shape[1]) for t in (k, v)]
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, *shared, 0.0, causal)
        else:
            with full_precision(q.device.type):
                out, lse = _forward(q, k, v, _Plan(q, k, causal, key_mask, document_ids))
        ctx.save_for_backward(q, k, v, out, lse, key_mask, document_ids)
        ctx.causal = causal
        return out

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, out, lse, key_mask, document_ids = ctx.saved_tensors
        if ctx.spans is not None:
            return *native_attention.backward_native(q, k, v, ctx.spans, out, lse, d_out), None, None, None
        plan = _Plan(q, k, ctx.causal, key_mask, document_ids)
        compute, scale = lse.dtype, q.shape[-1] ** -0.5
        lse = lse.masked_fill(lse == -torch.inf, 1e4)  # for a row that sees no key: exp(s - 1e4) = 0
        rows, d_rows = plan.pack(q), plan.pack(d_out)
        keys, values = k.flatten(0, 1), v.flatten(0, 1)
        delta = (d_rows.to(compute) * plan.pack(out)).sum(dim=-1, keepdim=True)
        # lse and delta are subtracted inside of the products, in float32 and before any rounding, by two more columns
        rows_lse, ones_keys = _with_offset(rows * scale, plan.pack(lse.unsqueeze(-1))), _with_ones(keys)
        d_rows_delta, ones_values = _with_offset(d_rows, delta), _with_ones(values)
        d_q = torch.empty_like(rows)
        d_keys, d_values = (t.new_zeros(t.shape, dtype=compute) for t in (keys, values))
        weights_buffer, d_scores_buffer = (plan.buffer(q.dtype, q.device) for _ in range(2))
        for queries, r, num_keys in plan.chunks():
            shape = (len(rows), r.stop - r.start, num_keys)
            weights, d_scores = (buffer[: math.prod(shape)].view(shape) for buffer in (weights_buffer, d_scores_buffer))
            torch.bmm(rows_lse[:, r], ones_keys[:, :num_keys].mT, out=weights).exp_()
            plan.hide_(weights, queries, 0.0)
            torch.bmm(d_rows_delta[:, r], ones_values[:, :num_keys].mT, out=d_scores).mul_(weights)

            d_values[:, :num_keys] += weights.mT @ d_rows[:, r]
            d_keys[:, :num_keys] += d_scores.mT @ rows[:, r]
            d_q[:, r] = d_scores @ keys[:, :num_keys]
        d_k, d_v = (t.to(k.dtype).view_as(k) for t in (d_keys.mul_(scale), d_values))
        return plan.unpack(d_q.mul_(scale)), d_k, d_v, None, None, None


def _with_offset(x: Tensor, offset: Tensor) -> Tensor:
    """Append minus the offset as two columns, of which the second is the rounding error of the first: `b n d+2`."""
    high = offset.to(x.dtype)
    low = (offset - high.to(offset.dtype)).to(x.dtype)
    return torch.cat((x, -high, -low), dim=-1)


def _with_ones(x: Tensor) -> Tensor:
    """Append two columns of ones, by which a product adds the columns of `_with_offset`: `b n d -> b n d+2`."""
    return torch.cat((x, x.new_ones(*x.shape[:-1], 2)), dim=-1)


def attention_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    key_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> Tensor:
    """Return what `attention_reference` returns, computed in chunks of queries.

    q: `b (hk g) i d`, k and v: `b hk j d`, key_mask and document_ids: `b j` -> `b (hk g) i d`
    """
    # PyTorch's kernel does not check that the last axis is dense, and would read other numbers.
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    return ChunkedAttention.apply(q, k, v, causal, key_mask, document_ids)
