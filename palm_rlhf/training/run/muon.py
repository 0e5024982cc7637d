"""Muon for the matrices, AdamW for the rest: fewer steps to the same loss than AdamW alone."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, cast

import torch
from beartype import beartype
from torch import Tensor, nn

from palm_rlhf.model.block import Block
from palm_rlhf.training.run.optimizer import nonempty

# A quintic whose iteration drives all singular values towards 1, fast rather than exactly (Jordan et al. 2024).
QUINTIC = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """Return nearly orthogonal matrices near the given ones, by Newton-Schulz steps in bfloat16: `k i o -> k i o`."""
    a, b, c = QUINTIC
    x = matrices.bfloat16()
    if wide := x.shape[-2] > x.shape[-1]:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if wide else x).to(matrices.dtype)


class Muon(torch.optim.AdamW):
    """AdamW, except for groups with a `momentum`, whose matrices move along their orthogonalised momentum.

    Each such parameter is cut into the row blocks that its group's `row_blocks` names by their sizes, since a fused
    projection is several matrices. Updates are scaled to the size that AdamW's have, so that one learning rate and one
    weight decay serve both (Liu et al. 2025, equation 4).
    """

    @torch.no_grad()
    def step(self, closure=None):
        """Take a step of AdamW for groups without a momentum, of Muon for the others; return the closure's loss."""
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if "momentum" not in group]
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        found_inf = getattr(self, "found_inf", None)  # 1.0 where the step is left out, see `Readings.check`
        of_same_shape = defaultdict(list)  # stacked: many small products are slow one by one
        for group in groups:
            parameters = [p for p in group["params"] if p.grad is not None] if "momentum" in group else []
            if not parameters:
                continue
            momenta = self._momenta(parameters, group["momentum"], found_inf)
            keep = 1 - group["lr"] * group["weight_decay"]
            torch._foreach_mul_(parameters, keep if found_inf is None else torch.where(found_inf > 0, 1.0, keep))
            for parameter, update in zip(parameters, momenta, strict=True):
                sizes = group["row_blocks"] or [len(parameter)]
                for block, part in zip(update.split(sizes), parameter.split(sizes), strict=True):
                    of_same_shape[block.shape, group["lr"]].append((block, part))
        for (shape, rate), pairs in of_same_shape.items():
            updates = orthogonalise(torch.stack([block for block, _ in pairs]))
            if found_inf is not None:
                updates = torch.where(found_inf > 0, 0.0, updates)
            parts = [part for _, part in pairs]
            torch._foreach_add_(parts, [*updates.unbind()], alpha=-0.2 * max(shape) ** 0.5 * rate)
        return loss

    def __setstate__(self, state):
        # AdamW expects its own count of steps in the state of every parameter.
        groups = state["param_groups"]
        super().__setstate__({**state, "param_groups": [group for group in groups if "momentum" not in group]})
        self.param_groups = groups

    def _momenta(
        self, parameters: Sequence[nn.Parameter], momentum: float, found_inf: Tensor | None
    ) -> Sequence[Tensor]:
        """Return Nesterov's momenta: the running averages of the gradients, one step ahead."""
        for parameter in parameters:
            if "momentum" not in self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        gradients = [cast(Tensor, parameter.grad) for parameter in parameters]
        averages = [self.state[parameter]["momentum"] for parameter in parameters]
        if found_inf is not None:  # the average of an average and itself stays what it is
            gradients = [torch.where(found_inf > 0, a, g) for a, g in zip(averages, gradients, strict=True)]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        return torch._foreach_lerp(gradients, averages, momentum)


@beartype
def muon(
    model: nn.Module,
    learning_rate: float | int,
    betas: tuple[float | int, float | int],
    eps: float | int,
    weight_decay: float | int,
    momentum: float = 0.95,
) -> Muon:
    """Return Muon (Jordan et al. 2024) for the blocks' matrices, with AdamW for all other trainable parameters."""
    groups: list[dict[str, Any]] = []
    for block in (module for module in model.modules() if isinstance(module, Block)):
        weights = ((getattr(block, name).weight, sizes) for name, sizes in block.matrices().items())
        rows = {weight: sizes for weight, sizes in weights if isinstance(weight, nn.Parameter)}  # not in fewer bits
        groups += ({"params": [weight], "row_blocks": sizes} for weight, sizes in rows.items() if len(sizes) > 1)
        whole = [weight for weight, sizes in rows.items() if len(sizes) == 1]
        groups.append({"params": whole, "row_blocks": None})
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
        group.update(momentum=momentum, weight_decay=weight_decay)
    theirs = {parameter for group in groups for parameter in group["params"]}
    rest = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter not in theirs]
    groups = nonempty([*groups, {"params": rest, "weight_decay": 0.0}])
    fused = {parameter.device.type for parameter in model.parameters()} <= {"cpu", "cuda"}
    return Muon(groups, lr=learning_rate, betas=betas, eps=eps, fused=fused)
