"""Two real processes: their gradients, scores and checkpoints are those of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from palm_rlhf.training.run.log import read_metrics

# Run by the test itself, and by each of two processes.
RUN = """
import itertools
import numpy as np, torch
from palm_rlhf.model.palm import PaLM
from palm_rlhf.training import LanguageModelTrainer, LMConfig

def trainer(folder, batch_size, dropout=0.0, **options):
    torch.manual_seed(0)
    palm = PaLM(num_tokens=256, dim=32, depth=2, heads=2, dim_head=16, dropout=dropout)
    generator = np.random.default_rng(1)
    sources = [generator.integers(0, 256, length) for length in (40, 5, 9, 3)]
    # With an eps this large AdamW's steps are those of gradient descent, so that weights show what gradients were.
    config = LMConfig(batch_size=batch_size, grad_accum=2, seq_len=16, eval_context=8, num_steps=4, warmup_steps=0,
                      learning_rate=1e6, eps=1e6, weight_decay=0.0, grad_clip=0.0, precision="float32", log_every=1,
                      eval_every=1, save_every=2, plot=False)
    return LanguageModelTrainer(palm, train_data=sources, valid_data=generator.integers(0, 256, 331), config=config,
                                output_dir=folder, **options)
"""
TWO_PROCESSES = """
import os, pathlib, sys
from palm_rlhf.training.run.launch import leave_the_others
out = sys.argv[1]
trainer(f"{out}/two", batch_size=2).train()
list(trainer(f"{out}/whole", batch_size=2, dropout=0.2).steps())
list(itertools.islice(trainer(f"{out}/cut", batch_size=2, dropout=0.2).steps(), 3))
list(trainer(f"{out}/cut", batch_size=2, dropout=0.2, resume=True).steps())
leave_the_others()
threads = [(task / "comm").read_text() for task in pathlib.Path("/proc/self/task").glob("*")]
pathlib.Path(f"{out}/threads{os.environ['RANK']}").write_text("".join(threads))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The folder that two processes have written their runs to."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "script.py").write_text(RUN + TWO_PROCESSES)
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*launch, folder / "script.py", folder], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints/step_00000004/model/model.safetensors")


def test_two_processes_do_what_one_does(runs):
    names = {}
    exec(RUN, names)
    names["trainer"](runs / "one", batch_size=4).train()
    one, two = (read_metrics(runs / name / "metrics.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) == 5
    for mine, theirs in zip(one, two, strict=True):
        assert mine.keys() == theirs.keys()
        for key in mine.keys() & {"loss", "grad_norm", "bits_per_byte"}:
            assert mine[key] == pytest.approx(theirs[key], rel=1e-6)
    torch.testing.assert_close(weights(runs / "one"), weights(runs / "two"), rtol=0, atol=1e-6)


def test_two_processes_resume_to_the_bit(runs):
    whole, cut = weights(runs / "whole"), weights(runs / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_processes_draw_different_dropout(runs):
    state = json.loads((runs / "whole/checkpoints/step_00000004/state.json").read_text())
    first, second = state["random_states"]
    assert first["torch"] != second["torch"]


@pytest.mark.skipif(sys.platform != "linux", reason="threads are listed by Linux")
def test_no_thread_of_a_connection_outlives_it_to_abort_the_process_at_its_exit(runs):
    for rank in (0, 1):
        threads = (runs / f"threads{rank}").read_text()
        assert "python" in threads
        assert "gloo" not in threads
