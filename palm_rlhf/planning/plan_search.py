"""The search for settings that fit into a GPU's memory: cheap changes first, those that save most last."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from palm_rlhf.model.config import PaLMConfig
from palm_rlhf.planning.memory_plan import MemoryPlan, plan_memory
from palm_rlhf.planning.plan_settings import PlanSettings, Task
from palm_rlhf.serving.engine.capacity import LEAST_SPARE

RANK = 16  # of adapters, where a search comes to them


@dataclass(frozen=True)
class SearchResult:
    """The plans that were made, in the order of the search; the last one fits, unless none does."""

    plans: tuple[MemoryPlan, ...]
    room: int

    @property
    def fitting(self) -> MemoryPlan | None:
        """The first plan that fits, which gives up least; None where no plan fits."""
        return self.plans[-1] if self.plans[-1].is_whole and self.plans[-1].total <= self.room else None


def room_of(gpu_memory: int) -> int:
    """Return the bytes of a GPU that tensors may take: a tenth is left to CUDA and to gaps between tensors."""
    return gpu_memory - max(LEAST_SPARE, gpu_memory // 10)


def search(
    task: Task, config: PaLMConfig, start: PlanSettings, gpu_memory: int, *, fixed: frozenset[str] = frozenset()
) -> SearchResult:
    """Plan one setting after another until one fits, and return all plans.

    First come the settings of `start`; then gradient checkpointing, adapters, one base for all roles, a base in fewer
    bits, alone and together; and then all of these again with ever smaller batches.

    Args:
        fixed: the names of settings that stay as they are.
    """
    room, plans = room_of(gpu_memory), []
    for settings in candidates(task, start, fixed):
        plans.append(plan_memory(task, config, settings, room=room))
        if plans[-1].total <= room:
            break
    if not plans:
        start.check(task)  # raises: none of the settings goes together with those that are fixed
    return SearchResult(tuple(plans), room)


def candidates(task: Task, start: PlanSettings, fixed: frozenset[str]) -> Iterator[PlanSettings]:
    """Yield the settings of a search in its order, each once."""
    seen = set()
    rows = start.batch_size
    while rows:
        for changes in ladder(task):
            changes = {name: value for name, value in changes.items() if name not in fixed}
            batch = {} if "batch_size" in fixed else {"batch_size": rows}
            if task == "ppo" and "rollout_batch_size" not in fixed:
                batch["rollout_batch_size"] = min(start.rollout_batch_size, max(rows, 1) * 2)
            settings = replace(start, **{**changes, **batch}) if rows < start.batch_size else replace(start, **changes)
            if settings not in seen and is_possible(task, settings):
                seen.add(settings)
                yield settings
        rows //= 2


def ladder(task: Task) -> list[dict]:
    """Return changes of settings, from none to those that save most."""
    if task == "serve":
        return [{}, {"quantize": "int8"}, {"quantize": "int4"}]
    adapters = {"lora_r": RANK, "share_base": True} if task == "ppo" else {"lora_r": RANK}
    steps: list[dict] = [{}]
    if task == "ppo":
        steps.append({"lora_r": RANK})
    for bits in ({}, {"quantize": "int8"}, {"quantize": "int4"}):
        steps.append({**adapters, **bits})
    return [{**step, **more} for step in steps for more in ({}, {"gradient_checkpointing": True})]


def is_possible(task: Task, settings: PlanSettings) -> bool:
    """Return whether settings go together."""
    try:
        settings.check(task)
    except ValueError:
        return False
    return True
