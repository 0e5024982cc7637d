"""Low-rank adapters (Hu et al. 2021) on the matrices of every block, kept in named scopes beside the base weights."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias, cast

import torch
from beartype import beartype
from torch import Tensor, nn

from palm_rlhf.model.config import PaLMConfig
from palm_rlhf.model.quantised.quantised_model import is_quantised, refuse_quantised
from palm_rlhf.model.shared_base import is_shared, require_sole_base
from palm_rlhf.ops.swiglu import swiglu

if TYPE_CHECKING:
    import palm_rlhf.model.palm
    from palm_rlhf.model.block import Block

# The matrices that can have an adapter: queries, keys, values and output of the attention; gate, value and output of
# the feed-forward. Settings may name all of them as PEFT does.
TARGETS = ("q", "k", "v", "out", "gate", "value", "ff_out")
ALL_LINEAR = "all-linear"
Targets: TypeAlias = tuple[Literal["q", "k", "v", "out", "gate", "value", "ff_out", "all-linear"], ...]
ATTENTION: Targets = ("q", "k", "v", "out")
# The targets in each matrix of a block, in the order of their rows; `in_proj` of a serial block has the first three.
ROWS = {
    "in_proj": ("q", "k", "v", "gate", "value"),
    "attn_out": ("out",),
    "ff_proj": ("gate", "value"),
    "ff_out": ("ff_out",),
}


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
    def rank_factors(self) -> Tensor | None:
        """Factors of the low-rank units that differ between the rows of a batch, `b 1 r`; None where there are none."""
        return None

    @property
    def delta(self) -> Tensor:
        """The change that merging makes to a weight, `o i`, in float32 or wider, so that it is rounded once."""
        dtype = torch.promote_types(self.A.dtype, torch.float32)
        return (self.A.to(dtype) @ self.B.to(dtype)).mT * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.A) @ self.B * self.scale


class BlockLoRA(nn.Module):
    """The adapters of one block, each under the name of its target; a target without an adapter is None.

    Args:
        shapes: the widths of input and output of every target; see `adapter_shapes`.
        parts: the adapters.
    """

    q: LoRALinear | None
    k: LoRALinear | None
    v: LoRALinear | None
    out: LoRALinear | None
    gate: LoRALinear | None
    value: LoRALinear | None
    ff_out: LoRALinear | None

    def __init__(self, shapes: Mapping[str, tuple[int, int]], parts: Mapping[str, LoRALinear]):
        super().__init__()
        self.qkv_sizes = [shapes[name][1] for name in "qkv"]
        for name in TARGETS:
            self.register_module(name, parts.get(name))

    @property
    def targets(self) -> tuple[str, ...]:
        """The names of the targets that have an adapter, in the order of `TARGETS`."""
        return tuple(name for name in TARGETS if getattr(self, name) is not None)

    @property
    def parts(self) -> tuple[LoRALinear, ...]:
        """The adapters, in the order of `TARGETS`."""
        return tuple(getattr(self, name) for name in self.targets)

    def add_qkv(self, qkv: Tensor, x: Tensor) -> Tensor:
        """Add the changes to queries, keys and values, which are computed from x: `b n (q k v)`, `b n e`."""
        parts = (self.q, self.k, self.v)
        if parts == (None, None, None):
            return qkv
        changes = [
            qkv.new_zeros(*qkv.shape[:-1], size) if part is None else part(x)
            for part, size in zip(parts, self.qkv_sizes, strict=True)
        ]
        return qkv + torch.cat(changes, dim=-1)

    def add_out(self, out: Tensor, attended: Tensor) -> Tensor:
        """Add the change to the output of the attention: `b n e`, `b n (h d)`."""
        return out if self.out is None else out + self.out(attended)

    def add_hidden(self, gate: Tensor, value: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Add the changes to gate and value of the feed-forward, which are computed from x: `b n j` each, `b n e`."""
        gate = gate if self.gate is None else gate + self.gate(x)
        return gate, value if self.value is None else value + self.value(x)

    def add_ff_out(self, out: Tensor, gate: Tensor, value: Tensor) -> Tensor:
        """Add the change to the output of the feed-forward, from its gate and value: `b n e`, `b n j` each."""
        return out if self.ff_out is None else out + self.ff_out(swiglu(gate, value))

    @torch.no_grad()
    def merge_into(self, layer: "Block") -> None:
        """Add the adapters to the weights of a block, in place."""
        for matrix, sizes in layer.matrices().items():
            for target, rows in zip(ROWS[matrix], getattr(layer, matrix).weight.split(sizes), strict=False):
                if (part := getattr(self, target)) is not None:
                    rows += part.delta


def adapter_shapes(config: PaLMConfig) -> dict[str, tuple[int, int]]:
    """Return the widths of input and output of each target, by the names of `TARGETS`."""
    dim, inner = config.dim, config.inner_dim
    q_dim, kv_dim = config.heads * config.dim_head, config.kv_heads * config.dim_head
    inputs = {"q": (dim, q_dim), "k": (dim, kv_dim), "v": (dim, kv_dim), "gate": (dim, inner), "value": (dim, inner)}
    return inputs | {"out": (q_dim, dim), "ff_out": (inner, dim)}


def adapters_of(palm: "palm_rlhf.model.palm.PaLM", scope: str | Sequence[BlockLoRA]) -> Sequence[BlockLoRA]:
    """Return the adapters of a scope, one for each block; ValueError where the model has no such scope.

    Adapters in place of a name are returned as they are.
    """
    if not isinstance(scope, str):
        return scope
    if scope not in palm.finetune_modules:
        raise ValueError(f"finetune scope {scope!r}; expected one of {sorted(palm.finetune_modules)}; add it first")
    return cast("Sequence[BlockLoRA]", palm.finetune_modules[scope])


def checked_targets(targets: str | Sequence[str]) -> list[str]:
    """Return the names of targets, all of them for "all-linear"; ValueError for an unknown one, and for none."""
    names = [targets] if isinstance(targets, str) else [*targets]
    names = [*TARGETS] if names == [ALL_LINEAR] else names
    if not names or not set(names).issubset(TARGETS):
        expected = f"at least one, and all of them from {TARGETS}, or {ALL_LINEAR!r} alone"
        raise ValueError(f"got the targets {names}; expected {expected}")
    return names


@beartype
def add_finetune_params(
    palm: "palm_rlhf.model.palm.PaLM",
    scope: str = "default",
    r: int = 8,
    *,
    alpha: float | int | None = None,
    train_base: bool = False,
    targets: str | Sequence[str] = ATTENTION,
) -> nn.ModuleList:
    """Add a LoRA scope that changes nothing yet, freeze the base unless `train_base`, and return the adapters.

    Args:
        scope: a new name without dots.
        r: the rank.
        alpha: the adapters are scaled by alpha / r; None is r.
        train_base: leave the parameters of the base trainable.
        targets: what has an adapter in each block: some of "q", "k", "v" and "out" of the attention, and of "gate",
            "value" and "ff_out" of the feed-forward; or "all-linear" for all of them.

    Returns:
        One `BlockLoRA` for each block.
    """
    if scope in palm.finetune_modules:
        raise ValueError(f"finetune scope {scope!r} is there already; remove or merge it, or choose another name")
    if not scope or "." in scope or hasattr(palm.finetune_modules, scope):
        raise ValueError(f"finetune scope {scope!r} cannot name a module; expected a name without dots: 'default'")
    if r < 1:
        raise ValueError(f"the rank r is {r}; expected at least 1")
    if train_base:
        refuse_quantised(palm, "to train the base", "leave train_base out, or call palm.dequantize_() first")
    names = checked_targets(targets)
    shapes, factor = adapter_shapes(palm.config), r if alpha is None else alpha
    adapters = nn.ModuleList(
        BlockLoRA(shapes, {name: LoRALinear(*shapes[name], r, factor) for name in TARGETS if name in names})
        for _ in range(palm.config.depth)
    )
    palm.finetune_modules[scope] = adapters.to(palm.device, palm.dtype)
    for parameter in palm.palm_parameters():
        parameter.requires_grad_(train_base)
    return adapters


@beartype
def remove_finetune_params(palm: "palm_rlhf.model.palm.PaLM", scope: str = "default") -> nn.ModuleList:
    """Remove a LoRA scope and return its adapters; without the last one a plain, unshared base is trainable."""
    adapters_of(palm, scope)
    adapters = cast(nn.ModuleList, palm.finetune_modules.pop(scope))
    if not palm.finetune_modules and not is_shared(palm):
        for parameter in palm.palm_parameters():
            parameter.requires_grad_(not is_quantised(palm))
    return adapters


@beartype
def merge_finetune_params(palm: "palm_rlhf.model.palm.PaLM", scope: str = "default") -> None:
    """Add a LoRA scope into the base weights, and remove it.

    Raises ValueError where another model holds the base, and for a base in fewer bits.
    """
    require_sole_base(palm, f"merge_finetune_params({scope!r})")
    refuse_quantised(palm, "to merge adapters into", "call palm.dequantize_() first")
    adapters = cast("Sequence[BlockLoRA]", palm.remove_finetune_params(scope))
    for layer, block in zip(cast("Sequence[Block]", palm.layers), adapters, strict=True):
        block.merge_into(layer)


def palm_parameters(palm: "palm_rlhf.model.palm.PaLM") -> list[nn.Parameter]:
    """Return the parameters of the base."""
    adapters = set(palm.finetune_modules.parameters())
    return [parameter for parameter in palm.parameters() if parameter not in adapters]


@beartype
def finetune_parameters(palm: "palm_rlhf.model.palm.PaLM", scope: str = "default") -> list[nn.Parameter]:
    """Return the parameters of one LoRA scope."""
    adapters_of(palm, scope)
    return list(palm.finetune_modules[scope].parameters())
