"""Muon for the matrices, AdamW for the rest: fewer steps to the same loss than AdamW alone."""

from collections import defaultdict
from typing import Any

import torch
from beartype import beartype
from torch import Tensor, nn

from palm_rlhf.model.block import ParallelBlock
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
        same_shape = defaultdict(list)  # stacked: many small products are slow one by one
        for group in groups:
            for parameter in group["params"] if "momentum" in group else ():
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    sizes = group["row_blocks"] or [len(parameter)]
                    update = self._momentum(parameter, group["momentum"])
                    for block, part in zip(update.split(sizes), parameter.split(sizes), strict=True):
                        same_shape[block.shape].append((block, part, group["lr"]))
        for shape, blocks in same_shape.items():
            updates = orthogonalise(torch.stack([block for block, _, _ in blocks]))
            for update, (_, part, rate) in zip(updates, blocks, strict=True):
                part.add_(update, alpha=-0.2 * max(shape) ** 0.5 * rate)
        return loss

    def __setstate__(self, state):
        # AdamW expects its own count of steps in the state of every parameter.
        groups = state["param_groups"]
        super().__setstate__({**state, "param_groups": [group for group in groups if "momentum" not in group]})
        self.param_groups = groups

    def _momentum(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        """Return Nesterov's momentum: the running average of the gradients, one step ahead."""
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(state["momentum"], momentum)


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
    for block in (module for module in model.modules() if isinstance(module, ParallelBlock)):
        config = block.config
        q_dim, kv_dim = config.heads * config.dim_head, config.kv_heads * config.dim_head
        row_blocks = [q_dim, kv_dim, kv_dim, config.inner_dim, config.inner_dim]
        groups.append({"params": [block.in_proj.weight], "row_blocks": row_blocks})
        groups.append({"params": [block.attn_out.weight, block.ff_out.weight], "row_blocks": None})
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
        group.update(momentum=momentum, weight_decay=weight_decay)
    theirs = {parameter for group in groups for parameter in group["params"]}
    rest = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter not in theirs]
    groups = nonempty([*groups, {"params": rest, "weight_decay": 0.0}])
    fused = {parameter.device.type for parameter in model.parameters()} <= {"cpu", "cuda"}
    return Muon(groups, lr=learning_rate, betas=betas, eps=eps, fused=fused)
