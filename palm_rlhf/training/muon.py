"""Muon for the matrices, AdamW for the rest: fewer steps to the same loss than AdamW alone."""

from collections import defaultdict

import torch
from torch import Tensor

# A quintic whose iteration drives all singular values towards 1, fast rather than exactly (Jordan et al. 2024).
QUINTIC = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """The nearly orthogonal matrices nearest to given ones, by Newton-Schulz iteration in bfloat16: `k i o -> k i o`."""
    a, b, c = QUINTIC
    x = matrices.bfloat16()
    if wide := x.shape[-2] > x.shape[-1]:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if wide else x).to(matrices.dtype)


class Muon(torch.optim.AdamW):
    """AdamW, but for groups with a `momentum`: their matrices move along their orthogonalised momentum.

    Each such parameter is cut into the row blocks that its group's `row_blocks` names by their sizes, since a fused
    projection is several matrices. Updates are scaled to the size that AdamW's have, so that one learning rate and one
    weight decay serve both (Liu et al. 2025, equation 4).
    """

    @torch.no_grad()
    def step(self, closure=None):
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if "momentum" not in group]
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if "momentum" in group:
                self._step_matrices(group)
        return loss

    def _step_matrices(self, group: dict) -> None:
        same_shape = defaultdict(list)  # orthogonalised together: many small products are slow one by one
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            average = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
            average.lerp_(parameter.grad, 1 - group["momentum"])
            update = parameter.grad.lerp(average, group["momentum"])
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            sizes = group["row_blocks"] or [len(parameter)]
            for block, part in zip(update.split(sizes), parameter.split(sizes), strict=True):
                same_shape[block.shape].append((block, part))
        for shape, pairs in same_shape.items():
            updates = orthogonalise(torch.stack([block for block, _ in pairs]))
            for update, (_, part) in zip(updates, pairs, strict=True):
                part.add_(update, alpha=-0.2 * max(shape) ** 0.5 * group["lr"])
