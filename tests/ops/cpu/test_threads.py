"""How threads wait and how many there are: what the user says, then what the machine's load asks for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from palm_rlhf.ops.cpu import threads

SETTINGS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
SETTLED = """
import json, os, sys
from palm_rlhf.ops.cpu import threads
threads.share_the_machine()
settings = {name: os.environ.get(name) for name in sys.argv[1:]}
print(json.dumps({**settings, "adapts": threads._State.adapts, "heavy": "torch" in sys.modules}))
"""
CALLERS = """
import json, sys
from palm_rlhf.ops.cpu import threads
threads.share_the_machine()
import numpy as np, torch
from palm_rlhf import PaLM
from palm_rlhf.data.tokenizer import ByteTokenizer
from palm_rlhf.serving.engine import Engine
from palm_rlhf.serving.generation import Request
from palm_rlhf.training import LanguageModelTrainer, LMConfig

torch.set_num_threads(2)
palm = PaLM(num_tokens=256, dim=16, depth=1, heads=1, dim_head=8)
text = np.arange(40, dtype=np.uint8)
config = LMConfig(seq_len=8, eval_context=4, num_steps=1, plot=False)
trainer = LanguageModelTrainer(palm, train_data=text, config=config)

def serve():
    with Engine(palm, ByteTokenizer()) as engine:
        list(engine.submit(Request([1, 2], max_new_tokens=2)))

callers = {
    "generate": lambda: palm.generate(3),
    "train": lambda: list(trainer.steps()),
    "evaluate": lambda: trainer.evaluate(text),
    "serve": serve,
}
tried = {}
for name, call in callers.items():
    threads._State.most, threads._State.looked, threads._State.tried = None, *2 * [float("-inf")]
    call()
    tried[name] = threads._State.most is not None
threads._State.most, threads._State.looked, threads._State.tried = None, *2 * [float("-inf")]
threads.adapt("cuda")
tried["cuda"] = threads._State.most is not None
print(json.dumps({**tried, "threads": torch.get_num_threads()}))
"""


def python(code: str, *arguments: str, **settings: str) -> dict:
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **settings}
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "said",
    [{}, {"OMP_NUM_THREADS": "3"}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}, {"KMP_BLOCKTIME": "9"}],
    ids=str,
)
def test_what_the_user_says_of_threads_counts_and_nothing_heavy_is_loaded(said):
    settled = python(SETTLED, *SETTINGS, **said)
    assert settled.pop("heavy") is False
    assert settled.pop("adapts") is ("OMP_NUM_THREADS" not in said)
    waits = said.keys() - {"OMP_NUM_THREADS"}
    assert settled == dict.fromkeys(SETTINGS) | ({} if waits else threads.WAITING) | said


def started(root, *command: str) -> str:
    """What the runtime of OpenMP says of its settings when a command of ours loads torch."""
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    environment |= {"PYTHONPATH": str(root), "OMP_DISPLAY_ENV": "VERBOSE"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, cwd=root).stderr


@pytest.mark.parametrize("command", [("-m", "palm_rlhf.cli", "info"), ("examples/train.py", "--help")], ids=" ".join)
def test_commands_settle_it_before_torch_is_loaded(root, command):
    if sys.platform != "linux" or "libgomp" not in Path("/proc/self/maps").read_text():
        return  # another runtime, which says other things
    shown = started(root, *command)
    assert f"GOMP_SPINCOUNT = '{threads.WAITING['GOMP_SPINCOUNT']}'" in shown


@pytest.mark.parametrize("example", ["rlhf", "serve_and_ask", "sft"])
def test_every_example_settles_it_before_it_imports_torch(root, example):
    lines = (root / f"examples/{example}.py").read_text().splitlines()
    imports = [number for number, line in enumerate(lines) if line.startswith(("import ", "from "))]
    settled = next(number for number, line in enumerate(lines) if line.startswith("share_the_machine()"))
    before = {lines[number].split()[1].partition(".")[0] for number in imports if number < settled}
    assert before <= sys.stdlib_module_names | {"palm_rlhf"}
    assert [line for line in lines[:settled] if "palm_rlhf" in line and "import" in line] == [
        "from palm_rlhf.ops.cpu.threads import share_the_machine"
    ]


def test_trainers_generation_evaluation_and_the_server_look_at_the_load():
    said = python(CALLERS)
    assert said.pop("threads") in (1, 2)
    assert said == {"generate": True, "train": True, "evaluate": True, "serve": True, "cuda": False}


@pytest.mark.parametrize(
    "seconds, expected",
    [
        ({1: 2.0, 2: 1.1, 4: 0.6}, 4),
        ({1: 2.0, 2: 1.1, 4: 3.0}, 2),
        ({1: 1.0, 2: 5.0, 4: 5.0}, 1),
        ({1: 1.0, 2: 0.6, 4: 0.62}, 4),  # as good: a quiet machine uses all its cores
        ({1: 1.0, 2: 0.6, 4: 0.65}, 2),
    ],
)
def test_the_fastest_number_of_threads_is_taken(seconds, expected):
    assert threads.fastest([1, 2, 4], seconds.__getitem__) == expected


def test_a_program_that_did_not_ask_for_it_keeps_its_threads():
    usual = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        threads.adapt()
        assert torch.get_num_threads() == 3
        assert threads._State.most is None
    finally:
        torch.set_num_threads(usual)
