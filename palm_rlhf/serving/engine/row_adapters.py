"""LoRA adapters of the rows of a batch: none, one for all rows, or for each row its own (Sheng et al. 2023, S-LoRA)."""

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor, nn

from palm_rlhf.model.lora import TARGETS, BlockLoRA, LoRALinear, adapter_shapes, adapters_of
from palm_rlhf.model.palm import PaLM
from palm_rlhf.serving.engine.transfer import upload


class RankMask:
    """The factor of each low-rank unit for each row, `b 1 r`: the scale of the row's own adapter, 0 for all others."""

    factors: Tensor


class SideBySideLoRA(LoRALinear):
    """The adapters of all scopes on one matrix, as one low-rank product: `b n i -> b n o`.

    Their low-rank units lie side by side, and a mask leaves to each row the units of its own adapter.
    """

    def __init__(self, downs: list[Tensor], ups: list[Tensor], mask: RankMask):
        nn.Module.__init__(self)
        self.A = nn.Parameter(torch.cat(downs, dim=1), requires_grad=False)
        self.B = nn.Parameter(torch.cat(ups), requires_grad=False)
        self.r = self.alpha = len(self.B)
        self.mask = mask

    @property
    def rank_factors(self) -> Tensor:
        return self.mask.factors

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.A * self.rank_factors) @ self.B


class SideBySide:
    """The adapters of all scopes of a model, for batches of rows with different scopes; see `SideBySideLoRA`.

    The adapters, which are small beside the base, are copied once.

    Args:
        palm: The model.
        scopes: The names of its scopes.
    """

    def __init__(self, palm: PaLM, scopes: Sequence[str]):
        self.mask = RankMask()
        blocks = [adapters_of(palm, scope) for scope in scopes]
        self.blocks = [self._block(palm, of_scopes) for of_scopes in zip(*blocks, strict=True)]
        first = [scope_blocks[0].parts[0] for scope_blocks in blocks]
        stops = [0, *accumulate(part.r for part in first)]
        self.factors = torch.zeros(1 + len(scopes), 1, stops[-1], dtype=palm.dtype, device=palm.device)
        for number, part in enumerate(first):  # number 0 is the base, for which all factors are 0
            self.factors[1 + number, 0, stops[number] : stops[number + 1]] = part.scale

    def _block(self, palm: PaLM, adapters: Sequence[BlockLoRA]) -> BlockLoRA:
        """Return the adapters of all scopes on one block; a scope without a target has zeros there."""
        shapes, parts = adapter_shapes(palm.config), {}
        for target in TARGETS:
            if not any(target in block.targets for block in adapters):
                continue
            downs, ups = [], []
            for block in adapters:
                part, like = cast("LoRALinear | None", getattr(block, target)), block.parts[0].A
                width_in, width_out = shapes[target]
                downs.append(like.new_zeros(width_in, block.parts[0].r) if part is None else part.A.detach())
                ups.append(like.new_zeros(block.parts[0].r, width_out) if part is None else part.B.detach())
            parts[target] = SideBySideLoRA(downs, ups, self.mask)
        return BlockLoRA(shapes, parts)


class RowAdapters:
    """Which LoRA scopes of a model the rows of forwards have.

    Args:
        palm: The model, whose scopes do not change any more.
    """

    def __init__(self, palm: PaLM):
        self.palm, self.scopes = palm, list(palm.finetune_modules)
        self.numbers: dict[str | None, int] = {None: 0, **{scope: 1 + i for i, scope in enumerate(self.scopes)}}

    @cached_property
    def side_by_side(self) -> SideBySide:
        """The adapters of all scopes together, made when they are needed first."""
        return SideBySide(self.palm, self.scopes)

    def check(self, scope: str | None) -> None:
        """Raise ValueError for a scope that the model lacks."""
        if scope not in self.numbers:
            raise ValueError(f"got adapter={scope!r}, expected one of the model's LoRA scopes, {sorted(self.scopes)}")

    def of(self, scopes: Sequence[str | None]) -> str | list[BlockLoRA] | None:
        """Return the `finetune_scope` for a forward of rows with these scopes; None is the base alone."""
        if len(set(scopes)) == 1:
            return scopes[0]
        self.side_by_side.mask.factors = self.side_by_side.factors[self.indices(scopes)]
        return self.side_by_side.blocks

    def indices(self, scopes: Sequence[str | None]) -> Tensor:
        """Return the number of each row's scope, from 1 on, or 0 for the base: `b` int64, on the model's device."""
        return upload([self.numbers[scope] for scope in scopes], self.palm.device)
