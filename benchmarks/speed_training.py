"""Rows of `gpu_speed.py`: training steps of models of one shape, and `examples/train.py`."""

import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from training_models import Size, parity_errors, rows
from utilization import mfu, peak_of, time_in_a_row, training_flops

from palm_rlhf import PaLM

Rows = Iterator[tuple[str, bool, dict[str, Any]]]
ROOT = Path(__file__).resolve().parent.parent
MAX_DIFFERENCE = 1e-2  # of logits in float32
NUM_STEPS = {"cuda": 10, "cpu": 1}
EXAMPLE = {  # further options of the example: on a GPU none, so that its defaults are timed
    "cuda": ["--num-steps", "120", "--max-seconds", "30"],
    "cpu": "--num-steps 6 --dim 32 --depth 1 --batch-size 2 --seq-len 32 --eval-context 16 --eval-tokens 100".split(),
}


def parity(size: Size, title: str) -> Rows:
    """The logits of the other packages with our weights, in float32 on the CPU."""
    for name, difference in parity_errors(size.config).items():
        yield f"training {title}, parity, {name}", difference < MAX_DIFFERENCE, {"largest difference": difference}


def training(device: str, size: Size, title: str, name: str) -> Rows:
    """The steps of a row of `training_models.rows`, one after the other."""
    label = f"training {title}, {size.batch} x {size.seq_len}, {name}"
    with torch.device("meta"):
        num_parameters = sum(parameter.numel() for parameter in PaLM.from_config(size.config).parameters())
    whole, half = (training_flops(size.config, num_parameters, size.seq_len, causal=c) for c in (False, True))
    peak = peak_of(torch.cuda.get_device_name()) if device == "cuda" else None
    try:
        step = rows(size, device)[name]()
        timing = time_in_a_row(step, num_steps=NUM_STEPS[device], series=3 if device == "cuda" else 1)
    except ImportError as missing:
        yield label, True, {"left out": f"not installed: {missing}"}
        return
    rate = size.batch * size.seq_len / timing.seconds
    figures = {"tokens/s": rate, "MFU": mfu(rate, whole, peak), "MFU causal": mfu(rate, half, peak)}
    figures |= {"peak GB": timing.peak_gigabytes, "first step s": timing.first_seconds}
    yield label, True, figures
    del step
    gc.collect()


def prepare(device: str, size: Size, name: str) -> None:
    """One step, whose compilation stays in the caches of torch.compile and Triton."""
    rows(size, device)[name]()()


def example(device: str) -> Rows:
    """Steps a second of `examples/train.py`, from its log, without its first quarter, in which kernels compile."""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.txt")
        sources = sorted((ROOT / "palm_rlhf").rglob("*.py"))[: None if device == "cuda" else 20]
        text.write_text("".join(path.read_text(encoding="utf-8") for path in sources), encoding="utf-8")
        command = [
            sys.executable,
            str(ROOT / "examples/train.py"),
            "--data",
            str(text),
            "--output-dir",
            f"{folder}/run",
        ]
        command += ["--log-every", "1", "--plot", "False", "--sample-bytes", "1", *EXAMPLE[device]]
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            yield "examples/train.py", False, {"left out": f"it ended with status {done.returncode}: {last}"}
            return
        lines = [json.loads(line) for line in Path(folder, "run/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    kept = steps[len(steps) // 4 :]
    rate = (kept[-1]["step"] - kept[0]["step"]) / (kept[-1]["elapsed"] - kept[0]["elapsed"])
    yield "examples/train.py", True, {"steps/s": rate, "steps": len(steps), "whole s": time.perf_counter() - started}
