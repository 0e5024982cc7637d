"""LoRA scopes in folders of their own: methods of `PaLM` that read and write what PEFT (Hugging Face) does."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from beartype import beartype
from torch import nn

from palm_rlhf.model import checkpoint
from palm_rlhf.model.interop.peft_adapter import AdapterWeights, read_peft, to_peft
from palm_rlhf.model.interop.peft_base import base_of
from palm_rlhf.model.interop.peft_settings import base_name
from palm_rlhf.model.local_model import local_model
from palm_rlhf.model.lora import BlockLoRA, LoRALinear, adapter_shapes, adapters_of
from palm_rlhf.model.weights_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG, WeightsFolder, read_json
from palm_rlhf.model.weights_writer import write_adapter
from palm_rlhf.ops.devices import meta_device

if TYPE_CHECKING:
    import palm_rlhf.model.palm
    from palm_rlhf.model.block import Block

FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)


@beartype
def load_adapter(
    palm: "palm_rlhf.model.palm.PaLM",
    source: str | os.PathLike,
    scope: str = "default",
    *,
    name: str | None = None,
    revision: str | None = None,
) -> nn.ModuleList:
    """Add a LoRA scope from a folder of PEFT, or from a `save_pretrained` folder of this model with a scope.

    The base is frozen, as by `add_finetune_params`. PEFT's dropout of the adapters is left out. A pickle is never
    opened. Raises FileNotFoundError for a missing file, and ValueError for an adapter that is damaged, belongs to
    another model, or is more than plain LoRA of linear layers; the model is unchanged then.

    Args:
        source: the folder, or the hub id of an adapter of PEFT, "owner/name".
        scope: the new name.
        name: which of several scopes in a folder of ours; by default the one that is called as the new one.
        revision: a branch, tag or commit on the hub.

    Returns:
        One `BlockLoRA` for each block.
    """
    weights = read_adapter(palm, local_model(source, revision, files=FILES), name or scope)
    adapters = palm.add_finetune_params(scope, **weights.options)
    with torch.no_grad():
        for block, tensors in zip(adapters, weights.blocks, strict=True):
            for name, parameter in block.named_parameters():
                parameter.copy_(tensors[name])
    return adapters


@torch.no_grad()
def open_adapter(
    cls: type["palm_rlhf.model.palm.PaLM"],
    folder: Path,
    *,
    dtype: torch.dtype | None,
    device: str | torch.device | None,
) -> "palm_rlhf.model.palm.PaLM":
    """Open the base of an adapter of PEFT, and merge the adapter into it.

    A change is computed in float32 or wider and added to the weights of the base, so that it is rounded once. Raises
    the errors of `base_of`, `PaLM.from_pretrained` and `load_adapter`.
    """
    base = base_of(folder)
    options: dict[str, Any] = {"dtype": dtype, "device": device, "revision": None}
    try:
        palm = checkpoint.from_pretrained(cls, base, **options, open_with=checkpoint.open_folder)
        weights = read_peft(folder, palm.config)
    except (FileNotFoundError, ValueError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{error} (the adapter {folder} has the base {base})") from error
    shapes, r, alpha = adapter_shapes(palm.config), weights.options["r"], weights.options["alpha"]
    for layer, tensors in zip(cast("Sequence[Block]", palm.layers), weights.blocks, strict=True):
        with meta_device():
            parts = {target: LoRALinear(*shapes[target], r, alpha) for target in weights.options["targets"]}
            adapters = BlockLoRA(shapes, parts)
        adapters.load_state_dict({name: tensor.to(palm.device) for name, tensor in tensors.items()}, assign=True)
        adapters.merge_into(layer)
    return palm


def base_of_adapter(source: str | os.PathLike) -> str | None:
    """Return the name of the base that an adapter of PEFT was trained on, if its folder is one and tells it."""
    file = local_model(source, files=FILES) / ADAPTER_CONFIG
    return base_name(read_json(file)) if file.is_file() else None


def read_adapter(palm: "palm_rlhf.model.palm.PaLM", folder: Path, scope: str) -> AdapterWeights:
    """Read the adapter in a folder of PEFT, or the scope in a folder of ours, for a model."""
    if (folder / CONFIG).is_file() and not (folder / ADAPTER_CONFIG).is_file():
        return read_scope(palm, WeightsFolder(folder), scope)
    return read_peft(folder, palm.config)


def read_scope(palm: "palm_rlhf.model.palm.PaLM", folder: WeightsFolder, scope: str) -> AdapterWeights:
    """Read the LoRA scope of this name in a folder of ours, or the only one that it has."""
    skeleton, _ = checkpoint.open_folder(type(palm), folder)
    checkpoint.require_same_mathematics(palm.config, skeleton.config, folder.path)
    options = checkpoint.scope_options(skeleton)
    if not options:
        raise ValueError(f"{folder.path} has no LoRA scope; expected a folder with one, or an adapter of PEFT")
    name = next(iter(options)) if len(options) == 1 else scope
    if name not in options:
        raise ValueError(
            f"{folder.path} has the finetune scopes {sorted(options)}; expected one, or one of the name {scope!r}"
        )
    found = [
        {tensor: folder[f"finetune_modules.{name}.{layer}.{tensor}"] for tensor, _ in block.named_parameters()}
        for layer, block in enumerate(adapters_of(skeleton, name))
    ]
    folder.require_unchanged()
    return AdapterWeights({**options[name], "train_base": False}, found)


@beartype
def save_adapter(
    palm: "palm_rlhf.model.palm.PaLM",
    directory: str | os.PathLike,
    scope: str = "default",
    *,
    base: str | None = None,
) -> None:
    """Write a LoRA scope as a folder of PEFT, atomically: for transformers, PEFT and vLLM.

    There it belongs over this model as `save_pretrained` writes it for Hugging Face.

    Args:
        directory: the folder; an adapter that it holds stays intact if writing fails.
        scope: its name in this model.
        base: the folder or hub id of the base, by which others find it.

    Raises ValueError where the model has no such scope, and OSError on a full disk.
    """
    adapters = adapters_of(palm, scope)
    part = adapters[0].parts[0]
    options = {"r": part.r, "alpha": part.alpha, "targets": list(adapters[0].targets)}
    blocks = [{name: parameter.detach() for name, parameter in block.named_parameters()} for block in adapters]
    write_adapter(Path(directory), *to_peft(AdapterWeights(options, blocks, base), palm.config))
