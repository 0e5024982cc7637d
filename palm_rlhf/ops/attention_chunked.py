"""Attention in chunks of queries: matrix products alone, forward and backward, in memory linear in the length.

On a CPU the backward of PyTorch's fused attention runs far below the speed of the matrix units. Here the heads that
share a key are packed into the rows of one product (row = query * group + head), and each chunk of queries meets all
the keys it may see at once, so that no online softmax is needed: a chunk's scores are held, used and dropped. Masks
are made a chunk at a time.
"""

import math
from collections.abc import Iterator

import torch
from einops import rearrange, repeat
from torch import Tensor

from palm_rlhf.ops.attention_reference import full_precision, visibility
from palm_rlhf.ops.cpu.native_attention import backward_native, forward_native, key_spans, takes

# Scores of one chunk: few enough to stay in a CPU's cache, many enough for efficient products.
CHUNK_ELEMENTS = 1 << 21


class _Plan:
    """How one attention is cut into chunks, and what each chunk's queries may not see."""

    def __init__(self, q: Tensor, k: Tensor, causal: bool, key_mask: Tensor | None, document_ids: Tensor | None):
        self.batch, heads, self.num_queries, _ = q.shape
        self.kv_heads, self.num_keys = k.shape[1:3]
        self.group = heads // self.kv_heads
        self.masks = {"causal": causal, "key_mask": key_mask, "document_ids": document_ids}
        queries = CHUNK_ELEMENTS // (self.batch * heads * self.num_keys)
        self.size = min(self.num_queries, max(16, min(256, queries // 16 * 16)))

    def pack(self, x: Tensor) -> Tensor:
        """`b (hk g) i d -> (b hk) (i g) d`"""
        return rearrange(x, "b (k g) i d -> (b k) (i g) d", k=self.kv_heads)

    def unpack(self, x: Tensor) -> Tensor:
        """`(b hk) (i g) d -> b (hk g) i d`"""
        return rearrange(x, "(b k) (i g) d -> b (k g) i d", b=self.batch, g=self.group)

    def chunks(self) -> Iterator[tuple[slice, slice, int]]:
        """Yield each chunk's queries, its rows, and how many keys it meets."""
        for start in range(0, self.num_queries, self.size):
            stop = min(start + self.size, self.num_queries)
            num_keys = stop + self.num_keys - self.num_queries if self.masks["causal"] else self.num_keys
            yield slice(start, stop), slice(start * self.group, stop * self.group), num_keys

    def hide_(self, scores: Tensor, queries: slice, value: float) -> Tensor:
        """Overwrite what a chunk's queries may not see: `(b hk) (i g) j`."""
        view = scores.unflatten(1, (-1, self.group)).unflatten(0, (self.batch, -1))  # b k i g j
        if self.masks["key_mask"] is None and self.masks["document_ids"] is None:
            if self.masks["causal"]:  # only a chunk's own keys can lie in its future
                size = queries.stop - queries.start
                future = torch.ones(size, size, dtype=torch.bool, device=scores.device).triu_(1)
                view[..., -size:].masked_fill_(repeat(future, "i j -> i g j", g=self.group), value)
            return scores
        visible = visibility(self.num_queries, self.num_keys, **self.masks, queries=queries, device=scores.device)
        view.masked_fill_(~rearrange(visible[..., : scores.shape[-1]], "b i j -> b 1 i 1 j"), value)
        return scores

    def buffer(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Room for the scores of one chunk, used again by the next: fresh memory costs more than the arithmetic."""
        num_rows = self.batch * self.kv_heads * self.group * self.size
        return torch.empty(num_rows * self.num_keys, dtype=dtype, device=device)


def _forward(q: Tensor, k: Tensor, v: Tensor, plan: _Plan) -> tuple[Tensor, Tensor]:
    """Attention and the logarithm of each row's sum of exponentials, `b h i d` and `b h i`.

    The scores are float32 products: in bfloat16 they would be rounded before the softmax sees them.
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
    """Attention whose backward is matrix products over chunks of queries (Dao et al. 2022, section 3.1)."""

    @staticmethod
    def forward(ctx, q, k, v, causal, key_mask, document_ids):
        masks = {"causal": causal, "key_mask": key_mask, "document_ids": document_ids}
        unmasked, square = key_mask is None and document_ids is None, q.shape[2] == k.shape[2]
        ctx.spans = key_spans(q, k, **masks) if takes(q, k, v) else None
        if ctx.spans is not None:
            out, lse = forward_native(q, k, v, ctx.spans)
        elif unmasked and (square or not causal) and q.device.type == "cpu":
            shared = [_for_every_head(t, q.shape[1]) for t in (k, v)]
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
            return *backward_native(q, k, v, ctx.spans, out, lse, d_out), None, None, None
        plan = _Plan(q, k, ctx.causal, key_mask, document_ids)
        compute, scale = lse.dtype, q.shape[-1] ** -0.5
        lse = lse.masked_fill(lse == -torch.inf, 1e4)  # a row that sees nothing: exp(s - 1e4) = 0
        rows, d_rows = plan.pack(q), plan.pack(d_out)
        keys, values = k.flatten(0, 1), v.flatten(0, 1)
        delta = (d_rows.to(compute) * plan.pack(out)).sum(dim=-1, keepdim=True)
        # the products subtract each row's lse and delta themselves, in float32 and before any rounding
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


def _for_every_head(x: Tensor, heads: int) -> Tensor:
    """`b hk j d -> b h j d`, which older versions of PyTorch's kernel need; multi-query keys are not copied."""
    return x.expand(-1, heads, -1, -1) if x.shape[1] == 1 else x.repeat_interleave(heads // x.shape[1], dim=1)


def _with_offset(x: Tensor, offset: Tensor) -> Tensor:
    """Append minus an offset in two columns, whose sum keeps what one of x's precision would lose: `b n d+2`."""
    high = offset.to(x.dtype)
    low = (offset - high.to(offset.dtype)).to(x.dtype)
    return torch.cat((x, -high, -low), dim=-1)


def _with_ones(x: Tensor) -> Tensor:
    """Append what the two columns of `_with_offset` are multiplied with: `b n d -> b n d+2`."""
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
    """The attention of `attention_reference`, computed a chunk of queries at a time.

    q: `b (hk g) i d`, k and v: `b hk j d`, masks: `b j` -> `b (hk g) i d`
    """
    # PyTorch's kernel takes the last axis to be dense, and reads something else where it is not.
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    return ChunkedAttention.apply(q, k, v, causal, key_mask, document_ids)
