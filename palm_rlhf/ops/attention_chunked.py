"""Attention in chunks of queries: matrix products alone, forward and backward, in memory linear in the length.

On a CPU the backward of PyTorch's fused attention runs far below the speed of the matrix units. Here the heads that
share a key are stacked into the rows of one product, and each chunk of queries meets all the keys it may see at once,
so that no online softmax is needed: the chunk's scores are held, used and dropped. Masks are built a chunk at a time.
"""

import math

import torch
from einops import rearrange
from torch import Tensor

from .attention_reference import visibility

# Elements of one chunk's scores: small enough to stay in a CPU's cache, large enough for efficient products.
CHUNK_ELEMENTS = 1 << 20


class _Chunks:
    """The chunks of one attention: which queries, which keys they meet, which of those they see."""

    def __init__(self, q: Tensor, k: Tensor, causal: bool, key_mask: Tensor | None, document_ids: Tensor | None):
        batch, heads, self.num_queries, _ = q.shape
        self.kv_heads, self.num_keys = k.shape[1:3]
        self.batch, self.group, self.device = batch, heads // self.kv_heads, q.device
        self.causal, self.key_mask, self.document_ids = causal, key_mask, document_ids
        rows = CHUNK_ELEMENTS // max(1, batch * heads * self.num_keys)
        self.size = min(self.num_queries, max(16, min(256, rows // 16 * 16)))

    def __iter__(self):
        """Yield the slice of the queries and the number of keys that they meet."""
        for start in range(0, self.num_queries, self.size):
            stop = min(start + self.size, self.num_queries)
            yield slice(start, stop), stop + self.num_keys - self.num_queries if self.causal else self.num_keys

    def rows(self, x: Tensor, chunk: slice) -> Tensor:
        """Stack a chunk's heads that share a key: `b (hk g) i d -> (b hk) (g i) d`."""
        return rearrange(x[:, :, chunk], "b (k g) i d -> (b k) (g i) d", k=self.kv_heads)

    def unrows(self, x: Tensor) -> Tensor:
        return rearrange(x, "(b k) (g i) d -> b (k g) i d", b=self.batch, g=self.group)

    def buffer(self, dtype: torch.dtype) -> Tensor:
        """Room for the scores of one chunk, used again by the next: fresh memory costs more than the arithmetic."""
        num_rows = self.batch * self.kv_heads * self.group * self.size
        return torch.empty(num_rows * self.num_keys, dtype=dtype, device=self.device)

    def hide_(self, x: Tensor, chunk: slice, num_keys: int, value: float) -> Tensor:
        """Overwrite the entries of `(b hk) (g i) j` that the chunk's queries may not see."""
        x = rearrange(x, "(b k) (g i) j -> b k g i j", b=self.batch, g=self.group)
        if self.key_mask is None and self.document_ids is None:
            if self.causal:  # only the last keys of a chunk lie above the diagonal
                size = chunk.stop - chunk.start
                future = torch.ones(size, size, dtype=torch.bool, device=x.device).triu_(1)
                x[..., num_keys - size :].masked_fill_(future, value)
            return rearrange(x, "b k g i j -> (b k) (g i) j")
        visible = visibility(
            self.num_queries,
            self.num_keys,
            causal=self.causal,
            key_mask=self.key_mask,
            document_ids=self.document_ids,
            queries=chunk,
            device=x.device,
        )
        x.masked_fill_(rearrange(~visible[..., :num_keys], "b i j -> b 1 1 i j"), value)
        return rearrange(x, "b k g i j -> (b k) (g i) j")


def _forward(q: Tensor, k: Tensor, v: Tensor, chunks: _Chunks) -> tuple[Tensor, Tensor]:
    """Attention and the logarithm of each row's sum of exponentials, `b h i d` and `b h i`.

    The scores are float32 products: in bfloat16 they would be rounded before the softmax sees them.
    """
    compute = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=compute, device=q.device)
    keys, values = (rearrange(t, "b k j d -> (b k) j d") for t in (k.to(compute), v))
    for chunk, num_keys in chunks:
        rows = chunks.rows(q, chunk).to(compute) * q.shape[-1] ** -0.5
        scores = chunks.hide_(rows @ keys[:, :num_keys].mT, chunk, num_keys, -torch.inf)
        row_lse = torch.logsumexp(scores, dim=-1, keepdim=True)
        weights = scores.sub_(row_lse.clamp(min=torch.finfo(compute).min)).exp_()
        out[:, :, chunk] = chunks.unrows(weights.to(v.dtype) @ values[:, :num_keys])
        lse[:, :, chunk] = chunks.unrows(row_lse).squeeze(-1)
    return out, lse


class ChunkedAttention(torch.autograd.Function):
    """Attention whose backward is matrix products over chunks of queries (Dao et al. 2022, section 3.1)."""

    @staticmethod
    def forward(ctx, q, k, v, causal, key_mask, document_ids):
        square = q.shape[2] == k.shape[2]
        if key_mask is None and document_ids is None and (square or not causal) and q.device.type == "cpu":
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
        else:
            out, lse = _forward(q, k, v, _Chunks(q, k, causal, key_mask, document_ids))
        ctx.save_for_backward(q, k, v, out, lse, key_mask, document_ids)
        ctx.causal = causal
        return out

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, out, lse, key_mask, document_ids = ctx.saved_tensors
        chunks = _Chunks(q, k, ctx.causal, key_mask, document_ids)
        compute, scale = lse.dtype, q.shape[-1] ** -0.5
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # a row that sees nothing: exp(s - inf) = 0
        keys, values = (rearrange(t, "b k j d -> (b k) j d") for t in (k, v))
        d_q = torch.empty_like(q)
        d_keys, d_values = (torch.zeros(t.shape, dtype=compute, device=t.device) for t in (keys, values))
        buffers = [chunks.buffer(dtype) for dtype in (q.dtype, compute, compute)]
        for chunk, num_keys in chunks:
            rows, d_rows, out_rows = (chunks.rows(t, chunk) for t in (q, d_out, out))
            shape = (*rows.shape[:2], num_keys)
            product, weights, d_scores = (buffer[: math.prod(shape)].view(shape) for buffer in buffers)
            row_lse = chunks.rows(lse.unsqueeze(-1), chunk)
            delta = (d_rows.to(compute) * out_rows).sum(dim=-1, keepdim=True)

            weights.copy_(torch.bmm(rows, keys[:, :num_keys].mT, out=product))
            torch.add(-row_lse, weights, alpha=scale, out=weights).exp_()
            chunks.hide_(weights, chunk, num_keys, 0.0)
            d_scores.copy_(torch.bmm(d_rows, values[:, :num_keys].mT, out=product))
            d_scores.sub_(delta).mul_(weights)

            d_values[:, :num_keys] += product.copy_(weights).mT @ d_rows
            product.copy_(d_scores)
            d_q[:, :, chunk] = chunks.unrows(product @ keys[:, :num_keys]).mul_(scale)
            d_keys[:, :num_keys] += (product.mT @ rows).mul_(scale)
        d_k, d_v = (rearrange(t, "(b k) j d -> b k j d", b=chunks.batch).to(k.dtype) for t in (d_keys, d_values))
        return d_q, d_k, d_v, None, None, None


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
    return ChunkedAttention.apply(q, k, v, causal, key_mask, document_ids)
