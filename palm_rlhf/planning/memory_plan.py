"""The memory of a task, part by part."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import nn

from palm_rlhf.model.config import PaLMConfig
from palm_rlhf.model.palm import PaLM
from palm_rlhf.planning.live_memory import without_numbers, without_weights
from palm_rlhf.planning.plan_settings import PlanSettings, Task
from palm_rlhf.planning.traced_roles import Roles, roles_on_meta
from palm_rlhf.serving.engine.capacity import columns_of
from palm_rlhf.serving.engine.slot_cache import SlotCache

TRACED_DEPTHS = (4, 6)  # of deeper models only these are run: the memory of a phase grows by the same for each block


@dataclass(frozen=True)
class MemoryPlan:
    """The bytes of each part, and which of them live at the same time.

    Args:
        settings: what was planned.
        resident: what lives all the time, by name.
        phases: for each phase of a step its own parts, by name; phases come one after the other.
        is_whole: False where the phases were not run, since what lives all the time is too much already.
    """

    settings: PlanSettings
    resident: Mapping[str, int]
    phases: Mapping[str, Mapping[str, int]]
    is_whole: bool = True

    @property
    def largest_phase(self) -> str:
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def total(self) -> int:
        """The bytes at the peak of a step."""
        return sum(self.resident.values()) + sum(self.phases[self.largest_phase].values())


def plan_memory(
    task: Task, config: PaLMConfig, settings: PlanSettings, *, has_reward_model: bool = True, room: int | None = None
) -> MemoryPlan:
    """Return the memory of a task on one device.

    The weights are counted on the meta device, and the phases of a step run on tensors without numbers. Raises
    ValueError for settings that do not go together.

    Args:
        task: what is to be done.
        config: the model.
        settings: how.
        has_reward_model: whether a reward model judges, and the critic begins as it (ppo).
        room: bytes that there are; a step is run only where weights, gradients and optimiser fit into them.
    """
    settings.check(task)
    roles = roles_on_meta(task, config, settings, has_reward_model)
    resident = resident_parts(roles)
    if task == "serve":
        palm = cast(PaLM, roles.models["model"])
        cache = settings.batch_size * columns_of(settings.seq_len) * SlotCache.bytes_per_token(palm)
        resident |= {"keys and values, replies": cache, "keys and values, ended replies": settings.prefix_memory}
    gradients = sum(parameter.nbytes for parameter in trained(roles))
    if room is not None and sum(resident.values()) + gradients > room:
        return MemoryPlan(settings, resident, {"update": {"gradients": gradients}}, is_whole=False)
    shallow = [config.depth] if config.depth <= TRACED_DEPTHS[-1] else TRACED_DEPTHS
    traced = {depth: traced_phases(task, replace(config, depth=depth), settings, has_reward_model) for depth in shallow}
    phases = {
        name: at_depth({depth: part[name] for depth, part in traced.items()}, config.depth)
        for name in traced[shallow[0]]
    }
    split: dict[str, dict[str, int]] = {}
    for name, num_bytes in phases.items():
        split[name] = {"activations": num_bytes}
        if name == "update":
            split[name] = {"gradients": gradients, "activations": max(num_bytes - gradients, 0)}
    return MemoryPlan(settings, resident, split)


def resident_parts(roles: Roles) -> dict[str, int]:
    """Return the bytes of weights, adapters and heads, and of the optimiser's state; what roles share counts once."""
    parts: dict[str, int] = {}
    counted: set[int] = set()
    for role, model in roles.models.items():
        base = adapters = 0
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if id(tensor) not in counted:
                counted.add(id(tensor))
                if "finetune_modules" in name or name.split(".")[0] in ("head", "value_head"):
                    adapters += tensor.nbytes
                else:
                    base += tensor.nbytes
        parts |= {f"weights, {role}": base, f"adapters and heads, {role}": adapters}
    state = sum(2 * parameter.nbytes for parameter in trained(roles))
    return {name: size for name, size in {**parts, "optimiser state": state}.items() if size}


def trained(roles: Roles) -> list[nn.Parameter]:
    """Return the parameters that get gradients, and so a state of the optimiser.

    The output layer of a reward model, or of a critic that is a model of its own, computes nothing.
    """
    if roles.loss is None:
        return []
    left_out = {"reference", "reward model"} if "critic" in roles.models else {"reference"}
    models = {role: model for role, model in roles.models.items() if role not in left_out}
    unused = {"critic": r"critic\..*lm_head", "reward model": "lm_head"}
    found = {
        id(parameter): parameter
        for role, model in models.items()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not (role in unused and re.search(unused[role], name))
    }
    return list(found.values())


def traced_phases(task: Task, config: PaLMConfig, settings: PlanSettings, has_reward_model: bool) -> dict[str, int]:
    """Return the peak bytes of each phase of a step, without the bytes that live all the time."""
    roles, peaks = roles_on_meta(task, config, settings, has_reward_model), {}
    precision = partial(torch.autocast, "cpu", torch.bfloat16, enabled=settings.computes_in_bfloat16(task))
    with without_numbers() as memory:
        for model in roles.models.values():
            without_weights(model)
        if roles.loss is not None:
            optimizer = torch.optim.AdamW(trained(roles), fused=True)
            for _ in range(2):  # the first step makes the optimiser's state
                before = memory.restart_peak()
                with precision():
                    loss = roles.loss()
                loss.backward()
                optimizer.step()
                peaks["update"] = memory.peak - before
                optimizer.zero_grad()
        for name, phase in roles.other_phases.items():
            for _ in range(2 if task == "serve" else 1):  # the first run makes the cache of a server
                before = memory.restart_peak()
                with torch.no_grad(), precision():
                    phase()
                peaks[name] = memory.peak - before
    return peaks


def at_depth(peaks: Mapping[int, int], depth: int) -> int:
    """Return the bytes at a depth by linear extrapolation from two smaller depths."""
    (low, first), (high, last) = min(peaks.items()), max(peaks.items())
    return first if low == high else first + (last - first) * (depth - low) // (high - low)
