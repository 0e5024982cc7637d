"""Kernels in Triton's interpreter, in processes of their own since it is chosen before the import; mutants in C."""

import os
import subprocess
import sys

import pytest

from palm_rlhf.ops.cpu import native_attention as attention_native
from palm_rlhf.ops.cpu import native_elementwise as elementwise_native
from palm_rlhf.ops.cpu import native_library as native


@pytest.fixture(scope="module")
def processes(root, request):
    """The files of `interpreted/` that a module names in INTERPRETED, at work side by side."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    started = {}
    for name in request.module.INTERPRETED:
        command = [sys.executable, "-m", "pytest", "-q", "--strict-skips", f"tests/ops/interpreted/{name}"]
        started[name] = subprocess.Popen(
            command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    yield started
    for process in started.values():
        process.kill()
        process.wait()


@pytest.fixture
def mutate(compile_native, monkeypatch):
    """`mutate("file.c", old, new)` runs the kernels in C from a source in which one text is another."""

    def run(file: str, old: str, new: str) -> None:
        sources = {path.name: path.read_text("utf-8") for path in native.SOURCES.iterdir()}
        assert sources[file].count(old) == 1, f"{old!r} is {sources[file].count(old)} times in {file}"
        del sources["decode.c"]  # which takes the compiler longest
        mutant = compile_native({**sources, file: sources[file].replace(old, new)})
        for module in (attention_native, elementwise_native):
            monkeypatch.setattr(module, "library", lambda: mutant)
        attention_native._runs.cache_clear()

    yield run
    attention_native._runs.cache_clear()
