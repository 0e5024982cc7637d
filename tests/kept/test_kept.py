"""What an earlier version wrote to disk opens today: runs go on as they did, and models give the same outputs.

`files` was written by `make.py` with the code of commit 184c6db, and stays as it is.
"""

import json
import shutil
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from palm_rlhf import PaLM, RewardModel

from . import chats, stores
from .runs import KEPT_STEP, NUM_STEPS, RUNS, checkpoint, lines, outcome, read, tensors, trained, trainer_of

FILES = Path(__file__).parent / "files"
TOLERANCE = 1e-5  # processors, and kernels for them, differ by up to 1e-6 here
MODELS = {
    "palm": PaLM, "palm_with_adapters": PaLM, "cohere": PaLM, "reward_model": RewardModel,
    "reward_model_binned": RewardModel
}  # fmt: skip


def expected_of(name: str) -> dict:
    return json.loads((FILES / name / "expected.json").read_text(encoding="utf-8"))


def state_of(saved: Path) -> dict:
    return json.loads((saved / "state.json").read_text(encoding="utf-8"))


def assert_close(got, expected, where: str = "") -> None:
    """Numbers within the tolerance, all else equal, at any depth."""
    if isinstance(expected, dict):
        assert got.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_close(got[key], value, f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(got) == len(expected), where
        for place, (one, other) in enumerate(zip(got, expected, strict=True)):
            assert_close(one, other, f"{where}[{place}]")
    elif isinstance(expected, float):
        assert got == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE), where
    else:
        assert got == expected, where


@pytest.fixture
def run(tmp_path):
    """`run("ppo")` is a copy of the kept folder of a run, which may be written to."""
    return lambda name: Path(shutil.copytree(FILES / name / "run", tmp_path / name))


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_before_goes_on_as_it_did(run, name):
    """From other weights than it began with, for all must come from the checkpoint."""
    folder, expected = run(name), expected_of(name)
    del expected["half_way"]
    trainer = trainer_of(name, folder, seed=9, resume=True)
    assert trainer.run.step == KEPT_STEP
    got = outcome(name, trainer, folder)
    assert [step["step"] for step in got["metrics"]] == [3, 4]
    assert_close(got, expected, name)
    final = tensors(checkpoint(folder, NUM_STEPS))
    weights = load_file(FILES / name / "final.safetensors")
    assert weights.keys() == {key for key in final if not key.startswith("optimizer")}
    for key, tensor in weights.items():
        torch.testing.assert_close(final[key], tensor, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_has_the_form_that_it_had(run, name):
    """The same files and tensors, so that an older version, or a tool of somebody's own, opens those of today."""
    folder = run(name)
    list(trainer_of(name, folder, seed=9, resume=True).steps())
    before, today = checkpoint(FILES / name / "run", KEPT_STEP), checkpoint(folder, NUM_STEPS)

    def forms(saved: Path) -> tuple[set[str], dict[str, tuple]]:
        files = {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()}
        return files, {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors(saved).items()}

    assert forms(today) == forms(before)
    assert state_of(today).keys() >= state_of(before).keys()
    for file in before.rglob("config.json"):
        config = json.loads((today / file.relative_to(before)).read_text(encoding="utf-8"))
        assert config.items() >= json.loads(file.read_text(encoding="utf-8")).items()


@pytest.mark.parametrize("name", RUNS)
def test_the_settings_of_before_are_settings_of_today(tmp_path, name):
    config = trainer_of(name, tmp_path, seed=0).config
    there = state_of(checkpoint(FILES / name / "run", KEPT_STEP))["config"]
    assert there.keys() <= {field.name for field in fields(config)}
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in there.items()}
    # a default that has changed since, and on a CPU still means that nothing is compiled
    assert values.get("compile", False) is False and config.compile == "auto"
    assert replace(type(config)(**values), compile="auto") == config


@pytest.mark.parametrize("name", RUNS)
def test_the_lines_of_before_stay(run, name):
    folder = run(name)
    before = {file.name: file.read_text(encoding="utf-8") for file in folder.glob("*.jsonl")}
    assert len(lines(folder / "metrics.jsonl")) == KEPT_STEP
    list(trainer_of(name, folder, seed=9, resume=True).steps())
    for file, text in before.items():
        after = (folder / file).read_text(encoding="utf-8")
        assert after.startswith(text) and len(after) > len(text)


@pytest.mark.parametrize("name", RUNS)
def test_the_model_of_a_checkpoint_opens(name):
    model = trained(name, checkpoint(FILES / name / "run", KEPT_STEP))
    assert_close(read(model), expected_of(name)["half_way"])


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_before_gives_the_outputs_that_it_gave(name):
    assert_close(read(MODELS[name].from_pretrained(FILES / "models" / name)), expected_of("models")[name])


@pytest.mark.parametrize("name", ["bytes", "words"])
def test_a_tokenizer_and_template_of_before_make_the_same_tokens(name):
    assert chats.tokens_of(FILES / "chats" / name) == expected_of("chats")[name]


def test_a_store_of_before_is_read_and_not_written_again(tmp_path, monkeypatch):
    shutil.copytree(FILES / "store", tmp_path / "store")
    monkeypatch.chdir(tmp_path / "store")
    monkeypatch.setattr(stores, "DOCUMENTS", [("one.txt", None)])  # which nothing could be written from
    monkeypatch.setattr(stores.Bytes, "encode", None)
    text, tokens = stores.write()
    first, second, third = b"a short text", b"and a second", "ein kürzerer".encode()
    content = b"\n\n".join((first, second, third))
    assert text.path.read_bytes() == content and text.size == len(content)
    assert text.ends.tolist() == [12, 26, 41] and text.where(28) == "two.txt, byte 0"
    train, valid = tokens.splits
    assert train.dtype == np.uint16
    assert train.tolist() == [*first, 256, *b"an"] and tokens.num_bytes == (14, 23)
    assert valid.tolist() == [*b"d a second", 256, *third, 256]
