"""A block of threads at work: registers, control flow, barriers and asynchronous copies.

All threads execute an instruction together, as arrays over them. Where a branch parts them, those that are behind go
first, until all stand at the same instruction again. That no result depends on this order is not tried out but
checked: `memory.py` refuses every access that another order could change.
"""

import numpy as np

from .instructions import Step
from .memory import GlobalMemory, MemoryFault, SharedMemory
from .program import Program
from .warp import WARP


class Divergence(Exception):
    """Threads that must act together, of a block at a barrier or of a warp, do not all arrive."""


class UndefinedRegister(Exception):
    """A register that is read before it is written."""


class Block:
    """The state of one block. `mask` tells which threads execute the present instruction: None for all."""

    def __init__(self, program: Program, memory: GlobalMemory, shared_bytes: int, parameters: dict[str, np.ndarray]):
        self.program, self.memory, self.parameters = program, memory, parameters
        self.shared = SharedMemory(shared_bytes)
        self.threads = np.arange(program.num_threads)
        self.first_thread = 0  # its number in the whole grid
        self.mask: np.ndarray | None = None
        self.registers: dict[str, np.ndarray] = {"%tid.x": self.threads.astype(np.uint32)}
        self.undefined: dict[str, np.ndarray] = {}  # of registers that not every thread has written
        self.copies: list[tuple] = []  # begun, but not yet part of a group
        self.groups: list[list[tuple]] = []

    def read(self, register: str) -> np.ndarray:
        """Its bits, in every thread."""
        value = self.registers.get(register)
        if value is None:
            raise UndefinedRegister(register)
        if self.undefined and register in self.undefined:
            missing = self.undefined[register]
            if (missing if self.mask is None else missing & self.mask).any():
                raise UndefinedRegister(register)
        return value

    def write(self, register: str, value: np.ndarray) -> None:
        """Set it in the threads that execute; a wider register is filled up with zeros, or the sign."""
        if register == "_":
            return
        kind = self.program.type_of(register)
        value = value.view(np.uint32) if value.dtype == np.float32 else value
        value = value.astype(kind, copy=False)
        if self.mask is not None:
            if register not in self.registers:
                self.undefined[register] = ~self.mask
            elif register in self.undefined:
                self.undefined[register] = self.undefined[register] & ~self.mask
            value = np.where(self.mask, value, self.registers.get(register, value))
        elif self.undefined:
            self.undefined.pop(register, None)
        self.registers[register] = value

    def active(self, values: np.ndarray) -> np.ndarray:
        """Those of the threads that execute."""
        return values if self.mask is None else values[self.mask]

    def spread(self, values: np.ndarray) -> np.ndarray:
        """Undo `active`, with zeros for the other threads."""
        if self.mask is None:
            return values
        spread = np.zeros((self.threads.size, *values.shape[1:]), values.dtype)
        spread[self.mask] = values
        return spread

    def load(self, space: str, addresses: np.ndarray, width: int) -> np.ndarray:
        """`threads width`, bytes."""
        addresses, threads = self.active(addresses), self.active(self.threads)
        if space == "shared":
            return self.spread(self.shared.load(addresses, width, threads))
        return self.spread(self.memory.load(addresses, width, threads + self.first_thread))

    def store(self, space: str, addresses: np.ndarray, values: np.ndarray) -> None:
        """Bytes, `threads width`."""
        addresses, values, threads = map(self.active, (addresses, values, self.threads))
        if space == "shared":
            self.shared.store(addresses, values, threads)
        else:
            self.memory.store(addresses, values, threads + self.first_thread)

    def begin_copy(self, to: np.ndarray, source: np.ndarray, width: int, sizes: np.ndarray) -> None:
        """cp.async: a copy of `sizes` bytes, filled up with zeros to the width."""
        to, source, sizes, threads = map(self.active, (to, source, sizes, self.threads))
        if not np.isin(sizes, (0, width)).all():
            raise NotImplementedError(f"a copy of a part of {width} bytes")
        values, whole = np.zeros((len(to), width), np.uint8), sizes > 0
        if whole.any():
            values[whole] = self.memory.load(source[whole], width, threads[whole] + self.first_thread)
        self.copies.append((self.shared.begin_copy(to, width, threads), values, threads))

    def commit_copies(self) -> None:
        """The copies begun since the last time are a group."""
        self.require_all("cp.async.commit_group")
        self.groups.append(self.copies)
        self.copies = []

    def await_copies(self, pending: int) -> None:
        """Go on when no more than so many groups, the latest, are under way."""
        self.require_all("cp.async.wait_group")
        while len(self.groups) > pending:
            for rows, values, threads in self.groups.pop(0):
                self.shared.land(rows, values, threads)

    def barrier(self) -> None:
        self.require_all("bar.sync")
        self.shared.barrier()

    def require_all(self, what: str) -> None:
        if self.mask is not None:
            raise Divergence(f"{what} by {self.mask.sum()} of {self.mask.size} threads")

    def require_warps(self) -> None:
        if self.mask is not None and (self.mask.reshape(-1, WARP).any(1) != self.mask.reshape(-1, WARP).all(1)).any():
            raise Divergence("an instruction for warps by parts of them")

    def run(self, steps: list[Step], index: tuple[int, int, int], grid: tuple[int, int, int]) -> None:
        """Execute the program, made ready as steps, as the block with this index in the grid."""
        for axis, here, extent in zip("xyz", index, grid, strict=True):
            for register, number in ((f"%ctaid.{axis}", here), (f"%nctaid.{axis}", extent)):
                self.registers[register] = np.full(self.threads.shape, number, np.uint32)
        self.first_thread = ((index[2] * grid[1] + index[1]) * grid[0] + index[0]) * self.threads.size
        at = np.zeros_like(self.threads)
        with np.errstate(all="ignore"):
            while (here := at.min()) < len(steps):
                self.advance(steps, at, together=at == here)

    def advance(self, steps: list[Step], at: np.ndarray, together: np.ndarray) -> None:
        """Let the threads that stand together go on until they part, or meet those that wait ahead; note where."""
        everybody = together.all()
        here, stop = at[together][0], len(steps) if everybody else at[~together].min()
        while here < stop:
            step = steps[here]
            mask = None if everybody else together
            if step.guard is not None:
                self.mask = mask
                chosen = self.read(step.guard) ^ step.negated
                mask = chosen if mask is None else chosen & mask
                mask = None if everybody and mask.all() else mask
            here += 1
            if mask is not None and not mask.any():
                continue
            if step.target is None:
                self.mask = mask
                self.execute(step)
            elif mask is None or (mask == together).all():
                here = step.target
            else:
                at[together], at[mask] = here, step.target
                return
        at[together] = here

    def execute(self, step: Step) -> None:
        try:
            step.action(self)
        except (MemoryFault, Divergence, UndefinedRegister) as fault:
            block = tuple(int(self.registers[f"%ctaid.{axis}"][0]) for axis in "xyz")
            raise type(fault)(f"{fault}; block {block}: {step.text}") from None
