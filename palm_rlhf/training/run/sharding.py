"""Weights in shards over the processes (FSDP2): whole for a while, whole for a checkpoint, and back into shards.

On a module that is not in shards all of this does nothing, or the ordinary thing. PyTorch's part of it is imported
where it is used: it takes long, and loads Triton.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from beartype import beartype
from torch import Tensor, nn

from palm_rlhf.model.checkpoint import scope_options
from palm_rlhf.model.palm import PaLM


@beartype
def prepare_shards(module: nn.Module) -> None:
    """Make the module the root of its shards, which otherwise the first part would be whose forward runs."""
    if sharded_parts(module):
        from torch.distributed.fsdp import register_fsdp_forward_method

        register_fsdp_forward_method(module, "extra_repr")  # a method without effect, run once as a forward
        module.extra_repr()
        del module.extra_repr
        module.reshard()


@contextmanager
@beartype
def whole(module: nn.Module) -> Iterator[None]:
    """All weights at hand in every process, without gradients, so that each can sample for as long as it likes."""
    parts = sharded_parts(module)
    inner = [part for part in parts if part is not module]  # the root stays whole after its forward anyway
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
def sharded_parts(module: nn.Module) -> list[nn.Module]:
    """The parts of a module, itself among them, whose weights are in shards."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [part for part in module.modules() if isinstance(part, FSDPModule)]


@beartype
def is_sharded(tensor: Tensor) -> bool:
    """Whether this process has only its part of a tensor."""
    if type(tensor) in (Tensor, nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


@beartype
def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor with all its shards; all processes have to ask."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


@beartype
def full_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of a module with all its shards; all processes have to ask."""
    return {name: full_tensor(tensor.detach()) for name, tensor in module.state_dict().items()}


@beartype
def sharded_like(target: Tensor, full: Tensor) -> Tensor:
    """A full tensor in the shards of another one of its shape; other shapes, such as a counter, stay as they are."""
    if not is_sharded(target) or full.shape != target.shape:
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full.to(target.device), target.device_mesh, target.placements)


@torch.no_grad()
@beartype
def load_full(target: Tensor, full: Tensor) -> None:
    """Copy a full tensor into one that may be in shards."""
    target.copy_(sharded_like(target, full))


@beartype
def plain_palm(palm: PaLM, state: dict[str, Tensor]) -> PaLM:
    """A PaLM like the given one, LoRA scopes included, on the full tensors of `state`, which are not copied."""
    with torch.device("meta"):
        plain = PaLM.from_config(palm.config)
        for scope, options in scope_options(palm).items():
            plain.add_finetune_params(scope, **options)
    plain.load_state_dict(state, assign=True)
    return plain
