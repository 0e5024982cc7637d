"""Tiny models, rewards and tokenizers, for tests of every room."""

from typing import Any

import torch

from palm_rlhf.model.palm import PaLM

LETTERS = "abcdefghijkl"
# The serial block with everything that it may have, whose arithmetic differs from PaLM's in every layer.
SERIAL = {"block": "serial", "norm": "rms", "qkv_bias": True, "qk_norm": True, "tie_embeddings": False}


def palm_of(seed: int = 0, **fields: Any) -> PaLM:
    """A small PaLM whose weights depend on the seed and its fields alone."""
    torch.manual_seed(seed)
    return PaLM(**{"num_tokens": 12, "dim": 16, "depth": 2, "heads": 2, "dim_head": 8, **fields})


def palm_of_scaled_norms(seed: int = 0, *, dtype: torch.dtype = torch.float64, **fields: Any) -> PaLM:
    """One whose norms have scales away from 1, and whose biases are not 0, so that a lost one shows."""
    palm = palm_of(seed, **fields).to(dtype)
    for name, parameter in palm.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
        elif name.endswith("bias"):
            parameter.data.normal_()
    return palm


def wandering_palm(seed: int = 0, **fields: Any) -> PaLM:
    """One that rarely repeats itself: at the start a tied model mostly says its last token again."""
    palm = palm_of(seed, **{"num_tokens": 13, "ff_mult": 2, **fields})
    for layer in palm.layers:
        if palm.config.qkv_bias:
            layer.in_proj.bias.data.normal_(std=0.5)
        layer.attn_out.weight.data.mul_(4)
        layer.ff_out.weight.data.mul_(4)
    return palm


def evens(prompts, completions) -> list[float]:
    """The share of even tokens: a reward that differs between responses and needs no model."""
    return [float((row % 2 == 0).double().mean()) for row in completions]


def lengths(prompts, completions) -> list[int]:
    """The lengths of responses, as a reward."""
    return [len(row) for row in completions]


class Letters:
    """A tokenizer whose tokens are the letters of an alphabet."""

    def __init__(self, alphabet: str = LETTERS):
        self.alphabet = alphabet

    def encode(self, text: str) -> list[int]:
        """The place of each letter."""
        return [self.alphabet.index(letter) for letter in text]

    def decode(self, tokens) -> str:
        """The letters of these places."""
        return "".join(self.alphabet[token] for token in tokens)
