"""An sm_80 GPU that runs on the CPU: it loads PTX, and launches grids of blocks on tensors where they lie."""

import ctypes
from functools import lru_cache
from itertools import product

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .block import Block
from .instructions import Step, prepare
from .memory import GlobalMemory
from .program import Program, parse

MAX_SHARED_BYTES = 163 * 1024
ALIGNMENT = 16  # what Triton makes of the address of a tensor


@lru_cache(maxsize=16)
def load(ptx: str) -> tuple[Program, list[Step]]:
    """A kernel, ready to run."""
    program = parse(ptx)
    return program, prepare(program)


def bytes_of(tensor: Tensor) -> np.ndarray:
    """The whole storage, shared, and valid as long as the tensor lives."""
    storage = tensor.untyped_storage()
    return np.ctypeslib.as_array((ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr()))


def bytes_inside(tensor: Tensor) -> np.ndarray:
    """Which bytes of its storage belong to the tensor, and not to the gaps that its strides leave."""
    size = tensor.element_size()
    elements = torch.zeros(tensor.untyped_storage().nbytes() // size, dtype=torch.bool)
    elements.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
    inside = np.zeros(tensor.untyped_storage().nbytes(), bool)
    inside[: elements.numel() * size] = np.repeat(elements.numpy(), size)
    return inside


class EmptyTensors(TorchDispatchMode):
    """Knows which bytes of the tensors that `torch.empty` and its sisters make were written since, here or there."""

    MAKERS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")

    def __init__(self):
        super().__init__()
        self.written: dict[int, tuple[Tensor, np.ndarray]] = {}  # the tensor stays alive, and its address its own

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        for position, argument in enumerate(function._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[position] if position < len(args) else kwargs.get(argument.name)
                if isinstance(value, Tensor):
                    self.initialised(value)[bytes_inside(value)] = True
        if function.overloadpacket.__name__ in self.MAKERS:
            storage = bytes_of(result)
            storage[:] = 0xFF  # NaN, as a float
            self.written[result.untyped_storage().data_ptr()] = result, np.zeros(storage.size, bool)
        return result

    def initialised(self, tensor: Tensor) -> np.ndarray:
        """Which bytes of its storage hold something."""
        known = self.written.get(tensor.untyped_storage().data_ptr())
        return np.ones(tensor.untyped_storage().nbytes(), bool) if known is None else known[1]


class Device:
    """Runs kernels; within its context, a read of an empty tensor is a fault.

    `edit` may change the PTX of every kernel before it is loaded.
    """

    def __init__(self, edit=None):
        self.edit = edit or (lambda ptx: ptx)
        self.empties = EmptyTensors()
        self.launched: list[Program] = []

    def __enter__(self):
        self.empties.__enter__()
        return self

    def __exit__(self, *error):
        self.empties.__exit__(*error)

    def launch(self, ptx: str, grid: tuple[int, int, int], shared_bytes: int, arguments: list) -> None:
        """Run a kernel to its end. Arguments: tensors, integers and floats, as many as it has parameters, or fewer.

        Triton's kernels have further pointers to scratch memory, which these do not use.
        """
        program, steps = load(self.edit(ptx))
        memory, parameters = GlobalMemory(), {}
        arguments = [*arguments, *[0] * (len(program.parameters) - len(arguments))]
        for (name, kind), argument in zip(program.parameters.items(), arguments, strict=True):
            parameters[name] = self._parameter(memory, kind, argument)
        self.launched.append(program)
        for z, y, x in product(*map(range, reversed(grid))):
            Block(program, memory, shared_bytes, parameters).run(steps, (x, y, z), grid)

    def _parameter(self, memory: GlobalMemory, kind: str, argument) -> np.ndarray:
        """The bits of an argument: of a tensor, its address after it was made visible."""
        if isinstance(argument, Tensor):
            if argument.untyped_storage().data_ptr() % ALIGNMENT:
                raise ValueError(f"a tensor's memory does not begin at a multiple of {ALIGNMENT}")
            start = memory.add(bytes_of(argument), bytes_inside(argument), self.empties.initialised(argument))
            argument = start + argument.storage_offset() * argument.element_size()
        if kind == "f32":
            return np.array([argument], np.float32).view(np.uint32)
        bits = int(kind[1:])
        return np.array([argument % (1 << bits)], f"u{bits // 8}")
