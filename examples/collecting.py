"""The pages of examples/human_loop.py: palm-rlhf collect in a process of its own."""

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

COMMAND = "from palm_rlhf.cli import main; main()"  # palm-rlhf, by the Python that runs the example


@contextmanager
def collecting(database: Path, port: int, log: Path) -> Iterator[str]:
    """Run palm-rlhf collect on a database for the length of a block, and yield the address of its pages.

    Raises RuntimeError if it does not start; `log` tells why.
    """
    command = [sys.executable, "-c", COMMAND, "collect", "--database", str(database), "--port", str(port)]
    with log.open("a") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    assert process.stdout is not None
    try:
        found = re.search(r"https?://\S+", process.stdout.readline())
        if found is None:
            raise RuntimeError(f"palm-rlhf collect did not start: {log.read_text()}")
        threading.Thread(target=process.stdout.read, daemon=True).start()
        yield found[0].rstrip("/") + "/"
    finally:
        process.terminate()
        process.wait()
