"""The benchmark that chooses tiles: it ends with the fastest of those that are right, in the form of the tables."""

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch

from palm_rlhf.ops.triton.tiles import Tile

SMALL, LARGE, THIRD = Tile(64, 64, 4, 3), Tile(128, 128, 8, 3), Tile(32, 64, 4)
NEVER = float("inf")


@pytest.fixture
def tiles(root, monkeypatch):
    """The benchmark as a module."""
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    return importlib.import_module("kernel_tiles")


@pytest.mark.slow(15)
def test_it_measures_every_kernel_in_the_interpreter(root):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(root / "benchmarks" / "kernel_tiles.py"), "--device", "cpu"]
    done = subprocess.run(
        [*command, "--dims", "64", "--candidates", "1"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *_, entries, line = done.stdout.splitlines()
    found = json.loads(line)
    assert entries.startswith('attention_decode.TILES: "sm_80": {64: Tile(16, ')
    kinds = {(kernel, dim, masked) for kernel, dim, masked, _, _ in found["milliseconds"]}
    kernels = ("forward", "keys", "queries", "decode")
    assert kinds == {(kernel, 64, masked) for kernel in kernels for masked in (False, True)}
    assert len(found["milliseconds"]) == 16  # two tiles for each, all of them right


def test_without_a_gpu_it_measures_nothing(root):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(root / "benchmarks" / "kernel_tiles.py")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 3 and done.stdout.startswith("no GPU"), done.stderr


def test_the_fastest_tile_is_the_entry_and_masks_get_their_own_where_it_pays(tiles):
    times = {}
    for kernel, dim, plain, masked in (
        ("keys", 64, (3.0, 2.0, NEVER), (5.0, 5.05, 9.0)),  # the other is faster under masks, but by no more than noise
        ("keys", 128, (3.0, 2.0, NEVER), (4.0, 5.0, 9.0)),
        ("queries", 64, (NEVER, NEVER, NEVER), (1.0, 1.0, 1.0)),
        ("decode", 64, (3.0, 2.0, 1.0), (1.0, 2.0, 3.0)),  # has no table for masks
    ):
        for is_masked, numbers in ((False, plain), (True, masked)):
            for tile, number in zip((SMALL, LARGE, THIRD), numbers, strict=True):
                times[tiles.Job(kernel, dim, is_masked, tile)] = number
    assert tiles.entries(times, "sm_90") == {
        "attention_keys_backward.KEY_TILES": {64: LARGE, 128: LARGE},
        "attention_keys_backward.MASKED_KEY_TILES": {128: SMALL},
        "attention_decode.TILES": {64: THIRD},
    }


@pytest.mark.parametrize("kernel", ["forward", "keys", "queries", "decode"])
def test_a_job_launches_its_kernel_with_its_tile(tiles, kernel):
    """Of a call with a mask too, also where another tile is in the table of exceptions."""
    aot = importlib.import_module("aot")
    for masked in (False, True):
        job = tiles.Job(kernel, 256, masked, Tile(16, 16, 2, 5))
        work = tiles.work_of(job, tiles.Size(1, 1, 128, 4, 2), 128, "cpu")

        def run(job=job, work=work):
            with tiles.using(job, "sm_90"):
                tiles.step_of(job, work)[0]()

        named = {"forward": "forward_kernel", "decode": "decode_kernel"}.get(kernel, f"{kernel}_backward_kernel")
        launched = [launch for launch in aot.record(run, "sm_90") if launch.kernel.__name__ == named]
        assert launched and all(launch.options["num_stages"] == 5 for launch in launched)


def test_today_s_tiles_come_first_and_once(tiles):
    for arch in ("sm_80", "sm_90", "sm_100"):
        found = tiles.jobs(("forward", "keys"), (64, 256), arch, 3)
        assert len(found) == len(set(found)) and len(found) <= 2 * 2 * 2 * 4
        assert found[0] == tiles.Job("forward", 64, False, tiles.TABLES["forward"].tiles[arch][64])


def test_wrong_results_are_refused(tiles):
    truth = [torch.tensor([1.0, -2.0]).double(), torch.tensor([0.001]).double()]
    right = [truth[0].bfloat16(), torch.tensor([0.0014]).bfloat16()]  # 0.1 counts as the largest number at least
    assert tiles.agree(right, truth)
    assert not tiles.agree([truth[0].bfloat16() * 1.03, right[1]], truth)
    assert not tiles.agree([right[0], torch.tensor([float("nan")]).bfloat16()], truth)
