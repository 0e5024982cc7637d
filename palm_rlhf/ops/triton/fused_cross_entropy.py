"""The output layer fused with its cross-entropy for GPUs, in chunks of tokens.

The products are PyTorch's. Between them, one kernel reads a chunk of logits, and another replaces the logits by their
gradients, so that the logits of a whole batch are never in memory (Hsu et al. 2024, "Liger Kernel", section 3.2).
Cross-entropy computes the gradients together with the loss, so that each logit is computed once. `fused_logprobs.py`
has the log-probabilities and entropies of single tokens, whose gradients are computed in the backward.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from palm_rlhf.ops.triton.operators import Operator
from palm_rlhf.ops.triton.tiles import LOG2_E, on

CHUNK_BYTES = 1 << 29  # of logits in memory at once
TILE = 4096  # logits
WARPS = 4
ROWS = 128  # a chunk has a multiple of these, which is the height of a tile of PyTorch's products
ALIGNMENT = 64  # a row of logits begins at a multiple, so that products and kernels read wide words
LOWEST: tl.constexpr = tl.constexpr(-1e30)  # below any logit; -inf would become NaN


@triton.jit
def load_logits(logits_ptr, rows, columns, num_rows, width):
    """Load a tile of logits, `row column`, in float32; returned are its pointers, its mask and the logits."""
    pointers = logits_ptr + (rows.to(tl.int64) * width)[:, None] + columns[None, :]
    mask = (rows < num_rows)[:, None] & (columns < width)[None, :]
    return pointers, mask, tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def statistics_kernel(
    logits_ptr, tokens_ptr, logprobs_ptr, log_z_ptr, entropy_ptr, num_rows, num_tokens, width, scale,
    LOG2_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute the log-probability of each row's token, log Z, and the entropy: `row`. Grid: blocks of rows."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < num_rows
    largest, total = tl.full((BLOCK_M,), LOWEST, tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    moment = tl.zeros((BLOCK_M,), tl.float32)  # the sum of weight * log2(weight)
    for start in tl.range(0, num_tokens, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        _, _, logits = load_logits(logits_ptr, rows, columns, num_rows, width)
        scores = tl.where((columns < num_tokens)[None, :], logits * (scale * LOG2_E), LOWEST)
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        exponents = scores - new_largest[:, None]
        weights = tl.math.exp2(exponents)
        shrink = tl.math.exp2(largest - new_largest)
        if entropy_ptr is not None:
            moment = (moment + total * (largest - new_largest)) * shrink
            moment += tl.sum(weights * exponents, 1)
        total = total * shrink + tl.sum(weights, 1)
        largest = new_largest

    tokens = tl.load(tokens_ptr + rows, mask=inside, other=0)
    known = inside & (tokens >= 0) & (tokens < num_tokens)  # targets that do not count may be any number
    token_logits = tl.load(logits_ptr + rows.to(tl.int64) * width + tokens, mask=known, other=0.0).to(tl.float32)
    total_log2 = tl.math.log2(total)
    tl.store(logprobs_ptr + rows, (token_logits * (scale * LOG2_E) - largest - total_log2) / LOG2_E, mask=inside)
    tl.store(log_z_ptr + rows, (largest + total_log2) / LOG2_E, mask=inside)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + rows, (total_log2 - moment / total) / LOG2_E, mask=inside)


@triton.jit
def gradient_kernel(
    logits_ptr, tokens_ptr, log_z_ptr, entropy_ptr, d_logprobs_ptr, d_log_z_ptr, d_entropy_ptr,
    num_rows, num_tokens, width, scale, LOG2_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Replace logits by their gradients; rows without a gradient become 0. Grid: blocks of rows, blocks of columns.

    The derivatives with respect to logit v, for token t: [v = t] - p_v of log p_t, p_v of log Z, and
    -p_v (log p_v + H) of the entropy H.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < num_rows
    d_logprobs = tl.load(d_logprobs_ptr + rows, mask=inside, other=0.0) * scale
    slope = -d_logprobs
    if d_log_z_ptr is not None:
        slope += tl.load(d_log_z_ptr + rows, mask=inside, other=0.0) * scale
    counts = (d_logprobs != 0.0) | (slope != 0.0)
    log_z = tl.load(log_z_ptr + rows, mask=inside, other=0.0)
    pointers, mask, logits = load_logits(logits_ptr, rows, columns, num_rows, width)
    logprobs = logits * (scale * LOG2_E) - (log_z * LOG2_E)[:, None]
    gradients = slope[:, None]
    if d_entropy_ptr is not None:
        d_entropy = tl.load(d_entropy_ptr + rows, mask=inside, other=0.0) * scale
        counts |= d_entropy != 0.0
        entropy = tl.load(entropy_ptr + rows, mask=inside, other=0.0)
        gradients = gradients - d_entropy[:, None] * (logprobs / LOG2_E + entropy[:, None])
    gradients = gradients * tl.math.exp2(logprobs)
    tokens = tl.load(tokens_ptr + rows, mask=inside, other=0)
    gradients += tl.where(columns[None, :] == tokens[:, None], d_logprobs[:, None], 0.0)
    gradients = tl.where(counts[:, None], gradients, 0.0)
    tl.store(pointers, gradients.to(logits_ptr.dtype.element_ty), mask=mask)


def tile(width: int) -> dict[str, int]:
    """Return the options of a launch: the shorter the rows, the more of them are in a tile."""
    block_n = min(triton.next_power_of_2(width), TILE)
    return {"BLOCK_M": TILE // block_n, "BLOCK_N": block_n, "LOG2_E": LOG2_E, "num_warps": WARPS}


def statistics(
    logits: Tensor, tokens: Tensor, num_tokens: int, scale: float, *, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Launch the forward, and return log-probabilities of the tokens, log Z, and entropies: `n`, float32.

    logits: `n w`, of which the first `num_tokens` columns count
    """
    (num_rows, width), options = logits.shape, tile(logits.shape[1])
    logprobs, log_z = (logits.new_empty(num_rows, dtype=torch.float32) for _ in range(2))
    entropy = torch.empty_like(log_z) if with_entropy else None
    with on(logits.device):
        statistics_kernel[(triton.cdiv(num_rows, options["BLOCK_M"]),)](
            logits, tokens, logprobs, log_z, entropy, num_rows, num_tokens, width, scale, **options
        )
    return logprobs, log_z, entropy


def differentiate_(
    logits: Tensor, tokens: Tensor, num_tokens: int, scale: float, *, log_z: Tensor, d_logprobs: Tensor,
    d_log_z: Tensor | None = None, entropy: Tensor | None = None, d_entropy: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Launch the backward, and return the gradients of the logits, `n num_tokens`, in the memory of the logits."""
    (num_rows, width), options = logits.shape, tile(logits.shape[1])
    grid = triton.cdiv(num_rows, options["BLOCK_M"]), triton.cdiv(width, options["BLOCK_N"])
    with on(logits.device):
        gradient_kernel[grid](
            logits, tokens, log_z, entropy, d_logprobs, d_log_z, d_entropy, num_rows, num_tokens, width, scale,
            **options,
        )  # fmt: skip
    return logits[:, :num_tokens]


def chunks(x: Tensor, matrix: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield a slice of some rows of x at a time, these rows in the dtype of the matrix, and their logits, `n w`.

    The next chunk overwrites the logits.

    x: `n e`, matrix: `v e`
    """
    width = triton.cdiv(len(matrix), ALIGNMENT) * ALIGNMENT
    size = max(CHUNK_BYTES // (width * matrix.element_size()), 1)
    size = size // ROWS * ROWS or size
    buffer = matrix.new_empty(min(size, len(x)), width)
    buffer[:, len(matrix) :] = 0  # the kernels read these columns, but do not use them
    for first in range(0, len(x), size):
        rows = slice(first, first + size)
        part = x[rows].to(matrix.dtype)
        logits = buffer[: len(part)]
        torch.mm(part, matrix.mT, out=logits[:, : len(matrix)])
        yield rows, part, logits


class Gradients:
    """The gradients of x, `n e`, and of the weight, `v e`, summed chunk by chunk; empty if not needed."""

    def __init__(self, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool):
        self.x = x.new_empty(x.shape if needs_x else 0)
        self.weight = weight.new_zeros(weight.shape if needs_weight else 0, dtype=torch.float32)
        self.dtype = weight.dtype
        self.needs_x, self.needs_weight = needs_x, needs_weight

    def add(self, rows: slice, d_logits: Tensor, part: Tensor, matrix: Tensor) -> None:
        """Add the gradients from the logits of some rows; `part` is x in these rows."""
        if self.needs_x:
            self.x[rows] = d_logits @ matrix
        if self.needs_weight and part.dtype == self.weight.dtype:
            self.weight.addmm_(d_logits.mT, part)
        elif self.needs_weight:
            self.weight += d_logits.mT @ part

    def result(self) -> tuple[Tensor, Tensor]:
        """Return both gradients, in the dtypes of x and the weight."""
        return self.x, self.weight.to(self.dtype)


def _cross_entropy(x, weight, targets, counts, scale, z_loss, dtype, needs_x, needs_weight):
    total, gradients = counts.new_zeros(()), Gradients(x, weight, needs_x, needs_weight)
    targets, counts = targets.contiguous(), counts.contiguous()
    with torch.autocast(x.device.type, enabled=False):
        matrix = weight.to(dtype)
        for rows, part, logits in chunks(x, matrix):
            target, count = targets[rows], counts[rows]
            logprobs, log_z, _ = statistics(logits, target, len(weight), scale, with_entropy=False)
            log_z = torch.where(count != 0, log_z, 0.0)
            total += torch.where(count != 0, (z_loss * log_z.square() - logprobs) * count, 0.0).sum()
            if needs_x or needs_weight:
                slopes = {"d_logprobs": -count, "d_log_z": 2 * z_loss * log_z * count if z_loss else None}
                d_logits = differentiate_(logits, target, len(weight), scale, log_z=log_z, **slopes)
                gradients.add(rows, d_logits, part, matrix)
    return total, *gradients.result()


def _fake_cross_entropy(x, weight, targets, counts, scale, z_loss, dtype, needs_x, needs_weight):
    return counts.new_empty(()), *Gradients(x, weight, needs_x, needs_weight).result()


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _pass_on(ctx, d_total, *_):
    needed = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
    gradients = (d * d_total.to(d.dtype) if needs else None for d, needs in needed)
    return *gradients, None, None, None, None, None, None, None


cross_entropy_operator = Operator(
    "linear_cross_entropy",
    "(Tensor x, Tensor weight, Tensor targets, Tensor counts, float scale, float z_loss, ScalarType dtype, "
    "bool needs_x, bool needs_weight) -> (Tensor, Tensor, Tensor)",
    _cross_entropy,
    _fake_cross_entropy,
    save=_save,
    gradients=_pass_on,
    num_results=1,  # the gradients of x and the weight are for the backward
)


def linear_cross_entropy_triton(
    x: Tensor, weight: Tensor, targets: Tensor, counts: Tensor, scale: float, z_loss: float, dtype: torch.dtype
) -> Tensor:
    """Return the sum of `-log p(target) + z_loss * log(Z)^2`, each times its weight in `counts`.

    `dtype` is that of the products.

    x: `n e`, weight: `v e`, targets and counts: `n` -> scalar
    """
    needs_x, needs_weight = (t.requires_grad and torch.is_grad_enabled() for t in (x, weight))
    return cross_entropy_operator(x, weight, targets, counts, scale, z_loss, dtype, needs_x, needs_weight)
