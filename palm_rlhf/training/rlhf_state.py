"""What a checkpoint of reinforcement learning holds beside the optimiser: policy, critic, reference, score moments."""

import math
from pathlib import Path
from typing import Any

from beartype import beartype
from safetensors.torch import load_file, save_file
from torch import Tensor

from palm_rlhf.policy.actor_critic import ActorCritic, Reference

CRITIC_FILE = "critic.safetensors"


@beartype
def write_policy(folder: Path, actor_critic: ActorCritic, reference: Reference) -> None:
    """Write the models into a checkpoint; with LoRA the policy's base is the reference, stored once."""
    actor_critic.palm.save_pretrained(folder / "policy")
    if not reference.is_base:
        reference.palm.save_pretrained(folder / "reference")
    if critic := _critic_tensors(actor_critic):
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in critic.items()}, folder / CRITIC_FILE)


@beartype
def read_policy(folder: Path, actor_critic: ActorCritic, reference: Reference) -> None:
    """Put back what `write_policy` wrote, in place."""
    actor_critic.palm.load(folder / "policy")
    if not reference.is_base:
        reference.palm.load(folder / "reference")
    if critic := _critic_tensors(actor_critic):
        saved = load_file(folder / CRITIC_FILE)
        for name, tensor in critic.items():
            tensor.detach().copy_(saved[name])


def _critic_tensors(actor_critic: ActorCritic) -> dict[str, Tensor]:
    """All that is not the policy's, by name, each tensor once."""
    return {name: tensor for name, tensor in actor_critic.state_dict().items() if not name.startswith("palm.")}


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
