"""Checkpoints under processes that are killed, find the disk full, write at once, or count their memory."""

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from palm_rlhf.model.palm import PaLM
from palm_rlhf.model.weights_folder import WeightsFolder
from tests.factories import palm_of

needs_posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX processes")


def model(seed: int, **options) -> PaLM:
    return palm_of(seed, **{"num_tokens": 19, "heads": 4, "dim_head": 4, "kv_heads": 2, **options})


OTHER = {"depth": 3, "rotary_theta": 500.0, "logit_scale": 0.5}


@functools.cache
def candidates() -> dict[str, tuple[PaLM, dict]]:
    """Models that no folder may mix, in one file or in several."""
    return {
        "a": (model(1), {}),
        "b": (model(2, **OTHER), {"max_shard_size": "6KB"}),
        "c": (model(3), {"max_shard_size": "6KB"}),
        "d": (model(4, **OTHER), {}),
    }


def save(name: str, folder: Path) -> None:
    palm, options = candidates()[name]
    palm.save_pretrained(folder, **options)


def opened(folder: Path) -> str:
    """Which of the candidates a folder opens as, whole; or why it does not."""
    try:
        palm = PaLM.from_pretrained(folder)
    except (OSError, ValueError) as error:
        return f"broken: {error}"
    state = palm.state_dict()
    for name, (candidate, _) in candidates().items():
        wanted = candidate.state_dict()
        if palm.config == candidate.config and state.keys() == wanted.keys():
            if all(torch.equal(tensor, wanted[key]) for key, tensor in state.items()):
                return name
    return "broken: a mixture"


def opened_by_others(folder: Path) -> str:
    """The same for a library that knows nothing of a save that was cut off: it sees only the files at their place."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as seen:
        for file in folder.iterdir():
            if file.is_file():
                os.link(file, Path(seen) / file.name)
        return opened(Path(seen))


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def run(function: Callable, *arguments, **options) -> subprocess.CompletedProcess:
    """A function of this file in a process of its own."""
    command = [sys.executable, __file__, function.__name__, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, **options)


@pytest.fixture
def quick_folder(tmp_path):
    """In memory where that can be: for thousands of flushed files, whose fate under a kill is the same there."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as folder:
        yield Path(folder) / "model"


# Killed


def killed_before_step(step: int) -> None:
    """Kill this process by SIGKILL before its step-th call that opens, lists, renames or removes something."""
    calls = iter(range(step))

    def watch(event, _):
        if (
            event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir")
            and next(calls, None) is None
        ):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def killed_after(seconds: float) -> None:
    """Kill this process by SIGALRM, which it does not handle, after some time."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def killed(act: Callable[[], None], arm: Callable[[], None]) -> bool:
    """Run `act` in a forked process that is to be killed; whether it was, before it came to the end."""
    child = os.fork()
    if not child:
        arm()
        act()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL, signal.SIGALRM), status
    return status != 0


def start(folder: Path, old: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    save(old, folder)
    (folder / "tokenizer.json").write_text("mine")


def kill_at_every_step(folder: str) -> None:
    """Print what each kill before one more step of writing over a checkpoint leaves."""
    folder, found = Path(folder), []
    for old, new in (("a", "b"), ("b", "a"), ("a", "d"), ("b", "c")):
        step, going = 0, True
        while going:
            start(folder, old)
            going = killed(lambda new=new: save(new, folder), lambda step=step: killed_before_step(step))
            found.append({"old": old, "new": new, "step": step, "killed": going, "opened": opened(folder)})
            others = opened_by_others(folder)
            assert others in (old, new) or "has no config.json" in others, (old, new, step, others)
            if going and step % 3 == 0:  # a second kill, while the first one's remains are cleared
                killed(lambda old=old: save(old, folder), lambda step=step: killed_before_step(step // 2))
                found.append({"old": old, "new": new, "step": step, "killed": True, "opened": opened(folder)})
            save(old, folder)
            assert opened(folder) == old and leftovers(folder) == []
            assert (folder / "tokenizer.json").read_text() == "mine"
            step += 1
    print(json.dumps(found))


@pytest.mark.slow(11)
@needs_posix
def test_a_kill_before_any_step_leaves_the_old_checkpoint_or_the_new(quick_folder):
    done = run(kill_at_every_step, quick_folder)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for case in found:
        assert case["opened"] in ([case["old"], case["new"]] if case["killed"] else [case["new"]]), case
    assert len(found) > 80
    assert all(any(case["opened"] == case[which] for case in found if case["killed"]) for which in ("old", "new"))


def kill_at_random(folder: str) -> None:
    """Print what kills at random moments leave."""
    folder, found, clock = Path(folder), [], random.Random(0)
    start(folder, "c")
    for _ in range(25):
        seconds = clock.uniform(1e-4, 1e-2)
        was_killed = killed(lambda: save("b", folder), lambda seconds=seconds: killed_after(seconds))
        found.append({"killed": was_killed, "opened": opened(folder)})
        save("c", folder)
    print(json.dumps(found))


@needs_posix
def test_a_kill_at_a_random_moment_leaves_the_old_checkpoint_or_the_new(quick_folder):
    done = run(kill_at_random, quick_folder)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 25
    for case in found:
        assert case["opened"] in (["c", "b"] if case["killed"] else ["b"]), case


def careless_save(name: str, folder: Path) -> None:
    """A mutant: whole files, but moved into the folder one by one with nothing that says so."""
    with tempfile.TemporaryDirectory() as fresh:
        save(name, Path(fresh))
        for file in sorted(Path(fresh).iterdir()):
            os.replace(shutil.copy(file, folder / f"{file.name}.tmp"), folder / file.name)


def kill_the_careless(folder: str) -> None:
    """Print what kills of the mutant leave."""
    folder, found, step, going = Path(folder), [], 0, True
    while going:
        start(folder, "a")
        going = killed(lambda: careless_save("d", folder), lambda step=step: killed_before_step(step))
        found.append(opened(folder))
        step += 1
    print(json.dumps(found))


@needs_posix
def test_these_kills_find_a_careless_writer(quick_folder):
    done = run(kill_the_careless, quick_folder)
    assert done.returncode == 0, done.stderr
    assert any(name.startswith("broken") for name in json.loads(done.stdout))


# A full disk


def save_without_room(name: str, folder: str, num_bytes: str) -> None:
    """Save where no file may grow beyond some bytes, and print the error."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (int(num_bytes), int(num_bytes)))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        save(name, Path(folder))
    except OSError as error:
        print(json.dumps(str(error)))


@needs_posix
@pytest.mark.parametrize("num_bytes", [100, 6000], ids=["at once", "in a later shard"])
@pytest.mark.parametrize("old", ["a", "c"])
def test_without_room_the_old_checkpoint_stays_and_nothing_else(tmp_path, old, num_bytes):
    save(old, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    done = run(save_without_room, "b", tmp_path, num_bytes)
    assert done.returncode == 0, done.stderr
    message = json.loads(done.stdout)
    assert str(tmp_path) in message and "File too large" in message
    assert "Make room there" in message and "saved there before is intact" in message
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    save("b", tmp_path)
    assert opened(tmp_path) == "b"


@needs_posix
def test_without_room_a_new_folder_is_not_left_behind(tmp_path):
    done = run(save_without_room, "b", tmp_path / "new", 6000)
    assert "nothing is left of this attempt" in json.loads(done.stdout)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(OSError, match=r"could not be written.*choose another folder"):
        save("a", tmp_path / "model")
    assert (tmp_path / "model").read_text() == "mine"


# Several processes at once


def save_again_and_again(folder: str, *names: str) -> None:
    """Write checkpoints over each other."""
    for _ in range(15):
        for name in names:
            save(name, Path(folder))


@needs_posix
def test_of_two_writers_one_waits_for_the_other(quick_folder):
    writers = [("a", "b"), ("d", "c")]
    results = []
    threads = [
        threading.Thread(target=lambda names=names: results.append(run(save_again_and_again, quick_folder, *names)))
        for names in writers
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [result.returncode for result in results] == [0, 0], [result.stderr for result in results]
    assert opened(quick_folder) in ("b", "c")
    assert leftovers(quick_folder) == []


@pytest.mark.parametrize("new", ["a", "b", "d"])
def test_a_checkpoint_that_is_written_over_while_it_is_read_is_refused(tmp_path, new):
    save("a", tmp_path)
    folder = WeightsFolder(tmp_path)
    folder.require_unchanged()
    save(new, tmp_path)
    with pytest.raises(ValueError, match="written to while it was read; load it again"):
        folder.require_unchanged()


# Memory


def write_large(folder: str) -> None:
    """About 250 MB in float32."""
    PaLM(num_tokens=256, dim=1024, depth=7, heads=8, dim_head=64).save_pretrained(folder)


def peak_of_loading(folder: str, load: str) -> None:
    """Print the growth of this process's resident memory at its peak, in bytes, and the bytes of the weights."""
    import resource

    def resident(field: str) -> int:
        if os.path.exists("/proc/self/status"):  # what getrusage says there includes the time before exec
            with open("/proc/self/status") as status:
                return 1024 * int(next(line for line in status if line.startswith(field)).split()[1])
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    small = Path(folder) / "small"  # so that the code which loads is in memory already
    model(0).save_pretrained(small)
    loaders = {"ours": PaLM.from_pretrained, "twice": loaded_twice}
    loaders[load](small)
    before = resident("VmRSS")
    palm = loaders[load](Path(folder))
    print(json.dumps([resident("VmHWM") - before, sum(parameter.nbytes for parameter in palm.parameters())]))


def loaded_twice(folder: Path) -> PaLM:
    """A mutant: a model of its own weights, and then those of the file beside them."""
    palm = PaLM.from_config(PaLM.from_pretrained(folder, device="meta").config)
    palm.load_state_dict({name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()})
    return palm


@pytest.mark.slow(12)
@needs_posix
def test_loading_needs_no_second_copy_in_memory(tmp_path):
    assert run(write_large, tmp_path).returncode == 0
    growth, num_bytes = json.loads(run(peak_of_loading, tmp_path, "ours").stdout)
    assert num_bytes > 200e6
    assert growth <= 1.2 * num_bytes
    growth, num_bytes = json.loads(run(peak_of_loading, tmp_path, "twice").stdout)
    assert growth > 1.7 * num_bytes


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](*sys.argv[2:])
