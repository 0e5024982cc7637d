"""The mean and deviation of all scores of a run, for `scale_scores`."""

import math
from typing import Any

from beartype import beartype
from torch import Tensor


class RunningMoments:
    """Mean and deviation of all numbers seen so far, in double precision (Chan et al. 1979, equation 2.1)."""

    def __init__(self) -> None:
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
        """Return the moments, as JSON."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    @beartype
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.count, self.mean, self.squares = state["count"], state["mean"], state["squares"]
