"""Floor 3: the formulas of learning from feedback, pure functions in float32, or float64 where they are given it."""

import torch
from torch import Tensor

Number = float | int
Denominator = Tensor | Number | None


def kept(mask: Tensor | None = None, **tensors: Tensor) -> list[Tensor]:
    """Tensors of one shape in float32 or wider, 0 at pads: what stood there reaches neither value nor gradient.

    mask and each of the tensors: `...` -> `...`. ValueError where shapes differ: nothing is broadcast unseen.
    """
    shapes = {name: tuple(x.shape) for name, x in (tensors if mask is None else {**tensors, "mask": mask}).items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"got the shapes {shapes}; expected one shape for all: expand what is to be repeated")
    wide = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors.values()]
    return wide if mask is None else [torch.where(mask, x, 0.0) for x in wide]
