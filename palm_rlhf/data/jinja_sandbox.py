"""The sandbox of chat templates, which come with models: they reach nothing outside, and their work is bounded."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from functools import cache, lru_cache
from typing import Any

# Of one rendering: passes of loops, and calls, each of which is as slow as ten. They take a few seconds, and are far
# more than long conversations need.
MAX_STEPS, STEPS_OF_CALL = 4 * 10**6, 10
MAX_LENGTH = 2**24  # of a text or list that an operation makes
_steps: ContextVar[list[int]] = ContextVar("steps")


@lru_cache(maxsize=16)
def compiled(source: str) -> Any:
    """Return a Jinja template ready to render within `bounded`. Raises ValueError if it is not valid."""
    try:
        return sandbox().from_string(source)
    except Exception as error:  # of Jinja, and of Python for blocks or brackets in too many others
        raise ValueError(f"the chat template is not valid Jinja ({error}), mend it: {source[:200]!r}") from error


@contextmanager
def bounded() -> Iterator[None]:
    """Bound the work of the template that is rendered in the block; SecurityError of Jinja is raised beyond it."""
    token = _steps.set([0])
    try:
        yield
    finally:
        _steps.reset(token)


@cache
def sandbox() -> Any:
    """Return the environment of the templates of Hugging Face, as in transformers; `generation` blocks mark nothing."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(Extension):
        tags = {"generation"}  # noqa: RUF012 (it is Jinja's)

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(OPERATORS)

        def _generate(self, source, *args, **kwargs):
            """Generate the code of a template in which loops count their passes, and joined texts are measured."""

            def filtered(node, name):
                return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno, environment=self)

            for loop in list(source.find_all(nodes.For)):
                loop.iter = filtered(loop.iter, "counted")
            for joined in list(source.find_all(nodes.Concat)):
                joined.nodes = [
                    filtered(nodes.Concat(joined.nodes, lineno=joined.lineno, environment=self), "measured")
                ]
            return super()._generate(source, *args, **kwargs)

        def call(__self, __context, __function, *args, **kwargs):  # named as in Jinja, beside names of templates
            count_steps(STEPS_OF_CALL)
            return super().call(__context, __function, *args, **kwargs)

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        # the filter of Jinja itself escapes characters of HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(form):
        return datetime.now().strftime(form)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationTag])
    environment.binop_table |= OPERATORS
    environment.filters |= {"tojson": tojson, "counted": counted, "measured": measured}
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment


def count_steps(number: int) -> None:
    """Count a pass of a loop, or a call."""
    steps = _steps.get()
    steps[0] += number
    if steps[0] > MAX_STEPS:
        refuse(f"more than {MAX_STEPS:,} steps, expected fewer")


def counted(values: Iterable[Any]) -> Iterator[Any]:
    """Yield the values over which a loop runs."""
    for value in values:
        count_steps(1)
        yield value


def measured(value: Any) -> Any:
    """Return a text or list that is not too long."""
    if hasattr(value, "__len__"):
        check_length(len(value))
    return value


def total(left: Any, right: Any) -> Any:
    """Return `left + right`."""
    return measured(left + right)


def product(left: Any, right: Any) -> Any:
    """Return `left * right`."""
    for one, other in ((left, right), (right, left)):
        if hasattr(one, "__len__") and isinstance(other, int):
            check_length(len(one) * other)
    return left * right


def power(left: Any, right: Any) -> Any:
    """Return `left**right`, of which the digits count."""
    if isinstance(left, int) and isinstance(right, int):
        check_length(left.bit_length() * right)
    return left**right


OPERATORS = {"+": total, "*": product, "**": power}


def check_length(length: int) -> None:
    """Refuse a text, list or number that is too long."""
    if length > MAX_LENGTH:
        refuse(f"a text or list of {length:,}, expected at most {MAX_LENGTH:,}")


def refuse(work: str) -> None:
    """Raise the error of Jinja for what a sandbox does not allow."""
    from jinja2.exceptions import SecurityError

    raise SecurityError(f"it takes {work}: take another template")
