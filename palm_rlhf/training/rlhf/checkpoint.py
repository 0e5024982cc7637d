"""What a checkpoint of reinforcement learning holds beside the optimiser: policy, critic, reference, score moments."""

import math
from pathlib import Path
from typing import Any

from beartype import beartype
from safetensors.torch import load_file, save_file
from torch import Tensor

from palm_rlhf.model.checkpoint import require_same_mathematics, shapes_of
from palm_rlhf.model.palm import PaLM
from palm_rlhf.model.weights_folder import check_shapes
from palm_rlhf.policy.actor_critic import ActorCritic, Reference
from palm_rlhf.training.run.sharding import load_full, plain_palm

CRITIC_FILE = "critic.safetensors"


@beartype
def write_policy(
    folder: Path, actor_critic: ActorCritic, reference: Reference | None, state: dict[str, Tensor]
) -> None:
    """Write the models into a checkpoint; with LoRA the policy's base is the reference, stored once.

    `state` is the state dict of the actor-critic with all its shards.
    """
    policy, critic = _parts(state)
    plain_palm(actor_critic.palm, policy).save_pretrained(folder / "policy")
    if reference is not None and not reference.is_base:
        reference.palm.save_pretrained(folder / "reference")
    if critic:
        save_file({name: tensor.cpu().contiguous() for name, tensor in critic.items()}, folder / CRITIC_FILE)


@beartype
def read_policy(folder: Path, actor_critic: ActorCritic, reference: Reference | None) -> None:
    """Put back what `write_policy` wrote, in place; ValueError for models that are not of this run."""
    if reference is not None and (folder / "reference").is_dir() == reference.is_base:
        base = "the base below the adapters" if actor_critic.actor_scope else "none, as with a kl_coef of 0"
        kinds = base, "a model of its own"
        here, there = kinds if reference.is_base else kinds[::-1]
        raise ValueError(f"this run's reference is {here}, that of {folder} is {there}: resume with what the run had")
    policy, critic = _parts(actor_critic.state_dict())
    saved_policy = PaLM.from_pretrained(folder / "policy")
    require_same_mathematics(actor_critic.palm.config, saved_policy.config, folder / "policy")
    pairs = (
        (policy, saved_policy.state_dict(), folder / "policy"),
        (critic, load_file(folder / CRITIC_FILE) if critic else {}, folder / CRITIC_FILE),
    )
    for targets, saved, where in pairs:
        check_shapes(shapes_of(saved), shapes_of(targets), where)
    for targets, saved, _ in pairs:
        for name, target in targets.items():
            load_full(target.detach(), saved[name])
    if reference is not None and not reference.is_base:
        reference.palm.load(folder / "reference")


def _parts(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The policy's tensors, by their names in it, and all others."""
    policy = {name.removeprefix("palm."): tensor for name, tensor in state.items() if name.startswith("palm.")}
    return policy, {name: tensor for name, tensor in state.items() if not name.startswith("palm.")}


class RunningMoments:
    """Mean and deviation of all numbers seen so far, in double precision (Chan et al. 1979, equation 2.1)."""

    def __init__(self):
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    @property
    def deviation(self) -> float:
        """The standard deviation; 1 while all numbers were the same."""
        deviation = math.sqrt(self.squares / max(self.count, 1))
        return deviation if deviation > 1e-8 else 1.0

    @beartype
    def update(self, numbers: Tensor) -> None:
        """Count more numbers, a tensor of any shape."""
        numbers = numbers.double().flatten()
        if not len(numbers):
            return
        count, mean = self.count + len(numbers), float(numbers.mean())
        shift = mean - self.mean
        self.squares += float((numbers - mean).square().sum()) + shift**2 * self.count * len(numbers) / count
        self.mean += shift * len(numbers) / count
        self.count = count

    def state_dict(self) -> dict[str, Any]:
        """The moments, as JSON."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    @beartype
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict()`."""
        self.count, self.mean, self.squares = state["count"], state["mean"], state["squares"]
