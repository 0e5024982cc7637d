"""Rotary frequencies of long contexts: those of transformers, and numbers by hand."""

import math

import pytest
import torch

from palm_rlhf.ops.rotary import rotary_tables
from palm_rlhf.ops.rotary_scaling import RotaryScaling

LLAMA_31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
QWEN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
SCALINGS = {
    "linear": ({"rope_type": "linear", "factor": 2.5}, 10000.0, 64),
    "Llama 3.1": (LLAMA_31, 500000.0, 128),
    "Llama 3.2": ({**LLAMA_31, "factor": 32.0}, 500000.0, 64),
    "llama3 with other limits": ({**LLAMA_31, "low_freq_factor": 2.0, "high_freq_factor": 16.0}, 10000.0, 32),
    "Qwen": (QWEN, 1000000.0, 128),
    "yarn, betas": ({**QWEN, "beta_fast": 64.0, "beta_slow": 2.0, "attention_factor": 1.3}, 10000.0, 96),
    "yarn, short": ({**QWEN, "original_max_position_embeddings": 5}, 10000.0, 16),
    "yarn, no pair turns so slowly": ({**QWEN, "beta_slow": 1e-4}, 10000.0, 16),
    "yarn of factor 1": ({**QWEN, "factor": 1.0}, 10000.0, 64),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_and_factor_are_those_of_transformers(name):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    fields, theta, size = SCALINGS[name]
    config = transformers.LlamaConfig(
        head_dim=size,
        max_position_embeddings=131072,
        rope_parameters={**fields, "rope_theta": theta},
    )
    expected, factor = ROPE_INIT_FUNCTIONS[fields["rope_type"]](config, torch.device("cpu"))
    scaling = RotaryScaling.from_dict(fields)
    plain = theta ** -(torch.arange(0, size, 2).double() / size)
    got = scaling.stretched(plain, theta)
    torch.testing.assert_close(got.float(), expected, rtol=1e-6, atol=0)
    assert scaling.table_factor == pytest.approx(factor, rel=1e-12)
    if fields["factor"] > 1:
        assert not torch.allclose(got, plain)

    positions = torch.tensor([0, 1, 7, 4000])
    cos, sin = rotary_tables(positions, size, theta=theta, scaling=scaling, dtype=torch.float64)
    angles = positions.double()[:, None] * got
    torch.testing.assert_close(cos, (angles.cos() * factor).repeat(1, 2), rtol=0, atol=1e-12)
    torch.testing.assert_close(sin, torch.cat((-angles.sin(), angles.sin()), dim=-1) * factor, rtol=0, atol=1e-12)


def test_by_hand():
    """Wavelengths of 4, 40 and 400 tokens in a context of 80: with factor 2, 20, 2 and 0.2 rotations."""
    plain = 2 * math.pi / torch.tensor([4.0, 40.0, 400.0]).double()
    linear = RotaryScaling("linear", 2.0)
    assert torch.equal(linear.stretched(plain, 10.0), plain / 2) and linear.table_factor == 1.0
    llama = RotaryScaling("llama3", 2.0, 80, low_freq_factor=1.0, high_freq_factor=4.0)
    wavelengths = 2 * math.pi / llama.stretched(plain, 10.0)
    # 2 rotations are a third of the way from 1 to 4, so that a third of the frequency stays and two thirds are halved
    torch.testing.assert_close(wavelengths, torch.tensor([4.0, 40 / (1 / 3 + 2 / 3 / 2), 800.0]).double())
    yarn = RotaryScaling("yarn", math.e, 80)
    assert yarn.table_factor == pytest.approx(1.1)
    assert RotaryScaling("yarn", 2.0, 80, attention_factor=0.7).table_factor == 0.7


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"rope_type": "dynamic", "factor": 2.0}, r"rotary scaling 'dynamic', expected one of .*yarn"),
        ({"rope_type": "longrope", "factor": 2.0}, "rotary scaling 'longrope'"),
        ({"rope_type": "linear", "factor": 0.5}, "factor 0.5, expected at least 1"),
        ({"rope_type": "linear", "factor": None}, r"without \['factor'\]"),
        ({"rope_type": "linear"}, r"without \['factor'\]"),
        ({"factor": 2.0}, r"without \['rope_type'\]"),
        ({"rope_type": "yarn", "factor": 2.0}, "yarn without original_max_position_embeddings"),
        ({**LLAMA_31, "original_max_position_embeddings": None}, "llama3 without original_max_position_embeddings"),
        ({**QWEN, "original_max_position_embeddings": -5}, "original_max_position_embeddings=-5, expected above 0"),
        ({**QWEN, "attention_factor": 0.0}, "attention_factor=0.0, expected above 0"),
        ({**LLAMA_31, "low_freq_factor": 4.0}, "low_freq_factor=4.0 and high_freq_factor=4.0"),
        ({**QWEN, "mscale": 0.7}, r"rotary scaling with \['mscale'\]"),
        ({**QWEN, "truncate": False}, r"rotary scaling with \['truncate'\]"),
        ({**QWEN, "beta_slow": 0.0}, "beta_fast=32.0 and beta_slow=0.0"),
    ],
)
def test_a_scaling_that_is_unknown_or_out_of_range_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        RotaryScaling.from_dict(fields)
