"""Calls of reward functions: the arguments that a signature asks for, one call for all responses, in a thread."""

import asyncio
import functools
import inspect
import threading
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import torch
from beartype import beartype
from torch import Tensor

Numbers = list[float | None]  # None where a reward cannot tell


@beartype
def start(ask: Callable[[], Any], device: str) -> Future:
    """Run a call in a thread of its own, under this thread's precision. Python can exit while the call runs."""
    future: Future = Future()
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)

    def run() -> None:
        try:
            with torch.no_grad(), torch.autocast(device, dtype, enabled):
                future.set_result(ask())
        except BaseException as error:  # raised again where the future is read
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """Return the event loop of all coroutines: one for the process, since they may keep connections open on it."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


async def _awaited(answers: Any) -> Any:
    return await answers


@beartype
def call(label: str, function: Callable, given: Mapping[str, Any]) -> Numbers:
    """Call a reward function and return its checked answers."""
    prompts, completions = given["prompts"], given["completions"]
    positional, keywords = arguments_of(label, function, given)
    try:
        answers = function(*positional, **keywords)
        if inspect.isawaitable(answers):
            answers = asyncio.run_coroutine_threadsafe(_awaited(answers), _event_loop()).result()
    except Exception as error:
        row = _row_at(error, prompts, completions)
        where = f"{len(prompts)} prompts together, from {shown(prompts[0])} on"
        if row is not None:
            where = f"prompt {row}, {shown(prompts[row])}, and the completion {shown(completions[row])}"
        raise RuntimeError(f"{label} raised {error!r} for {where}") from error
    try:
        rows = answers.tolist() if isinstance(answers, Tensor) else answers
        numbers = [None if row is None else float(row) for row in rows]
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{label} returned {answers!r:.200}; expected a number, or None, for each completion"
        ) from error
    if len(numbers) != len(prompts):
        raise ValueError(f"{label} returned {len(numbers)} scores for {len(prompts)} completions")
    return numbers


@beartype
def arguments_of(label: str, function: Callable, given: Mapping[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Return the arguments of a call: all by name if the function knows `completions`, else these two come first."""
    plain = given["prompts"], given["completions"]
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some functions written in C have no signature
        return plain, {}
    kinds = {parameter.kind for parameter in parameters}
    if inspect.Parameter.VAR_POSITIONAL in kinds:  # such as a wrapper, whose signature hides what it passes on
        return plain, {}
    by_keyword = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    all_by_name = "completions" in by_keyword or kinds == {inspect.Parameter.VAR_KEYWORD}
    if not all_by_name:
        if sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters[:2]) < 2:
            raise ValueError(
                f"{label} takes ({', '.join(map(str, parameters))}); expected prompts and completions first, or a "
                "parameter completions"
            )
        parameters = parameters[2:]
    wanted = by_keyword & {p.name for p in parameters}
    if inspect.Parameter.VAR_KEYWORD in kinds:
        wanted |= given.keys() - (set() if all_by_name else {"prompts", "completions"})
    required = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    if missing := [name for name in required if name not in given or name not in by_keyword]:
        raise ValueError(
            f"{label} asks for {' and '.join(map(repr, missing))}; expected names among {sorted(given)}: give prompts "
            "with such a column, or the parameter a default"
        )
    return () if all_by_name else plain, {name: given[name] for name in given if name in wanted}


def _row_at(error: Exception, prompts: list, completions: list) -> int | None:
    """Return the row that a function worked on when it raised, judged by the prompt or completion in its variables."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        held = {id(value) for value in frame.f_locals.values()}
        for parts in (completions, prompts):
            rows = [row for row, part in enumerate(parts) if id(part) in held]
            if len(rows) == 1:
                return rows[0]
    return None


def shown(part: str | Tensor) -> str:
    """Return a prompt or completion as error messages show it."""
    return f"{part if isinstance(part, str) else part.tolist()!r:.200}"
