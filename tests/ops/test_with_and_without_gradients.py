"""One arithmetic: a forward gives the same bits with and without gradients, whichever kernels compute it."""

from contextlib import nullcontext

import pytest
import torch

from palm_rlhf import PaLM
from palm_rlhf.ops import attention_native, logprobs_chunked, native
from palm_rlhf.policy.sequences import action_logprobs, join

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
    "recomputed": {"gradient_checkpointing": True},
    "wide": {"dim": 800, "num_tokens": 3200, "depth": 1},  # whose logits are dearer to compute again than to hold
}


@pytest.fixture(params=["kernels in C", "operations of PyTorch"])
def kernels(request, monkeypatch):
    """Each test with the kernels in C, where there is a compiler for them, and without; logits in small chunks."""

    def forget():
        native._load.cache_clear()
        attention_native._runs.cache_clear()

    monkeypatch.setattr(logprobs_chunked, "CHUNK", 1 << 12)
    if request.param == "operations of PyTorch":
        monkeypatch.setenv("PALM_RLHF_NATIVE", "0")
    forget()
    yield
    monkeypatch.undo()
    forget()


def tiny_palm(**options) -> PaLM:
    torch.manual_seed(0)
    return PaLM(**{"num_tokens": 300, "dim": 64, "depth": 2, "heads": 2, "dim_head": 32, **options})


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
    """The policy in training, the same one without gradients, and a frozen copy in a mode with them."""
    with precision(autocast):
        trained = said(palm, sequences, scope)
        assert trained[1].requires_grad
        with torch.no_grad():
            assert_same_bits(said(palm, sequences, scope), trained)
        if scope is not None:  # adapters change nothing at the start: their base is the reference
            assert_same_bits(said(palm, sequences), trained)
        elif palm.config.dim <= 768:
            assert_same_bits(said(palm.requires_grad_(False), sequences), trained)


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
