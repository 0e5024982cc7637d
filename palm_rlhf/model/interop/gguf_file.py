"""GGUF files, the format of llama.cpp, read as if they were folders of Hugging Face.

A file presents the names and the config of the folder that llama.cpp's converter made it from. Its weights may be
quantised: the package gguf turns them into numbers.
"""

import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from palm_rlhf.model.interop.gguf_config import ARCHITECTURE, EMBEDDINGS, ROPE_FACTORS, config_of
from palm_rlhf.model.interop.gguf_header import DAMAGED, StoredTensor
from palm_rlhf.model.interop.gguf_parts import read_whole_header
from palm_rlhf.model.interop.tensor_layout import to_halves
from palm_rlhf.model.weights_folder import versions

CHUNK = 2**20  # numbers that are dequantised at a time
TOKENS = "tokenizer.ggml.tokens"
# The names of tensors in llama.cpp and in Hugging Face; those of a block follow its number.
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# llama.cpp's converter reorders the rows of queries and keys of this architecture to neighbouring pairs.
PAIRED = "llama"


class GGUFFile:
    """A GGUF file to read, or the first of several, with the attributes of a `WeightsFolder`.

    Its tensors are float32, which holds all values.

    Raises ImportError without the package gguf, FileNotFoundError where there is no file, and ValueError for a file
    that is damaged, or has an architecture or a type of quantisation that is not known.
    """

    dtype: torch.dtype | None = None  # all tensors have one type already

    def __init__(self, path: Path):
        self.path = path
        self._gguf = import_gguf(path)
        header = read_whole_header(path)
        self._files, self._versions = header.files, versions(header.files)
        self.metadata: Mapping[str, Any] = header.metadata
        self._row_bytes = {name: self._bytes_of_row(name, tensor) for name, tensor in header.tensors.items()}
        self._tensors = header.tensors
        for name, tensor in header.tensors.items():
            if tensor.start + prod(tensor.shape[:-1]) * self._row_bytes[name] > tensor.limit:
                raise ValueError(f"{tensor.file} ends before the end of {name}, expected a whole file: {DAMAGED}")
        rope_factors = self._numbers(ROPE_FACTORS).tolist() if ROPE_FACTORS in header.tensors else None
        self.config = config_of(header, rope_factors)
        self._names = {folder_name(name): name for name in header.tensors if name != ROPE_FACTORS}
        self.shapes = {theirs: header.tensors[name].shape for theirs, name in self._names.items()}
        if len(self._names) < len(header.tensors) - (rope_factors is not None):
            raise ValueError(f"{path} has two tensors for one place in the model, expected one: {DAMAGED}")
        rows, tokens = header.tensors[EMBEDDINGS].shape[0], self.metadata.get(TOKENS)
        if isinstance(tokens, list) and len(tokens) != rows:
            raise ValueError(
                f"{path} has a tokenizer of {len(tokens)} tokens and {rows} rows of embeddings, expected as many: "
                "convert the model again"
            )

    def __getitem__(self, name: str) -> Tensor:
        numbers = self._numbers(self._names[name])
        projection = re.search(r"\.self_attn\.([qk])_proj\.", name)
        if projection is None or self.metadata[ARCHITECTURE] != PAIRED:
            return numbers
        heads = self.config["num_attention_heads" if projection[1] == "q" else "num_key_value_heads"]
        return to_halves(numbers, heads, self.config["head_dim"])

    def require_unchanged(self) -> None:
        """Raise ValueError if another process has replaced the file since it was opened."""
        if not all(file.is_file() for file in self._files) or versions(self._files) != self._versions:
            raise ValueError(f"{self.path} was written to while it was read; load it again")

    def _bytes_of_row(self, name: str, tensor: StoredTensor) -> int:
        """Return the bytes of a row of a tensor. Raises ValueError for a type that cannot be read."""
        kind = None
        try:
            kind = self._gguf.GGMLQuantizationType(tensor.type_id)
            block, size = self._gguf.GGML_QUANT_SIZES[kind]
            self._gguf.dequantize(np.zeros((1, size), np.uint8), kind)
        except (NotImplementedError, KeyError, ValueError) as error:
            type_name = tensor.type_id if kind is None else kind.name
            raise ValueError(
                f"{self.path} has {name} of the type {type_name}, which the package gguf cannot turn into numbers; "
                "expected one such as F16, BF16, Q8_0 or Q4_K: take a file of that type"
            ) from error
        if not tensor.shape or tensor.shape[-1] % block:
            raise ValueError(
                f"{self.path} has the shape {tensor.shape} of {name}, expected rows of a multiple of {block}: {DAMAGED}"
            )
        return tensor.shape[-1] // block * size

    def _numbers(self, name: str) -> Tensor:
        """Return a tensor in float32, of which some rows at a time are read."""
        tensor = self._tensors[name]
        kind = self._gguf.GGMLQuantizationType(tensor.type_id)
        numbers = torch.empty(prod(tensor.shape[:-1]), tensor.shape[-1], dtype=torch.float32)
        size = max(1, CHUNK // tensor.shape[-1])
        with open(tensor.file, "rb") as file:
            file.seek(tensor.start)
            for rows in numbers.split(size):
                data = np.empty((1, len(rows) * self._row_bytes[name]), np.uint8)  # one row: gguf cuts between rows
                if file.readinto(data.data) < data.nbytes:
                    raise ValueError(f"{tensor.file} ends before the end of {name}, expected a whole file: {DAMAGED}")
                rows.copy_(torch.from_numpy(self._gguf.dequantize(data, kind)).view_as(rows))
        return numbers.reshape(tensor.shape)


def folder_name(name: str) -> str:
    """Return the name of a tensor in a folder of Hugging Face, or the name itself where it is not known."""
    block, rest = match.groups() if (match := re.fullmatch(r"blk\.(\d+)\.(.+)", name)) else (None, name)
    stem, _, kind = rest.rpartition(".")
    theirs = (OUTER if block is None else INNER).get(stem)
    if theirs is None:
        return name
    return f"{theirs}.{kind}" if block is None else f"model.layers.{block}.{theirs}.{kind}"


def import_gguf(path: Path) -> Any:
    """Return the package gguf. Raises ImportError that names the extra."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            f"{path} is a GGUF file, whose weights need a package that is not installed ({error}): "
            "pip install 'palm-rlhf[gguf]'"
        ) from error
    return gguf
