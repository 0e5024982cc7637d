"""Folders of weights in the layout of Hugging Face: config.json, and safetensors in one file or in shards.

Here they are read; `local_model.py` finds them, and `weights_writer.py` writes them.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from palm_rlhf.model.files import read_text

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # of PEFT
WRITTEN = ".written"  # a subfolder of new files that are complete, but not yet in their places: see weights_writer.py
MOST_JSON = 2**28  # bytes: the largest index of a known model has under 2^24
DEPTHS = ("depth", "num_hidden_layers")  # the number of blocks, in configs of ours and of Hugging Face
# The floating-point types, by their names in safetensors, the widest first.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
OURS = ("palm", "palm_reward")  # model types whose parts may have types of their own, such as adapters
# The tokenizer and the chat template of a model.
TOKENIZER_FILES = [
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"),
    *("chat_template.jinja", "template.json"),
]
HUB_FILES = [CONFIG, ADAPTER_CONFIG, "*.safetensors", "*.safetensors.index.json", *TOKENIZER_FILES]
# A second copy of the weights in another layout, beside the first in repositories of Mistral and others.
HUB_COPIES = ["consolidated*.safetensors", "*/*"]
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class WeightsFolder:
    """A folder to read: its `config`, the `shapes` of its tensors, and each tensor when it is asked for.

    `dtype` is the type for all tensors where the folder mixes several; see `one_dtype`.

    Raises FileNotFoundError for a missing file, and ValueError for a file that is damaged or holds anything but
    floating-point tensors.
    """

    def __init__(self, path: Path):
        self.path = path
        config = self._find(CONFIG, self._instead_of_config())
        weights = self._weight_files()
        self._versions = versions([config, *weights])
        self.config = read_json(config)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Path] = {}
        dtypes: dict[str, str] = {}
        for file in weights:
            with reading(file), safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():
                    if name in self._files:
                        raise ValueError(f"{name} is in {self._files[name].name}, too, expected each tensor once")
                    part = tensors.get_slice(name)
                    self.shapes[name], self._files[name] = tuple(part.get_shape()), file
                    dtypes[name] = part.get_dtype()
        check_depth(self.config, len(self.shapes), config)
        for name, dtype in dtypes.items():
            if dtype not in FLOATS:
                raise ValueError(
                    f"{path} holds {name} as {dtype}; expected one of {tuple(FLOATS)}: take it from before quantisation"
                )
        self.dtype = one_dtype(self.config, set(dtypes.values()))

    def __getitem__(self, name: str) -> Tensor:
        # The file is opened for each tensor, so that its pages do not stay in memory beside the copy of the tensor.
        with reading(self._files[name]), safe_open(self._files[name], framework="pt") as tensors:
            return tensors.get_tensor(name)

    def require_unchanged(self) -> None:
        """Raise ValueError if another process has replaced the files since they were opened."""
        try:
            now = versions([self._find(CONFIG), *self._weight_files()])
        except FileNotFoundError:
            now = None
        if now != self._versions:
            raise ValueError(f"{self.path} was written to while it was read; load it again")

    def _find(self, name: str, mend: str = "copy or download the folder again") -> Path:
        """Return the path of a file. Raises FileNotFoundError with advice on how to mend it."""
        for place in (self.path / WRITTEN, self.path):
            if (place / name).is_file():
                return place / name
        raise FileNotFoundError(f"{self.path} has no {name}; {mend}")

    def _instead_of_config(self) -> str:
        """Return the advice for a folder without a config.json."""
        if (self.path / ADAPTER_CONFIG).is_file():
            return (
                "it is an adapter of PEFT, and no model: PaLM.from_pretrained opens it with its base, and "
                "palm.load_adapter adds it to a model that is open"
            )
        return (
            "expected a folder of save_pretrained, or of a model of Hugging Face; of a hub id that has GGUF files, "
            "download one and name that"
        )

    def _weight_files(self) -> list[Path]:
        """Return the file of the weights, or all its shards."""
        for place in (self.path / WRITTEN, self.path):
            if (place / WEIGHTS).is_file():
                return [place / WEIGHTS]
            if (place / INDEX).is_file():
                return [self._find(shard) for shard in shards_of(place / INDEX)]
        pickles = sorted(file.name for file in self.path.iterdir() if file.suffix in PICKLES)
        if pickles:
            raise ValueError(
                f"{self.path} has its weights in {pickles}, pickles, which are never opened: they can run any code. "
                "Expected model.safetensors; convert the folder with save_pretrained of the library that wrote it"
            )
        raise FileNotFoundError(f"{self.path} has no {WEIGHTS}, nor {INDEX}; copy or download the folder again")


def one_dtype(config: Mapping[str, Any], found: set[str]) -> torch.dtype | None:
    """Return the type for all tensors of a folder that mixes several, where the model computes in one; else None.

    It is the type that config.json names, or else the widest.
    """
    if config.get("model_type") in OURS or len(found) < 2:
        return None
    named = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS.values()}
    stated = next((name for key in ("dtype", "torch_dtype") if isinstance(name := config.get(key), str)), "")
    return named.get(stated) or next(dtype for name, dtype in FLOATS.items() if name in found)


def versions(files: list[Path]) -> set[tuple[int, int, int]]:
    """Return the inode, size and time of change of each file, by which a replaced or changed file is noticed."""
    return {(stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in map(os.stat, files)}


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn the error of a damaged file into one that names the file and says how to mend it."""
    try:
        yield
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}. Copy, download or save it again") from error


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises ValueError for anything else."""
    with reading(file):
        if (num_bytes := file.stat().st_size) > MOST_JSON:
            raise ValueError(f"it has {num_bytes:,} bytes, expected at most {MOST_JSON:,}")
        try:
            values = json.loads(read_text(file))
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error
        if not isinstance(values, dict):
            raise ValueError(f"it holds a JSON {type(values).__name__}, expected an object")
        return values


def shards_of(index: Path) -> list[str]:
    """Return the names of the files in an index, all of which must be in its own folder."""
    weight_map = read_json(index).get("weight_map")
    with reading(index):
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError('it has no "weight_map" from tensors to files')
        for shard in weight_map.values():
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise ValueError(f"it names the shard {shard!r}, expected a file in the same folder")
    return sorted(set(weight_map.values()))


def check_depth(config: Mapping[str, Any], num_tensors: int, where: Path) -> None:
    """Raise ValueError if a config has more blocks than the folder has tensors: they would take time and memory."""
    palm = config.get("palm")  # of a reward model
    for values in (config, palm if isinstance(palm, dict) else {}):
        for name in DEPTHS:
            if isinstance(depth := values.get(name), int) and depth > num_tensors:
                raise ValueError(
                    f"{where} has {name}={depth}, and there are {num_tensors} tensors, expected several of each block: "
                    "copy or download the folder again"
                )


@torch.no_grad()
def require_finite(tensors: Mapping[str, Tensor], where: Path) -> None:
    """Raise ValueError that names a tensor with a number that is not finite."""
    for name, tensor in tensors.items():
        # a sum that is finite tells it in less time than each number
        if not (tensor.is_meta or tensor.sum().isfinite() or tensor.isfinite().all()):
            raise ValueError(
                f"{where} has a number in {name} that is not finite, or not in {tensor.dtype}, expected finite ones: "
                "take an earlier checkpoint, download it again, or open it with another dtype"
            )


def check_shapes(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: Path | str
) -> None:
    """Raise ValueError, with the name of a tensor, if one is missing, unexpected or of another shape."""
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
