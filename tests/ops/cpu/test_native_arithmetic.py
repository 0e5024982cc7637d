"""What the kernels in C share, compiled alone: exp, and the rounding to bfloat16."""

from ctypes import c_long, c_void_p

import numpy as np
import pytest
import torch

from palm_rlhf.ops.cpu import native_library
from tests.planting_in_c import plant

LOOPS = """
#include "native.h"
void exps(const float *x, float *out, long n) { for (long k = 0; k < n; k++) out[k] = exp_(x[k]); }
void stores(const float *x, bfloat16 *out, long n) { for (long k = 0; k < n; k++) out[k] = store_bf16(x[k]); }
void loads(const bfloat16 *x, float *out, long n) { for (long k = 0; k < n; k++) out[k] = load_bf16(x[k]); }
"""


@pytest.fixture
def compile_header(compile_native):
    """Compiles loops over the functions of the header, in which one text may be another."""

    def compile_(text="#pragma once", other="#pragma once"):
        header = (native_library.SOURCES / "native.h").read_text()
        return compile_native({**plant({"native.h": header}, text, other), "loops.c": LOOPS})

    return compile_


def call(function, x, out):
    function.argtypes, function.restype = [c_void_p, c_void_p, c_long], None
    function(x.data_ptr(), out.data_ptr(), x.numel())
    return out


def assert_exp(library):
    x = torch.cat((torch.linspace(-87, 88, 500_001), torch.linspace(-1, 1, 100_001)))
    got, exact = call(library.exps, x, torch.empty_like(x)).double().numpy(), np.exp(x.double().numpy())
    assert (np.abs(got - exact) <= 2 * np.spacing(exact.astype(np.float32))).all(), "units in the last place"
    small, large = torch.tensor([-87.1, -88, -100, -1e30, -torch.inf]), torch.tensor([88.1, 89, 100, 1e30, torch.inf])
    got = call(library.exps, small, torch.empty_like(small))
    assert ((got >= 0) & (got < 1.7e-38)).all(), "small"
    assert (call(library.exps, large, torch.empty_like(large)) > 1.6e38).all(), "large"
    special = torch.tensor([0.0, -0.0, torch.nan])
    torch.testing.assert_close(call(library.exps, special, torch.empty_like(special)), special.exp(), equal_nan=True)


def assert_bfloat16(library):
    """The rounding of PyTorch, of every upper half with a tie, its neighbours and random lower halves."""
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, *torch.randint(2**16, (4,))])
    x = (torch.arange(2**16).unsqueeze(-1) << 16 | lower).to(torch.uint32).view(torch.float32)
    got, expected = call(library.stores, x, torch.empty_like(x, dtype=torch.bfloat16)), x.bfloat16()
    nan = expected.isnan()
    assert torch.equal(nan, x.isnan()) and torch.equal(got.isnan(), nan), "nan"
    assert torch.equal(got[~nan].view(torch.int16), expected[~nan].view(torch.int16)), "rounding"
    wide = call(library.loads, got, torch.empty_like(x))
    assert torch.equal(wide[~nan].view(torch.int32), expected[~nan].float().view(torch.int32)), "loading"
    assert wide[nan].isnan().all(), "loading"


@pytest.mark.parametrize("law", [assert_exp, assert_bfloat16])
def test_arithmetic(law, compile_header):
    if native_library.why_not() is None:
        law(compile_header())


@pytest.mark.parametrize(
    "law, text, wrong, noticed",
    [
        (assert_exp, "4.1665795894e-2f", "4.2e-2f", "units in the last place"),
        (assert_exp, "n * 2.12194440e-4f", "n * 2.122e-4f", "units in the last place"),
        (assert_exp, "x < -87.0f ? -87.0f : x > 88.0f", "x > 88.0f", "small"),
        (assert_exp, "x > 88.0f ? 88.0f : x;", "x;", "large"),
        (assert_bfloat16, "0x7fff + (wide.bits >> 16 & 1)", "0x8000", "rounding"),
        (assert_bfloat16, "0x7fff + (wide.bits >> 16 & 1)", "0", "rounding"),
        (assert_bfloat16, "x == x ? rounded : 0x7fc0", "rounded", "nan"),
    ],
)
def test_wrong_arithmetic_is_noticed(law, text, wrong, noticed, compile_header):
    if native_library.why_not() is None:
        with pytest.raises(AssertionError, match=noticed):
            law(compile_header(text, wrong))
