"""Checkpoints of the PyPI package palm-rlhf-pytorch 0.8.0: state dicts, whose names and shapes tell most options."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from palm_rlhf.model.config import PaLMConfig
from palm_rlhf.model.weights_folder import check_shapes

EMBEDDINGS, TIED = "token_emb.weight", "to_logits.weight"
FUSED, FREQUENCIES = "fn.fused_attn_ff_proj.weight", "fn.rotary_emb.inv_freq"
ATTN_OUT, FF_OUT = "fn.attn_out.weight", "fn.ff_out.2.weight"
SCOPES = "finetune_modules."
ADAPTERS = ("q", "k", "v", "out")  # there they are numbered 0 to 3


def is_from_there(state: Mapping[str, Any]) -> bool:
    """Return whether a state dict is of the PaLM of that package."""
    return f"layers.0.{FUSED}" in state


def config_of(state: Mapping[str, Any], *, causal: bool, where: str) -> dict[str, Any]:
    """Return the fields of a PaLMConfig: the sizes from the shapes, the others as they are fixed in that package.

    Causal models have xPos with a scale base of 512; a checkpoint does not tell if it was changed. Logits are not
    scaled, and there is no z-loss. Raises ValueError for another state dict, and for one with `qk_rmsnorm=True`, whose
    formula differs from `qk_norm`.
    """
    needed = [EMBEDDINGS, *(f"layers.0.{name}" for name in (FUSED, FREQUENCIES, ATTN_OUT, FF_OUT))]
    if missing := [name for name in needed if name not in state]:
        raise ValueError(f"{where} lacks {missing}; expected the state dict of a PaLM of palm-rlhf-pytorch 0.8.0")
    if scales := [name for name in state if name.endswith((".q_scale", ".k_scale"))]:
        raise ValueError(
            f"{where} was trained with qk_rmsnorm=True (it has {scales[0]}), which a PaLM cannot compute: "
            "its qk_norm is another formula; train a new model with qk_norm=True"
        )
    dim_head = 2 * len(state[f"layers.0.{FREQUENCIES}"])
    num_tokens, dim = state[EMBEDDINGS].shape
    return {
        "num_tokens": num_tokens,
        "dim": dim,
        "depth": len([name for name in state if name.endswith(FUSED)]),
        "heads": state[f"layers.0.{ATTN_OUT}"].shape[1] // dim_head,
        "dim_head": dim_head,
        "ff_inner_dim": state[f"layers.0.{FF_OUT}"].shape[1],
        "causal": causal,
        "xpos": causal,
        "logit_scale": 1.0,
        "z_loss": 0.0,
    }


def scopes_of(state: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Return, for each LoRA scope, the keywords of `add_finetune_params`; that package does not freeze the base."""
    first = {name.split(".")[1]: name for name in state if name.startswith(SCOPES) and name.endswith(".0.0.A")}
    ranks = {scope: state[name].shape[1] for scope, name in first.items()}
    return {scope: {"r": r, "alpha": r, "train_base": True} for scope, r in ranks.items()}


def tensors_of(state: Mapping[str, Tensor], config: PaLMConfig, where: str) -> Iterator[tuple[str, Iterable[Tensor]]]:
    """Return the names of our tensors and their parts, after checking the whole state dict."""
    found = {name: tuple(tensor.shape) for name, tensor in state.items() if name != TIED}
    check_shapes(found, expected_shapes(config, scopes_of(state)), where)
    d = config.dim_head
    fixed = {"inv_freq": config.rotary_theta ** -(torch.arange(0, d, 2) / d), "beta": torch.zeros(config.dim)}
    for name, tensor in state.items():
        constant = fixed.get(name.rpartition(".")[2])
        if constant is not None and not torch.allclose(tensor.float().cpu(), constant, rtol=1e-2):  # of bfloat16
            raise ValueError(
                f"{where} has another {name} than palm-rlhf-pytorch 0.8.0 makes, which a PaLM cannot compute; take the "
                "checkpoint of an unchanged model"
            )
    if TIED in state and not torch.equal(state[TIED], state[EMBEDDINGS]):
        raise ValueError(f"{where} has a {TIED} of its own; expected the embeddings, as in a PaLM: take another model")
    return renamed(state, config)


def expected_shapes(config: PaLMConfig, scopes: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of the PaLM of that package, buffers included."""
    dim, d, inner, q_dim = config.dim, config.dim_head, config.inner_dim, config.heads * config.dim_head
    shapes = {EMBEDDINGS: (config.num_tokens, dim), "norm.gamma": (dim,), "norm.beta": (dim,)}
    for i in range(config.depth):
        shapes |= {
            f"layers.{i}.fn.norm.gamma": (dim,),
            f"layers.{i}.fn.norm.beta": (dim,),
            f"layers.{i}.{FREQUENCIES}": (d // 2,),
            f"layers.{i}.fn.rotary_emb.scale": (d // 2,),
            f"layers.{i}.{FUSED}": (q_dim + 2 * d + 2 * inner, dim),
            f"layers.{i}.{ATTN_OUT}": (dim, q_dim),
            f"layers.{i}.{FF_OUT}": (dim, inner),
        }
        for scope, options in scopes.items():
            for kind, (rows, columns) in enumerate(((dim, q_dim), (dim, d), (dim, d), (q_dim, dim))):
                shapes[f"{SCOPES}{scope}.{i}.{kind}.A"] = (rows, options["r"])
                shapes[f"{SCOPES}{scope}.{i}.{kind}.B"] = (options["r"], columns)
    return shapes


def renamed(state: Mapping[str, Tensor], config: PaLMConfig) -> Iterator[tuple[str, Iterable[Tensor]]]:
    """Yield the names of our tensors and their parts.

    That package stores the scale of a norm minus 1, and the value of the feed-forward before its gate.
    """
    yield EMBEDDINGS, [state[EMBEDDINGS]]
    yield "norm.weight", [state["norm.gamma"] + 1]
    for i in range(config.depth):
        fused = state[f"layers.{i}.{FUSED}"]
        qkv, value, gate = fused.split([len(fused) - 2 * config.inner_dim, config.inner_dim, config.inner_dim])
        yield f"layers.{i}.norm.weight", [state[f"layers.{i}.fn.norm.gamma"] + 1]
        yield f"layers.{i}.in_proj.weight", [qkv, gate, value]
        yield f"layers.{i}.attn_out.weight", [state[f"layers.{i}.{ATTN_OUT}"]]
        yield f"layers.{i}.ff_out.weight", [state[f"layers.{i}.{FF_OUT}"]]
    for scope in scopes_of(state):
        for i in range(config.depth):
            for kind, ours in enumerate(ADAPTERS):
                for matrix in "AB":
                    theirs = state[f"{SCOPES}{scope}.{i}.{kind}.{matrix}"]
                    yield f"{SCOPES}{scope}.{i}.{ours}.{matrix}", [theirs]
