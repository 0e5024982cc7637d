"""Kernels in C are compiled once, on first use, for all processes; where they cannot be, nothing is lost but speed."""

import json
import os
import re
import shutil
import subprocess
import sys
from typing import NamedTuple

import pytest

from palm_rlhf.ops.cpu import native_library

COMPILER = next((path for name in native_library.COMPILERS if name and (path := shutil.which(name))), None)
COMPILER = COMPILER if sys.platform == "linux" else None
NO_COMPILER = "no C compiler was found|compiled on Linux only"

# Imports everything, which alone compiles nothing; waits; then reads tokens under each environment.
GENERATE = """
import importlib, json, os, sys

before = os.listdir(os.environ["PALM_RLHF_CACHE"])
import torch
from palm_rlhf import PaLM
from palm_rlhf.ops.cpu import native_library

assert os.listdir(os.environ["PALM_RLHF_CACHE"]) == before
print("ready", flush=True)
input()
usual = dict(os.environ)
for changes in json.loads(sys.argv[1]):
    os.environ.clear()
    os.environ.update({**usual, **changes})
    importlib.reload(native_library)  # forgets what was loaded, as a new process does
    torch.manual_seed(0)
    palm = PaLM(num_tokens=17, dim=12, depth=2, heads=3, dim_head=4)
    options = {"max_new_tokens": 12, "temperature": 0, "repetition_penalty": 100.0}
    tokens = palm.generate(prompt=torch.tensor([1, 2, 3]), **options)
    print(json.dumps([native_library.why_not(), native_library._load()[0] is not None, tokens.tolist()]))
"""


class Outcome(NamedTuple):
    refusal: str | None
    loaded: bool
    tokens: list[int]


class Processes:
    """Fresh interpreters that share one cache folder, empty at first."""

    def __init__(self, folder):
        self.folder, self.started = folder, []
        self.said = []  # the standard error of each that ended
        self.compiler = folder.with_name("quick-compiler")  # without optimisation, which takes most of the time
        self.compiler.write_text(f'#!/bin/sh\nexec "{COMPILER}" "$@" -O0\n')
        self.compiler.chmod(0o755)

    def start(self, *environments):
        environment = {key: value for key, value in os.environ.items() if key != "PALM_RLHF_NATIVE"}
        environment |= {"PALM_RLHF_CACHE": str(self.folder), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        if COMPILER:
            environment["CC"] = str(self.compiler)
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        command = [sys.executable, "-c", GENERATE, json.dumps(environments)]
        self.started.append(subprocess.Popen(command, env=environment, text=True, **pipes))
        return self.started[-1]

    def go(self, *processes):
        """Let processes go on together once all are ready; what each found under each of its environments."""
        for process in processes:
            assert process.stdout.readline() == "ready\n", process.communicate()[1]
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        for process in processes:
            out, err = process.communicate(timeout=900)
            assert process.returncode == 0, err
            self.said.append(err)
            yield [Outcome(*json.loads(line)) for line in out.splitlines()]

    def files(self):
        return [path.name for path in self.folder.iterdir()]


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    processes = Processes(tmp_path_factory.mktemp("cache"))
    yield processes
    for process in processes.started:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def compiled(processes):
    """What two processes found that began at once, when nothing was compiled."""
    assert processes.files() == []
    return [outcome for (outcome,) in processes.go(processes.start({}), processes.start({}))]


def test_kernels_are_used_where_a_compiler_is(compiled):
    for outcome in compiled:
        if COMPILER:
            assert outcome[:2] == (None, True)
        else:
            assert re.search(NO_COMPILER, outcome.refusal) and not outcome.loaded


def test_processes_that_start_at_once_leave_one_library_and_nothing_else(compiled, processes):
    assert compiled[0] == compiled[1]
    assert len(processes.files()) == bool(COMPILER)
    assert all(name.startswith("native-") and name.endswith(".so") for name in processes.files())


# Half-way through writing the library, whose name comes last.
COMPILER_THAT_FAILS = """#!/bin/sh
[ "$1" = --version ] && echo 1.0 && exit 0
for name; do :; done
echo half >"$name"
[ "$1" = -shared ] || exit 0
echo out of order today >&2
exit 1
"""


@pytest.fixture(scope="module")
def later(compiled, processes, tmp_path_factory):
    """What one process finds that comes later, in the usual environment and in wrong ones; the library's files."""
    folder = tmp_path_factory.mktemp("wrong")
    compiler, file, damaged = folder / "compiler", folder / "file", folder / "damaged"
    compiler.write_text(COMPILER_THAT_FAILS)
    compiler.chmod(0o755)
    file.touch()
    damaged.mkdir()
    for name in processes.files():
        (damaged / name).write_bytes(b"half a library")
    environments = {
        "usual": {},
        "switched off": {"PALM_RLHF_NATIVE": "0"},
        "no compiler": {"PATH": "", "CC": ""},
        "failing compiler": {"CC": str(compiler)},
        "no folder": {"PALM_RLHF_CACHE": str(file / "below")},
        "damaged": {"PALM_RLHF_CACHE": str(damaged)},
    }
    before = {path: path.stat() for path in processes.folder.iterdir()}
    (outcomes,) = processes.go(processes.start(*environments.values()))
    after = {path: path.stat() for path in processes.folder.iterdir()}
    return dict(zip(environments, outcomes, strict=True)), before, after


def test_compiling_and_what_is_in_its_way_are_said_where_nobody_asked_for_logs(later, processes):
    *first, later_said = processes.said
    if COMPILER:
        assert any("compiling the kernels in C for this processor, once, into" in said for said in first)
    assert later_said.count("the kernels in C cannot be used") == 4 + (not COMPILER)  # not where they are switched off
    for reason in ("no C compiler was found", "out of order today", "NotADirectoryError"):
        assert reason in later_said or not COMPILER


def test_a_later_process_reuses_the_library(later, compiled):
    outcomes, before, after = later
    assert outcomes["usual"] == compiled[0]
    assert [(s.st_ino, s.st_mtime_ns) for s in before.values()] == [(s.st_ino, s.st_mtime_ns) for s in after.values()]


@pytest.mark.parametrize(
    "environment, reason",
    [
        ("switched off", "PALM_RLHF_NATIVE is 0"),
        ("no compiler", "no C compiler was found: install gcc, or name one in CC"),
        ("failing compiler", "compiler .* failed: out of order today"),
        ("no folder", "NotADirectoryError: .*file/below"),
        ("damaged", r"OSError: .*damaged/native-\w+\.so"),
    ],
)
def test_without_the_kernels_there_is_a_reason_and_the_same_text(later, environment, reason):
    outcomes, before, after = later
    outcome = outcomes[environment]
    assert re.search(reason if COMPILER else f"{reason}|{NO_COMPILER}", outcome.refusal) and not outcome.loaded
    assert outcome.tokens == outcomes["usual"].tokens and len(set(outcome.tokens)) > 6
    assert before.keys() == after.keys()


def test_a_library_of_another_user_is_not_loaded(monkeypatch):
    """Who owns a file in a shared folder could have written anything into it."""
    native_library.why_not()  # compiles it, if nobody has
    monkeypatch.delenv("PALM_RLHF_NATIVE", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(native_library._Unusable, match="belongs to another user" if COMPILER else NO_COMPILER):
        native_library._compiled()


def test_a_user_without_a_home_is_refused_with_a_reason(monkeypatch):
    def nobody(_):
        raise KeyError

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("PALM_RLHF_CACHE", raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    library, reason = native_library._load.__wrapped__()
    assert library is None and re.search("home" if COMPILER else NO_COMPILER, reason)


FORKED = """
import os, torch
from palm_rlhf import PaLM

torch.set_num_threads(2)
palm = PaLM(num_tokens=17, dim=12, depth=2, heads=3, dim_head=4)
cache, tokens = palm.make_cache(1, 4), torch.tensor([[3]])
with torch.no_grad():
    palm(tokens, cache=cache)  # with the threads of this process, which its child has not
    if (child := os.fork()) == 0:
        palm(tokens, cache=cache)
        os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_process_goes_on_with_the_thread_that_it_has(start_python):
    out, error = start_python(FORKED).communicate(timeout=600)
    assert out == "7\n", error
