"""PyTorch's scaled_dot_product_attention (SDPA), called such that one of its fast kernels computes it.

On CUDA PyTorch picks one of four kernels, and without a word takes the slowest, `math`, with all scores in memory,
where no other can compute. What each of them takes, in torch 2.6 to 2.13:

- cuDNN: bfloat16 and float16, groups, masks. PyTorch puts it first on sm_90 and sm_100 where the library is newer than
  9.15.0 (torch 2.11 and later), and last elsewhere, since older ones erred at lengths that are no multiple of 128.
- flash: bfloat16 and float16, groups, no masks but the causal one of as many queries as keys; up to 256 dimensions.
- efficient: all types but float64, any mask, but no groups: keys and values have as many heads as the queries.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from palm_rlhf.ops.attention_reference import visibility
from palm_rlhf.ops.devices import GPUS

FLASH_DTYPES = (torch.float16, torch.bfloat16)
MAX_FLASH_DIM = 256
CUDNN_MULTIPLE = 128  # of a length
_biases = WeakTensorKeyDictionary()  # `_bias_of_mask` of the masks that exist


def attention_fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    key_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> Tensor:
    """Return PyTorch's fused attention. With one new query, the heads that share a key become its query axis.

    Nothing here waits for a GPU, and no shape depends on a tensor's contents, so a CUDA graph can hold it.

    q: `b (hk g) i d`, k and v: `b hk j d`, key_mask and document_ids: `b j` -> `b (hk g) i d`
    """
    num_queries, num_keys, kv_heads = q.shape[-2], k.shape[-2], k.shape[1]
    if num_queries == 1:
        causal = False  # the last query sees every key
        if key_mask is not None and document_ids is None and q.device.type in GPUS and not torch.is_grad_enabled():
            key_bias, sees_none = _bias_of_mask(key_mask, q)
            rows = q.reshape(len(q), kv_heads, -1, q.shape[-1])  # b hk g d
            return _sdpa_without_cudnn(rows, k, v, key_bias, False).reshape(q.shape).masked_fill_(sees_none, 0.0)
    visible = None  # b i j
    is_square = not causal or num_queries == num_keys  # PyTorch's own causal mask starts at the first key
    if num_queries == 1 and document_ids is None:
        visible = None if key_mask is None else key_mask.unsqueeze(1)
    elif key_mask is not None or document_ids is not None or not is_square:
        visible = visibility(
            num_queries, num_keys, causal=causal, key_mask=key_mask, document_ids=document_ids, device=q.device
        )
    sees_any = None  # without a key mask, a query sees at least its own position
    if visible is not None:
        visible = visible.unsqueeze(1)  # b 1 i j
        if key_mask is not None:
            sees_any = visible.any(dim=-1, keepdim=True)
    bias = visible if visible is None or q.device.type not in GPUS else _as_bias(visible, sees_any, q, k, v)
    out_shape = q.shape
    if num_queries == 1:
        q = q.reshape(len(q), kv_heads, -1, q.shape[-1])  # b hk g d
    elif kv_heads != q.shape[1] and not takes_groups(q, visible is not None):
        k, v = (for_every_head(t, q.shape[1]) for t in (k, v))
    sdpa = _sdpa if may_plan(q, num_queries, num_keys, visible is not None) else _sdpa_without_cudnn
    out = sdpa(q, k, v, bias, visible is None and causal).reshape(out_shape)
    return out if sees_any is None else torch.where(sees_any, out, 0.0)


def _as_bias(visible: Tensor, sees_any: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return 0 for the keys to see and -inf for others, in two operations instead of the four of PyTorch: `b 1 i j`.

    A query that sees no key is NaN on a GPU. The caller overwrites its result, but its gradients would be NaN as well,
    those of all keys too: so it sees all keys where gradients are needed.
    """
    if sees_any is not None and torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        visible = visible | ~sees_any
    return visible.to(q.dtype).log_()


def _bias_of_mask(key_mask: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Return 0 for the keys that one query sees and -inf for others, and whether it sees none: `b 1 1 j`, `b 1 1 1`.

    Both are computed once for all layers of a model, which get the same mask. A CUDA graph computes its own, whatever
    ran before it was captured: a replay must see the mask that is there by then.
    """
    keeps = not (torch.compiler.is_compiling() or key_mask.is_inference())  # such tensors do not count their changes
    state = (key_mask._version, q.dtype, is_captured(q)) if keeps else None
    known = _biases.get(key_mask) if keeps else None
    if known is None or known[0] != state:
        visible = key_mask[:, None, None]
        known = state, (_as_bias(visible, None, q, q, q), ~visible.any(dim=-1, keepdim=True))
        if keeps:
            _biases[key_mask] = known
    return known[1]


def is_captured(x: Tensor) -> bool:
    """Return whether a CUDA graph is being captured."""
    return x.device.type == "cuda" and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def takes_groups(q: Tensor, masked: bool) -> bool:
    """Return whether a fast kernel of PyTorch takes fewer key heads than query heads: `b h i d`."""
    if q.device.type not in GPUS:
        return True
    return not masked and q.dtype in FLASH_DTYPES and q.shape[-1] <= MAX_FLASH_DIM


def may_plan(q: Tensor, num_queries: int, num_keys: int, masked: bool) -> bool:
    """Return whether PyTorch may take cuDNN, which plans for about half a second for every new shape: `b h i d`.

    That pays for the sequences of pretraining, whose length is one and round. It does not for a cache that grows by a
    key a token, nor for prompts and responses of all lengths. Under torch.compile the choice stays with PyTorch.
    """
    if q.device.type not in GPUS or torch.compiler.is_compiling():
        return True
    return not masked and num_queries == num_keys and num_keys % CUDNN_MULTIPLE == 0


def for_every_head(x: Tensor, heads: int) -> Tensor:
    """Repeat shared heads, `b hk j d -> b h j d`, for kernels that take no groups; one head is not copied."""
    return x.expand(-1, heads, -1, -1) if x.shape[1] == 1 else x.repeat_interleave(heads // x.shape[1], dim=1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, is_causal: bool) -> Tensor:
    enable_gqa = k.shape[1] != q.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=is_causal, enable_gqa=enable_gqa)


def _sdpa_without_cudnn(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, is_causal: bool) -> Tensor:
    """Return `_sdpa` by another kernel than cuDNN's; the setting of the process comes back afterwards."""
    was_enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        return _sdpa(q, k, v, bias, is_causal)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was_enabled)
