"""Several PaLMs over one set of base weights, each with LoRA scopes of its own.

They hold the same modules: the embeddings, the blocks, the last norm and the output layer. So a second PaLM
costs the memory of its adapters, a move of one moves all, and whoever changed the base would change all of them.

With `PPOConfig.share_base` the roles hold, beside the base:

policy         adapters, each number with a gradient and the two moments of AdamW
reference      nothing: it is the base
reward model   adapters, a head and the two embeddings of prompts and responses, without gradients
critic         a copy of those of the reward model, of which the head is not trained, or new adapters (critic_lora_r);
               and a value head; trained numbers have gradients and moments as the policy's
"""

import copy
import gc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from palm_rlhf.model.palm import PaLM

Model = TypeVar("Model", bound=nn.Module)
OWN_PARTS = ("finetune_modules", "dropout")  # every other part of a PaLM is the base
_palms: WeakKeyDictionary[nn.Module, WeakSet["PaLM"]] = WeakKeyDictionary()  # of each shared base, by its blocks


def base_parts(palm: "PaLM") -> dict[str, nn.Module]:
    """Return the modules of the base, by their names in the PaLM."""
    return {name: part for name, part in palm.named_children() if name not in OWN_PARTS}


def palm_over_base(palm: "PaLM") -> "PaLM":
    """Return a PaLM over the base of another one, without LoRA scopes; the base is frozen from now on."""
    view = copy.deepcopy(palm, {**_same_parts(palm), id(palm.finetune_modules): nn.ModuleDict()})
    _register(palm, view)
    return view


def copy_over_base(model: Model, palm: "PaLM") -> Model:
    """Return a copy of a model, adapters and heads included, but for the base of `palm`, which is the model's PaLM."""
    memo: dict[int, Any] = _same_parts(palm)
    copied = copy.deepcopy(model, memo)
    _register(palm, memo[id(palm)])
    return copied


def adopt_base(palm: "PaLM", base: "PaLM") -> None:
    """Let a PaLM of the same config hold the base of another one in place of its own; the base is frozen."""
    for name, part in base_parts(base).items():
        setattr(palm, name, part)
    _register(base, palm)


def is_shared(palm: "PaLM") -> bool:
    """Return whether another PaLM holds the same base."""
    return bool(_others(palm))


def have_one_base(one: "PaLM", other: "PaLM") -> bool:
    """Return whether two PaLMs hold the same base, not equal ones."""
    return one.layers is other.layers


def require_sole_base(palm: "PaLM", action: str) -> None:
    """Raise ValueError where an action would change the base below the adapters of another PaLM."""
    if others := _others_left(palm):
        scopes = sorted({scope for other in others for scope in other.finetune_modules})
        raise ValueError(
            f"got {action} on a base that {len(others)} other models hold, with the LoRA scopes {scopes}, expected a "
            "base of its own, since their adapters were trained on this one: change a copy, copy.deepcopy(palm), or "
            "delete the other models (a reward model, a critic, a trainer) first"
        )


def apply(palm: "PaLM", fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PaLM":
    """Move or cast a PaLM, as `to` does. Raises ValueError for a cast of a base that another model holds.

    The adapters and the head of the other model would keep their type.
    """
    dtype = fn(torch.empty(0, dtype=palm.dtype, device=palm.device)).dtype if is_shared(palm) else palm.dtype
    if dtype != palm.dtype and (others := _others_left(palm)):
        raise ValueError(
            f"got a cast to {dtype} of a base that {len(others)} other models hold (a reward model, a critic, a "
            f"trainer's), expected {palm.dtype}, the type of their adapters and heads: cast a model before others are "
            "built over it, or a copy, copy.deepcopy(palm)"
        )
    return nn.Module._apply(palm, fn, recurse)


def load_from_state_dict(
    palm: "PaLM",
    state_dict: Any,
    prefix: Any,
    local_metadata: Any,
    strict: Any,
    missing_keys: Any,
    unexpected_keys: Any,
    error_msgs: Any,
) -> None:
    """Check a state dict before a PaLM's parts load it. Raises ValueError for other weights of a shared base."""
    ours = palm.state_dict() if is_shared(palm) else {}
    for name in (name for name in ours if name.split(".")[0] in base_parts(palm)):
        theirs = state_dict.get(prefix + name, ours[name])
        if theirs.shape != ours[name].shape or not torch.equal(theirs.to(ours[name]), ours[name]):
            require_sole_base(palm, f"load_state_dict with another {name}")
    lists = missing_keys, unexpected_keys, error_msgs
    nn.Module._load_from_state_dict(palm, state_dict, prefix, local_metadata, strict, *lists)


def _same_parts(palm: "PaLM") -> dict[int, Any]:
    """Return the memo with which copy.deepcopy takes the base as it is."""
    return {id(part): part for part in base_parts(palm).values()}


def _register(*palms: "PaLM") -> None:
    _palms.setdefault(palms[0].layers, WeakSet()).update(palms)
    for part in base_parts(palms[0]).values():
        part.requires_grad_(False)


def _others(palm: "PaLM") -> list["PaLM"]:
    return [other for other in _palms.get(palm.layers, ()) if other is not palm]


def _others_left(palm: "PaLM") -> list["PaLM"]:
    """Return the other PaLMs over the base, but for those that nobody holds, which may be left in a cycle."""
    if is_shared(palm):
        gc.collect()
    return _others(palm)
