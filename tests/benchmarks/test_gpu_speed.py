"""The speeds of a GPU, as far as they go without one: every part runs, and what is wrong or missing is not timed."""

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch

MISSING = (
    "tyro",
    "pytest",
    "hypothesis",
    "transformers",
    "palm_rlhf_pytorch",
    "flash_attn",
    "matplotlib",
    "bitsandbytes",
)


@pytest.fixture
def module(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    return importlib.import_module


def run(root, *options: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(root / "benchmarks/gpu_speed.py"), *options]
    return subprocess.run(command, cwd=root, env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.mark.slow(20)
def test_every_part_runs_on_the_cpu_at_a_tiny_size(root, module):
    done = run(root, "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["failed"] == [] and report["left_out"] == {} and report["torch"] == torch.__version__
    assert set(report["seconds"]) == {"compilation", *module("gpu_speed").PARTS}
    rows = report["rows"]
    assert rows["training tiny, 2 x 16, palm-rlhf, trainer"]["tokens/s"] > 0
    assert rows["generation tiny, batch 2"]["no CUDA graphs because"] == "the model is not on a GPU"
    assert rows["examples/train.py"]["steps/s"] > 0
    assert rows["training tiny LLaMA, 2 x 16, palm-rlhf"]["tokens/s"] > 0
    assert (
        rows["bits tiny LLaMA, int4"]["weights, of bfloat16's"]
        < rows["bits tiny LLaMA, int8"]["weights, of bfloat16's"]
        < 1
    )
    assert rows["adapters tiny, 6 clients, 4 adapters and none, mixed"]["times the time of none"] > 0
    for kind in ("ppo", "ppo, one base", "ppo, four bases"):
        assert rows[f"{kind} tiny, 4 responses of 4 tokens, whole step"]["tokens/s"] > 0
    for name in ("engine tiny, engine, 2 clients", "generation tiny LLaMA, batch 1, transformers"):
        assert rows[name]["tokens/s"] > 0


def test_without_a_gpu_nothing_is_timed(root):
    done = run(root, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 3 and done.stdout.startswith("no GPU")


@pytest.mark.parametrize("name", ["gpu_speed", "gpu_check"])
def test_it_starts_without_the_packages_that_an_older_machine_may_lack(root, name):
    code = f"import runpy, sys; sys.modules.update(dict.fromkeys({MISSING})); sys.argv = [{name!r}, '--help']; "
    code += f"sys.path.insert(0, {str(root / 'benchmarks')!r}); "
    code += f"runpy.run_path({str(root / 'benchmarks' / name)!r} + '.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and "--max-seconds" in done.stdout, done.stderr


def test_what_is_not_right_is_not_timed(module, monkeypatch):
    attention = module("speed_attention")
    original = attention.implementation

    def wrong(name):
        factor = 1.01 if name == "fused" else 1.0
        return lambda *tensors, **options: original(name)(*tensors, **options) * factor

    monkeypatch.setattr(attention, "implementation", wrong)
    found = {name: (passed, figures) for name, passed, figures in attention.attention("cpu", 0)}
    passed, figures = found["attention d16 multi-query, SDPA"]
    assert passed and figures["left out"].startswith("not right")
    assert "attention d16 multi-query, both, ours, auto" in found
    assert not any("SDPA" in name and "us median" in figures for name, (_, figures) in found.items())


def test_our_own_attention_has_to_be_right(module, monkeypatch):
    attention = module("speed_attention")
    original = attention.implementation
    monkeypatch.setattr(attention, "implementation", lambda name: lambda *t, **o: original(name)(*t, **o) * 1.01)
    found = {name: passed for name, passed, _ in attention.attention("cpu", 0)}
    assert not found["attention d16 multi-query, ours, auto"]


def test_packages_that_are_missing_are_named(module, monkeypatch):
    for name in MISSING:
        monkeypatch.setitem(sys.modules, name, None)
    speed, decoding = module("gpu_speed"), module("speed_decoding")
    tiny = speed.size_of("tiny").config
    found = {name: figures for name, _, figures in decoding.generation("cpu", tiny, "tiny", 1)}
    assert found["generation tiny, batch 1, transformers"]["left out"].startswith("not installed")
    assert found["generation tiny, batch 1"]["whole call tokens/s"] > 0
    ((_, passed, figures),) = speed.rows_of(["training", "tiny", "palm-rlhf-pytorch"], "cpu")
    assert passed and figures["left out"].startswith("not installed")


def test_a_gpu_is_asked_for_the_rows_that_the_readme_reports(module):
    speed = module("gpu_speed")
    tasks = speed.tasks_of("cuda", list(speed.PARTS))
    names = {row.name for row in module("speed_attention").ROWS["cuda"]}
    assert {"d64 multi-head", "d128 multi-query", "d256 multi-query", "8 documents", "decoding"} <= names
    assert ["generation", "1B", 1] in tasks and ["generation", "139M", 64] in tasks and ["example"] in tasks
    assert ["training", "139M", "transformers Cohere, compiled"] in tasks and ["engine", "139M", 64] in tasks
    rows = module("training_models").rows(speed.size_of("139M"), "cpu")
    assert {task[2] for task in tasks if task[0] == "training"} - {"parity"} <= set(rows)
    kinds = ("ppo", "grpo", "ppo, one base", "ppo, four bases")
    assert speed.tasks_of("cuda", ["rlhf"]) == [["rlhf", "139M", kind] for kind in kinds]
    serial = {task[2] for task in tasks if task[0] == "serial"}
    assert serial == {"SmolLM2 135M", "LLaMA 3.2 1B"} and ["adapters", "139M", 16] in tasks
    assert [task for task in tasks if task[0] == "bits"] == [
        ["bits", "LLaMA 3.2 1B", kind] for kind in ("int8", "int4")
    ]
    assert all(task in tasks for task in speed.compiled_tasks(tasks))


def test_the_bytes_of_a_token_by_hand(module):
    from palm_rlhf import PaLM

    palm = PaLM(num_tokens=10, dim=8, depth=2, heads=2, dim_head=4, kv_heads=1).to(torch.bfloat16)
    weights = 2 * sum(parameter.numel() for parameter in palm.parameters())
    # keys and values of 2 layers, 4 numbers of 2 bytes each, for 5 keys in each of 3 rows
    assert module("speed_decoding").bytes_of_a_token(palm, 3, 5) == weights + 2 * 2 * 4 * 2 * 5 * 3
