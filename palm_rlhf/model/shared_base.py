"""Several PaLMs over one set of base weights, each with LoRA scopes of its own.

They hold the very modules of the base: the embeddings, the blocks, the last norm and the output layer. So a second PaLM
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
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary, WeakSet

from torch import nn

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
    if is_shared(palm):
        gc.collect()  # a model that nobody holds may be left in a cycle
    if others := _others(palm):
        scopes = sorted({scope for other in others for scope in other.finetune_modules})
        raise ValueError(
            f"got {action} on a base that {len(others)} other models hold, with the LoRA scopes {scopes}, expected a "
            "base of its own, since their adapters were trained on this one: change a copy, copy.deepcopy(palm), or "
            "delete the other models (a reward model, a critic, a trainer) first"
        )


def _same_parts(palm: "PaLM") -> dict[int, Any]:
    """Return the memo with which copy.deepcopy takes the base as it is."""
    return {id(part): part for part in base_parts(palm).values()}


def _register(*palms: "PaLM") -> None:
    _palms.setdefault(palms[0].layers, WeakSet()).update(palms)
    for part in base_parts(palms[0]).values():
        part.requires_grad_(False)


def _others(palm: "PaLM") -> list["PaLM"]:
    return [other for other in _palms.get(palm.layers, ()) if other is not palm]
