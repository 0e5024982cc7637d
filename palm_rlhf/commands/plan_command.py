"""The command ``palm-rlhf plan``: how much memory a model takes to train or to serve, and what fits."""

import json
import shlex
from typing import Annotated, Any

from beartype import beartype
from tyro.conf import Positional, arg

from palm_rlhf.evaluation.reports.report import Table, as_text
from palm_rlhf.model.lora import Targets
from palm_rlhf.model.quantised.quantised_weights import Quantisation
from palm_rlhf.planning.memory_plan import MemoryPlan
from palm_rlhf.planning.model_config import config_of_model, dtype_of_model, name_in_commands
from palm_rlhf.planning.plan_search import SearchResult, search
from palm_rlhf.planning.plan_settings import Dtype, PlanSettings, Task
from palm_rlhf.planning.planned_command import planned_command
from palm_rlhf.serving.access_options import num_bytes
from palm_rlhf.training.run.optimizer import Precision

Integer = Annotated[int | None, arg(metavar="INT")]
GB = 10**9


@beartype
def plan(
    model: Annotated[Positional[str], arg(metavar="MODEL")],
    *,
    task: Task,
    gpu_memory: Annotated[str, arg(metavar="BYTES")] = "40GB",
    dtype: Dtype | None = None,
    precision: Precision | None = None,
    lora_r: Integer = None,
    lora_targets: Annotated[Targets | None, arg(metavar="NAME ...", help_behavior_hint="(default: q k v out)")] = None,
    share_base: bool | None = None,
    quantize: Quantisation | None = None,
    gradient_checkpointing: bool | None = None,
    batch_size: Integer = None,
    seq_len: int = 1024,
    new_tokens: int = 256,
    rollout_batch_size: Integer = None,
    num_adapters: int = 0,
    prefix_memory: str = "256MB",
) -> None:
    """Add up the memory of a task part by part, without weights, and name the setting that fits and gives up least.

    A setting that is not given is searched for: first all weights are trained as they are; then come adapters, for ppo
    one base for all roles, a base in int8 and int4, each also with gradient checkpointing; then smaller batches. A
    tenth of the memory is left to CUDA. The phases of a step run on tensors without numbers, which are counted while
    they live. The command line of the setting is printed too. The last line is JSON: fits, the settings, the command,
    total_bytes, room_bytes, and the bytes of the parts.

    Args:
        model: A folder with a config.json, or that file; a .gguf file, a hub id, owner/name, smollm2, or one of the
            paper's sizes: 8B, 62B, 540B. Weights are not read.
        task: What is to be done. ppo counts a policy, a reference, a critic and a reward model of this size.
        gpu_memory: Memory of one GPU, such as 40GB or 24GiB.
        dtype: Type of the weights, and so of gradients and the optimiser's state; by default the one that the command
            opens the model in, and bfloat16 where there are no weights and config.json names none.
        precision: Arithmetic of the forward in training, as the option of the commands; auto is bf16.
        lora_r: Rank of the adapters, in serving of each adapter; 0 trains all weights.
        lora_targets: Matrices of each block that have adapters: q, k, v, out, gate, value, ff_out; all-linear is all.
        share_base: Hold the base once for all roles of ppo, which have adapters.
        quantize: Kind of numbers of the base's matrices below adapters, or in serving.
        gradient_checkpointing: Keep only the inputs of the blocks for the backward.
        batch_size: Rows in one forward with gradients, by default 8, in serving replies at once, by default 16; reward
            and dpo have two rows for each.
        seq_len: Tokens of a row; in serving the context of a reply.
        new_tokens: Tokens of the response among them (ppo, dpo).
        rollout_batch_size: Responses that ppo draws at once, by default 16.
        num_adapters: Adapters that a server offers beside its model (--lora).
        prefix_memory: Memory that a server keeps for keys and values of ended replies.
    """
    config = config_of_model(model)
    given = {
        "dtype": dtype,
        "precision": precision,
        "lora_r": lora_r,
        "lora_targets": lora_targets,
        "share_base": share_base,
        "quantize": quantize,
        "gradient_checkpointing": gradient_checkpointing,
        "batch_size": batch_size,
        "rollout_batch_size": rollout_batch_size,
    }
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    saved = dtype_of_model(model, task)
    start = PlanSettings(
        **{"batch_size": 16 if task == "serve" else 8, "dtype": saved, **chosen},
        seq_len=seq_len,
        new_tokens=new_tokens,
        num_adapters=num_adapters,
        prefix_memory=num_bytes("prefix_memory", prefix_memory),
    )
    result = search(task, config, start, num_bytes("gpu_memory", gpu_memory), fixed=frozenset(chosen))
    show(task, name_in_commands(model), result, saved)


def show(task: Task, model: str, result: SearchResult, saved: Dtype) -> None:
    """Print the plans that were made, the parts and the command line of the last one, and one line of JSON."""
    rows = tuple(
        (made.settings.in_words(task), *in_gb(made.total), verdict(made, result.room)) for made in result.plans
    )
    print(as_text(Table("Settings", ("setting", "peak, GB", f"room of {result.room / GB:.1f} GB"), rows)), end="\n\n")
    best = result.fitting or min(result.plans, key=lambda made: made.total)
    parts = [(name, *in_gb(size), "always") for name, size in best.resident.items()]
    for phase, sizes in best.phases.items():
        parts += [(f"{name}, {phase}", *in_gb(size), phase) for name, size in sizes.items()]
    parts.append((f"peak, in the phase: {best.largest_phase}", *in_gb(best.total), ""))
    title = f"Parts of: {best.settings.in_words(task)}"
    print(as_text(Table(title, ("part", "GB", "when"), tuple(parts))), end="\n\n")
    if result.fitting is None:
        print(f"nothing fits: the smallest setting lacks {(best.total - result.room) / GB:.1f} GB")
    else:
        print(f"fits, with {(result.room - best.total) / GB:.1f} GB to spare: {best.settings.in_words(task)}")
    command = None if result.fitting is None else shlex.join(planned_command(task, model, best.settings))
    if command is not None:
        print(f"\n{command}")
    if best.settings.share_base:
        print("REWARD_MODEL is one that `palm-rlhf reward --lora-r` trained on the same model")
    if task != "serve" and best.settings.dtype != saved:
        print(f"training opens these weights in {saved}, as they are saved: save them in {best.settings.dtype} first")
    numbers = {
        "fits": result.fitting is not None,
        "settings": vars(best.settings),
        "command": command,
        "total_bytes": best.total,
        "room_bytes": result.room,
        "resident": dict(best.resident),
        "phases": {name: dict(sizes) for name, sizes in best.phases.items()},
    }
    print(json.dumps(numbers))


def in_gb(size: int) -> tuple[float]:
    """Return bytes as GB, in a tuple, for the row of a table."""
    return (round(size / GB, 3),)


def verdict(made: MemoryPlan, room: int) -> str:
    """Return whether a plan fits, or by how much it does not."""
    least = "" if made.is_whole else "at least "
    return "fits" if made.total <= room else f"{least}{(made.total - room) / GB:.1f} GB too much"
