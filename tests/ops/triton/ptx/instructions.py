"""Instructions made ready for execution: what each does to a block."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from .arithmetic import operation
from .program import TYPES, Address, Instruction, Program, unsigned
from .warp import matrices_from_rows, multiply_matrices, reduce, shuffle

Action = Callable[["Block"], None]  # noqa: F821  (which is in block.py, and imports this)
Reader = Callable[["Block"], np.ndarray]  # noqa: F821
WHOLE_WARP = 0xFFFFFFFF


class Step(NamedTuple):
    """An action, or the target of a jump; done by the threads whose guard is true, or without a guard by all."""

    action: Action | None
    target: int | None
    guard: str | None
    negated: bool
    text: str


def prepare(program: Program) -> list[Step]:
    """All instructions of a program; NotImplementedError for what no kernel here has needed yet."""
    return [prepare_instruction(program, instruction) for instruction in program.code]


def prepare_instruction(program: Program, instruction: Instruction) -> Step:
    """An action, or for a branch or a return its target."""
    action = target = None
    if instruction.name == "bra":
        target = program.labels[instruction.operands[-1]]
    elif instruction.name in ("ret", "exit"):
        target = len(program.code)
    else:
        try:
            action = action_of(program, instruction)
        except (KeyError, IndexError, ValueError, TypeError) as unknown:
            raise NotImplementedError(f"{instruction.text} ({unknown!r})") from unknown
    return Step(action, target, instruction.guard, instruction.negated, instruction.text)


def action_of(program: Program, instruction: Instruction) -> Action:
    """What an instruction does that is no jump."""
    name, modifiers, operands = instruction[:3]
    if name in ("ld", "st", "cp", "bar", "barrier"):
        return {"ld": load, "st": store, "cp": copy}.get(name, barrier)(program, modifiers, operands)
    if name in ("shfl", "redux", "ldmatrix", "mma"):
        together = {"shfl": shuffle_lanes, "redux": reduce_lanes, "ldmatrix": load_matrices, "mma": multiply}[name]
        return of_whole_warps(together(program, modifiers, operands))
    if name == "mov" and any(isinstance(operand, tuple) for operand in operands):
        return (unpack if isinstance(operands[0], tuple) else pack)(program, TYPES[modifiers[-1]], operands)
    return compute(program, name, modifiers, operands)


def reader(program: Program, operand: str | int, kind: type) -> Reader:
    """How to get at a register, of which a narrower type takes the low bits, or at an immediate."""
    bits = unsigned(kind)
    if isinstance(operand, int):
        operand &= (1 << 8 * np.dtype(bits).itemsize) - 1
        constant = np.full(program.num_threads, operand, bits).view(kind)
        return lambda block: constant
    wide, narrow = np.dtype(program.type_of(operand)), np.dtype(bits)
    if wide == narrow == kind:
        return lambda block: block.read(operand)
    if wide == narrow:
        return lambda block: block.read(operand).view(kind)
    if wide.itemsize < narrow.itemsize or kind is np.bool_:
        raise KeyError(operand)
    return lambda block: block.read(operand).astype(bits).view(kind)


def readers(program: Program, operands: tuple, kind: type) -> list[Reader]:
    return [reader(program, operand, kind) for operand in operands]


def address_reader(program: Program, address: Address) -> Reader:
    """Addresses, `threads`, as int64."""
    if isinstance(address.base, int):
        return lambda block: np.full(block.threads.shape, address.base + address.offset)
    base = reader(program, address.base, program.type_of(address.base))
    return lambda block: base(block).astype(np.int64) + address.offset


def as_vector(operand) -> tuple:
    return operand if isinstance(operand, tuple) else (operand,)


def columns(block, read: list[Reader]) -> np.ndarray:
    """What several operands hold, side by side: `threads operands`."""
    return np.stack([operand(block) for operand in read], axis=1)


def compute(program: Program, name: str, modifiers: tuple[str, ...], operands: tuple) -> Action:
    """What every thread computes for itself."""
    function, kinds, _ = operation(name, modifiers)
    to, *sources = operands
    if len(sources) != len(kinds):
        raise KeyError(operands)
    read = [reader(program, source, kind) for source, kind in zip(sources, kinds, strict=True)]
    if len(read) == 1:
        first = read[0]
        return lambda block: block.write(to, function(first(block)))
    if len(read) == 2:
        first, second = read
        return lambda block: block.write(to, function(first(block), second(block)))
    return lambda block: block.write(to, function(*[operand(block) for operand in read]))


def pack(program: Program, kind: type, operands: tuple) -> Action:
    """mov of a vector into a register, the first element lowest."""
    to, parts = operands
    bits = np.dtype(f"u{np.dtype(kind).itemsize // len(parts)}").type
    read = readers(program, parts, bits)

    return lambda block: block.write(to, columns(block, read).view(unsigned(kind))[:, 0])


def unpack(program: Program, kind: type, operands: tuple) -> Action:
    """mov of a register into a vector."""
    parts, source = operands
    bits = np.dtype(f"u{np.dtype(kind).itemsize // len(parts)}").type
    read = reader(program, source, unsigned(kind))

    def action(block):
        halves = np.ascontiguousarray(read(block)).view(bits).reshape(-1, len(parts))
        for part, column in zip(parts, halves.T, strict=True):
            block.write(part, column.copy())

    return action


def load(program: Program, modifiers: tuple[str, ...], operands: tuple) -> Action:
    """ld of a parameter, or of one or several numbers in a row from global or shared memory."""
    space, *_, kind = modifiers
    registers, address = as_vector(operands[0]), operands[1]
    if space == "param":
        if address.offset:
            raise KeyError(address)
        return lambda block: block.write(registers[0], np.repeat(block.parameters[address.base], program.num_threads))
    if space not in ("global", "shared"):
        raise KeyError(space)
    read, kind = address_reader(program, address), TYPES[kind]
    width = len(registers) * np.dtype(kind).itemsize

    def action(block):
        loaded = block.load(space, read(block), width).view(kind)
        for register, column in zip(registers, loaded.T, strict=True):
            block.write(register, column.copy())

    return action


def store(program: Program, modifiers: tuple[str, ...], operands: tuple) -> Action:
    """st of one or several numbers in a row to global or shared memory."""
    space, *_, kind = modifiers
    if space not in ("global", "shared"):
        raise KeyError(space)
    address, bits = address_reader(program, operands[0]), unsigned(TYPES[kind])
    read = readers(program, as_vector(operands[1]), bits)

    return lambda block: block.store(space, address(block), columns(block, read).view(np.uint8))


def copy(program: Program, modifiers: tuple[str, ...], operands: tuple) -> Action:
    """cp.async and what awaits it."""
    match modifiers:
        case "async", "commit_group":
            return lambda block: block.commit_copies()
        case "async", "wait_group":
            return lambda block: block.await_copies(operands[0])
        case "async", "wait_all":
            return lambda block: (block.commit_copies(), block.await_copies(0))
        case "async", "ca" | "cg", "shared", "global", *_:
            to, source = (address_reader(program, address) for address in operands[:2])
            width = operands[2]
            size = reader(program, operands[3] if len(operands) > 3 else width, np.uint32)
            return lambda block: block.begin_copy(to(block), source(block), width, size(block))
    raise KeyError(modifiers)


def barrier(program: Program, modifiers: tuple[str, ...], operands: tuple) -> Action:
    """bar.sync 0, of the whole block."""
    if modifiers not in (("sync",), ("sync", "aligned"), ("cta", "sync"), ("cta", "sync", "aligned")) or any(operands):
        raise KeyError(modifiers)
    return lambda block: block.barrier()


def of_whole_warps(action: Action) -> Action:
    """The action, refused where a part of a warp is elsewhere."""

    def checked(block):
        block.require_warps()
        action(block)

    return checked


def shuffle_lanes(program: Program, modifiers: tuple[str, ...], operands: tuple) -> Action:
    """shfl.sync of whole warps."""
    mode, (to, source, lane, clamp, members) = modifiers[1], operands
    if mode not in ("bfly", "idx") or clamp != 31 or members & WHOLE_WARP != WHOLE_WARP:
        raise KeyError(modifiers)
    source, lane = readers(program, (source, lane), np.uint32)
    return lambda block: block.write(to, shuffle(mode, source(block), lane(block)))


def reduce_lanes(program: Program, modifiers: tuple[str, ...], operands: tuple) -> Action:
    """redux.sync of whole warps."""
    _, name, kind = modifiers
    to, source, members = operands
    source, members = reader(program, source, TYPES[kind]), reader(program, members, np.uint32)

    def action(block):
        if (block.active(members(block)) != WHOLE_WARP).any():
            raise NotImplementedError("a reduction over a part of a warp")
        block.write(to, reduce(name, source(block)))

    return action


def load_matrices(program: Program, modifiers: tuple[str, ...], operands: tuple) -> Action:
    """ldmatrix of 1, 2 or 4 matrices; the first 8, 16 or all threads of a warp give the addresses of the rows."""
    if not {"m8n8", "shared", "b16"} < set(modifiers):
        raise KeyError(modifiers)
    registers, address = as_vector(operands[0]), address_reader(program, operands[1])
    lanes = 8 * len(registers)
    transpose = "trans" in modifiers

    def action(block):
        warps = block.active(block.threads).reshape(-1, 32)
        given = block.active(address(block)).reshape(-1, 32)[:, :lanes].reshape(-1)
        rows = block.shared.load(given, 16, warps[:, :lanes].reshape(-1)).reshape(len(warps), -1)
        for register, values in zip(registers, matrices_from_rows(rows, transpose), strict=True):
            block.write(register, block.spread(values))

    return action


def multiply(program: Program, modifiers: tuple[str, ...], operands: tuple) -> Action:
    """mma of 16 x 16 and 16 x 8 matrices of 16-bit floats, added up in float32."""
    if modifiers[2:5] != ("m16n8k16", "row", "col") or modifiers[5::3] != ("f32", "f32"):
        raise KeyError(modifiers)
    if modifiers[6] not in ("bf16", "f16") or modifiers[7] != modifiers[6]:
        raise KeyError(modifiers)
    results, a, b, c = operands
    a, b, c = readers(program, a, np.uint32), readers(program, b, np.uint32), readers(program, c, np.float32)
    function = partial(multiply_matrices, bfloat16=modifiers[6] == "bf16")

    def action(block):
        fragments = ([part(block) for part in operand] for operand in (a, b, c))
        for register, values in zip(results, function(*fragments), strict=True):
            block.write(register, values)

    return action
