"""The processes that a trainer runs on."""

import atexit
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin
from beartype import beartype

from palm_rlhf.training.run.allocator import keep_freed_memory

if dist.is_available():
    # If it were imported after the processes are connected, its default arguments would keep the connection open.
    import torch.distributed.nn.functional

REPLICATED = {DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}


@beartype
def build_accelerator(output_dir: Path | None, trackers: Sequence[str], may_shard: bool = False) -> Accelerator:
    """Return the Accelerator of one process, or of those of `accelerate launch`, each with a replica of the model.

    With `may_shard`, the processes may also have the model in shards (FSDP2). On a CPU, see `keep_freed_memory` for its
    effect on the whole process.
    """
    if trackers and output_dir is None:
        raise ValueError(f"trackers is {tuple(trackers)} without output_dir: give the folder that they write to")
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else processes on a CPU would know nothing of each other
        mixed_precision="no",  # the forward has its own autocast, which leaves the user's model unwrapped
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # the trainer divides by tokens itself
        log_with=list(trackers) or None,
        project_dir=None if output_dir is None else str(output_dir),
    )
    if accelerator.distributed_type not in REPLICATED and not (may_shard and accelerator.is_fsdp2):
        raise ValueError(
            f"accelerate is set up for {accelerator.distributed_type.value}, expected replicas of the whole model"
            f"{', or FSDP version 2' if may_shard else ''}: launch one process, or replicas by torchrun or "
            f"accelerate launch --multi_gpu"
        )
    if missing := set(trackers) - {str(getattr(tracker, "value", tracker)) for tracker in accelerator.log_with}:
        raise ImportError(
            f"trackers has {sorted(missing)}, which accelerate does not find here: "
            f"install their packages, for tensorboard by pip install palm-rlhf[tensorboard]"
        )
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    if accelerator.num_processes > 1:
        atexit.register(leave_the_others)
    return accelerator


def leave_the_others() -> None:
    """End the connections to the other processes, whose threads would abort this one at its exit."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
