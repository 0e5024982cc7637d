"""The folder of a training run, and the end of a training command: the saved model and the next commands."""

import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from beartype import beartype
from tqdm import tqdm

from palm_rlhf.model.local_model import MODEL
from palm_rlhf.training.run.checkpoints import complete_checkpoints

RUNS = Path("runs")


@runtime_checkable
class Saved(Protocol):
    """An object with `save_pretrained`: a model, a tokenizer or a chat template."""

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the object to a folder."""
        ...


@beartype
def run_folder(command: str, output_dir: Path | None, resume: bool) -> Path:
    """Return the folder of a run of `command`: the given one, the newest one to resume, or a new one in runs/.

    Raises ValueError if `resume` is set and runs/ has no run of this command with a checkpoint.
    """
    if output_dir is not None:
        return output_dir
    if not resume:
        return RUNS / time.strftime(f"{command}-%Y%m%d-%H%M%S")
    saved = {folder: complete_checkpoints(folder / "checkpoints") for folder in RUNS.glob(f"{command}-*")}
    started = {folder: found[-1].stat().st_mtime for folder, found in saved.items() if found}
    if not started:
        raise ValueError(
            f"got --resume without --output-dir, expected a run of `{command}` with a checkpoint in {RUNS.absolute()}: "
            "name the folder of the run by --output-dir"
        )
    newest = max(started, key=started.__getitem__)
    say(f"continuing {newest}, the newest run")
    return newest


@beartype
def save_model(output_dir: Path, *parts: Saved | None) -> None:
    """Write a model with its tokenizer and template (if any) to the folder `model` of a run."""
    for part in parts:
        if part is not None:
            part.save_pretrained(output_dir / MODEL)


@beartype
def finish(result: dict[str, Any], output_dir: Path, next_commands: Sequence[tuple[str, str]]) -> None:
    """End a command: print the next commands to standard error, and one line of JSON to standard output.

    The process group is left open until Python ends. Accelerate's `end_training` would close it while the trainer still
    exists, and the trainer's deletion can then deadlock with a thread of the group.

    Args:
        result: The figures of the run.
        output_dir: The folder of the run.
        next_commands: Pairs of a description and a command.
    """
    say(f"the model is in {output_dir / MODEL}")
    show_next(next_commands)
    print(json.dumps({**result, "output_dir": str(output_dir), "model": str(output_dir / MODEL)}), flush=True)


@beartype
def finish_chat_model(
    result: dict[str, Any],
    output_dir: Path,
    parts: Sequence[Saved | None],
    more_commands: Sequence[tuple[str, str]] = (),
) -> None:
    """Save a model with its tokenizer and template, and end the command that trained it."""
    save_model(output_dir, *parts)
    folder = quoted(output_dir)
    commands = [("talk with it", f"palm-rlhf chat {folder}"), ("serve it", f"palm-rlhf serve {folder}")]
    finish(result, output_dir, [*commands, *more_commands])


@beartype
def show_next(next_commands: Sequence[tuple[str, str]]) -> None:
    """Print pairs of a description and a command to standard error."""
    for description, command in next_commands:
        say(f"  {description + ':':<19}{command}")


@beartype
def quoted(path: str | Path) -> str:
    """Return a path quoted for a shell."""
    return shlex.quote(str(path))


@beartype
def say(text: str, end: str = "\n") -> None:
    """Print a text for people to standard error, from the first process only; standard output is for figures."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(text, file=sys.stderr, end=end)
