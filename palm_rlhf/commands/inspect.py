"""The command ``palm-rlhf inspect``: what an update of reinforcement learning did to each token."""

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from palm_rlhf.evaluation.reports.inspection import write_inspection


def inspect(run: Annotated[Positional[Path], arg(metavar="RUN")], output: Path | None = None) -> None:
    """Write a page that shows a run of reinforcement learning token by token.

    Each token of the responses that the run has kept is coloured by its advantage, ratio, KL, value or surprise.

    Args:
        run: The output folder of the run, which may be going on.
        output: The HTML file to write; inspect.html in that folder by default.
    """
    print(f"wrote {write_inspection(run, output)}: open it in a browser")
