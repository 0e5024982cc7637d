"""The state of an optimiser in a file, by the names of the parameters, whole where they are in shards."""

from collections.abc import Mapping
from pathlib import Path

import torch
from beartype import beartype
from safetensors.torch import load_file
from torch import Tensor, nn

from palm_rlhf.training.run.sharding import full_tensor, sharded_like


@beartype
def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]) -> dict[str, Tensor]:
    """Return an optimiser's state by the names of the parameters, with all shards; all processes take part."""
    return {
        f"{names[parameter]}/{key}": full_tensor(value.detach()).cpu().contiguous()
        for parameter in _parameters(optimizer)
        for key, value in optimizer.state[parameter].items()
    }


@beartype
def load_optimizer(path: Path, optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]) -> None:
    """Restore an optimiser from a file of `optimizer_tensors`; parameters without gradients have no state."""
    kept: dict[str, dict[str, Tensor]] = {}
    for name, value in load_file(path).items():
        parameter, _, key = name.rpartition("/")
        kept.setdefault(parameter, {})[key] = value
    state = {
        index: {key: sharded_like(parameter, value) for key, value in kept[names[parameter]].items()}
        for index, parameter in enumerate(_parameters(optimizer))
        if names[parameter] in kept
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
