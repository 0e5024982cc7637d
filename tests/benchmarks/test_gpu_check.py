"""The check of a GPU, as far as it goes without one: what it refuses, its processes, and the time it is allowed."""

import importlib
import json
import os
import subprocess
import sys
import time

import pytest
import torch


@pytest.fixture
def bench(root):
    def run(name: str, *options: str, **environment: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(root / "benchmarks" / name), *options]
        return subprocess.run(command, cwd=root, env={**os.environ, **environment}, capture_output=True, text=True)

    return run


@pytest.fixture
def module(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    return importlib.import_module


def test_the_check_says_that_there_is_no_gpu(bench):
    done = bench("gpu_check.py", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 3 and done.stdout.startswith("no GPU")


def test_the_check_passes_on_the_cpu(bench):
    done = bench("gpu_check.py", "--device", "cpu", "--repeats", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["failed"] == [] and result["left_out"] == {"tests": "they need a GPU"}
    assert len(result["timings"]) == 4 and len(result["choices"]) == 8 and result["passed"] == 64
    assert done.stdout.count("passed  accuracy") == 12 and done.stdout.count("passed  law") == 4
    assert done.stdout.count("passed  bits d ") == 4 and done.stdout.count("passed  decode") == 2
    assert done.stdout.count("passed  block") == 12 and done.stdout.count("passed  adapters") == 6
    assert done.stdout.count("passed  bits int") == 6 and done.stdout.count("passed  one base") == 6


def test_weights_in_fewer_bits_are_left_out_without_their_package(module, monkeypatch):
    check = module("gpu_check")
    tasks = check.tasks_of("cuda", 1)
    assert check.without_packages(tasks) == (tasks, {}) and {task[0] for task in tasks} >= {
        "bits",
        "one base",
        "blocks",
    }
    monkeypatch.setattr(check, "find_spec", lambda name: None)
    rest, left_out = check.without_packages(tasks)
    assert left_out == {"bits": "bitsandbytes is not installed"}
    assert rest == [task for task in tasks if task[0] != "bits"]


def wrong(kind: str):
    """An attention with one mistake."""
    from palm_rlhf.ops.attention import attention

    def function(q, k, v, *, causal, **masks):
        if kind == "sees the future":
            causal = q.shape[2] != k.shape[2]
        if kind == "forgets the mask":
            masks = {}
        if kind == "decodes without the last key" and q.shape[2] == 1 and k.shape[2] > 1:
            k, v = k[:, :, :-1], v[:, :, :-1]
        out = attention(q, k, v, causal=causal, **masks, implementation="chunked")
        if kind == "races":
            out = out + torch.randn_like(out) * 1e-7
        if kind == "forgets a gradient":
            out = out + (v.sum() - v.detach().sum()) * 1e-2
        return out

    return function


@pytest.mark.parametrize(
    "kind, checks",
    [
        ("nothing", ""),
        ("sees the future", "accuracy law"),
        ("forgets the mask", "accuracy"),
        ("decodes without the last key", "law"),
        ("races", "law bits"),
        ("forgets a gradient", "accuracy law"),
    ],
)
def test_the_checks_refuse_a_wrong_attention(module, capsys, kind, checks):
    failed = module("gpu_check").run_checks(wrong(kind), "cpu", 2)
    assert set(checks.split()) <= {name.split()[0] for name in failed} and bool(checks) == bool(failed)
    assert capsys.readouterr().out.count("FAILED") == len(failed)


@pytest.mark.parametrize("kind", ["loss", "swiglu"])
def test_the_checks_refuse_a_wrong_loss_and_layer(module, monkeypatch, kind):
    checks = module("fused_checks")
    assert all(passed for part in (checks.losses, checks.layers) for _, passed in part("cpu", torch.float32))
    name = {"loss": "linear_cross_entropy", "swiglu": "swiglu"}[kind]
    original = getattr(checks, name)
    monkeypatch.setattr(checks, name, lambda *inputs, **options: original(*inputs, **options) * 1.001)
    found = [*checks.losses("cpu", torch.float32), *checks.layers("cpu", torch.float32)]
    assert {text.split()[0] for text, passed in found if not passed} == {kind}


def without_gradient(function):
    """The function with the same result, and a gradient of its last positional tensor that is no number."""
    return lambda *tensors, **options: function(*tensors, **options) + (tensors[-1] * 0).sqrt().sum()


def test_gradients_that_are_no_numbers_are_refused(module, monkeypatch):
    """Also where the numbers before them are right: the largest of a number and NaN depends on their order."""
    attention, work, fused = module("attention_checks"), module("attention_work"), module("fused_checks")
    spoiled = without_gradient(work.implementation("chunked"))
    found = list(attention.accuracy(spoiled, "cpu", torch.float32, (3, 3, 1, 1, 32)))
    assert len(found) == 4 and not any(passed for _, passed in found)
    original = fused.swiglu
    monkeypatch.setattr(fused, "swiglu", without_gradient(original))
    assert [passed for name, passed in fused.layers("cpu", torch.float32) if name.startswith("swiglu")] == [False]
    speed = module("speed_attention")
    monkeypatch.setattr(speed, "functions_for", lambda row, device: {"ours, auto": spoiled})
    found = {name: passed for name, passed, _ in speed.attention("cpu", 0)}
    assert found["attention d16 multi-query, ours, auto"] is False


# A process that passes its first check, and crashes, hangs or raises in the task of that name.
WORKER = """
import json, os, signal, sys, time
from check_processes import worker

def run(task):
    print("a model loads", flush=True)  # what others print is no result
    yield f"{task[1]} begins", True
    if task[1] == "crash":
        print("a last word", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if task[1] == "hang":
        time.sleep(600)
    if task[1] == "raise":
        raise RuntimeError("no kernel image")
    yield f"{task[1]} is right", task[1] != "wrong"

worker(json.loads(sys.argv[1]), run)
"""


@pytest.fixture
def share(module, root):
    def run(*names: str, seconds: float) -> tuple[dict[str, bool], dict[str, str]]:
        path = f"import sys; sys.path.insert(0, {str(root / 'benchmarks')!r})"
        command = [sys.executable, "-c", path + WORKER]
        tasks = [["part", name] for name in names]
        share = module("check_processes").in_processes
        results, left_out = share(command, tasks, 2, time.monotonic() + seconds, lambda result: None)
        return {result.name: result.passed for result in results}, left_out

    return run


def test_a_process_that_dies_has_failed_its_task_and_no_other(share):
    found, left_out = share("one", "two", "crash", "wrong", "raise", "last", seconds=600)
    failed = {name for name, passed in found.items() if not passed}
    crashed = "part crash: its process ended with status -9: a last word"
    assert failed == {crashed, "wrong is right", "part raise: RuntimeError: no kernel image"} and not left_out
    assert {f"{name} is right" for name in ("one", "two", "last")} <= found.keys() - failed


def test_what_is_not_done_in_time_is_named(share):
    found, left_out = share("hang", "one", "after", seconds=6)
    assert left_out == {"part hang": "the time was up", "part after": "the time was up"}
    assert found == {"hang begins": True, "one begins": True, "one is right": True}


def test_the_tests_that_need_a_gpu_are_found_and_read(module, root):
    tests = module("gpu_tests")
    names = {str(path.relative_to(root)) for path in tests.files_of_tests()}
    assert {
        "tests/ops/triton/test_fused_layers.py",
        "tests/model/test_laws.py",
        "tests/training/test_devices.py",
    } <= names
    assert "tests/data/test_text.py" not in names
    report = """<testsuites><testsuite><testcase classname="a" name="right" time="2.5"/>
      <testcase classname="a" name="wrong" time="1"><failure/></testcase>
      <testcase classname="a" name="broken" time="0"><error/></testcase>
      <testcase classname="a" name="left" time="0"><skipped/></testcase></testsuite></testsuites>"""
    assert tests.read_report(report) == [
        ("tests", "a::right", True, 2.5, None),
        ("tests", "a::wrong", False, 1.0, None),
        ("tests", "a::broken", False, 0.0, None),
    ]


def test_test_files_are_left_out_for_want_of_a_package(module, root, monkeypatch):
    tests, path = module("gpu_tests"), root / "tests/serving/test_engine.py"
    assert not tests.missing_packages(path)
    found = tests.importlib.util.find_spec
    absent = {"openai", "hypothesis"}
    monkeypatch.setattr(tests.importlib.util, "find_spec", lambda name: None if name in absent else found(name))
    assert tests.missing_packages(path) == {"openai", "hypothesis"}  # of conftest.py beside it, and of that above
    assert tests.missing_packages(root / "tests/training/test_devices.py") == {"hypothesis"}
