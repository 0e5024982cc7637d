"""Copies from the CPU to a GPU that Python does not wait for."""

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return a tensor on a device; a copy from the CPU to a GPU runs behind the launches before it.

    A GPU copies by itself from pinned memory alone. Each copy gets pinned memory of its own: PyTorch's allocator hands
    it out again only after the GPU has read it, so that the next batch can be written while this one is on its way.
    """
    device = torch.device(device)
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
