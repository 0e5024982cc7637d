"""The mutants of a module: cosmic-ray's, without those of annotations and decorators, which change no value."""

import ast
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

# What replaces an operator: not what raises a TypeError on most operands, which any test would notice.
REPLACEMENTS = {
    "Add": ("Sub",), "Sub": ("Add",), "Mul": ("Div", "Add"), "Div": ("Mul",), "FloorDiv": ("Div", "Mul"),
    "Mod": ("FloorDiv", "Mul"), "Pow": ("Mul",), "BitAnd": ("BitOr", "BitXor"), "BitOr": ("BitAnd", "BitXor"),
    "BitXor": ("BitOr",), "RShift": ("LShift",), "LShift": ("RShift",),
    "Lt": ("LtE", "GtE"), "LtE": ("Lt", "Gt"), "Gt": ("GtE", "LtE"), "GtE": ("Gt", "Lt"),
    "Eq": ("NotEq",), "NotEq": ("Eq",), "Is": ("IsNot",), "IsNot": ("Is",), "In": ("NotIn",), "NotIn": ("In",),
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One change of one module."""

    module: Path
    operator: str
    occurrence: int  # which of the places in the module that the operator can change
    start: tuple[int, int]  # line, from 1, and column
    end: tuple[int, int]
    before: str = ""  # the first line that differs, without blanks around it and a comment
    after: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """What names it in targets.py, wherever its line moves."""
        return str(self.module), self.before, self.after

    def __str__(self) -> str:
        return f"{self.module}:{self.start[0]} {self.operator.removeprefix('core/')}"

    def plant(self, source: str) -> str:
        """The module's source with this change."""
        changed = mutate_code(source, get_operator(self.operator)(), self.occurrence)
        if changed is None:
            raise ValueError(f"{self} is not there: the source has changed since the mutants were listed")
        return changed

    def described(self, source: str) -> "Mutant":
        """The same, with the line that it changes."""
        pairs = zip(source.splitlines(), self.plant(source).splitlines())
        before, after = next((pair for pair in pairs if pair[0] != pair[1]), ("", ""))
        return replace(self, before=code_of(before), after=code_of(after))


def code_of(line: str) -> str:
    """A line without blanks around it and a comment."""
    return line.partition("  # ")[0].strip()


def mutants_of(root: Path, module: Path) -> list[Mutant]:
    """All mutants of a module, by their places in it."""
    source = (root / module).read_text(encoding="utf-8")
    tree = ast.parse(source)
    hidden, binary = list(annotations(tree)), list(gaps(tree))
    nodes = list(ast_nodes(get_ast(source)))
    found = []
    for name in sorted(operator_names()):
        if not is_plausible(name):
            continue
        operator = get_operator(name)()
        positions = (position for node in nodes for position in operator.mutation_positions(node))
        for occurrence, (start, end) in enumerate(positions):
            if "BinaryOperator" in name and not within(start, end, binary):  # the star of a signature, say
                continue
            if not within(start, end, hidden):
                found.append(Mutant(module, name, occurrence, tuple(start), tuple(end)))
    return sorted(found, key=lambda mutant: (mutant.start, mutant.end, mutant.operator))


def is_plausible(operator: str) -> bool:
    """Whether somebody could have written that by mistake, and a test could tell."""
    kind, *operands = operator.removeprefix("core/").split("_")
    if kind in ("ReplaceBinaryOperator", "ReplaceComparisonOperator"):
        return operands[1] in REPLACEMENTS.get(operands[0], ())
    # beartype and no_grad change no value; the others need arguments or change nothing
    return kind not in ("RemoveDecorator", "VariableInserter", "VariableReplacer", "NoOp")


def within(start: tuple[int, int], end: tuple[int, int], spans: list[tuple[tuple[int, int], tuple[int, int]]]) -> bool:
    """Whether a place lies in one of the spans."""
    return any(first <= start and end <= last for first, last in spans)


def gaps(tree: ast.AST) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Where the operators of binary operations stand: between their operands."""
    for node in ast.walk(tree):
        match node:
            case ast.BinOp(left=left, right=right):
                yield span(left)[1], span(right)[0]
            case ast.AugAssign(target=target, value=value):
                yield span(target)[1], span(value)[0]


def annotations(tree: ast.AST) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Where annotations, decorators, type aliases, assertions and what only type checkers read begin and end."""
    for node in ast.walk(tree):
        match node:
            case ast.arg(annotation=ast.expr() as hidden) | ast.AnnAssign(annotation=hidden):
                yield span(hidden)
            case ast.FunctionDef() | ast.ClassDef():
                returns = node.returns if isinstance(node, ast.FunctionDef) else None
                yield from map(span, [*node.decorator_list, *filter(None, [returns])])
            case ast.Assign(value=ast.BinOp(op=ast.BitOr()) as hidden, targets=[ast.Name(id=name)]) if name.istitle():
                yield span(hidden)
            case ast.keyword(arg="dim", value=ast.UnaryOp(op=ast.USub())):  # the last axis of a matrix is also axis 1
                yield span(node)[0], (node.value.lineno, node.value.col_offset + 1)
            case ast.If(test=ast.Name(id="TYPE_CHECKING")) | ast.keyword(arg="strict"):  # zip's, an assertion
                yield span(node)


def span(node: ast.AST) -> tuple[tuple[int, int], tuple[int, int]]:
    return (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)


def draw(mutants: list[Mutant], number: int | None, seed: int) -> list[Mutant]:
    """One mutant of each place, or of `number` places drawn without replacement.

    A place with many operators, such as `a + b`, which eleven others may replace, counts no more than one with few.
    """
    generator = random.Random(seed)
    places = [list(group) for _, group in groupby(mutants, key=lambda one: (one.module, one.start, one.end))]
    chosen = places if number is None else generator.sample(places, min(number, len(places)))
    return [generator.choice(place) for place in chosen]
