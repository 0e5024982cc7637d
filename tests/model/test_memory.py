"""Peak memory, as the system counts it, grows linearly with the length of a sequence."""

import json
import os
import subprocess
import sys

import pytest

# Every measurement is a child of one process that has imported everything: what it holds beyond that is its own.
MEASURE = """
import json, os, resource, sys
import torch
from palm_rlhf import PaLM
from palm_rlhf.ops.attention import attention

torch.set_num_threads(1)
MASKS = {
    "plain": lambda n: {},
    "key_mask": lambda n: {"key_mask": (torch.arange(n) > n // 8).unsqueeze(0)},
    "document_ids": lambda n: {"document_ids": (torch.arange(n) // 1000).unsqueeze(0)},
}

def attend(n, mask="plain", implementation="auto", causal=True, train=True):
    q, k, v = (torch.randn(1, 1, n, 16, requires_grad=train) for _ in range(3))
    out = attention(q, k, v, causal=causal, **MASKS[mask](n), implementation=implementation)
    if train:
        out.sum().backward()

def step(n, mask="plain", **options):
    palm = PaLM(**{"num_tokens": 64, "dim": 64, "depth": 2, "heads": 2, "dim_head": 16, **options})
    palm(torch.randint(64, (1, n)), return_loss=True, **MASKS[mask](n)).backward()

def peak(function, n, options):
    readable, writable = os.pipe()
    if (child := os.fork()) == 0:
        function(256, **options)  # what is set up once is not counted
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        function(n, **options)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        os.write(writable, str(grown * (1 if sys.platform == "darwin" else 1024)).encode())
        os._exit(0)
    _, status = os.waitpid(child, 0)
    os.close(writable)
    return int(os.read(readable, 100)) if status == 0 else None

cases = json.loads(sys.argv[1])
print(json.dumps([[peak(globals()[name], n, options) for n in lengths] for name, lengths, options in cases]))
"""

pytestmark = pytest.mark.slow(18)

CASES = {
    "plain": ("attend", (4096, 8192), {}),
    "bidirectional": ("attend", (4096, 8192), {"causal": False}),
    "key_mask": ("attend", (4096, 8192), {"mask": "key_mask"}),
    "document_ids": ("attend", (4096, 8192), {"mask": "document_ids"}),
    "inference": ("attend", (4096, 8192), {"mask": "key_mask", "train": False}),
    "all scores": ("attend", (2048, 4096), {"implementation": "eager"}),
    "a whole mask": ("attend", (2048, 4096), {"implementation": "fused", "mask": "key_mask"}),
    "step": ("step", (4096, 8192), {}),
    "packed step": ("step", (4096, 8192), {"mask": "document_ids"}),
    "deep step": ("step", (1024,), {"dim": 256, "depth": 8}),
    "deep step, computed again": ("step", (1024,), {"dim": 256, "depth": 8, "gradient_checkpointing": True}),
}


@pytest.fixture(scope="module")
def peaks() -> dict[str, list[int]]:
    """Peak bytes of every case, for each of its lengths."""
    command = [sys.executable, "-c", MEASURE, json.dumps(list(CASES.values()))]
    # glibc then gives every freed tensor back at once; else the peak would count what it keeps for later
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = dict(zip(CASES, json.loads(done.stdout), strict=True))
    assert not any(None in case for case in found.values()), done.stderr
    return found


@pytest.mark.parametrize("case", ["plain", "bidirectional", "key_mask", "document_ids", "inference"])
def test_attention_holds_nothing_for_every_pair_of_tokens(peaks, case):
    half, whole = peaks[case]
    assert whole < 3 * half
    assert whole - half < 8192**2 - 4096**2  # what is added is not even one byte for every added pair


@pytest.mark.parametrize("case", ["all scores", "a whole mask"])
def test_what_holds_all_pairs_is_caught(peaks, case):
    half, whole = peaks[case]
    assert whole > 3 * half
    assert whole - half > 4096**2 - 2048**2


@pytest.mark.parametrize("case", ["step", "packed step"])
def test_a_training_step_on_8192_tokens_is_linear(peaks, case):
    half, whole = peaks[case]
    assert whole < 3 * half
    assert whole < 200 * 2**20


def test_gradient_checkpointing_holds_less(peaks):
    assert peaks["deep step, computed again"][0] < 0.4 * peaks["deep step"][0]
