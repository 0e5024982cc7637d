"""Adapters in the folder form of PEFT (Hugging Face): adapter_config.json and adapter_model.safetensors.

transformers has the same names of modules for LLaMA's kin and for Cohere. PEFT's matrices are the transposes of ours,
and for Cohere, a parallel block, the rows of queries and keys are in the order of its rotary; see `tensor_layout.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from palm_rlhf.model.config import PaLMConfig
from palm_rlhf.model.interop.peft_settings import PeftSettings, read_settings, to_values
from palm_rlhf.model.interop.tensor_layout import to_halves, to_pairs
from palm_rlhf.model.lora import TARGETS, adapter_shapes
from palm_rlhf.model.weights_folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    PICKLES,
    WRITTEN,
    check_shapes,
    read_json,
    reading,
    versions,
)

MODULES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "value": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}


@dataclass(frozen=True)
class AdapterWeights:
    """A LoRA scope outside a model.

    Args:
        options: the keywords of `add_finetune_params`.
        blocks: for each block, the matrices by their names in its adapters, such as "q.A".
        base: the name of the model that it was trained on, if its folder tells it.
    """

    options: dict[str, Any]
    blocks: list[dict[str, Tensor]]
    base: str | None = None


def read_peft(folder: Path, config: PaLMConfig) -> AdapterWeights:
    """Read the adapter in a folder of PEFT, for a model of the given config; a pickle is never opened.

    Raises FileNotFoundError for a missing file, and ValueError for a file that is damaged, has settings that a LoRA
    scope cannot compute, or belongs to another model.
    """
    files = config_file, weights_file = adapter_files(folder)
    before = versions([*files])
    settings = read_settings(read_json(config_file), config_file)
    with reading(weights_file):
        tensors = load_file(weights_file)
    if versions([*files]) != before:
        raise ValueError(f"{folder} was written to while it was read; load it again")
    found = adapted_modules(settings, tensors, config)
    check_tensors(tensors, found, settings, config, weights_file)
    rank = max(settings.rank(module) for module in found)
    scale = settings.scale(next(iter(found))) or 1.0  # the scale of others goes into their matrices
    targets = [target for target in TARGETS if any(of == target for _, of in found.values())]
    blocks: list[dict[str, Tensor]] = [{} for _ in range(config.depth)]
    for module, (layer, target) in found.items():
        down, up = (tensors[name] for name in tensor_names(module))
        if (factor := settings.scale(module) / scale) != 1:
            up = up.double() * factor
        A, B = down.new_zeros(down.shape[1], rank), up.new_zeros(rank, len(up))
        A[:, : len(down)], B[: len(down)] = down.mT, in_our_order(up, target, config).mT
        blocks[layer] |= {f"{target}.A": A, f"{target}.B": B}
    # a block may lack an adapter that others have: zeros change nothing, and stay zeros in training
    shapes = adapter_shapes(config)
    for block in blocks:
        for target in targets:
            width_in, width_out = shapes[target]
            block.setdefault(f"{target}.A", torch.zeros(width_in, rank))
            block.setdefault(f"{target}.B", torch.zeros(rank, width_out))
    return AdapterWeights({"r": rank, "alpha": scale * rank, "targets": targets}, blocks, settings.base)


def adapter_files(folder: Path) -> tuple[Path, Path]:
    """Return the paths of the settings and of the weights of an adapter."""
    place = folder / WRITTEN if (folder / WRITTEN / ADAPTER_CONFIG).is_file() else folder
    config, weights = place / ADAPTER_CONFIG, place / ADAPTER_WEIGHTS
    if not weights.is_file() and place != folder:
        weights = folder / ADAPTER_WEIGHTS  # moved by a writer that was killed before it moved the settings
    if not config.is_file():
        raise FileNotFoundError(f"{folder} has no {ADAPTER_CONFIG}; expected the folder of an adapter of PEFT")
    if not weights.is_file():
        if pickles := sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES):
            raise ValueError(
                f"{folder} has its weights in {pickles}, pickles, which are never opened: they can run any code. "
                f"Expected {ADAPTER_WEIGHTS}; open and save the adapter with a newer version of PEFT, which writes it"
            )
        raise FileNotFoundError(f"{folder} has no {ADAPTER_WEIGHTS}; copy or download the folder again")
    return config, weights


def adapted_modules(
    settings: PeftSettings, tensors: Mapping[str, Tensor], config: PaLMConfig
) -> dict[str, tuple[int, str]]:
    """Return the names of the modules that have an adapter, and for each its block and target."""
    found = {}
    for layer in range(config.depth):
        for target, name in MODULES.items():
            module = f"model.layers.{layer}.{name}"
            covered = settings.covers(module, layer)
            if any(one in tensors for one in tensor_names(module)) if covered is None else covered:
                found[module] = layer, target
    return found


def tensor_names(module: str) -> tuple[str, str]:
    """Return the names of the two matrices of a module's adapter: `r i`, `o r`."""
    return f"base_model.model.{module}.lora_A.weight", f"base_model.model.{module}.lora_B.weight"


def check_tensors(
    tensors: Mapping[str, Tensor],
    found: Mapping[str, tuple[int, str]],
    settings: PeftSettings,
    config: PaLMConfig,
    where: Path,
) -> None:
    """Raise ValueError unless the tensors are exactly those of the adapted modules, with fitting shapes, and finite."""
    shapes = adapter_shapes(config)
    expected: dict[str, tuple[int, ...]] = {}
    for module, (_, target) in found.items():
        (width_in, width_out), r = shapes[target], settings.rank(module)
        expected |= dict(zip(tensor_names(module), ((r, width_in), (width_out, r)), strict=True))
    other = sorted(name for name in tensors if not any(f".{module}." in name for module in MODULES.values()))
    if other or not found:
        things = f"the tensors {other[:3]}" if other else "no adapters"
        raise ValueError(
            f"{where} has {things}; expected adapters of {', '.join(sorted(MODULES.values()))} alone: a LoRA scope has "
            "no place for adapters of embeddings and output layer, nor for whole weights"
        )
    try:
        check_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()}, expected, where)
    except ValueError as error:
        base = "another model" if settings.base is None else f"{settings.base!r}"
        raise ValueError(
            f"{error}. Its adapter_config.json says that it was trained on {base}: open the adapter over that model"
        ) from error
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(f"{where} has {name} with something other than finite numbers; download it again")


def in_our_order(rows: Tensor, target: str, config: PaLMConfig) -> Tensor:
    """Return the rows of an upper matrix in the order of our rotary: `o r`."""
    heads = turned_heads(target, config)
    return to_halves(rows, heads, config.dim_head) if heads else rows


def in_their_order(rows: Tensor, target: str, config: PaLMConfig) -> Tensor:
    """Return the rows of an upper matrix in the order of the rotary of transformers: `o r`."""
    heads = turned_heads(target, config)
    return to_pairs(rows, heads, config.dim_head) if heads else rows


def turned_heads(target: str, config: PaLMConfig) -> int:
    """Return the number of heads of a target if transformers has their rows in another order, or else 0."""
    return {"q": config.heads, "k": config.kv_heads}.get(target, 0) if config.block == "parallel" else 0


def to_peft(weights: AdapterWeights, config: PaLMConfig) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the values of adapter_config.json, and the tensors of adapter_model.safetensors."""
    tensors = {}
    for layer, block in enumerate(weights.blocks):
        for target in weights.options["targets"]:
            down, up = tensor_names(f"model.layers.{layer}.{MODULES[target]}")
            tensors[down] = block[f"{target}.A"].mT.contiguous()
            tensors[up] = in_their_order(block[f"{target}.B"].mT.contiguous(), target, config)
    modules = sorted(MODULES[target].rpartition(".")[2] for target in weights.options["targets"])
    return to_values(weights.options["r"], weights.options["alpha"], modules, weights.base), tensors
