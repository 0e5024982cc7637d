"""The config of a model that is to be planned for: of a folder, a GGUF file, a hub id, or a size of the paper."""

from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

from beartype import beartype
from safetensors import safe_open

from palm_rlhf.model.config import PRESET_COMMON, PRESETS, PaLMConfig
from palm_rlhf.model.interop.gguf_dtype import FLOAT32
from palm_rlhf.model.interop.gguf_file import GGUFFile
from palm_rlhf.model.interop.gguf_header import GGUFHeader, is_gguf
from palm_rlhf.model.interop.hugging_face import CONFIG_READERS
from palm_rlhf.model.interop.peft_base import base_of, is_adapter
from palm_rlhf.model.local_model import local_model
from palm_rlhf.model.weights_folder import ADAPTER_CONFIG, CONFIG, read_json, reading
from palm_rlhf.planning.plan_settings import Dtype, Task
from palm_rlhf.policy.reward_model_folder import MODEL_TYPE as REWARD_MODEL

# The types of weights as safetensors and config.json name them; float16 takes the memory of bfloat16.
DTYPES: dict[Any, Dtype] = {
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "bfloat16",
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": "bfloat16",
}

MOST_BLOCKS, MOST = 1_000, 2**31  # a plan takes time for each block, and torch counts bytes in 64 bits
WIDTHS = ("num_tokens", "dim", "inner_dim", "heads", "kv_heads", "dim_head")


@beartype
def config_of_model(source: str | Path) -> PaLMConfig:
    """Return the config of a model without reading its weights, which may be missing.

    Raises FileNotFoundError where there is no config, and ValueError for a model that a PaLM cannot compute.

    Args:
        source: a config.json, a folder with one, the folder of a run, a .gguf file, an adapter of PEFT, a known name, a
            hub id, or one of the sizes of the paper, such as "8B".
    """
    if is_preset(source):
        return PaLMConfig.from_dict({**PRESET_COMMON, **PRESETS[str(source)]})
    found = file_of_model(source)
    return config_from(GGUFFile(found).config if is_gguf(found) else read_json(found), found)


@beartype
def dtype_of_model(source: str | Path, task: Task) -> Dtype:
    """Return the type in which a command opens the weights of a model, see `config_of_model`.

    It is the type of most of the saved weights, or the one that config.json names. Where neither is there, it is
    bfloat16. Training opens a GGUF file in float32; a server opens one of fewer bits in bfloat16.
    """
    if is_preset(source):
        return "bfloat16"
    found = file_of_model(source)
    if is_gguf(found):
        has_fewer_bits = any(tensor.type_id != FLOAT32 for tensor in GGUFHeader(found).tensors.values())
        return "bfloat16" if task == "serve" and has_fewer_bits else "float32"
    counts: Counter[str] = Counter()
    for file in sorted(found.parent.glob("model*.safetensors"))[:1]:  # the first shard is like the others
        with reading(file), safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                part = tensors.get_slice(name)
                counts[part.get_dtype()] += prod(part.get_shape())
    values = read_json(found)
    names = [*(name for name, _ in counts.most_common(1)), values.get("dtype"), values.get("torch_dtype")]
    return next((DTYPES[name] for name in names if isinstance(name, str) and name in DTYPES), "bfloat16")


@beartype
def name_in_commands(source: str | Path) -> str:
    """Return a model as other commands take it: the folder of a config.json, and MODEL for a size of the paper."""
    if is_preset(source):
        return "MODEL"
    path = Path(source)
    return str(path.parent if path.name == CONFIG and path.is_file() else source)


def is_preset(source: str | Path) -> bool:
    """Return whether a model is one of the sizes of the paper, and not a folder of that name."""
    return source in PRESETS and not Path(source).exists()


def file_of_model(source: str | Path) -> Path:
    """Return the GGUF file of a model, or its config.json. Raises FileNotFoundError where there is none."""
    path = Path(source)
    if path.name == CONFIG and path.is_file():
        return path
    found = local_model(source, files=(CONFIG, ADAPTER_CONFIG))
    if is_adapter(found):  # its base has the sizes
        found = base_of(found, files=(CONFIG,))
    if is_gguf(found):
        return found
    if not (found / CONFIG).is_file():
        raise FileNotFoundError(
            f"{found} has no {CONFIG}; expected one: a plan needs no weights, but the sizes of a model"
        )
    return found / CONFIG


def config_from(values: dict[str, Any], where: Path) -> PaLMConfig:
    """Return the config that the values of a config.json describe, of a PaLM, a reward model, or a kin of LLaMA.

    Raises ValueError for a model that a PaLM cannot compute, and for sizes far above those of any model.
    """
    config = _read_config(values, where)
    sizes = {"depth": config.depth} | {name: getattr(config, name) for name in WIDTHS}
    if large := [f"{name}={size}" for name, size in sizes.items() if size > (MOST_BLOCKS if name == "depth" else MOST)]:
        raise ValueError(
            f"{where} describes a model of {', '.join(large)}; expected at most {MOST_BLOCKS:,} blocks, and "
            f"{MOST:,} of the others: copy or download it again"
        )
    return config


def _read_config(values: dict[str, Any], where: Path) -> PaLMConfig:
    """Return the config that the values of a config.json describe, of any size."""
    model_type = values.get("model_type")
    if isinstance(model_type, str) and model_type in CONFIG_READERS:
        return PaLMConfig.from_dict(CONFIG_READERS[model_type](values, where))
    if model_type == REWARD_MODEL and isinstance(values.get("palm"), dict):
        return _read_config({**values["palm"], "model_type": "palm"}, where)
    if model_type != "palm":
        known = ["palm", *sorted(CONFIG_READERS)]
        raise ValueError(f"{where} has the model_type {model_type!r}; expected one of {known}")
    try:
        return PaLMConfig.from_dict({k: v for k, v in values.items() if k not in ("model_type", "finetune_scopes")})
    except TypeError as error:
        raise ValueError(f"{where} does not describe a PaLM: {error}; expected all of its sizes") from error
