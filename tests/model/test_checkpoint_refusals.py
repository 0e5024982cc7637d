"""Bad input: each damaged, foreign or missing checkpoint gives one error, which names it and says what to do."""

import io
import json
import os
import pickle
import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from palm_rlhf.model.palm import PaLM
from palm_rlhf.policy.reward_model import RewardModel
from tests.factories import palm_of

SIZES = {"num_tokens": 19, "dim": 16, "depth": 2, "heads": 4, "dim_head": 4, "kv_heads": 2}
INDEX = "model.safetensors.index.json"


def model(seed: int = 0, **options) -> PaLM:
    return palm_of(seed, **{**SIZES, **options})


def unchanged(palm: PaLM, seed: int, **options) -> bool:
    other = model(seed, **options).state_dict()
    return all(torch.equal(tensor, other[name]) for name, tensor in palm.state_dict().items())


@pytest.fixture
def whole(tmp_path) -> Path:
    """A folder with one file of weights."""
    model().save_pretrained(tmp_path / "whole")
    return tmp_path / "whole"


@pytest.fixture
def sharded(tmp_path) -> Path:
    """A folder with several files of weights."""
    model().save_pretrained(tmp_path / "sharded", max_shard_size="4KB")
    return tmp_path / "sharded"


def edit_config(folder: Path, remove: tuple[str, ...] = (), **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    for name in remove:
        del config[name]
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def edit_weights(folder: Path, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def cut(file: Path, num_bytes: int) -> None:
    file.write_bytes(file.read_bytes()[:num_bytes])


def refused(folder: Path, error: type[Exception], *parts: str) -> None:
    """Both doors give the same error, with these parts in this order; the model that would be filled is unchanged."""
    palm = model(5)
    for act in (lambda: PaLM.from_pretrained(folder), lambda: palm.load(folder)):
        with pytest.raises(error) as caught:
            act()
        assert re.search(".*".join(map(re.escape, parts)), str(caught.value), re.S), str(caught.value)
    assert unchanged(palm, 5)


# Missing


@pytest.mark.parametrize("name", ["nowhere", "./a/b", "/no/such/folder", "a/b/c", "../a"])
def test_a_folder_that_is_not_there(name):
    with pytest.raises(
        FileNotFoundError, match=f"there is no folder {re.escape(str(Path(name)))}; expected one of save_"
    ):
        PaLM.from_pretrained(name)
    with pytest.raises(
        FileNotFoundError, match=r"is not a file; expected a folder of save_pretrained, or what torch\.save"
    ):
        model().load(name)


def test_a_path_is_never_a_hub_id():
    with pytest.raises(FileNotFoundError, match="there is no folder owner/name; expected"):
        PaLM.from_pretrained(Path("owner/name"))


def test_a_hub_id_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"no folder owner/name; .*pip install 'palm-rlhf\[hf\]'"):
        PaLM.from_pretrained("owner/name")


def test_a_hub_id_that_cannot_be_reached():
    """The tests run offline."""
    with pytest.raises(
        FileNotFoundError, match=r"no folder owner/name, .*hub .*check the name, the revision, the network"
    ):
        PaLM.from_pretrained("owner/name", revision="v1")


def test_a_folder_has_no_revision(whole):
    with pytest.raises(
        ValueError, match="whole is on this machine, and has no revision 'main'; leave the revision out"
    ):
        PaLM.from_pretrained(whole, revision="main")


def test_a_file_instead_of_a_folder(whole):
    with pytest.raises(ValueError, match=r"is a file; expected a folder.*\.load\(path\).*from_palm_rlhf_pytorch"):
        PaLM.from_pretrained(whole / "model.safetensors")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file(whole, name):
    (whole / name).unlink()
    refused(whole, FileNotFoundError, str(whole), f"has no {name}", "folder")


def test_a_missing_shard(sharded):
    (sharded / "model-00002-of-00009.safetensors").unlink()
    refused(sharded, FileNotFoundError, str(sharded), "has no model-00002-of-00009.safetensors", "copy or download")


# Damaged


@pytest.mark.parametrize("num_bytes", [0, 4, 100, -1])
def test_weights_cut_short(whole, num_bytes):
    cut(whole / "model.safetensors", num_bytes)
    refused(whole, ValueError, str(whole / "model.safetensors"), "cannot be read", "Copy, download or save it again")


def test_a_shard_cut_short(sharded):
    cut(sharded / "model-00002-of-00009.safetensors", -1)
    refused(sharded, ValueError, "model-00002-of-00009.safetensors cannot be read")


def test_weights_that_are_garbage(whole):
    (whole / "model.safetensors").write_bytes(os.urandom(5000))
    refused(whole, ValueError, str(whole / "model.safetensors"), "cannot be read")


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "\xff\xfe\x00", '{"model_type": "palm"', "{" * 10])
def test_a_config_that_is_no_json_object(whole, text):
    (whole / "config.json").write_bytes(text.encode("latin-1"))
    refused(whole, ValueError, str(whole / "config.json"), "cannot be read", "Copy, download or save it again")


@pytest.mark.parametrize(
    "index", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "{", "\xff"]
)
def test_an_index_that_is_none(sharded, index):
    (sharded / INDEX).write_bytes(index.encode("latin-1"))
    refused(sharded, ValueError, str(sharded / INDEX), "cannot be read")


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "a/b", "../"])
def test_an_index_that_leads_out_of_its_folder(sharded, shard):
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"norm.weight": shard}}))
    refused(sharded, ValueError, str(sharded / INDEX), repr(shard), "expected a file in the same folder")


def test_a_shard_that_the_index_does_not_name(sharded):
    index = json.loads((sharded / INDEX).read_text())
    last = max(index["weight_map"].values())
    index["weight_map"] = {name: shard for name, shard in index["weight_map"].items() if shard != last}
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, ValueError, str(sharded), "lacks norm.weight", "expected all tensors of its model")


def test_a_tensor_in_two_shards(sharded):
    first, second = (sharded / f"model-0000{number}-of-00009.safetensors" for number in (1, 2))
    name, rows = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: rows + 1}, second)
    refused(sharded, ValueError, str(second), f"{name} is in {first.name}, too, expected each tensor once")


@pytest.mark.parametrize("text", ["[" * 10**5, '{"a":' * 10**5])
def test_a_config_that_is_nested_too_deeply(whole, text):
    (whole / "config.json").write_text(text)
    refused(whole, ValueError, str(whole / "config.json"), "nested too deeply")


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_a_json_file_of_absurd_size_is_not_read_into_memory(sharded, name):
    os.truncate(sharded / name, 2**36)  # a hole, which takes no room on the disk
    refused(sharded, ValueError, str(sharded / name), "it has 68,719,476,736 bytes, expected at most 268,435,456")


def test_more_blocks_than_there_are_tensors(whole):
    """They would take hours to make, before anything was compared."""
    edit_config(whole, depth=10**9)
    refused(whole, ValueError, str(whole / "config.json"), "depth=1000000000, and there are", "copy or download")
    RewardModel(model()).save_pretrained(whole)
    config = json.loads((whole / "config.json").read_text())
    edit_config(whole, palm={**config["palm"], "depth": 10**9})
    with pytest.raises(ValueError, match="depth=1000000000, and there are"):
        RewardModel.from_pretrained(whole)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e30])
def test_numbers_that_are_not_finite(whole, number):
    def put(tensors):
        tensors["layers.1.ff_out.weight"][3, 5] = number

    edit_weights(whole, put)
    message = r"number in layers\.1\.ff_out\.weight that is not finite, or not in torch\.float16"
    with pytest.raises(ValueError, match=message):
        PaLM.from_pretrained(whole, dtype=torch.float16)
    if number == 1e30:
        assert PaLM.from_pretrained(whole, dtype=torch.bfloat16).layers[1].ff_out.weight[3, 5] > 9e29
    else:
        with pytest.raises(ValueError, match="is not finite"):
            PaLM.from_pretrained(whole)


def test_a_sum_that_is_too_large_is_no_number_that_is_not_finite(whole):
    edit_weights(whole, lambda tensors: tensors["token_emb.weight"].fill_(60_000))
    assert PaLM.from_pretrained(whole, dtype=torch.float16).token_emb.weight.max() == 60_000


# Of another model


def test_a_missing_tensor(whole):
    edit_weights(whole, lambda tensors: tensors.pop("layers.1.ff_out.weight"))
    refused(whole, ValueError, str(whole), "lacks layers.1.ff_out.weight; expected all tensors")


def test_an_unexpected_tensor(whole):
    edit_weights(whole, lambda tensors: tensors.update({"layers.2.a": torch.ones(1), "layers.2.b": torch.ones(1)}))
    refused(whole, ValueError, str(whole), "has the unexpected layers.2.a (and 1 others); expected all tensors")


def test_a_tensor_of_another_shape(whole):
    edit_weights(whole, lambda tensors: tensors.update({"norm.weight": torch.ones(15)}))
    refused(whole, ValueError, str(whole), "has another shape of norm.weight: (15,), not (16,); expected all tensors")


def test_quantised_weights(whole):
    edit_weights(whole, lambda tensors: tensors.update({"norm.weight": torch.ones(16, dtype=torch.int8)}))
    refused(whole, ValueError, str(whole), "norm.weight as I8; expected", "BF16", "before quantisation")


@pytest.mark.parametrize("model_type", ["cohere2", "gpt_neox", "", None, 3, ["palm"], ["llama"]])
def test_a_foreign_model_type(whole, model_type):
    edit_config(whole, model_type=model_type)
    refused(
        whole,
        ValueError,
        str(whole / "config.json"),
        f"model_type {model_type!r}",
        'expected "palm"',
        "'cohere', 'llama'",
    )


def test_no_model_type(whole):
    edit_config(whole, remove=("model_type",))
    refused(whole, ValueError, "the model_type None; expected")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sliding_window": 3}, "unknown fields ['sliding_window']"),
        ({"dim": "16"}, "'<' not supported between instances of 'str' and 'int'"),
        ({"dim": 16.5}, "dim"),
        ({"causal": "yes"}, "causal"),
        ({"heads": 3}, "heads=3 is not divisible by kv_heads=2"),
        ({"depth": 0}, "depth is 0; expected at least 1"),
        ({"finetune_scopes": [1]}, ""),
        ({"finetune_scopes": {"one": 3}}, ""),
        ({"finetune_scopes": {"one": {"r": 0}}}, "rank r is 0"),
        ({"finetune_scopes": {"one": {"rank": 1}}}, "rank"),
    ],
)
def test_numbers_that_make_no_palm(whole, change, message):
    edit_config(whole, **change)
    refused(whole, ValueError, str(whole / "config.json"), "does not describe a PaLM", message)


def test_a_number_that_is_not_there(whole):
    edit_config(whole, remove=("dim",))
    refused(whole, ValueError, str(whole / "config.json"), "does not describe a PaLM", "'dim'")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_folder_of_pickles_is_not_opened(whole, name):
    (whole / "model.safetensors").rename(whole / name)
    refused(whole, ValueError, f"['{name}'], pickles", "run any code", "Expected model.safetensors; convert")


# palm.load: the model that is there, and the file

OTHER_MATHEMATICS = {
    "rotary_theta": 500.0,
    "xpos": True,
    "causal": False,
    "norm_eps": 1e-3,
    "logit_scale": 1.0,
    "heads": 2,
    "depth": 3,
    "dim": 24,
    "ff_mult": 2,
    "qk_norm": True,
    "num_tokens": 20,
}


@pytest.mark.parametrize("name, value", OTHER_MATHEMATICS.items())
def test_load_refuses_another_mathematics_by_name(whole, name, value):
    """Even where every shape is the same."""
    palm = model(5, **{name: value})
    shown = {"ff_mult": "inner_dim=64 there and 32 here", "logit_scale": "output_scale=0.25 there and 1.0 here"}
    with pytest.raises(ValueError, match=shown.get(name, rf"{name}=\S+ there and {value} here")) as caught:
        palm.load(whole)
    assert str(whole) in str(caught.value)
    assert "PaLM.from_pretrained" in str(caught.value)
    assert unchanged(palm, 5, **{name: value})


@pytest.mark.parametrize("r, alpha", [(2, 2), (3, 4), (None, None)])
def test_load_refuses_other_scopes_by_name(tmp_path, r, alpha):
    saved, palm = model(), model(5)
    palm.add_finetune_params("one", 2, alpha=4)
    before = {name: tensor.clone() for name, tensor in palm.state_dict().items()}
    if r is not None:
        saved.add_finetune_params("one", r, alpha=alpha)
    saved.save_pretrained(tmp_path)
    found = {"r": r, "alpha": alpha} if r else "none of that name"
    message = (
        f"scope 'one' with {{'r': 2, 'alpha': 4}}, {tmp_path} has {found}; call palm.remove_finetune_params('one')"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        palm.load(tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in palm.state_dict().items())


def test_a_state_dict_of_another_shape(tmp_path):
    torch.save(model(dim=24).state_dict(), tmp_path / "palm.pt")
    palm = model(5)
    with pytest.raises(
        ValueError, match=r"has another shape of layers\.0\.attn_out\.weight \(and \d+ others\): \(24, 16\)"
    ):
        palm.load(tmp_path / "palm.pt")
    torch.save({"weight": torch.ones(3)}, tmp_path / "palm.pt")
    with pytest.raises(
        ValueError, match=r"lacks layers\.0.* \(and 9 others\), has the unexpected weight; expected all"
    ):
        palm.load(tmp_path / "palm.pt")
    assert unchanged(palm, 5)


# Pickles


class Malicious:
    """Unpickled by anything that runs pickles, it makes a folder."""

    def __init__(self, target: Path):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


def malicious_files(folder: Path, target: Path) -> dict[str, Path]:
    """A state dict with a malicious value, in each of the forms that torch has ever written, and bare."""
    state = {**model().state_dict(), "extra": Malicious(target)}
    torch.save(state, folder / "zip.pt")
    torch.save(state, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    (folder / "bare.pt").write_bytes(pickle.dumps(Malicious(target), protocol=2))
    return {file.stem: file for file in folder.glob("*.pt")}


@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
def test_a_malicious_pickle_is_not_executed(tmp_path, form):
    target, palm = tmp_path / "executed", model(5)
    file = malicious_files(tmp_path, target)[form]
    for act in (palm.load, PaLM.from_palm_rlhf_pytorch):
        with pytest.raises(
            ValueError, match=r"cannot be read as tensors only, and other pickles are never executed .*torch\.save"
        ) as refusal:
            act(file)
        assert "weights_only" not in str(refusal.value), "how to run it is no advice for an error"
    assert not target.exists()
    assert unchanged(palm, 5)
    # it does run where pickles are trusted, so that the above says something
    torch.load(file, weights_only=False) if form != "bare" else pickle.loads(file.read_bytes())
    assert target.exists()


def test_a_pickled_model_is_refused(tmp_path):
    torch.save(model(), tmp_path / "palm.pt")
    with pytest.raises(
        ValueError, match=r"cannot be read as tensors only.*expected what torch\.save\(model\.state_dict"
    ):
        model().load(tmp_path / "palm.pt")


@pytest.mark.parametrize(
    "value", [3, [torch.ones(3)], {"step": 3}, {"model": {"a": torch.ones(2)}}, {"a": torch.arange(2)}]
)
def test_a_file_of_something_else_is_refused(tmp_path, value):
    torch.save(value, tmp_path / "palm.pt")
    with pytest.raises(ValueError, match="holds something other than floating-point tensors by name"):
        model().load(tmp_path / "palm.pt")


def test_a_damaged_state_dict_is_refused(tmp_path, whole):
    buffer = io.BytesIO()
    torch.save(model().state_dict(), buffer)
    content = buffer.getvalue()
    legacy = io.BytesIO()
    torch.save(model().state_dict(), legacy, _use_new_zipfile_serialization=False)
    old = legacy.getvalue()
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("readme.txt", "no tensors")
    palm = model(5)
    cut(whole / "model.safetensors", -1)
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        palm.load(whole / "model.safetensors")
    damaged = [b"", b"\x80", content[:-1], content[:1000], content[:10], old[:1000], old[:-9], archive.getvalue()]
    for case in [*damaged, os.urandom(3000), (json.dumps({"a": 1})).encode()]:
        (tmp_path / "palm.pt").write_bytes(case)
        with pytest.raises(ValueError, match=r"palm\.pt (cannot be read|holds something else)"):
            palm.load(tmp_path / "palm.pt")
    assert unchanged(palm, 5)


def test_an_empty_folder(tmp_path):
    refused(tmp_path, FileNotFoundError, str(tmp_path), "has no config.json; expected a folder of save_pretrained")
    shutil.rmtree(tmp_path)
