"""The folder of a training command's run: where it is, what is saved to it, and what to do with it next."""

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

from palm_rlhf.model.weights_folder import MODEL
from palm_rlhf.training.run.checkpoints import complete_checkpoints

RUNS = Path("runs")


@runtime_checkable
class Saved(Protocol):
    """What has a `save_pretrained`: models, tokenizers, templates."""

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes it to a folder."""
        ...


@beartype
def run_folder(command: str, output_dir: Path | None, resume: bool) -> Path:
    """The folder of a run of `command`: the one given, the newest that can be resumed, or a new one in runs/.

    ValueError where a run is to be resumed and runs/ has none of this command with a checkpoint.
    """
    if output_dir is not None:
        return output_dir
    if not resume:
        return RUNS / time.strftime(f"{command}-%Y%m%d-%H%M%S")
    saved = {folder: complete_checkpoints(folder / "checkpoints") for folder in RUNS.glob(f"{command}-*")}
    started = {folder: found[-1].stat().st_mtime for folder, found in saved.items() if found}
    if not started:
        raise ValueError(
            f"got --resume without --output-dir, and {RUNS.absolute()} has no run of `{command}` with a checkpoint; "
            "expected one to go on with: name its folder by --output-dir"
        )
    newest = max(started, key=started.__getitem__)
    say(f"going on with {newest}, the newest run")
    return newest


@beartype
def save_model(output_dir: Path, *parts: Saved | None) -> None:
    """Writes a model, and the tokenizer and template that it has, to the folder `model` of a run."""
    for part in parts:
        if part is not None:
            part.save_pretrained(output_dir / MODEL)


@beartype
def finish(result: dict[str, Any], output_dir: Path, next_commands: Sequence[tuple[str, str]]) -> None:
    """Ends a command: on standard error what to do next, (words, command) each; on standard output a line of JSON.

    The connection of several processes ends when Python does: ended before the trainer is gone, as by accelerate's
    `end_training`, its last reference can wait for a thread that waits for it.
    """
    say(f"the model is in {output_dir / MODEL}")
    show_next(next_commands)
    print(json.dumps({**result, "output_dir": str(output_dir), "model": str(output_dir / MODEL)}), flush=True)


@beartype
def show_next(next_commands: Sequence[tuple[str, str]]) -> None:
    """Says what can be done with what was made, (words, command) each."""
    for words, command in next_commands:
        say(f"  {words + ':':<19}{command}")


@beartype
def quoted(path: str | Path) -> str:
    """A path as a shell reads it."""
    return shlex.quote(str(path))


@beartype
def say(text: str, end: str = "\n") -> None:
    """Words for people go to standard error, from the first process alone; standard output has the numbers."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(text, file=sys.stderr, end=end)
