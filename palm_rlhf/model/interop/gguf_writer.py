"""Writing of GGUF files: a PaLM in the names, the metadata and the order of rows of llama.cpp."""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from palm_rlhf.model.files import replacing
from palm_rlhf.model.interop.gguf_config import MODEL_TYPES, ROPE_FACTORS, llama3_factors, metadata_of
from palm_rlhf.model.interop.gguf_file import INNER, OUTER, PAIRED, import_gguf
from palm_rlhf.model.interop.hugging_face import to_hugging_face
from palm_rlhf.model.interop.tensor_layout import to_pairs

if TYPE_CHECKING:
    from palm_rlhf.model.palm import PaLM

# The types of matrices, and the file_type of llama.cpp for files of them; vectors and norms stay float32.
FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}
NORMS_PER_HEAD_FROM = 64  # blocks of a command-r: llama.cpp expects norms of queries and keys from there on


def write_gguf(palm: "PaLM", path: Path, *, type: str, name: str, tokenizer: Mapping[str, Any]) -> str:
    """Write a model as a GGUF file, and return its architecture in llama.cpp.

    It is `command-r` for parallel blocks, and `llama`, `qwen2` or `qwen3` for serial ones.

    Matrices are written in the type, except that q8_0 is f16 where rows are no multiple of 32. One tensor at a time is
    converted, and the file replaces another when it is complete.

    Args:
        type: one of FILE_TYPES.
        name: the name of the model in the metadata.
        tokenizer: further metadata, by their whole keys; ints are written as uint32, and those in lists as int32.

    Raises ValueError for a model that these architectures cannot represent, and OSError on a full disk.
    """
    gguf = import_gguf(path)
    config, tensors = to_hugging_face(palm)
    architecture = next(ours for ours, theirs in MODEL_TYPES.items() if theirs == config["model_type"])
    require_writable(palm, architecture)
    tensors = dict(named_tensors(palm, tensors))
    heads = {"attn_q": palm.config.heads, "attn_k": palm.config.kv_heads} if architecture == PAIRED else {}

    def reordered(key: str, tensor: Tensor) -> Tensor:
        num_heads = heads.get(key.split(".")[-2], 0)
        return to_pairs(tensor, num_heads, palm.config.dim_head) if num_heads else tensor

    kinds = {key: kind_of(key, tensor, type) for key, tensor in tensors.items()}
    metadata: dict[str, Any] = {"general.name": name, "general.file_type": FILE_TYPES[type]}
    if type == "q8_0":
        metadata["general.quantization_version"] = gguf.GGML_QUANT_VERSION
    metadata |= {f"{architecture}.{key}": value for key, value in metadata_of(config).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(path) as partial:
            write_parts(gguf, partial, architecture, {**metadata, **tokenizer}, tensors, kinds, reordered)
    except OSError as error:
        message = f"{path} could not be written: {error}. Make room there, or choose another place"
        raise (OSError(message) if error.errno is None else OSError(error.errno, message)) from error
    return architecture


def write_parts(
    gguf: Any,
    path: Path,
    architecture: str,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    kinds: Mapping[str, str],
    reordered: Callable[[str, Tensor], Tensor],
) -> None:
    """Write the header of a file, and its tensors, each of which is put into its order and its type when it is due."""
    writer = gguf.GGUFWriter(path, architecture)
    try:
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        for key, value in metadata.items():
            add.get(value.__class__, writer.add_array)(key, value)
        for key, tensor in tensors.items():
            kind = gguf.GGMLQuantizationType[kinds[key]]
            block, size = gguf.GGML_QUANT_SIZES[kind]
            num_bytes = tensor.numel() // block * size
            writer.add_tensor_info(key, list(tensor.shape), np.dtype(np.float32), num_bytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for key, tensor in tensors.items():
            writer.write_tensor_data(converted(gguf, key, reordered(key, tensor), kinds[key]))
    finally:
        writer.close()


def require_writable(palm: "PaLM", architecture: str) -> None:
    """Raise ValueError that names the options of a model that llama.cpp does not compute."""
    config, refused = palm.config, []
    if architecture in ("command-r", "qwen2") and config.heads * config.dim_head != config.dim:
        refused.append(f"heads * dim_head = {config.heads * config.dim_head} (it expects dim, {config.dim})")
    if architecture == "command-r" and config.qk_norm != (config.depth >= NORMS_PER_HEAD_FROM):
        refused.append(f"qk_norm={config.qk_norm} with depth={config.depth} (it has the norms from depth 64 on)")
    scaling = config.rotary_scaling
    if scaling is not None:
        if scaling.rope_type == "yarn" and not math.isclose(scaling.table_factor, 0.1 * math.log(scaling.factor) + 1):
            refused.append(f"attention_factor={scaling.attention_factor} (it computes 0.1 log(factor) + 1)")
        if scaling.rope_type == "llama3" and architecture != "llama":
            refused.append('a llama3 scaling (only its "llama" reads one)')
        elif scaling.rope_type == "llama3" and (scaling.low_freq_factor, scaling.high_freq_factor) != (1, 4):
            refused.append("a llama3 scaling with other factors than low_freq_factor=1 and high_freq_factor=4")
    if refused:
        raise ValueError(f'the architecture "{architecture}" of llama.cpp cannot hold {" and ".join(refused)}')


def named_tensors(palm: "PaLM", tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a Hugging Face model by their names in llama.cpp, and the divisors of a llama3 rotary."""
    scaling = palm.config.rotary_scaling
    if scaling is not None and scaling.rope_type == "llama3":
        yield ROPE_FACTORS, llama3_factors(scaling, palm.config.rotary_theta, palm.config.dim_head)
    for name, tensor in tensors.items():
        yield llama_cpp_name(name), tensor


def llama_cpp_name(name: str) -> str:
    """Return the name in llama.cpp of a tensor in a folder of Hugging Face."""
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("model.layers."):
        return f"{next(ours for ours, theirs in OUTER.items() if theirs == stem)}.{kind}"
    _, _, block, inner = stem.split(".", 3)
    return f"blk.{block}.{next(ours for ours, theirs in INNER.items() if theirs == inner)}.{kind}"


def kind_of(name: str, tensor: Tensor, type: str) -> str:
    """Return the type in which a tensor is written, as gguf names it."""
    if tensor.ndim < 2 or name.endswith("_norm.weight"):
        return "F32"
    return "F16" if type == "q8_0" and tensor.shape[-1] % 32 else type.upper()


def converted(gguf: Any, name: str, tensor: Tensor, kind: str) -> np.ndarray:
    """Return the bytes of a tensor in a type. Raises ValueError for a number that the type cannot hold."""
    numbers = tensor.detach().to("cpu", torch.float32).contiguous()
    if kind == "F16" and not numbers.half().isfinite().all():
        raise ValueError(f"{name} has numbers beyond those of f16, up to 65504; take the type bf16 or f32")
    return gguf.quantize(numbers.numpy(), gguf.GGMLQuantizationType[kind])
