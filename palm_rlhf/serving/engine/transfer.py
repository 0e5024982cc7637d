"""Numbers on their way from Python to the device that computes, and back."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from palm_rlhf.ops import pinned_copy


def upload(numbers: np.ndarray | Sequence[float], device: torch.device) -> Tensor:
    """Return numbers on a device; a GPU computes on meanwhile, and is not waited for."""
    return pinned_copy.upload(torch.from_numpy(np.asarray(numbers)), device)


def to_lists(matrices: Sequence[Tensor]) -> list[list[list[float]]]:
    """Return matrices of one type as lists, by one copy from the device, which waits for what it has computed."""
    numbers = torch.cat([matrix.flatten() for matrix in matrices]).tolist()
    found = []
    for num_rows, width in [matrix.shape for matrix in matrices]:
        rows, numbers = numbers[: num_rows * width], numbers[num_rows * width :]
        found.append([rows[first : first + width] for first in range(0, num_rows * width, width)])
    return found
