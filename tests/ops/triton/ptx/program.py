"""The text of a PTX kernel -> its instructions, their operands told apart.

The language: NVIDIA, "Parallel Thread Execution ISA". Understood is what Triton emits: one entry, no calls, and
dynamic shared memory, which begins at the address 0.
"""

import re
from typing import NamedTuple

import numpy as np

TYPES = {
    "pred": np.bool_, "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16,
    "s16": np.int16, "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "b64": np.uint64, "u64": np.uint64,
    "s64": np.int64, "f32": np.float32,
}  # fmt: skip

COMMENT = re.compile(r"//[^\n]*")
NOT_CODE = re.compile(r"^\s*\.(loc|file)\b[^\n]*", re.MULTILINE)
ENTRY = re.compile(r"\.entry\s+(?P<name>[\w$]+)\s*\((?P<parameters>[^)]*)\)(?P<directives>[^{]*)\{", re.DOTALL)
PARAMETER = re.compile(r"\.param\s+\.(\w+)[^,]*?([\w$]+)\s*(?:,|$)")
REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(%\w+?)<\d+>")
LABEL = re.compile(r"\s*([\w$]+):(?!:)")
STATEMENT = re.compile(r"(?:@(?P<negated>!?)(?P<guard>%\w+)\s+)?(?P<name>[\w.:]+)\s*(?P<operands>.*)", re.DOTALL)
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")


def unsigned(kind: type) -> type:
    """The type of the bits of a number; predicates stay what they are."""
    return kind if kind is np.bool_ else np.dtype(f"u{np.dtype(kind).itemsize}").type


class Address(NamedTuple):
    """What is written [base+offset]; the base is a register, the name of a parameter, or a number."""

    base: str | int
    offset: int


class Instruction(NamedTuple):
    """The operands are registers and labels by name, immediates, addresses, and tuples of these for a vector."""

    name: str
    modifiers: tuple[str, ...]
    operands: tuple
    guard: str | None
    negated: bool
    text: str


class Program(NamedTuple):
    """A kernel: the types of its parameters by name, those of its registers by prefix, and where its labels lead."""

    name: str
    num_threads: int
    parameters: dict[str, str]
    registers: dict[str, type]
    code: list[Instruction]
    labels: dict[str, int]

    def type_of(self, register: str) -> type:
        """The unsigned type as wide as a register; those with a dot in their name, as %tid.x, are special."""
        return np.uint32 if "." in register else self.registers[register.rstrip("0123456789")]


def parse_operand(text: str):
    """A register or a label, the bits of a number, an `Address`, or a tuple of operands."""
    if text.startswith("{"):
        return tuple(parse_operand(part.strip()) for part in text[1:-1].split(","))
    if text.startswith("["):
        base, _, offset = text[1:-1].replace(" ", "").partition("+")
        return Address(parse_operand(base), int(offset or "0", 0))
    if text == "global_smem":
        return 0
    if text[:2] in ("0f", "0F"):
        return int(text[2:], 16)
    if text[0].isdigit() or text[0] == "-":
        return int(text.rstrip("U"), 0)
    return text


def parse_instruction(text: str) -> Instruction:
    """One statement without its semicolon."""
    statement = STATEMENT.fullmatch(text)
    if statement is None:
        raise NotImplementedError(f"not a PTX instruction: {text}")
    name, *modifiers = statement["name"].replace("::cta", "").split(".")  # shared::cta is shared, by its full name
    operands = tuple(parse_operand(operand) for operand in OPERAND.findall(statement["operands"]))
    return Instruction(name, tuple(modifiers), operands, statement["guard"], bool(statement["negated"]), text)


def body_of(ptx: str, start: int) -> str:
    """What lies between the brace that opens just before `start` and the one that closes it."""
    depth = 1
    for brace in re.finditer(r"[{}]", ptx[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return ptx[start : start + brace.start()]
    raise ValueError("the PTX ends inside its kernel")


def parse(ptx: str) -> Program:
    """The one kernel of a PTX module."""
    ptx = NOT_CODE.sub("", COMMENT.sub("", ptx))
    entry = ENTRY.search(ptx)
    if entry is None or ENTRY.search(ptx, entry.end()):
        raise ValueError("a PTX module with exactly one .entry is needed")
    threads = re.search(r"\.reqntid\s+(\d+)(?:\s*,\s*1)*\s*$", entry["directives"].strip(), re.MULTILINE)
    parameters = {name: kind for kind, name in PARAMETER.findall(entry["parameters"])}
    body = body_of(ptx, entry.end())
    registers = {prefix: unsigned(TYPES[kind]) for kind, prefix in REGISTERS.findall(body)}
    code, labels = [], {}
    for statement in body.split(";"):
        while label := LABEL.match(statement):
            labels[label[1]] = len(code)
            statement = statement[label.end() :]
        statement = statement.strip()
        if statement and not statement.startswith("."):
            code.append(parse_instruction(statement))
    return Program(entry["name"], int(threads[1]), parameters, registers, code, labels)
