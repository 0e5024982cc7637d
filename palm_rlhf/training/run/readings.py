"""The numbers of a step: read at once on a CPU, and on a GPU left there until somebody looks at them.

The launch of a kernel returns before the kernel has run, so Python can be steps ahead of a GPU. To read a number,
Python waits for the GPU, and then the GPU waits for Python. So a training step on a GPU reads nothing: an update is
left out on the GPU itself where a number is not finite, and the error is raised at the next reading.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

Mark = float | torch.cuda.Event  # a point in time


class Rate(NamedTuple):
    """A number of items over the time from one mark to another, where the GPU may still be before the second."""

    num_items: int
    started: Mark
    ended: Mark

    def per_second(self) -> float:
        """Return the rate; wait for the second mark."""
        if isinstance(self.started, float) or isinstance(self.ended, float):
            return self.num_items / (cast(float, self.ended) - cast(float, self.started))
        self.ended.synchronize()
        return self.num_items / (self.started.elapsed_time(self.ended) / 1e3)


class DeferredMetrics(dict[str, Any]):
    """The metrics of a step: a dict of numbers, of which some are read from the GPU when one of them is looked at.

    All that are still on the GPU are read in one transfer. Raises FloatingPointError at that point where the loss or a
    gradient of a step was not finite.
    """

    def __init__(self, values: Mapping[str, float | int | Tensor | Rate], readings: "Readings"):
        super().__init__(values)
        self._readings = readings

    def read(self) -> "DeferredMetrics":
        """Read all numbers that are still on the GPU."""
        pending = {name: value for name, value in super().items() if isinstance(value, Tensor)}
        if pending:
            self.update(zip(pending, self._readings.read([*pending.values()]), strict=True))
        self.update({name: value.per_second() for name, value in super().items() if isinstance(value, Rate)})
        return self

    def __getitem__(self, name: str) -> Any:
        """Return a number; those that are known, such as the step's, without reading others."""
        value = super().__getitem__(name)
        return super(DeferredMetrics, self.read()).__getitem__(name) if isinstance(value, Tensor | Rate) else value

    def get(self, name: str, default: Any = None) -> Any:
        """Return a number, or the default where there is none of that name."""
        return self[name] if name in self else default

    def __iter__(self):
        """Iterate over the names; with a method of its own, dict(), ** and |= take the numbers by `__getitem__`."""
        return super().__iter__()

    def __reduce__(self):
        """Pickle and copy as a plain dict."""
        return dict, (dict(self.items()),)


def _after_reading(name: str) -> Callable[..., Any]:
    method = getattr(dict, name)
    return lambda self, *args: method(self.read(), *args)


for _name in ("items", "values", "pop", "popitem", "setdefault", "copy", "__or__", "__ror__", "__eq__", "__repr__"):
    setattr(DeferredMetrics, _name, _after_reading(_name))


class Readings:
    """How a run reads its numbers from the device.

    Args:
        device: where they are.
        deferred: leave them there until somebody looks.
        fail: raises FloatingPointError for a step with a number that is not finite, and its numbers.
    """

    def __init__(self, device: torch.device, *, deferred: bool, fail: Callable[[int, Mapping[str, float]], None]):
        self.device, self.deferred, self.fail = device, deferred, fail
        self._first_bad = self._none_bad()

    def _none_bad(self) -> Tensor:
        """Return the numbers of no step: step 0, loss, gradient norm."""
        return torch.zeros(3, dtype=torch.float64, device=self.device if self.deferred else "cpu")

    def number(self, value: Tensor) -> float | Tensor:
        """Return a number, or where readings are deferred the tensor."""
        return value.detach() if self.deferred else float(value)

    def mark(self) -> Mark:
        """Return the present point in time, of the GPU's clock where readings are deferred."""
        if not self.deferred or self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def rate(self, num_items: int, started: Mark) -> float | Rate:
        """Return a number of items over the seconds since a mark."""
        rate = Rate(num_items, started, self.mark())
        return rate if self.deferred else rate.per_second()

    def metrics(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the metrics of a step, from numbers, tensors and rates by name."""
        return DeferredMetrics(values, self) if self.deferred else dict(values)

    @torch.no_grad()
    def check(
        self, step: int, loss: Tensor, norms: Sequence[Tensor]
    ) -> tuple[float | Tensor, list[float | Tensor], Tensor | None]:
        """Return the loss and the norms of a step's gradients, and whether its update is to be left out.

        Calls `fail` where one is not finite. Where readings are deferred, the next reading does so, and the third
        result is 1.0 from that step until then, else 0.0: all that the optimiser changes stays as before that step.
        """
        if not self.deferred:
            of_norms = [float(norm) for norm in norms]
            numbers = {"loss": float(loss), "gradient norm": sum(of_norms)}
            if not all(map(math.isfinite, numbers.values())):
                self.fail(step, numbers)
            return numbers["loss"], [*of_norms], None
        of_step = torch.full((), step, dtype=torch.float64, device=self.device)
        now = torch.stack([of_step, loss, torch.stack([*norms]).sum()])
        is_good = (self._first_bad[0] > 0) | now.isfinite().all()
        self._first_bad = torch.where(is_good, self._first_bad, now)
        return loss, [*norms], (self._first_bad[0] > 0).float()

    def read(self, tensors: Sequence[float | Tensor] = ()) -> list[float]:
        """Return the numbers of tensors, in one transfer. Calls `fail` as `check` says."""
        if not self.deferred:
            return [float(tensor) for tensor in tensors]
        known = torch.stack([*self._first_bad.unbind(), *(cast(Tensor, tensor).double() for tensor in tensors)])
        step, loss, norm, *numbers = known.tolist()
        if step:
            self._first_bad = self._none_bad()
            self.fail(int(step), {"loss": loss, "gradient norm": norm})
        return numbers
