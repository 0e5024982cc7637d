"""Weights in shards over the processes (FSDP2): gathered for sampling and for checkpoints, and put back into shards.

For a module that is not in shards, these functions do nothing, or what they would do to ordinary tensors. PyTorch's
FSDP is imported where it is used: the import takes long, and loads Triton.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from beartype import beartype
from torch import Tensor, nn

from palm_rlhf.model.checkpoint import scope_options
from palm_rlhf.model.palm import PaLM
from palm_rlhf.model.shared_base import is_shared
from palm_rlhf.ops.devices import meta_device


@beartype
def check_shared_bases(module: nn.Module, *, shards: bool) -> None:
    """Raise ValueError for a PaLM that shares its base with another one, if the base is trained or put in shards."""
    for part in module.modules():
        if not isinstance(part, PaLM) or not is_shared(part):
            continue
        if any(parameter.requires_grad for parameter in part.palm_parameters()):
            raise ValueError(
                "got a model to train whose base other models hold (a reward model with share_base), expected frozen "
                "weights below adapters, since training would change the others: train a LoRA scope, or a copy"
            )
        if shards:
            raise ValueError(
                "got one base for several models, and weights in shards (FSDP), expected whole weights in every "
                "process: launch replicas (accelerate launch --multi_gpu), or give each model a base of its own"
            )


@torch.no_grad()
@beartype
def make_root(module: nn.Module, *example: Any) -> None:
    """Run one forward of the whole module on a small example: FSDP2 takes the first module that runs for the root.

    Otherwise a part that samples, or is evaluated, before the first training step would be the root of its own shards.
    """
    if sharded_parts(module):
        module(*example)
        cast(Any, module).reshard()


@contextmanager
@beartype
def whole(module: nn.Module) -> Iterator[None]:
    """Gather all weights in every process for the block, without gradients, so that each can sample on its own."""
    parts = sharded_parts(module)
    inner = [part for part in parts if part is not module]  # the root stays gathered after its forward
    for part in parts:
        part.unshard()
    for part in inner:
        part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for part in inner:
            part.set_reshard_after_forward(True, recurse=False)
        for part in parts:
            part.reshard()


@beartype
def sharded_parts(module: nn.Module) -> list[Any]:
    """Return the parts of a module, itself included, whose weights are in shards."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [part for part in module.modules() if isinstance(part, FSDPModule)]


@beartype
def is_sharded(tensor: Tensor) -> bool:
    """Return whether this process has only its shard of a tensor."""
    if type(tensor) in (Tensor, nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


@beartype
def full_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor with all its shards; all processes take part."""
    return cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor


@beartype
def full_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of a module with all shards; all processes take part."""
    return {name: full_tensor(tensor.detach()) for name, tensor in module.state_dict().items()}


@beartype
def sharded_like(target: Tensor, full: Tensor) -> Tensor:
    """Return a full tensor in shards like the target; a tensor of another shape, such as a counter, stays as it is."""
    if not is_sharded(target) or full.shape != target.shape:
        return full
    from torch.distributed.tensor import distribute_tensor

    sharded = cast(Any, target)
    return distribute_tensor(full.to(target.device), sharded.device_mesh, sharded.placements)


@torch.no_grad()
@beartype
def load_full(target: Tensor, full: Tensor) -> None:
    """Copy a full tensor into one that may be in shards."""
    target.copy_(sharded_like(target, full))


@beartype
def plain_palm(palm: PaLM, state: dict[str, Tensor]) -> PaLM:
    """Return a PaLM like the given one, LoRA scopes included, with the tensors of `state`, which are not copied."""
    with meta_device():
        plain = PaLM.from_config(palm.config)
        for scope, options in scope_options(palm).items():
            plain.add_finetune_params(scope, **options)
    plain.load_state_dict(state, assign=True)
    return plain
