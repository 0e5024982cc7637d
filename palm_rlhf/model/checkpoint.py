"""How a PaLM is saved and loaded: folders of safetensors and state dicts, checked before a model is changed."""

import dataclasses
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from beartype.roar import BeartypeCallHintViolation
from safetensors.torch import load_file
from torch import Tensor, nn

from palm_rlhf.model.config import PaLMConfig
from palm_rlhf.model.interop import gguf_file, llama, palm_rlhf_pytorch
from palm_rlhf.model.interop.gguf_header import is_gguf
from palm_rlhf.model.interop.hugging_face import CONFIG_READERS, to_hugging_face
from palm_rlhf.model.interop.tensor_layout import Weights, read_tensors
from palm_rlhf.model.local_model import local_model
from palm_rlhf.model.lora import ATTENTION, adapters_of
from palm_rlhf.model.quantised.quantised_model import quantised_parts, require_frozen
from palm_rlhf.model.shared_base import require_sole_base
from palm_rlhf.model.weights_folder import CONFIG, WeightsFolder, check_shapes, require_finite
from palm_rlhf.model.weights_writer import parse_size, write_folder
from palm_rlhf.ops.devices import meta_device

if TYPE_CHECKING:
    from palm_rlhf.model.palm import PaLM

Model = TypeVar("Model", bound=nn.Module)
# The name of each tensor, and its parts, to be concatenated along the rows; a part is not read before it is used.
Parts = Iterator[tuple[str, Iterable[Tensor]]]
# The formats of save_pretrained: ours, and model_types of Hugging Face, of which "hf" is the one that holds the model.
FORMATS = ("palm", "hf", *CONFIG_READERS)
# Fields of the config that do not change what a model computes: a model may load weights that were saved with others.
FREE_TO_CHANGE = {"dropout", "flash_attn", "gradient_checkpointing", "max_seq_len", "z_loss"}
STATE_DICT = "what torch.save(model.state_dict(), path) writes"


def save_pretrained(palm: "PaLM", path: Path, *, format: str, max_shard_size: int | str) -> None:
    """Write a PaLM and its LoRA scopes to a folder, in our format or in one of Hugging Face."""
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; expected one of {FORMATS}")
    if format == "palm":
        config = {"model_type": "palm", **palm.config.to_dict(), "finetune_scopes": scope_options(palm)}
        tensors = palm.state_dict()
    else:
        config, tensors = to_hugging_face(palm, None if format == "hf" else format)
    write_folder(path, config, tensors, parse_size(max_shard_size))


def from_pretrained(
    cls: type[Model],
    source: str | os.PathLike,
    *,
    dtype: torch.dtype | None,
    device: str | torch.device | None,
    revision: str | None,
    open_with: Callable[[type[Model], Weights], tuple[Model, Parts]],
) -> Model:
    """Open a folder, or a hub id, as a new model, with the dtype of the file unless another is given.

    `open_with` is `open_folder`, or the corresponding function of another kind of model.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}; expected a floating-point one, such as torch.bfloat16")
    folder = open_weights(local_model(source, revision))
    model = filled(*open_with(cls, folder), dtype=dtype or folder.dtype, device=device)
    require_finite(model.state_dict(), folder.path)
    folder.require_unchanged()
    return model


def from_palm_rlhf_pytorch(cls: type["PaLM"], source: str | os.PathLike | Mapping[str, Any], *, causal: bool) -> "PaLM":
    """Read a checkpoint of palm-rlhf-pytorch 0.8.0 as a new model."""
    state, where = state_and_name(source)
    return filled(*open_palm_rlhf_pytorch(cls, state, causal, where), dtype=None, device=None)


def state_and_name(source: str | os.PathLike | Mapping[str, Any]) -> tuple[Mapping[str, Tensor], str]:
    """Return a state dict, or the one in a file, checked to hold only tensors, and its name for errors."""
    if isinstance(source, Mapping):
        return tensors_only(source, "the state dict"), "the state dict"
    return read_state_dict(Path(source)), str(source)


def load_into(palm: "PaLM", path: Path) -> None:
    """Load a folder, a `.pt` state dict of ours, or palm-rlhf-pytorch's; the model keeps its dtype and device.

    LoRA scopes that the model lacks are added. Raises FileNotFoundError where there is no file, and ValueError for a
    file that is damaged or of another model; the model is unchanged then.
    """
    require_sole_base(palm, f"load({str(path)!r})")
    folder = open_weights(path) if path.is_dir() or is_gguf(path) else None
    if folder is not None:
        skeleton, parts = open_folder(type(palm), folder)
    else:
        state = read_state_dict(path)
        if palm_rlhf_pytorch.is_from_there(state):
            skeleton, parts = open_palm_rlhf_pytorch(type(palm), state, palm.config.causal, str(path))
        else:
            skeleton, parts = open_state_dict(palm, state, path)
    require_same_mathematics(palm.config, skeleton.config, path)
    require_same_scopes(palm, skeleton, path)
    parts = with_frozen_checked(palm, parts)
    for scope, options in scope_options(skeleton).items():
        if scope not in palm.finetune_modules:
            palm.add_finetune_params(scope, **options)
    copy_parts(palm, parts)
    if folder is not None:
        folder.require_unchanged()


def open_weights(path: Path) -> Weights:
    """Return the weights in a folder, or in a GGUF file."""
    return gguf_file.GGUFFile(path) if is_gguf(path) else WeightsFolder(path)


def open_folder(cls: type["PaLM"], folder: Weights) -> tuple["PaLM", Parts]:
    """Return the model of a folder, on the meta device, and its tensors, whose shapes are checked."""
    config = dict(folder.config)
    where = folder.path if is_gguf(folder.path) else folder.path / CONFIG
    model_type = config.pop("model_type", None)
    if isinstance(model_type, str) and model_type in CONFIG_READERS:
        skeleton = skeleton_of(cls, CONFIG_READERS[model_type](folder.config, where), {}, where)
        return skeleton, read_tensors(skeleton.config, folder)
    if model_type != "palm":
        reason = llama.OTHERS.get(str(model_type))
        raise ValueError(
            f"{where} has the model_type {model_type!r}{f', which a PaLM cannot compute: {reason}' if reason else ''}; "
            f'expected "palm", which save_pretrained writes, or, as Hugging Face names them, {sorted(CONFIG_READERS)}'
        )
    scopes = config.pop("finetune_scopes", {})
    skeleton = skeleton_of(cls, config, scopes, where)
    check_shapes(folder.shapes, shapes_of(skeleton.state_dict()), folder.path)
    return skeleton, ((name, [folder[name]]) for name in folder.shapes)


def open_palm_rlhf_pytorch(
    cls: type["PaLM"], state: Mapping[str, Any], causal: bool, where: str
) -> tuple["PaLM", Parts]:
    """Return the model of a state dict of palm-rlhf-pytorch, on the meta device, and its tensors."""
    config = palm_rlhf_pytorch.config_of(state, causal=causal, where=where)
    skeleton = skeleton_of(cls, config, palm_rlhf_pytorch.scopes_of(state), where)
    return skeleton, palm_rlhf_pytorch.tensors_of(state, skeleton.config, where)


def open_state_dict(palm: "PaLM", state: Mapping[str, Tensor], path: Path) -> tuple["PaLM", Parts]:
    """Return the model itself, and the tensors of a state dict of ours, whose shapes are checked against it."""
    scopes = {name.split(".")[1] for name in state if name.startswith("finetune_modules.")}
    if missing := sorted(scopes - set(palm.finetune_modules)):
        raise ValueError(
            f"{path} has the finetune scopes {missing}, which the model lacks, but not their alpha; call "
            f"palm.add_finetune_params({missing[0]!r}, r=..., alpha=...) first, or load a save_pretrained folder"
        )
    check_shapes(shapes_of(state), shapes_of(palm.state_dict()), path)
    return palm, ((name, [tensor]) for name, tensor in state.items())


def skeleton_of(cls: type["PaLM"], config: Mapping[str, Any], scopes: Mapping[str, Any], where: Path | str) -> "PaLM":
    """Return a model on the meta device, with its LoRA scopes. Raises ValueError for a config of no PaLM."""
    try:
        with meta_device():
            palm = cls.from_config(PaLMConfig.from_dict(dict(config)))
            for scope, options in scopes.items():
                palm.add_finetune_params(scope, **options)
    except (TypeError, ValueError, AttributeError, RuntimeError, BeartypeCallHintViolation) as error:
        raise ValueError(f"{where} does not describe a PaLM: {error}") from error
    return palm


def filled(skeleton: Model, parts: Parts, *, dtype: torch.dtype | None, device: str | torch.device | None) -> Model:
    """Give memory and weights to a model on the meta device, reading one tensor at a time."""
    shapes, state = shapes_of(skeleton.state_dict()), {}
    for name, rows in parts:
        rows = iter(rows)
        first = next(rows)
        state[name] = torch.empty(shapes[name], dtype=dtype or first.dtype, device=device)
        copy_rows(state[name], chain([first], rows))
    skeleton.load_state_dict(state, assign=True)
    return skeleton


def with_frozen_checked(model: nn.Module, parts: Parts) -> Parts:
    """Return the tensors that a model takes from a file: all but its frozen weights in fewer bits.

    Raises ValueError where the file has other weights than these.
    """
    if not (frozen := quantised_parts(model)):
        return parts
    read = {name: list(rows) for name, rows in parts}
    require_frozen(frozen, {name: torch.cat(read.pop(name)) for name in frozen})
    return iter(read.items())


def copy_parts(model: nn.Module, parts: Parts) -> None:
    """Copy weights into a model, in place."""
    ours = dict(chain(model.named_parameters(), model.named_buffers()))
    for name, rows in parts:
        copy_rows(ours[name], rows)


@torch.no_grad()
def copy_rows(target: Tensor, parts: Iterable[Tensor]) -> None:
    """Fill a tensor with the concatenation of its parts along the rows."""
    start = 0
    for part in parts:
        target[start : start + len(part)] = part
        start += len(part)


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def scope_options(palm: "PaLM") -> dict[str, dict[str, Any]]:
    """Return, for each LoRA scope, the keywords with which `add_finetune_params` adds it again."""
    train_base = all(parameter.requires_grad for parameter in palm.palm_parameters())
    options: dict[str, dict[str, Any]] = {}
    for scope in palm.finetune_modules:
        adapters = adapters_of(palm, scope)[0]
        options[scope] = {"r": adapters.parts[0].r, "alpha": adapters.parts[0].alpha, "train_base": train_base}
        if adapters.targets != ATTENTION:
            options[scope]["targets"] = list(adapters.targets)
    return options


def require_same_mathematics(ours: PaLMConfig, theirs: PaLMConfig, path: Path) -> None:
    """Raise ValueError if models of the two configs would compute different numbers from the same weights."""
    computed = {"ff_mult": "inner_dim", "ff_inner_dim": "inner_dim", "logit_scale": "output_scale"}
    names = {computed.get(field.name, field.name) for field in dataclasses.fields(PaLMConfig)} - FREE_TO_CHANGE
    different = [
        f"{name}={getattr(theirs, name)} there and {getattr(ours, name)} here"
        for name in sorted(names)
        if getattr(theirs, name) != getattr(ours, name)
    ]
    if different:
        raise ValueError(
            f"{path} is of another model: {', '.join(different)}; build the model with its config, or open it with "
            "PaLM.from_pretrained or PaLM.from_palm_rlhf_pytorch"
        )


def require_same_scopes(palm: "PaLM", skeleton: "PaLM", path: Path) -> None:
    """Raise ValueError if a LoRA scope of the model is missing in the file, or has other options there."""
    there = scope_options(skeleton)
    for scope, here in scope_options(palm).items():
        found = {name: value for name, value in there.get(scope, {}).items() if name != "train_base"}
        here.pop("train_base")
        if found != here:
            raise ValueError(
                f"the model has the finetune scope {scope!r} with {here}, {path} has {found or 'none of that name'}; "
                f"call palm.remove_finetune_params({scope!r}) first: loading adds the scopes of the file"
            )


def read_state_dict(path: Path) -> Mapping[str, Tensor]:
    """Return the tensors in a file of `torch.save` or safetensors. Other pickles are refused and never executed."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; expected a folder of save_pretrained, or {STATE_DICT}")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch and safetensors raise errors of many kinds for damaged files
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        if isinstance(error, UnpicklingError):  # the message of torch explains how to execute the pickle
            reason = "it is a damaged pickle, or a pickle of other objects"
        raise ValueError(
            f"{path} cannot be read as tensors only, and other pickles are never executed ({reason}); expected "
            f"{STATE_DICT}"
        ) from error
    return tensors_only(state, path)


def tensors_only(state: Any, where: Path | str) -> Mapping[str, Tensor]:
    """Return the state dict itself. Raises ValueError if it holds anything but floating-point tensors by name."""
    values = state.values() if isinstance(state, Mapping) else [None]
    if not all(isinstance(value, Tensor) and value.is_floating_point() for value in values):
        raise ValueError(f"{where} holds something other than floating-point tensors by name; expected {STATE_DICT}")
    return state
