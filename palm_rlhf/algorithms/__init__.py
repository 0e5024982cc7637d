"""The formulas of learning from feedback: pure functions in float32, or in float64 where their inputs are."""

import torch
from torch import Tensor

Number = float | int
Denominator = Tensor | Number | None


def kept(mask: Tensor | None = None, **tensors: Tensor) -> list[Tensor]:
    """Return tensors of one shape in float32 or wider, with 0 at padding.

    Padding thus reaches neither value nor gradient. Shapes: mask and each of the tensors `...`; returns tensors of
    `...`. Raises ValueError if the shapes differ: nothing is broadcast silently.
    """
    shapes = {name: tuple(x.shape) for name, x in (tensors if mask is None else {**tensors, "mask": mask}).items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"got the shapes {shapes}; expected one shape for all: expand what is to be repeated")
    wide = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors.values()]
    return wide if mask is None else [torch.where(mask, x, 0.0) for x in wide]
