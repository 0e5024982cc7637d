"""Saving and loading of a reward model: functions that `RewardModel` has as its methods.

A reward model is saved as a folder. It is loaded from such a folder, from a state dict, or from one of
palm-rlhf-pytorch 0.8.0.
"""

import os
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from beartype import beartype
from beartype.roar import BeartypeCallHintViolation
from torch import Tensor

from palm_rlhf.model import checkpoint
from palm_rlhf.model.checkpoint import Parts, scope_options, shapes_of
from palm_rlhf.model.interop import palm_rlhf_pytorch
from palm_rlhf.model.interop.tensor_layout import Weights
from palm_rlhf.model.local_model import local_model
from palm_rlhf.model.modes import switch_off_dropout
from palm_rlhf.model.palm import PaLM
from palm_rlhf.model.quantised.quantised_model import quantised_parts
from palm_rlhf.model.shared_base import adopt_base, base_parts, is_shared
from palm_rlhf.model.weights_folder import CONFIG, WeightsFolder, check_shapes
from palm_rlhf.model.weights_writer import parse_size, write_folder

if TYPE_CHECKING:
    import palm_rlhf.policy.reward_model
    from palm_rlhf.policy.reward_model import RewardModel

MODEL_TYPE = "palm_reward"
PALM = "palm."
# The names of our tensors in palm-rlhf-pytorch.
THERE = {"prompt_embed": "prompt_embed", "response_embed": "response_embed"}
BINNED = {**THERE, "head.weight": "to_pred.weight", "head.bias": "to_pred.bias"}
SCALAR = {**THERE, "head.weight": "to_pred.0.weight"}


@beartype
def save_pretrained(
    model: "palm_rlhf.policy.reward_model.RewardModel",
    directory: str | os.PathLike,
    *,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write the model, its PaLM and its normalisation to one folder of config.json and safetensors, atomically.

    Weights larger than `max_shard_size`, in bytes or like "5GB", are split into several files. Raises OSError on a full
    disk; the earlier contents of the folder stay intact then.
    """
    palm = {**model.palm.config.to_dict(), "finetune_scopes": scope_options(model.palm)}
    options = {"num_binned_output": model.num_binned_output, "pooling": model.pooling}
    config = {"model_type": MODEL_TYPE, **options, "lora_scope": model.lora_scope, "palm": palm}
    write_folder(Path(directory), config, model.state_dict(), parse_size(max_shard_size))


@beartype
def from_pretrained(
    cls: type["palm_rlhf.policy.reward_model.RewardModel"],
    source: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    base: PaLM | None = None,
) -> "palm_rlhf.policy.reward_model.RewardModel":
    """Open a `save_pretrained` folder, or the hub id of one, as `PaLM.from_pretrained` does, with its errors.

    With `base` the model holds the weights of that PaLM, as `share_base` of the constructor, and no others; it has its
    dtype and device. Raises ValueError for a model without LoRA, or with a base of other weights.
    """
    if base is not None:
        if dtype is not None or device is not None:
            raise ValueError(f"got base, dtype={dtype} and device={device}, expected base alone, which has both")
        return open_over(cls, checkpoint.open_weights(local_model(source, revision)), base)
    return checkpoint.from_pretrained(cls, source, dtype=dtype, device=device, revision=revision, open_with=open_folder)


@beartype
def from_palm_rlhf_pytorch(
    cls: type["palm_rlhf.policy.reward_model.RewardModel"],
    source: str | os.PathLike | Mapping[str, Any],
    *,
    causal: bool = True,
    reward_lora_scope: str = "reward",
) -> "palm_rlhf.policy.reward_model.RewardModel":
    """Read a `.pt` of the RewardModel of palm-rlhf-pytorch 0.8.0, or its state dict.

    LoRA is on if the file has `reward_lora_scope`. That package samples a bin for its score; ours is the expectation of
    the bins. Scores are not normalised.
    """
    state, where = checkpoint.state_and_name(source)
    skeleton, parts = open_palm_rlhf_pytorch(cls, state, causal, reward_lora_scope, where)
    return checkpoint.filled(skeleton, parts, dtype=None, device=None)


@beartype
def load(
    model: "palm_rlhf.policy.reward_model.RewardModel", path: str | os.PathLike
) -> "palm_rlhf.policy.reward_model.RewardModel":
    """Load a folder, a `.pt` state dict of ours, or one of palm-rlhf-pytorch, in place; dtype and device stay.

    The pooling and the LoRA scope become those of the file, if it has them. A pickle is never executed. Raises
    FileNotFoundError where there is no file, and ValueError for a file that is damaged or of another model, or of
    another base where the base is shared; the model is unchanged then.
    """
    path, folder = Path(path), None
    if path.is_dir():
        folder = WeightsFolder(path)
        skeleton, parts = open_folder(type(model), folder)
    else:
        state = checkpoint.read_state_dict(path)
        if palm_rlhf_pytorch.is_from_there(palm_part(state)):
            causal, scope = model.palm.config.causal, model.lora_scope or "reward"
            skeleton, parts = open_palm_rlhf_pytorch(type(model), state, causal, scope, str(path))
        else:
            check_shapes(shapes_of(state), shapes_of(model.state_dict()), path)
            skeleton, parts = model, ((name, [tensor]) for name, tensor in state.items())
    require_same(model, skeleton, path)
    if is_shared(model.palm):
        parts = ((name, [tensor]) for name, tensor in without_base(parts, model.palm, path))
    else:
        parts = checkpoint.with_frozen_checked(model, parts)
    for name, options in scope_options(skeleton.palm).items():
        if name not in model.palm.finetune_modules:
            model.palm.add_finetune_params(name, **options)
    model.pooling = skeleton.pooling
    model.use_lora_scope(skeleton.lora_scope)
    checkpoint.copy_parts(model, parts)
    if folder is not None:
        folder.require_unchanged()
    return model


def open_folder(cls: type["RewardModel"], folder: Weights) -> tuple["RewardModel", Parts]:
    """Return the model of a folder, on the meta device, and its tensors, whose shapes are checked."""
    config, where = dict(folder.config), folder.path / CONFIG
    if (model_type := config.pop("model_type", None)) != MODEL_TYPE:
        raise ValueError(
            f"{where} has the model_type {model_type!r}; expected {MODEL_TYPE!r}, which RewardModel.save_pretrained "
            "writes. A PaLM is opened with PaLM.from_pretrained, and RewardModel(palm) puts a new head on it"
        )
    palm, lora_scope = config.pop("palm", None), config.pop("lora_scope", None)
    if not isinstance(palm, dict):
        raise ValueError(f'{where} does not describe a RewardModel: it lacks the config of its "palm"')
    scopes = palm.pop("finetune_scopes", {})
    skeleton = skeleton_of(cls, palm, scopes, config, lora_scope, where)
    check_shapes(folder.shapes, shapes_of(skeleton.state_dict()), folder.path)
    return skeleton, ((name, [folder[name]]) for name in folder.shapes)


def open_over(cls: type["RewardModel"], folder: Weights, base: PaLM) -> "RewardModel":
    """Return the model of a folder over the weights of `base`, which have to be the same."""
    model, parts = open_folder(cls, folder)
    if model.lora_scope is None:
        raise ValueError(
            f"{folder.path} has no LoRA scope, so all its weights were trained; expected adapters over the base: train "
            "the reward model with use_lora=True, by adapters alone, or do not share the base"
        )
    checkpoint.require_same_mathematics(base.config, model.palm.config, folder.path)
    own, buffers = without_base(parts, base, folder.path), dict(model.named_buffers())
    folder.require_unchanged()
    adopt_base(model.palm, base)
    state = {name: tensor.to(base.device, tensor.dtype if name in buffers else base.dtype) for name, tensor in own}
    model.load_state_dict(state, strict=False, assign=True)  # strict would ask for the base as well
    switch_off_dropout(model).use_lora_scope(model.lora_scope)
    return model


def without_base(parts: Parts, base: PaLM, where: Path | str) -> list[tuple[str, Tensor]]:
    """Return the tensors beside the base, each whole. Raises ValueError where the base of the file is not `base`.

    Below a base in fewer bits, the file may have been trained on the plain weights, or on these bits.
    """
    shared, frozen = base_parts(base), quantised_parts(base)
    ours = base.state_dict()
    own = []
    for name, rows in parts:
        inner = name.removeprefix(PALM)
        first, *others = rows
        tensor = torch.cat((first, *others)) if others else first
        if inner == name or inner.split(".")[0] not in shared:
            own.append((name, tensor))
        elif inner in frozen and frozen[inner].is_made_of(tensor):
            continue
        elif inner not in ours or not torch.equal(tensor.to(ours[inner]), ours[inner]):
            raise ValueError(
                f"{where} has another {inner} than the base that is to be shared, expected the same weights: give the "
                "model that the reward model was trained from, or do not share the base"
            )
    return own


def open_palm_rlhf_pytorch(
    cls: type["RewardModel"], state: Mapping[str, Tensor], causal: bool, scope: str, where: str
) -> tuple["RewardModel", Parts]:
    """Return the model of palm-rlhf-pytorch on the meta device, and its tensors; it pools by the mean of all tokens."""
    theirs = palm_part(state)
    names = BINNED if BINNED["head.weight"] in state else SCALAR
    others = {name: tensor for name, tensor in state.items() if not name.startswith(PALM)}
    num_outputs = len(state[names["head.weight"]]) if names["head.weight"] in state else 1
    config = palm_rlhf_pytorch.config_of(theirs, causal=causal, where=where)
    dim, scopes = config["dim"], palm_rlhf_pytorch.scopes_of(theirs)
    shapes = {"head.weight": (num_outputs, dim), "head.bias": (num_outputs,)}
    check_shapes(shapes_of(others), {there: shapes.get(ours, (1, 1, dim)) for ours, there in names.items()}, where)
    if scopes and scope not in scopes:
        raise ValueError(
            f"{where} has the finetune scopes {sorted(scopes)}, but not {scope!r}; name the one that the reward model "
            "was trained with: RewardModel.from_palm_rlhf_pytorch(..., reward_lora_scope=...)"
        )

    num_bins = num_outputs if names is BINNED else 0
    options = {"num_binned_output": num_bins, "pooling": "mean_all"}
    skeleton = skeleton_of(cls, config, scopes, options, scope if scopes else None, where)
    own = {ours: state[there] for ours, there in names.items()}
    own |= {name: own[name].flatten() for name in THERE}
    own |= {"score_mean": torch.zeros(1), "score_std": torch.ones(1)}
    palm_parts = palm_rlhf_pytorch.tensors_of(theirs, skeleton.palm.config, where)
    return skeleton, chain(
        ((PALM + name, rows) for name, rows in palm_parts), ((name, [tensor]) for name, tensor in own.items())
    )


def skeleton_of(
    cls: type["RewardModel"],
    palm_config: Mapping[str, Any],
    scopes: Mapping[str, Any],
    options: Mapping[str, Any],
    lora_scope: str | None,
    where: Path | str,
) -> "RewardModel":
    """Return a reward model on the meta device. Raises ValueError for a config of no reward model."""
    palm = checkpoint.skeleton_of(PaLM, palm_config, scopes, where)
    try:
        model = cls(palm, **options)
        model.use_lora_scope(lora_scope)
    except (TypeError, ValueError, BeartypeCallHintViolation) as error:
        raise ValueError(f"{where} does not describe a RewardModel: {error}") from error
    return model


def require_same(model: "RewardModel", skeleton: "RewardModel", path: Path) -> None:
    """Raise ValueError if the weights of the file do not fit the model, or would compute other numbers in it."""
    checkpoint.require_same_mathematics(model.palm.config, skeleton.palm.config, path)
    if is_shared(model.palm) and skeleton.lora_scope is None:
        raise ValueError(f"{path} has no LoRA scope, expected one: this model shares its base, which is not trained")
    checkpoint.require_same_scopes(model.palm, skeleton.palm, path)
    here, there = model.num_binned_output, skeleton.num_binned_output
    if here != there:
        raise ValueError(
            f"{path} has num_binned_output={there}, and this model {here}; build the model with RewardModel(palm, "
            f"num_binned_output={there}), or open it with RewardModel.from_pretrained"
        )


def palm_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the PaLM inside of the reward model, by their names in the PaLM."""
    return {name.removeprefix(PALM): tensor for name, tensor in state.items() if name.startswith(PALM)}
