"""Folders of weights as Hugging Face lays them out: config.json, and safetensors in one file or in shards."""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from palm_rlhf.model.files import sync
from palm_rlhf.model.text_file import read_text

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
SHARD = "model-{:05d}-of-{:05d}.safetensors"
ANY_SHARD = SHARD.format(0, 0).replace("0", "[0-9]")
# New files are written in the first of these. Renaming it to the second makes them the folder's content, which then
# moves to its place file by file; a reader looks for each file in the second before the folder itself.
WRITING, WRITTEN = ".writing", ".written"
FLOATS = ("F64", "F32", "F16", "BF16")
MODEL, CHECKPOINTS = "model", "checkpoints/step_*/model"  # in the folder of a run
# What makes tokens of text and conversations for a model.
TOKENIZER_FILES = [
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"),
    *("chat_template.jinja", "template.json"),
]
HUB_FILES = [CONFIG, "*.safetensors", "*.safetensors.index.json", *TOKENIZER_FILES]
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class WeightsFolder:
    """A folder to read: its `config`, the `shapes` of its tensors, and each tensor on demand, mapped from the file.

    Raises:
        FileNotFoundError: a file that is not there, by name.
        ValueError: a file that is damaged, or holds anything but floating-point tensors.
    """

    def __init__(self, path: Path):
        self.path = path
        config = self._find(CONFIG, "expected a folder of save_pretrained, or a Hugging Face one of a cohere model")
        weights = self._weight_files()
        self._versions = versions([config, *weights])
        self.config = read_json(config)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Path] = {}
        dtypes: dict[str, str] = {}
        for file in weights:
            with reading(file), safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():
                    part = tensors.get_slice(name)
                    self.shapes[name], self._files[name] = tuple(part.get_shape()), file
                    dtypes[name] = part.get_dtype()
        for name, dtype in dtypes.items():
            if dtype not in FLOATS:
                raise ValueError(f"{path} holds {name} as {dtype}; expected {FLOATS}, from before quantisation")

    def __getitem__(self, name: str) -> Tensor:
        # Opened anew for each tensor, so that the pages of the last one do not stay in memory beside its copy.
        with reading(self._files[name]), safe_open(self._files[name], framework="pt") as tensors:
            return tensors.get_tensor(name)

    def require_unchanged(self) -> None:
        """ValueError where another process has replaced the files since they were opened."""
        try:
            now = versions([self._find(CONFIG), *self._weight_files()])
        except FileNotFoundError:
            now = None
        if now != self._versions:
            raise ValueError(f"{self.path} was written to while it was read; load it again")

    def _find(self, name: str, mend: str = "copy or download the folder again") -> Path:
        for place in (self.path / WRITTEN, self.path):
            if (place / name).is_file():
                return place / name
        raise FileNotFoundError(f"{self.path} has no {name}; {mend}")

    def _weight_files(self) -> list[Path]:
        for place in (self.path / WRITTEN, self.path):
            if (place / WEIGHTS).is_file():
                return [place / WEIGHTS]
            if (place / INDEX).is_file():
                return [self._find(shard) for shard in shards_of(place / INDEX)]
        pickles = sorted(file.name for file in self.path.iterdir() if file.suffix in PICKLES)
        if pickles:
            raise ValueError(
                f"{self.path} has its weights in {pickles}, pickles, which are never opened: they can run any code. "
                "Expected model.safetensors; convert the folder with the save_pretrained of the library it is from"
            )
        raise FileNotFoundError(f"{self.path} has no {WEIGHTS}, nor {INDEX}; copy or download the folder again")


def versions(files: list[Path]) -> set[tuple[int, int, int]]:
    """What changes where one of the files is replaced or written to."""
    return {(stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in map(os.stat, files)}


def local_folder(
    source: str | os.PathLike, revision: str | None = None, *, files: Sequence[str] = tuple(HUB_FILES)
) -> Path:
    """The folder itself, that of the model in a run's folder, or the one to which `files` of a hub id are downloaded.

    Raises FileNotFoundError for what is neither, and for a run that has no finished model yet.
    """
    path = Path(source)
    if path.exists():
        if not path.is_dir():
            raise ValueError(
                f"{path} is a file; expected a folder. Open a state dict with PaLM(...).load(path), "
                "or with PaLM.from_palm_rlhf_pytorch(path)"
            )
        if revision is not None:
            raise ValueError(
                f"{path} is a folder, which has no revision {revision!r}; leave that out, or give a hub id"
            )
        return model_of_run(path)
    if not isinstance(source, str) or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", source):
        raise FileNotFoundError(f"there is no folder {path}; expected one of save_pretrained, or a hub id, owner/name")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(
            f"there is no folder {path}; to open a model of that name on the Hugging Face hub, "
            "pip install 'palm-rlhf[hf]'"
        ) from error
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(files)))
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise FileNotFoundError(
            f"there is no folder {path}, and it was not found on the Hugging Face hub ({error}); check the name, the "
            "revision, the network, and whether the model asks for a login"
        ) from error


def model_of_run(path: Path) -> Path:
    """The folder of the finished model where `path` is that of a run, else `path` itself."""
    if any((place / CONFIG).is_file() for place in (path, path / WRITTEN)):
        return path
    if (path / MODEL).is_dir():
        return path / MODEL
    if checkpoints := sorted(path.glob(CHECKPOINTS)):
        raise FileNotFoundError(
            f"{path} is the folder of a run that has not finished: resume it by the command that began it, or open "
            f"its newest checkpoint, {checkpoints[-1]}"
        )
    return path


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Makes the error of a damaged file name it, and say what to do."""
    try:
        yield
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}. Copy, download or save it again") from error


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError for anything else."""
    with reading(file):
        values = json.loads(read_text(file))
        if not isinstance(values, dict):
            raise ValueError(f"it holds a JSON {type(values).__name__}, expected an object")
        return values


def shards_of(index: Path) -> list[str]:
    """The files that an index names, all in its own folder."""
    weight_map = read_json(index).get("weight_map")
    with reading(index):
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError('it has no "weight_map" from tensors to files')
        for shard in weight_map.values():
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise ValueError(f"it names the shard {shard!r}, expected a file beside it")
    return sorted(set(weight_map.values()))


def check_shapes(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: Path | str
) -> None:
    """ValueError that names what is missing, unexpected or of another shape, unless the named shapes are the same."""
    missing, unexpected = expected.keys() - found.keys(), found.keys() - expected.keys()
    different = [name for name in found.keys() & expected.keys() if found[name] != expected[name]]
    problems = [
        f"{problem} {name}" + (f" (and {len(names) - 1} others)" if len(names) > 1 else "")
        for problem, names in (
            ("lacks", missing),
            ("has the unexpected", unexpected),
            ("has another shape of", different),
        )
        for name in sorted(names)[:1]
    ]
    if different:
        name = min(different)
        problems[-1] += f": {found[name]}, not {expected[name]}"
    if problems:
        raise ValueError(f"{where} {', '.join(problems)}; expected all tensors of its model, and no others")


def write_folder(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], max_shard_bytes: int) -> None:
    """Write weights, or write over those of the folder, as a whole: a kill at any moment leaves the old or the new.

    Other files in the folder stay. Raises OSError where it cannot be written to, with the old weights intact.
    """
    new = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with sole_writer(path):
            finish(path)
            try:
                shutil.rmtree(path / WRITING, ignore_errors=True)
                (path / WRITING).mkdir()
                write_files(path / WRITING, config, tensors, max_shard_bytes)
                os.rename(path / WRITING, path / WRITTEN)
            finally:
                shutil.rmtree(path / WRITING, ignore_errors=True)
            sync(path)
            finish(path)
    except (OSError, SafetensorError) as error:
        if new:
            with suppress(OSError):
                path.rmdir()
        number = error.errno if isinstance(error, OSError) else None
        message = f"{path} could not be written: {error}. Make room there, or choose another folder; "
        message += "nothing is left of this attempt" if new else "what was saved there before is intact"
        raise (OSError(message) if number is None else OSError(number, message)) from error


@contextmanager
def sole_writer(path: Path) -> Iterator[None]:
    """One process at a time writes to a folder; a killed one lets go. (There are no such locks on Windows.)"""
    if os.name != "posix":
        yield
        return
    import fcntl

    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have no locks on folders
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_files(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], max_shard_bytes: int) -> None:
    """Write the files of a checkpoint to an empty folder, and wait until they are on the disk."""
    groups = shards(tensors, max_shard_bytes)
    names = [SHARD.format(i, len(groups)) for i in range(1, len(groups) + 1)] if len(groups) > 1 else [WEIGHTS]
    for name, group in zip(names, groups, strict=True):
        here = {key: tensors[key].detach().cpu().contiguous() for key in group}
        save_file(here, path / name, metadata={"format": "pt"})
    if len(groups) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        weight_map = {key: name for name, group in zip(names, groups, strict=True) for key in group}
        write_json(path / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(path / CONFIG, config)
    for file in [*path.iterdir(), path]:
        sync(file)


def shards(tensors: Mapping[str, Tensor], max_bytes: int) -> list[list[str]]:
    """The names of tensors in their order, in groups of at most `max_bytes`, or of one tensor."""
    groups: list[list[str]] = []
    size = 0
    for name, tensor in tensors.items():
        if not groups or size + tensor.nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += tensor.nbytes
    return groups


def finish(path: Path) -> None:
    """Move a checkpoint that was written whole to its place, and remove the one before it; goes on after a kill."""
    written = path / WRITTEN
    if not written.is_dir():
        return
    if (written / CONFIG).exists():  # it moves last
        (path / CONFIG).unlink(missing_ok=True)  # so that no other library opens half of each
        for shard in written.glob(ANY_SHARD):
            os.replace(shard, path / shard.name)
        for name, other in ((WEIGHTS, INDEX), (INDEX, WEIGHTS)):
            if (written / name).exists():
                (path / other).unlink(missing_ok=True)
                os.replace(written / name, path / name)
        kept = shards_of(path / INDEX) if (path / INDEX).exists() else ()
        for shard in path.glob(ANY_SHARD):
            if shard.name not in kept:
                shard.unlink()
        os.replace(written / CONFIG, path / CONFIG)
    written.rmdir()
    sync(path)


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Write an object as JSON, one field a line."""
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def parse_size(size: int | str) -> int:
    """Bytes in "5GB", "200KB" (powers of 1000) or "1GiB" (of 1024)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT])(i?)B", str(size))
    num_bytes = size if isinstance(size, int) else 0
    if match:
        number, unit, binary = match.groups()
        num_bytes = int(float(number) * (1024 if binary else 1000) ** ("KMGT".index(unit) + 1))
    if num_bytes < 1:
        raise ValueError(f'max_shard_size is {size!r}; expected bytes, or a size such as "5GB"')
    return num_bytes
