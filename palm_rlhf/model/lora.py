"""Low-rank adapters (Hu et al. 2021) on the attention of every block, kept in named scopes beside the base weights."""

import torch
from torch import Tensor, nn


class LoRALinear(nn.Module):
    """A low-rank product, x A B alpha / r, which is zero at the start: `... i -> ... o`."""

    A: nn.Parameter  # i r
    B: nn.Parameter  # r o

    def __init__(self, dim_in: int, dim_out: int, r: int, alpha: float):
        super().__init__()
        self.r, self.alpha = r, alpha
        self.A = nn.Parameter(torch.randn(dim_in, r) * dim_in**-0.5)
        self.B = nn.Parameter(torch.zeros(r, dim_out))

    @property
    def scale(self) -> float:
        """The factor of the product of the two matrices, alpha / r."""
        return self.alpha / self.r

    @property
    def delta(self) -> Tensor:
        """The change that merging makes to a weight, `o i`, in float32 or wider, so that it is rounded once."""
        dtype = torch.promote_types(self.A.dtype, torch.float32)
        return (self.A.to(dtype) @ self.B.to(dtype)).mT * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.A) @ self.B * self.scale


class BlockLoRA(nn.Module):
    """The adapters of one parallel block: on queries, keys, values, and on the output of the attention."""

    q: LoRALinear
    k: LoRALinear
    v: LoRALinear
    out: LoRALinear

    def __init__(self, dim: int, q_dim: int, kv_dim: int, r: int, alpha: float):
        super().__init__()
        self.q = LoRALinear(dim, q_dim, r, alpha)
        self.k = LoRALinear(dim, kv_dim, r, alpha)
        self.v = LoRALinear(dim, kv_dim, r, alpha)
        self.out = LoRALinear(q_dim, dim, r, alpha)

    @property
    def parts(self) -> tuple[LoRALinear, LoRALinear, LoRALinear, LoRALinear]:
        """The four adapters: of queries, keys, values and the output."""
        return self.q, self.k, self.v, self.out

    def qkv(self, x: Tensor) -> Tensor:
        """Return the change to the fused queries, keys and values: `b n e -> b n (q k v)`."""
        return torch.cat((self.q(x), self.k(x), self.v(x)), dim=-1)

    @torch.no_grad()
    def merge_into(self, in_proj: Tensor, attn_out: Tensor) -> None:
        """Add the adapters to the weights of a block, `(q k v ff) e` and `e q`, in place."""
        delta = torch.cat((self.q.delta, self.k.delta, self.v.delta))
        in_proj[: len(delta)] += delta
        attn_out += self.out.delta
