"""One arithmetic: a forward gives the same bits with and without gradients, whichever kernels compute it."""

from contextlib import nullcontext

import pytest
import torch

from palm_rlhf import PaLM
from palm_rlhf.ops.logprobs import MAX_REPEATED_DIM
from palm_rlhf.policy.sequences import action_logprobs, join
from tests.factories import SERIAL, palm_of

ARITHMETIC = {  # the type of the weights, and whether bfloat16 autocast is on
    "float64": (torch.float64, False),
    "float32": (torch.float32, False),
    "bfloat16": (torch.bfloat16, False),
    "autocast": (torch.float32, True),
}
MODELS = {
    "multi-query": {},
    "grouped": {"heads": 4, "kv_heads": 2},
    "narrow heads": {"dim_head": 24},  # which the kernel of attention in C does not take
    "normalised": {"qk_norm": True, "xpos": True},
    "eager": {"flash_attn": False},
    "bidirectional": {"causal": False},
    "serial": SERIAL,
    "recomputed": {"gradient_checkpointing": True},
    "wide": {"dim": 800, "num_tokens": 3200, "depth": 1},  # whose logits are dearer to compute again than to hold
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """A tiny model has several chunks of logits."""
    monkeypatch.setattr("palm_rlhf.ops.logprobs.CHUNK", 1 << 12)


def tiny_palm(**options) -> PaLM:
    return palm_of(**{"num_tokens": 300, "dim": 64, "dim_head": 32, **options})


def ragged(num_tokens: int, *pairs: tuple[int, int]):
    """Prompts and responses of these lengths."""
    torch.manual_seed(1)
    rows = [[torch.randint(num_tokens, (length,)) for length in pair] for pair in pairs]
    return join(*zip(*rows, strict=True))


def said(palm: PaLM, sequences, scope=None) -> tuple[torch.Tensor, ...]:
    """Everything that reinforcement learning compares of a policy, its critic and its reference."""
    embeds = palm(sequences.tokens, key_mask=sequences.key_mask, return_only_embedding=True, finetune_scope=scope)
    found = action_logprobs(palm, sequences.before_actions(embeds), sequences.actions)
    return embeds.where(sequences.key_mask.unsqueeze(-1), 0.0), *found


def precision(autocast: bool):
    return torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()


def assert_same_bits(got, expected):
    differences = [float((one - other).detach().abs().max()) for one, other in zip(got, expected, strict=True)]
    assert not any(differences), differences


def assert_one_arithmetic(palm: PaLM, sequences, autocast: bool, scope: str | None = None):
    """The policy in training, the same one without gradients, and its reference: its base, or a frozen copy."""
    with precision(autocast):
        trained = said(palm, sequences, scope)
        assert trained[1].requires_grad
        with torch.no_grad():
            assert_same_bits(said(palm, sequences, scope), trained)
        if scope is not None:  # adapters change nothing at the start
            assert_same_bits(said(palm, sequences), trained)
            return
        embeds, logprobs, _ = said(palm.requires_grad_(False), sequences)
        assert_same_bits([embeds], trained[:1])
        if palm.config.dim <= MAX_REPEATED_DIM:
            assert_same_bits([logprobs], trained[1:2])
        else:  # the logits of a frozen copy come in chunks, whose products may add up in another order
            torch.testing.assert_close(logprobs, trained[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("name", MODELS)
def test_a_policy_says_the_same_with_and_without_gradients(name, arithmetic, kernels):
    dtype, autocast = ARITHMETIC[arithmetic]
    palm = tiny_palm(**MODELS[name]).to(dtype)
    assert_one_arithmetic(palm, ragged(palm.num_tokens, (9, 17), (1, 5), (20, 20)), autocast)


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
def test_adapters_that_change_nothing_leave_the_bits_of_their_base(arithmetic, kernels):
    dtype, autocast = ARITHMETIC[arithmetic]
    palm = tiny_palm().to(dtype)
    palm.add_finetune_params("actor", 4)
    assert_one_arithmetic(palm, ragged(300, (9, 17), (1, 5), (20, 20)), autocast, "actor")


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("pairs", [[(1, 1)], [(1, 1), (1, 2)], [(2, 6)] * 3], ids=str)
def test_sequences_of_a_few_tokens_are_no_decoding(pairs, arithmetic, kernels):
    dtype, autocast = ARITHMETIC[arithmetic]
    assert_one_arithmetic(tiny_palm().to(dtype), ragged(300, *pairs), autocast)
