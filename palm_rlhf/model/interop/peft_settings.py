"""The adapter_config.json of PEFT (Hugging Face): which modules have adapters, of which rank and scale.

Settings that change what an adapter computes, and that a LoRA scope has no place for, are refused by name.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palm_rlhf.model.lora import ALL_LINEAR

OFF: tuple[Any, ...] = (None, False, (), {}, "")
# The values that a LoRA scope can compute with; a setting that is missing has PEFT's default, which is among them.
COMPUTED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": (None, "CAUSAL_LM"),
    "bias": (None, "none"),
    # of the others, some change the weights of the base before training begins, by its singular values for example
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
    **dict.fromkeys(
        ("alora_invocation_tokens", "arrow_config", "fan_in_fan_out", "kasa_config", "layer_replication", "lora_bias",
         "megatron_config", "modules_to_save", "monteclora_config", "target_parameters", "trainable_token_indices",
         "use_bdlora", "use_dora", "use_qalora", "velora_config"),
        OFF,
    ),
}  # fmt: skip
REMOTE_CODE = "transformers_modules"  # where transformers puts code that it downloads
MODULE_NAME = re.compile(r"[\w.]+")


@dataclass(frozen=True)
class PeftSettings:
    """The settings of the adapters of a model in adapter_config.json; modules have the names of transformers.

    A regular expression of the file is never run, since a hostile one would not end. Where `target_modules` is one, the
    tensors tell which modules have adapters.

    Args:
        r: the rank, except where `rank_pattern` has another for a module.
        alpha: the numerator of the scale, except where `alpha_pattern` has another.
        use_rslora: divide alpha by the square root of the rank (Kalajdzievski 2023), and not by the rank.
        target_modules: names of modules, or the ends of their names; None: the modules that have tensors.
        exclude_modules: modules that have no adapter though `target_modules` names them.
        layers: the numbers of the blocks with adapters; None is all.
        rank_pattern: ranks by names of modules, or by the ends of their names.
        alpha_pattern: the same for alpha.
        base: the name of the model that the adapter was trained on, if the file tells it.
    """

    r: int
    alpha: float
    use_rslora: bool
    target_modules: tuple[str, ...] | None
    exclude_modules: tuple[str, ...]
    layers: tuple[int, ...] | None
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    base: str | None

    def covers(self, module: str, layer: int) -> bool | None:
        """Return whether a module of a block has an adapter, or None where only its tensors show it."""
        if self.target_modules is None:
            return None
        if is_named(module, self.exclude_modules) or (self.layers is not None and layer not in self.layers):
            return False
        return ALL_LINEAR in self.target_modules or is_named(module, self.target_modules)

    def rank(self, module: str) -> int:
        """Return the rank of the adapter of a module."""
        return next((r for name, r in self.rank_pattern.items() if is_named(module, (name,))), self.r)

    def scale(self, module: str) -> float:
        """Return the factor of the product of the two matrices of a module."""
        found = (alpha for name, alpha in self.alpha_pattern.items() if is_named(module, (name,)))
        alpha, rank = next(found, self.alpha), self.rank(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def is_named(module: str, names: tuple[str, ...]) -> bool:
    """Return whether one of the names is the name of a module, or its end after a dot."""
    return any(module == name or module.endswith(f".{name}") for name in names)


def read_settings(values: Mapping[str, Any], where: Path) -> PeftSettings:
    """Return the settings in the values of an adapter_config.json.

    Raises ValueError that names the settings that a LoRA scope cannot compute, or that are of a wrong type.
    """
    settings = {name: values.get(name, fine[0]) for name, fine in COMPUTED.items()}
    if refused := [f"{name}={got!r:.80}" for name, got in settings.items() if not is_one_of(got, COMPUTED[name])]:
        raise ValueError(
            f"{where} has {', '.join(refused)}, which a LoRA scope cannot compute; expected plain LoRA of the linear "
            "layers: merge the adapter into its base with PEFT (merge_and_unload), and open the merged model"
        )
    mapping = values.get("auto_mapping")
    library = mapping.get("parent_library") if isinstance(mapping, dict) else None
    if isinstance(library, str) and library.startswith(REMOTE_CODE):
        raise ValueError(
            f"{where} has a base of the class in {library!r}, code from its repository, which is never executed; "
            "expected an adapter of a model of transformers itself"
        )
    excluded = values.get("exclude_modules") or []
    layers = values.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers or None
    found = {
        "r": (values.get("r", 8), lambda x: is_number(x, int) and x > 0, "a rank of at least 1"),
        "lora_alpha": (values.get("lora_alpha", 8), lambda x: is_number(x, (int, float)), "a number"),
        "use_rslora": (values.get("use_rslora") or False, lambda x: isinstance(x, bool), "true or false"),
        "target_modules": (values.get("target_modules"), lambda x: bool(x) and are_names(x), "names of modules"),
        "exclude_modules": (excluded, lambda x: isinstance(x, list) and are_names(x), "a list of names of modules"),
        "layers_to_transform": (layers, lambda x: x is None or are_numbers(x, int), "numbers of blocks"),
        "rank_pattern": (values.get("rank_pattern") or {}, lambda x: is_pattern(x, int), "ranks by names of modules"),
        "alpha_pattern": (
            values.get("alpha_pattern") or {},
            lambda x: is_pattern(x, (int, float)),
            "numbers by names of modules, without regular expressions",
        ),
    }
    for name, (got, is_fine, expected) in found.items():
        if not is_fine(got):
            raise ValueError(f"{where} has {name}={got!r:.80}; expected {expected}: copy or download the file again")
    targets = found["target_modules"][0]
    if isinstance(targets, str):  # a regular expression, but for one word
        targets = [targets] if targets == ALL_LINEAR else None
    return PeftSettings(
        r=found["r"][0],
        alpha=found["lora_alpha"][0],
        use_rslora=found["use_rslora"][0],
        target_modules=None if targets is None else tuple(targets),
        exclude_modules=tuple(excluded),
        layers=None if layers is None else tuple(layers),
        rank_pattern=found["rank_pattern"][0],
        alpha_pattern=found["alpha_pattern"][0],
        base=base_name(values),
    )


def base_name(values: Mapping[str, Any]) -> str | None:
    """Return the name of the model that an adapter was trained on, if its file tells it."""
    name = values.get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def is_one_of(got: Any, fine: tuple[Any, ...]) -> bool:
    """Return whether a value is among others; 1 is not True, and an empty list is as good as None."""
    got = () if got == [] else got
    return any(type(got) is type(value) and got == value for value in fine)


def is_number(got: Any, kinds: type | tuple[type, ...]) -> bool:
    """Return whether a value is a finite number, and no truth value."""
    return isinstance(got, (int, float)) and isinstance(got, kinds) and type(got) is not bool and math.isfinite(got)


def are_numbers(got: Any, kinds: type | tuple[type, ...]) -> bool:
    """Return whether a value is a list of numbers."""
    return isinstance(got, list) and all(is_number(one, kinds) for one in got)


def are_names(got: Any) -> bool:
    """Return whether a value is a string, or a list of strings."""
    return isinstance(got, str) or (isinstance(got, list) and all(isinstance(name, str) for name in got))


def is_pattern(got: Any, kinds: type | tuple[type, ...]) -> bool:
    """Return whether a value maps names of modules to numbers; ranks are at least 1."""
    least = 1 if kinds is int else -math.inf
    return isinstance(got, dict) and all(
        MODULE_NAME.fullmatch(name) and is_number(number, kinds) and number >= least for name, number in got.items()
    )


def to_values(r: int, alpha: float, modules: list[str], base: str | None) -> dict[str, Any]:
    """Return the values of an adapter_config.json: plain LoRA of the modules of these names in every block."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": r,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "target_modules": modules,
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "inference_mode": True,
    }
