"""Checkpoints: what is saved comes back, in files of the expected names, into a new model or one that is there."""

import dataclasses
import hashlib
import inspect
import json
import os
import re
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from palm_rlhf.model.config import PaLMConfig
from palm_rlhf.model.palm import PaLM
from palm_rlhf.model.weights_writer import parse_size, shards
from tests.factories import palm_of

SIZES = {"num_tokens": 19, "dim": 16, "depth": 2, "heads": 4, "dim_head": 4, "kv_heads": 2}
OTHER = {**SIZES, "depth": 3, "rotary_theta": 500.0, "logit_scale": 0.5}


def model(seed: int = 0, **options) -> PaLM:
    palm = palm_of(seed, **{**SIZES, **options})
    for parameter in palm.parameters():
        torch.nn.init.normal_(parameter)
    return palm


def tokens() -> torch.Tensor:
    return torch.randint(19, (2, 9), generator=torch.Generator().manual_seed(1))


def same(a: PaLM, b: PaLM) -> bool:
    """The same numbers, to the bit, in the same names, shapes and dtypes, and the same config."""
    ours, theirs = a.state_dict(), b.state_dict()
    return (
        a.config == b.config
        and {name: (t.dtype, t.shape) for name, t in ours.items()}
        == {name: (t.dtype, t.shape) for name, t in theirs.items()}
        and all(torch.equal(t, theirs[name]) for name, t in ours.items())
    )


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


configs = st.builds(
    PaLMConfig,
    num_tokens=st.integers(1, 40),
    dim=st.integers(1, 24),
    depth=st.integers(1, 3),
    heads=st.sampled_from([2, 4]),
    dim_head=st.sampled_from([2, 6]),
    kv_heads=st.sampled_from([1, 2]),
    ff_mult=st.sampled_from([2, 8 / 3]),
    ff_inner_dim=st.none() | st.integers(1, 30),
    causal=st.booleans(),
    rotary_theta=st.floats(1.0, 1e9),
    xpos=st.booleans(),
    logit_scale=st.none() | st.floats(1e-3, 2.0),
    z_loss=st.floats(0, 1e-2),
    norm_eps=st.floats(1e-9, 1e-2),
    qk_norm=st.booleans(),
    dropout=st.floats(0, 0.9),
    max_seq_len=st.integers(1, 10**6),
    flash_attn=st.booleans(),
    gradient_checkpointing=st.booleans(),
)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])


@settings(max_examples=30)
@given(configs, dtypes, st.sampled_from(["5GB", "5KB", 20_000]))
def test_what_is_saved_comes_back(tmp_path_factory, config, dtype, max_shard_size):
    folder = tmp_path_factory.mktemp("palm") / "new" / "model"
    palm = PaLM.from_config(config).to(dtype)
    palm.save_pretrained(folder, max_shard_size=max_shard_size)
    state = torch.get_rng_state()
    loaded = PaLM.from_pretrained(folder)
    assert same(loaded, palm)
    assert torch.equal(torch.get_rng_state(), state)  # loading draws no random numbers
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in loaded.parameters())


def test_a_small_model_is_two_files_with_each_weight_once(tmp_path):
    palm = model().bfloat16()
    palm.save_pretrained(tmp_path)
    assert files(tmp_path) == ["config.json", "model.safetensors"]
    stored = load_file(tmp_path / "model.safetensors")
    assert set(stored) == {name for name, _ in palm.named_parameters()}  # and so no second matrix for the output
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    num_bytes = sum(parameter.nbytes for parameter in palm.parameters())
    assert num_bytes < (tmp_path / "model.safetensors").stat().st_size < num_bytes + 4096
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "palm"
    switches = {"block", "norm", "qkv_bias", "tie_embeddings", "rotary_scaling"}  # off, and so left out
    expected = {name: value for name, value in dataclasses.asdict(palm.config).items() if name not in switches}
    assert config == {"model_type": "palm", "finetune_scopes": {}, **expected}


def test_a_large_model_is_sharded_under_the_names_of_hugging_face(tmp_path):
    palm = model()
    palm.save_pretrained(tmp_path, max_shard_size="4KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    names = sorted(set(index["weight_map"].values()))
    assert len(names) > 2
    assert names == [f"model-{i:05d}-of-{len(names):05d}.safetensors" for i in range(1, len(names) + 1)]
    assert files(tmp_path) == sorted(["config.json", "model.safetensors.index.json", *names])
    assert index["metadata"]["total_size"] == sum(parameter.nbytes for parameter in palm.parameters())
    stored = {name: load_file(tmp_path / name) for name in names}
    assert {tensor: name for name, tensors in stored.items() for tensor in tensors} == index["weight_map"]
    for tensors in stored.values():
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 4000


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 20))
def test_shards_keep_the_order_and_the_bound_and_are_few(sizes, bound):
    tensors = {f"t{i}": torch.empty(size, dtype=torch.uint8) for i, size in enumerate(sizes)}
    groups = shards(tensors, bound)
    assert [name for group in groups for name in group] == list(tensors)
    totals = [sum(tensors[name].nbytes for name in group) for group in groups]
    assert all(total <= bound or len(group) == 1 for total, group in zip(totals, groups))
    for total, following in zip(totals, groups[1:]):  # the next tensor found no room
        assert total + tensors[following[0]].nbytes > bound


def test_the_bound_is_5_gigabytes():
    with torch.device("meta"):
        big = {str(i): torch.empty(10**9, dtype=torch.bfloat16) for i in range(4)}
    assert shards(big, parse_size("5GB")) == [["0", "1"], ["2", "3"]]
    assert inspect.signature(PaLM.save_pretrained).parameters["max_shard_size"].default == "5GB"


@pytest.mark.parametrize(
    "size, num_bytes", [(7, 7), ("5GB", 5 * 10**9), ("200KB", 200_000), ("1.5 MB", 1_500_000), ("2GiB", 2 * 2**30)]
)
def test_sizes(size, num_bytes):
    assert parse_size(size) == num_bytes


@pytest.mark.parametrize("size", [0, -1, "5", "GB", "5gb", "-5GB", "5GB or so"])
def test_a_size_that_is_none_is_refused_before_anything_is_written(tmp_path, size):
    with pytest.raises(ValueError, match=rf"max_shard_size is {size!r}; expected a number of bytes"):
        model().save_pretrained(tmp_path / "new", max_shard_size=size)
    assert files(tmp_path) == []


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'gguf'; expected one of \('palm', 'hf', 'cohere', 'llama'"):
        model().save_pretrained(tmp_path / "new", format="gguf")
    assert files(tmp_path) == []


def test_a_model_is_saved_from_any_device_and_opened_on_any(device, tmp_path):
    model().to(device).save_pretrained(tmp_path)
    palm = PaLM.from_pretrained(tmp_path, device=device)
    assert {tensor.device.type for tensor in palm.state_dict().values()} == {device.type}
    assert same(palm.cpu(), model()) and same(PaLM.from_pretrained(tmp_path), model())


def test_dtype_and_device_can_be_chosen(tmp_path):
    palm = model()
    palm.save_pretrained(tmp_path)
    half = PaLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert same(half, model().bfloat16())
    assert PaLM.from_pretrained(tmp_path, device="meta").device.type == "meta"
    assert PaLM.from_pretrained(tmp_path, device=torch.device("cpu")).device.type == "cpu"
    with pytest.raises(ValueError, match=r"dtype is torch\.int8; expected a floating-point one"):
        PaLM.from_pretrained(tmp_path, dtype=torch.int8)


def test_tensors_of_several_dtypes_stay_as_they_are(tmp_path):
    palm = model().bfloat16()
    palm.norm.float()
    palm.save_pretrained(tmp_path)
    assert same(PaLM.from_pretrained(tmp_path), palm)


def test_a_loaded_model_trains_and_is_saved_over_the_files_it_is_from(tmp_path):
    model().save_pretrained(tmp_path)
    palm = PaLM.from_pretrained(tmp_path)
    optimizer = torch.optim.AdamW(palm.parameters(), lr=0.1)
    palm(tokens(), return_loss=True).backward()
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(palm.parameters(), model().parameters()))
    palm.save_pretrained(tmp_path)
    assert same(PaLM.from_pretrained(tmp_path), palm)


WAYS = {
    "whole": {},
    "shards": {"max_shard_size": "4KB"},
    "more shards": {"max_shard_size": 1},
    "cohere": {"format": "cohere"},
    "cohere shards": {"format": "cohere", "max_shard_size": "4KB"},
}


@pytest.mark.parametrize("new", WAYS)
@pytest.mark.parametrize("old", WAYS)
def test_a_checkpoint_is_written_over_another(tmp_path, old, new):
    """No file of the old one is left to be mistaken for a part of the new, and what else is there stays."""
    folder, fresh = tmp_path / "model", tmp_path / "fresh"
    model(1, **OTHER).save_pretrained(folder, **WAYS[old])
    mine = {"tokenizer.json": "mine", "model-best-of-two.safetensors": "mine too"}
    for name, text in mine.items():
        (folder / name).write_text(text)
    model(2).save_pretrained(folder, **WAYS[new])
    model(2).save_pretrained(fresh, **WAYS[new])
    assert files(folder) == sorted([*files(fresh), *mine])
    assert {name: (folder / name).read_text() for name in mine} == mine
    assert same(PaLM.from_pretrained(folder), PaLM.from_pretrained(fresh))
    assert torch.equal(PaLM.from_pretrained(folder)(tokens()), model(2)(tokens()))


# palm.load: into a model that is there already


@pytest.mark.parametrize("way", WAYS)
def test_load_takes_a_folder_in_place(tmp_path, way):
    saved, palm = model(1), model(2).bfloat16()
    saved.save_pretrained(tmp_path, **WAYS[way])
    parameters = list(palm.parameters())
    assert palm.load(tmp_path) is palm
    assert all(a is b for a, b in zip(palm.parameters(), parameters, strict=True))
    assert same(palm, model(1).bfloat16())


def test_load_keeps_what_is_not_mathematics(tmp_path):
    model(1, z_loss=0.5, dropout=0.3, max_seq_len=7, ff_inner_dim=64, logit_scale=0.25).save_pretrained(tmp_path)
    palm = model(2, flash_attn=False, gradient_checkpointing=True).load(str(tmp_path))  # ff_mult 4, dim**-0.5
    assert torch.equal(palm(tokens()), model(1, flash_attn=False)(tokens()))


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_load_takes_a_state_dict_of_ours(tmp_path, form):
    file = tmp_path / ("palm.safetensors" if form == "safetensors" else "palm.pt")
    if form == "safetensors":
        save_file(model(1).half().state_dict(), file)
    else:
        torch.save(model(1).half().state_dict(), file, _use_new_zipfile_serialization=form == "zip")
    assert same(model(2).load(file), model(1).half().float())


@pytest.mark.parametrize("train_base", [False, True])
def test_load_adds_the_scopes_of_a_folder(tmp_path, train_base):
    saved = model(1)
    saved.add_finetune_params("one", 3, alpha=5, train_base=train_base)
    torch.nn.init.normal_(saved.finetune_modules["one"][0].q.B)
    saved.save_pretrained(tmp_path)
    palm = model(2).load(tmp_path)
    assert same(palm, saved)
    assert torch.equal(palm(tokens(), finetune_scope="one"), saved(tokens(), finetune_scope="one"))
    assert [p.requires_grad for p in palm.parameters()] == [p.requires_grad for p in saved.parameters()]
    assert same(model(3).load(tmp_path).load(tmp_path), saved)  # and fills those that are there already


def test_load_fills_the_scopes_of_a_state_dict_where_they_were_added(tmp_path):
    saved, palm = model(1), model(2)
    saved.add_finetune_params("one", 3, alpha=5)
    torch.nn.init.normal_(saved.finetune_modules["one"][0].q.B)
    torch.save(saved.state_dict(), tmp_path / "palm.pt")
    with pytest.raises(ValueError, match=r"finetune scopes \['one'\].*add_finetune_params\('one'"):
        palm.load(tmp_path / "palm.pt")
    assert same(palm, model(2))
    palm.add_finetune_params("one", 3, alpha=5)
    assert same(palm.load(tmp_path / "palm.pt"), saved)


# Hub ids, from a server of the hub's protocol on this machine


class Hub(BaseHTTPRequestHandler):
    """A repository, owner/name, whose branches are the folders of `root`; a commit is its branch's name ten times."""

    root: Path
    requested: list[str]

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path, _, _ = self.path.partition("?")
        self.requested.append(path)
        content, commit = None, ""
        if match := re.fullmatch(r"/api/models/owner/name/(revision|tree)/(\w{4})\w*", path):
            commit = match[2] * 10
            names = files(self.root / match[2])
            tree = [{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in names]
            info = {"id": "owner/name", "sha": commit, "siblings": [{"rfilename": name} for name in names]}
            content = json.dumps(info if match[1] == "revision" else tree).encode()
        elif match := re.fullmatch(r"/owner/name/resolve/(\w{4})\w*/([\w.-]+)", path):
            commit = match[1] * 10
            content = (self.root / match[1] / match[2]).read_bytes()
        self.send_response(404 if content is None else 200)
        if content is None:
            self.send_header("X-Error-Code", "RepoNotFound")
        else:
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if content is not None and self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(run_server, tmp_path):
    """Runs `from_pretrained(hub_id, revision)` in a process that takes this machine for the hub."""
    Hub.root, Hub.requested = tmp_path / "repository", []
    server = run_server(ThreadingHTTPServer(("127.0.0.1", 0), Hub))

    def open_and_copy(hub_id: str, revision: str | None = None) -> subprocess.CompletedProcess:
        script = (
            "import sys; from palm_rlhf.model.palm import PaLM\n"
            "PaLM.from_pretrained(sys.argv[1], revision=sys.argv[2] or None).save_pretrained(sys.argv[3])"
        )
        environment = {
            **os.environ,
            "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
        }
        command = [sys.executable, "-c", script, hub_id, revision or "", str(tmp_path / "copy")]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=900)

    return open_and_copy


@pytest.mark.slow(8)
@pytest.mark.parametrize("revision", [None, "next"])
def test_a_hub_id_is_downloaded_and_opened(tmp_path, hub, revision):
    model(1).save_pretrained(tmp_path / "repository" / "main")
    model(2, **OTHER).save_pretrained(tmp_path / "repository" / "next", format="cohere", max_shard_size="4KB")
    for branch in ("main", "next"):
        (tmp_path / "repository" / branch / "pytorch_model.bin").write_bytes(b"a pickle")
        (tmp_path / "repository" / branch / "tokenizer.json").write_text("{}")
        (tmp_path / "repository" / branch / "chat_template.jinja").write_text("{{ messages }}")
    done = hub("owner/name", revision)
    assert done.returncode == 0, done.stderr
    opened = PaLM.from_pretrained(tmp_path / "copy")
    assert same(opened, PaLM.from_pretrained(tmp_path / "repository" / (revision or "main")))
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        assert any(path.endswith(f"/{name}") for path in Hub.requested)
    assert not any("pytorch_model.bin" in path for path in Hub.requested)


def test_what_the_hub_does_not_have_is_refused(tmp_path, hub):
    model(1).save_pretrained(tmp_path / "repository" / "main")
    done = hub("owner/other")
    assert re.search(r"FileNotFoundError: there is no folder owner/other, and .* not found on the .* hub", done.stderr)
    assert "check the name" in done.stderr


def test_a_run_is_opened_where_its_model_is(tmp_path):
    run = tmp_path / "run"
    saved = model(1)
    saved.save_pretrained(run / "checkpoints/step_00000002/model")
    with pytest.raises(
        FileNotFoundError, match=r"run is the folder of a run that has not finished.*step_00000002/model"
    ):
        PaLM.from_pretrained(run)
    saved.save_pretrained(run / "model")
    assert same(PaLM.from_pretrained(run), saved)
    other = model(2)
    other.save_pretrained(run)  # a model of the folder's own comes first
    assert same(PaLM.from_pretrained(run), other)
