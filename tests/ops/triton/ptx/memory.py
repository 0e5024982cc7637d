"""Memory that knows of every byte whether it may be accessed, was written, and by whom.

An access that a GPU would silently answer with garbage, or with whatever the order of its threads makes of it, raises
here: outside of an allocation, before anything was written, misaligned, or in a race with another thread.
"""

import numpy as np

BUFFER_BITS = 32  # a global address is the number of its buffer, from 1, and the offset in it
THREADS = 1 << 11  # more than a block has
EVERYBODY = THREADS - 1
NOBODY = -1
IN_FLIGHT = 1 << 62


class MemoryFault(Exception):
    """An access that means nothing."""


class OutOfBounds(MemoryFault):
    """Outside of every buffer, or of the part of it that was handed over."""


class Misaligned(MemoryFault):
    """Not at a multiple of its own width."""


class Uninitialised(MemoryFault):
    """A read of what nobody wrote."""


class NotLanded(MemoryFault):
    """An access to what an asynchronous copy is still writing."""


class Race(MemoryFault):
    """With another thread, and no barrier between the two."""


def check_alignment(addresses: np.ndarray, width: int) -> None:
    if (addresses % width).any():
        raise Misaligned(f"{width} bytes at {hex(addresses[addresses % width != 0][0])}")


def in_rows(memory: np.ndarray, width: int) -> np.ndarray:
    """`bytes` -> `rows width`, for aligned accesses of that width; an incomplete last row is left out."""
    return memory[: memory.size // width * width].reshape(-1, width)


class Buffer:
    """One allocation: its bytes, those that may be accessed, those that hold something, and who wrote them."""

    def __init__(self, data: np.ndarray, accessible: np.ndarray, initialised: np.ndarray):
        self.data, self.accessible, self.initialised = data, accessible, initialised
        self.writer = np.full(data.size, NOBODY, np.int64)


class GlobalMemory:
    """What all blocks of a launch see, in no order: what one thread wrote, no other may read or write."""

    def __init__(self):
        self.buffers: list[Buffer] = []

    def add(self, data: np.ndarray, accessible: np.ndarray, initialised: np.ndarray) -> int:
        """Make bytes visible, by reference; the address of the first."""
        self.buffers.append(Buffer(data, accessible, initialised))
        return len(self.buffers) << BUFFER_BITS

    def _split(self, addresses: np.ndarray, width: int):
        """The buffers met, with the accesses to each (all, as a slice, if there is but one) and their rows in it."""
        check_alignment(addresses, width)
        numbers, offsets = addresses >> BUFFER_BITS, addresses & ((1 << BUFFER_BITS) - 1)
        for number in np.unique(numbers):
            if not 1 <= number <= len(self.buffers):
                raise OutOfBounds(f"global address {hex(addresses[numbers == number][0])}")
            buffer, chosen = self.buffers[number - 1], numbers == number
            rows = offsets[chosen] // width
            accessible = in_rows(buffer.accessible, width)
            if rows.max() >= len(accessible) or not accessible[rows].all():
                raise OutOfBounds(f"{width} bytes of argument {number - 1}")
            yield buffer, chosen, rows

    def load(self, addresses: np.ndarray, width: int, threads: np.ndarray) -> np.ndarray:
        """`threads` -> `threads width`, bytes."""
        loaded = np.empty((len(addresses), width), np.uint8)
        for buffer, chosen, rows in self._split(addresses, width):
            if not in_rows(buffer.initialised, width)[rows].all():
                raise Uninitialised(f"{width} bytes of global memory")
            writer = in_rows(buffer.writer, width)[rows]
            if ((writer != NOBODY) & (writer != threads[chosen][:, None])).any():
                raise Race("a read of global memory that another thread writes")
            loaded[chosen] = in_rows(buffer.data, width)[rows]
        return loaded

    def store(self, addresses: np.ndarray, values: np.ndarray, threads: np.ndarray) -> None:
        """Bytes, `threads width`."""
        width = values.shape[1]
        for buffer, chosen, rows in self._split(addresses, width):
            writers, me = in_rows(buffer.writer, width), threads[chosen][:, None]
            before = writers[rows]
            writers[rows] = me
            if ((before != NOBODY) & (before != me)).any() or (writers[rows] != me).any():
                raise Race("two threads write to the same global memory")
            in_rows(buffer.data, width)[rows] = values[chosen]
            in_rows(buffer.initialised, width)[rows] = True


class SharedMemory:
    """What the threads of a block see, in order only where a barrier lies between them.

    Of every byte are kept the last write and the last read since the last barrier, as epoch * THREADS + thread, where
    an epoch is the time between two barriers: an access is a race if another thread's write, or for a write
    another thread's read, is of the same epoch. Threads that write what is there already do no harm.
    """

    def __init__(self, size: int):
        self.data = np.zeros(size, np.uint8)
        self.written = np.full(size, NOBODY, np.int64)
        self.read = np.full(size, NOBODY, np.int64)
        self.epoch = 0

    def barrier(self) -> None:
        """What came before happened for everybody."""
        self.epoch += THREADS

    def _rows(self, addresses: np.ndarray, width: int) -> np.ndarray:
        check_alignment(addresses, width)
        if addresses.min() < 0 or addresses.max() + width > self.data.size:
            raise OutOfBounds(f"{width} bytes of shared memory at {addresses.min()} to {addresses.max()}")
        return addresses // width

    def load(self, addresses: np.ndarray, width: int, threads: np.ndarray) -> np.ndarray:
        """`threads` -> `threads width`, bytes."""
        rows, me = self._rows(addresses, width), (self.epoch + threads)[:, None]
        written = in_rows(self.written, width)[rows]
        if ((written < 0) | ((written >= self.epoch) & (written != me))).any():
            self._refuse_read(written)
        self._note_readers(rows, width, me)
        return in_rows(self.data, width)[rows]

    def _refuse_read(self, written: np.ndarray) -> None:
        if (written >= IN_FLIGHT).any():
            raise NotLanded("a read of shared memory that a copy is still writing")
        if (written < 0).any():
            raise Uninitialised("a read of shared memory that nobody wrote")
        raise Race("a read of shared memory that another thread wrote since the last barrier")

    def _note_readers(self, rows: np.ndarray, width: int, me: np.ndarray) -> None:
        read = in_rows(self.read, width)
        before = read[rows]
        read[rows] = np.where((before < self.epoch) | (before == me), me, self.epoch + EVERYBODY)
        lost = read[rows] != me  # to another thread that reads the same byte in this very instruction
        if lost.any():
            self.read[(rows[:, None] * width + np.arange(width))[lost]] = self.epoch + EVERYBODY

    def _claim(self, addresses: np.ndarray, width: int, threads: np.ndarray, values: np.ndarray | None) -> np.ndarray:
        """The rows that threads are about to write, if they race with no other access."""
        rows, me = self._rows(addresses, width), (self.epoch + threads)[:, None]
        written, read = in_rows(self.written, width)[rows], in_rows(self.read, width)[rows]
        others = (written >= self.epoch) & (written != me)
        if (written >= IN_FLIGHT).any():
            raise NotLanded("a write to shared memory that a copy is still writing")
        if values is not None:
            others &= in_rows(self.data, width)[rows] != values
        if others.any():
            raise Race("a write to shared memory that another thread wrote since the last barrier")
        if ((read >= self.epoch) & (read != me)).any():
            raise Race("a write to shared memory that another thread read since the last barrier")
        return rows

    def store(self, addresses: np.ndarray, values: np.ndarray, threads: np.ndarray) -> None:
        """Bytes, `threads width`."""
        width = values.shape[1]
        rows = self._claim(addresses, width, threads, values)
        self._write(rows, values, threads)

    def _write(self, rows: np.ndarray, values: np.ndarray, threads: np.ndarray) -> None:
        data = in_rows(self.data, values.shape[1])
        data[rows] = values
        if (data[rows] != values).any():
            raise Race("two threads write different values to the same shared memory")
        in_rows(self.written, values.shape[1])[rows] = (self.epoch + threads)[:, None]

    def begin_copy(self, addresses: np.ndarray, width: int, threads: np.ndarray) -> np.ndarray:
        """Set rows aside for a copy, which nobody may touch until it has landed."""
        rows = self._claim(addresses, width, threads, None)
        if len(np.unique(rows)) < len(rows):
            raise Race("two copies to the same shared memory")
        in_rows(self.written, width)[rows] = IN_FLIGHT
        return rows

    def land(self, rows: np.ndarray, values: np.ndarray, threads: np.ndarray) -> None:
        """End a copy: its thread sees the values now, the others after a barrier."""
        self._write(rows, values, threads)
