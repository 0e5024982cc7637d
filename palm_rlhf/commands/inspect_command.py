"""The command ``palm-rlhf inspect``: a page that shows an RLHF run token by token."""

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from palm_rlhf.evaluation.reports.inspection import write_inspection


def inspect(run: Annotated[Positional[Path], arg(metavar="RUN")], output: Path | None = None) -> None:
    """Write a page that shows a run of reinforcement learning token by token.

    Each token of the kept responses is coloured by its advantage, ratio, KL, value or surprise.

    Args:
        run: The output folder of the run, which may still be training.
        output: The HTML file to write; by default inspect.html in the folder of the run.
    """
    print(f"wrote {write_inspection(run, output)}: open it in a browser")
