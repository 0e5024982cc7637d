"""How a reward model is stored: a folder of its own, or a state dict, that of palm-rlhf-pytorch 0.8.0 too."""

import dataclasses
import os
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from beartype import beartype
from beartype.roar import BeartypeCallHintViolation
from torch import Tensor, nn

from palm_rlhf.model import checkpoint
from palm_rlhf.model.checkpoint import Parts, scope_options, shapes_of
from palm_rlhf.model.interop import palm_rlhf_pytorch
from palm_rlhf.model.palm import PaLM
from palm_rlhf.model.weights_folder import CONFIG, WeightsFolder, check_shapes, parse_size, write_folder

MODEL_TYPE = "palm_reward"
PALM = "palm."
# What palm-rlhf-pytorch calls our tensors.
THERE = {"prompt_embed": "prompt_embed", "response_embed": "response_embed"}
BINNED = {**THERE, "head.weight": "to_pred.weight", "head.bias": "to_pred.bias"}
SCALAR = {**THERE, "head.weight": "to_pred.0.weight"}


Stored = TypeVar("Stored", bound=nn.Module)


class StoredRewardModel(nn.Module):
    """The part of a reward model that writes and reads it."""

    @beartype
    def save_pretrained(self, directory: str | os.PathLike, *, max_shard_size: int | str = "5GB") -> None:
        """Write the model, its PaLM and its normalisation to one folder of config.json and safetensors, atomically.

        Weights above `max_shard_size`, in bytes or like "5GB", go to several files. Raises OSError on a full disk; what
        was in the folder is intact then.
        """
        save_pretrained(self, Path(directory), max_shard_size=max_shard_size)

    @classmethod
    @beartype
    def from_pretrained(
        cls: type[Stored],
        source: str | os.PathLike,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        revision: str | None = None,
    ) -> Stored:
        """Open a `save_pretrained` folder, or the hub id of one, as `PaLM.from_pretrained` does, with its errors."""
        options = {"dtype": dtype, "device": device, "revision": revision}
        return checkpoint.from_pretrained(cls, source, **options, open_with=open_folder)

    @classmethod
    @beartype
    def from_palm_rlhf_pytorch(
        cls, source: str | os.PathLike | Mapping[str, Any], *, causal: bool = True, reward_lora_scope: str = "reward"
    ) -> "StoredRewardModel":
        """Read a `.pt` of palm-rlhf-pytorch 0.8.0's RewardModel, or its state dict; LoRA is on where it has that scope.

        Its binned scores are drawn at random; ours are the expectation. The normalisation is none.
        """
        return from_palm_rlhf_pytorch(cls, source, causal=causal, scope=reward_lora_scope)

    @beartype
    def load(self, path: str | os.PathLike) -> "StoredRewardModel":
        """Load a folder, a `.pt` state dict of ours, or palm-rlhf-pytorch's, in place; dtype and device stay.

        The pooling and the LoRA scope become those of the file's weights, where it tells them. A pickle is never
        executed. Raises FileNotFoundError, or ValueError for a file that is damaged or of another model, which leaves
        this one as it was.
        """
        load_into(self, Path(path))
        return self


def save_pretrained(model: nn.Module, path: Path, *, max_shard_size: int | str) -> None:
    """Write a reward model to a folder, as a whole."""
    palm = {**dataclasses.asdict(model.palm.config), "finetune_scopes": scope_options(model.palm)}
    config = {"model_type": MODEL_TYPE, **options_of(model), "lora_scope": model.lora_scope, "palm": palm}
    write_folder(path, config, model.state_dict(), parse_size(max_shard_size))


def from_palm_rlhf_pytorch(
    cls: type, source: str | os.PathLike | Mapping[str, Any], *, causal: bool, scope: str
) -> nn.Module:
    """Read that package's checkpoint as a new model."""
    state, where = checkpoint.state_and_name(source)
    return checkpoint.filled(*open_palm_rlhf_pytorch(cls, state, causal, scope, where), dtype=None, device=None)


def load_into(model: nn.Module, path: Path) -> None:
    """Load a folder, a `.pt` state dict of ours, or that package's; the model keeps its dtype and device.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it is damaged, or of another model; nothing is changed then.
    """
    folder = None
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
    for scope, options in scope_options(skeleton.palm).items():
        if scope not in model.palm.finetune_modules:
            model.palm.add_finetune_params(scope, **options)
    model.pooling = skeleton.pooling
    model.use_lora_scope(skeleton.lora_scope)
    ours = model.state_dict()
    for name, rows in parts:
        checkpoint.copy_rows(ours[name], rows)
    if folder is not None:
        folder.require_unchanged()


def open_folder(cls: type, folder: WeightsFolder) -> tuple[nn.Module, Parts]:
    """A folder's model on the meta device, and its tensors, checked against that."""
    config, where = dict(folder.config), folder.path / CONFIG
    if (model_type := config.pop("model_type", None)) != MODEL_TYPE:
        raise ValueError(
            f"{where} has the model_type {model_type!r}; expected {MODEL_TYPE!r}, which RewardModel.save_pretrained "
            "writes. A PaLM is opened with PaLM.from_pretrained, and RewardModel(palm) puts a new head on it"
        )
    palm, lora_scope = config.pop("palm", None), config.pop("lora_scope", None)
    if not isinstance(palm, dict):
        raise ValueError(f'{where} does not describe a RewardModel: it lacks the numbers of its "palm"')
    scopes = palm.pop("finetune_scopes", {})
    skeleton = skeleton_of(cls, palm, scopes, config, lora_scope, where)
    check_shapes(folder.shapes, shapes_of(skeleton.state_dict()), folder.path)
    return skeleton, ((name, [folder[name]]) for name in folder.shapes)


def open_palm_rlhf_pytorch(
    cls: type, state: Mapping[str, Tensor], causal: bool, scope: str, where: str
) -> tuple[nn.Module, Parts]:
    """That package's model on the meta device, and its tensors; it takes the mean over all real tokens."""
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
            f"{where} has the finetune scopes {sorted(scopes)}, and not {scope!r}; name the one that the reward model "
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
    cls: type,
    palm_config: Mapping[str, Any],
    scopes: Mapping[str, Any],
    options: Mapping[str, Any],
    lora_scope: str | None,
    where: Path | str,
) -> nn.Module:
    """A reward model on the meta device; ValueError where the numbers do not make one."""
    palm = checkpoint.skeleton_of(PaLM, palm_config, scopes, where)
    try:
        model = cls(palm, **options)
        model.use_lora_scope(lora_scope)
    except (TypeError, ValueError, BeartypeCallHintViolation) as error:
        raise ValueError(f"{where} does not describe a RewardModel: {error}") from error
    return model


def require_same(model: nn.Module, skeleton: nn.Module, path: Path) -> None:
    """ValueError where the file's weights do not fit the model, or would compute other numbers in it."""
    checkpoint.require_same_mathematics(model.palm.config, skeleton.palm.config, path)
    checkpoint.require_same_scopes(model.palm, skeleton.palm, path)
    here, there = model.num_binned_output, skeleton.num_binned_output
    if here != there:
        raise ValueError(
            f"{path} has num_binned_output={there}, and this model {here}; build the model with RewardModel(palm, "
            f"num_binned_output={there}), or open it with RewardModel.from_pretrained"
        )


def options_of(model: nn.Module) -> dict[str, Any]:
    """What builds the head again."""
    return {"num_binned_output": model.num_binned_output, "pooling": model.pooling}


def palm_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the PaLM inside, by their names in it."""
    return {name.removeprefix(PALM): tensor for name, tensor in state.items() if name.startswith(PALM)}
