"""Saving and loading of a PaLM, and the paper's sizes: methods of `PaLM`; `model/checkpoint.py` does the work."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from beartype import beartype

from palm_rlhf.model import checkpoint
from palm_rlhf.model.adapter_folder import open_adapter
from palm_rlhf.model.config import PRESET_COMMON, PRESETS
from palm_rlhf.model.interop.peft_base import is_adapter
from palm_rlhf.model.local_model import local_model

if TYPE_CHECKING:
    import palm_rlhf.model.palm


@beartype
def save_pretrained(
    palm: "palm_rlhf.model.palm.PaLM",
    directory: str | os.PathLike,
    *,
    format: str = "palm",
    max_shard_size: int | str = "5GB",
) -> None:
    """Write the model and its LoRA scopes as config.json and safetensors, atomically.

    Args:
        directory: the folder; its earlier contents stay intact if writing fails.
        format: "palm"; or for Hugging Face transformers, "hf", or the name of an architecture: "cohere", "llama",
            "mistral", "qwen2" or "qwen3". "hf" takes the architecture that computes the same numbers. These formats
            have no place for the settings of training, such as the z-loss, and refuse xPos, bidirectional models and
            unmerged scopes.
        max_shard_size: in bytes or like "5GB"; larger weights are split into several files.

    Raises OSError on a full disk.
    """
    checkpoint.save_pretrained(palm, Path(directory), format=format, max_shard_size=max_shard_size)


@beartype
def from_pretrained(
    cls: type["palm_rlhf.model.palm.PaLM"],
    source: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
) -> "palm_rlhf.model.palm.PaLM":
    """Open a `save_pretrained` folder, a Hugging Face folder, the hub id of one, a GGUF file, or an adapter of PEFT.

    Of Hugging Face, the model_types cohere, llama, mistral, qwen2 and qwen3 open, where a PaLM can compute all their
    settings; of GGUF, the architectures llama, qwen2, qwen3 and command-r.
    An adapter, in a folder or on the hub, is opened merged into the base that it names; `palm.load_adapter` keeps an
    adapter apart.

    Args:
        source: the folder or file, or the hub id, "owner/name".
        dtype: of the weights; None keeps the dtype of a folder. The weights of a GGUF file, which may be quantised,
            are then float32, which holds all their values.
        device: where to put the weights.
        revision: a branch, tag or commit on the hub.

    Raises FileNotFoundError where there is no such model, and ValueError for a file that is damaged or describes a
    model that a PaLM cannot compute.
    """
    place = local_model(source, revision)
    if is_adapter(place):
        return open_adapter(cls, place, dtype=dtype, device=device)
    return checkpoint.from_pretrained(
        cls, place, dtype=dtype, device=device, revision=None, open_with=checkpoint.open_folder
    )


@beartype
def from_palm_rlhf_pytorch(
    cls: type["palm_rlhf.model.palm.PaLM"], source: str | os.PathLike | Mapping[str, Any], *, causal: bool = True
) -> "palm_rlhf.model.palm.PaLM":
    """Read a `.pt` of the PyPI package palm-rlhf-pytorch 0.8.0, or a state dict of its PaLM.

    Its causal models have xPos with a scale base of 512. Its loss leaves token 0 out by default; ours does not.
    """
    return checkpoint.from_palm_rlhf_pytorch(cls, source, causal=causal)


@beartype
def load(palm: "palm_rlhf.model.palm.PaLM", path: str | os.PathLike) -> "palm_rlhf.model.palm.PaLM":
    """Load a folder, a GGUF file, or a `.pt` of a PaLM or of palm-rlhf-pytorch, in place; dtype and device stay.

    LoRA scopes that the model lacks are added. A pickle is never executed. Raises FileNotFoundError where there is no
    file, and ValueError for a file that is damaged or of another model; the model is unchanged then.
    """
    checkpoint.load_into(palm, Path(path))
    return palm


@beartype
def preset(cls: type["palm_rlhf.model.palm.PaLM"], /, name: str, **overrides: Any) -> "palm_rlhf.model.palm.PaLM":
    """Return a model of a size in the paper's table 1, "8B", "62B" or "540B"; overrides are keywords of `PaLM`.

    Under `torch.device("meta")` it takes no memory.
    """
    if name not in PRESETS:
        raise ValueError(f"got preset {name!r}, expected one of {sorted(PRESETS)}")
    return cls(**{**PRESET_COMMON, **PRESETS[name], **overrides})
