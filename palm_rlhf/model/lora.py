"""Low-rank adapters (Hu et al. 2021) on the attention of every block, kept in named scopes beside the base weights."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from beartype import beartype
from torch import Tensor, nn

if TYPE_CHECKING:
    import palm_rlhf.model.palm
    from palm_rlhf.model.block import Block


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
    """The adapters of one block: on queries, keys, values, and on the output of the attention."""

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


def adapters_of(palm: "palm_rlhf.model.palm.PaLM", scope: str) -> Sequence[BlockLoRA]:
    """Return the adapters of a scope, one for each block; ValueError where the model has no such scope."""
    if scope not in palm.finetune_modules:
        raise ValueError(f"finetune scope {scope!r}; expected one of {sorted(palm.finetune_modules)}; add it first")
    return cast("Sequence[BlockLoRA]", palm.finetune_modules[scope])


@beartype
def add_finetune_params(
    palm: "palm_rlhf.model.palm.PaLM",
    scope: str = "default",
    r: int = 8,
    *,
    alpha: float | int | None = None,
    train_base: bool = False,
) -> nn.ModuleList:
    """Add a LoRA scope that changes nothing yet, freeze the base unless `train_base`, and return the adapters.

    Args:
        scope: a new name without dots.
        r: the rank.
        alpha: the adapters are scaled by alpha / r; None is r.
        train_base: leave the parameters of the base trainable.

    Returns:
        One `BlockLoRA` for each block.
    """
    if scope in palm.finetune_modules:
        raise ValueError(f"finetune scope {scope!r} is there already; remove or merge it, or choose another name")
    if not scope or "." in scope or hasattr(palm.finetune_modules, scope):
        raise ValueError(f"finetune scope {scope!r} cannot name a module; expected a name without dots: 'default'")
    if r < 1:
        raise ValueError(f"the rank r is {r}; expected at least 1")
    c = palm.config
    adapters = nn.ModuleList(
        BlockLoRA(c.dim, c.heads * c.dim_head, c.kv_heads * c.dim_head, r, r if alpha is None else alpha)
        for _ in range(c.depth)
    )
    palm.finetune_modules[scope] = adapters.to(palm.device, palm.dtype)
    for parameter in palm.palm_parameters():
        parameter.requires_grad_(train_base)
    return adapters


@beartype
def remove_finetune_params(palm: "palm_rlhf.model.palm.PaLM", scope: str = "default") -> nn.ModuleList:
    """Remove a LoRA scope and return its adapters; without the last one the base is trainable again."""
    adapters_of(palm, scope)
    adapters = cast(nn.ModuleList, palm.finetune_modules.pop(scope))
    if not palm.finetune_modules:
        for parameter in palm.palm_parameters():
            parameter.requires_grad_(True)
    return adapters


@beartype
def merge_finetune_params(palm: "palm_rlhf.model.palm.PaLM", scope: str = "default") -> None:
    """Add a LoRA scope into the base weights, and remove it."""
    adapters = cast("Sequence[BlockLoRA]", palm.remove_finetune_params(scope))
    for layer, block in zip(cast("Sequence[Block]", palm.layers), adapters, strict=True):
        block.merge_into(layer.in_proj.weight, layer.attn_out.weight)


def palm_parameters(palm: "palm_rlhf.model.palm.PaLM") -> list[nn.Parameter]:
    """Return the parameters of the base."""
    adapters = set(palm.finetune_modules.parameters())
    return [parameter for parameter in palm.parameters() if parameter not in adapters]


@beartype
def finetune_parameters(palm: "palm_rlhf.model.palm.PaLM", scope: str = "default") -> list[nn.Parameter]:
    """Return the parameters of one LoRA scope."""
    adapters_of(palm, scope)
    return list(palm.finetune_modules[scope].parameters())
