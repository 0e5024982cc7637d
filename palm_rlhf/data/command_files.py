"""The files of a command of `palm-rlhf data`: read twice if needed, not written over unasked, and broken records."""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from beartype import beartype

from palm_rlhf.data.files.json_record import BrokenRecord
from palm_rlhf.data.files.records import STANDARD


def offers_to_skip(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command; its error for a broken record names the option that leaves such records out."""

    @wraps(command)
    def run(*args: Any, **options: Any) -> None:
        try:
            command(*args, **options)
        except ValueError as error:
            if isinstance(error.__cause__, BrokenRecord):
                raise ValueError(f"{error}, or leave out broken records with --skip-broken") from error
            raise

    return run


@beartype
def refuse_existing(overwrite: bool, *outs: str | None) -> None:
    """Raise FileExistsError if a file would be written over without --overwrite; pipes and devices are allowed."""
    for out in outs:
        if out not in (None, STANDARD) and os.path.isfile(out) and not overwrite:
            raise FileExistsError(f"{out} exists already: choose another name, or write over it with --overwrite")


def check_eval(fraction: float, eval_out: str | None, out: str) -> None:
    """Raise ValueError if a held-out share and its file are not given together, or the file is the other one."""
    if (fraction > 0) != (eval_out is not None) or out == eval_out:
        raise ValueError(
            f"got eval_fraction={fraction:g}, eval_out={eval_out} and out={out}; expected a fraction above 0 together "
            "with another file to write to: give both --eval-fraction and --eval-out"
        )


@contextmanager
def seekable(file: str) -> Iterator[str]:
    """Yield the path of a file that can be read twice: standard input is copied to a temporary file."""
    if file != STANDARD:
        yield file
        return
    with tempfile.TemporaryDirectory(prefix="palm-rlhf-") as folder:
        path = os.path.join(folder, "standard-input")
        with open(path, "wb") as copy:
            shutil.copyfileobj(sys.stdin.buffer, copy)
        yield path
