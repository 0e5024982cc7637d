"""Mistakes in the kernel that reads the next token, each of which the laws of `test_step.py` notice."""

import math
import platform

import pytest

from palm_rlhf.model.lora import ATTENTION, TARGETS
from palm_rlhf.ops.cpu import native_library
from tests.planting_in_c import plant

from .steps import EXACT, add_scope, assert_way, bfloat16_error, palm_of, read, read_at_once, rows_of

pytestmark = pytest.mark.usefixtures("one_thread")
SOURCES = ("native.h", "decode.c", "products.h", "products_body.h", "decode_body.h")
TURNED = "$buffer[$k < $n / 2 ? $k + $n / 2 : $k - $n / 2] * $sines[$k]"
# Code, with $name for a variable of any name; a mistake in its place; and the shape, if any, for which it is none.
MUTANTS = {
    "own key": (
        "$scores[$h * $capacity + $length] = $tile[$h][0]",
        "$scores[$h * $capacity + $length] = 0",
        None,
    ),
    "own value": ("$out[$c] = $scores[$length] * $own[$c];", "$out[$c] = 0;", None),
    "scale": ("EXP(($score - $most) * $scale)", "EXP($score - $most)", None),
    "first": (
        "$first[$i / $heads], $lengths[$i / $heads]",
        "0 * $first[$i / $heads], $lengths[$i / $heads]",
        {"lengths": (6, 6, 6)},
    ),
    "half": (TURNED, "$buffer[$k ^ 1] * $sines[$k]", {"dim_head": 2}),
    "sign": (TURNED, f"-{TURNED}", None),
    "gate": ("$gate / (1 + EXP(-$gate)) * $value", "$value / (1 + EXP(-$value)) * $gate", None),
    "eps": ("sqrt($variance / $n + $eps)", "sqrt($variance / $n)", {"norm_eps": 0.0}),
    "kv head": ("$kv = $head / ($heads / $kv_heads)", "$kv = $head % $kv_heads", {"kv_heads": 4}),
    "norm's head": ("k_norm ? k_norm + $kv * $scale : 0", "k_norm ? k_norm : 0", {"kv_heads": 1}),
    "table's head": ("$shape->table_heads == 1 ? 0 : $d", "0", {"xpos": False}),
    "table's row": ("cosines += ($shape->table_rows == 1 ? 0 : $row)", "cosines += 0", {"lengths": (6, 6, 6)}),
    "values' place": ("values[$length * $d + $c] =", "values[($length - 1) * $d + $c] =", None),
    "rest of values": (
        "$scores[$j] * OF(load)(values[$j * $d + $c])",
        "$scores[$j] * OF(load)(values[$c])",
        None,
    ),
    "fourth value": (
        "OF(load)($values[3 * $d + $c])",
        "OF(load)($values[2 * $d + $c])",
        {"lengths": (4, 4, 4)},
    ),
    "second head": (
        "$scores + $h * $capacity, $out + $h * $d)",
        "$scores + $h * $capacity, $out)",
        {"heads": 2},
    ),
    "next rows": ("$i + $q < rows ? $i + $q : rows - 1", "$i + $q < rows ? $q : rows - 1", None),
    "second token": (
        "$i + $q < batch ? $i + $q : batch - 1",
        "$i + $q < batch ? $i : batch - 1",
        {"lengths": (7,), "heads": 1, "kv_heads": 1},
    ),
    "rest of tokens": ("OF(quad)($w, $x, $n, 3, $out)", "OF(quad)($w, $x, $n, 2, $out)", {"lengths": (7, 5)}),
    "last entries": (
        "$w + $k, ($n - $k) * sizeof(T)",
        "$w + $k, ($n - $k - 1) * sizeof(T)",
        {"dim": 16, "dim_head": 8, "ff_inner_dim": 8},
    ),
    "adapter": ("OF(load)(up[$r * $width + $i])", "OF(load)(up[$i])", {"r": 1}),
    "adapter's factor": ("(A)$shape->adapter_scale * $low", "$low", {"alpha": None}),
    "adapter's place": ("qkv + $first, $width)", "qkv, $width)", None),
    "adapter of the output": (
        "OF(add_adapter)($shape, $layer, OUTPUT",
        "if (0) OF(add_adapter)($shape, $layer, OUTPUT",
        {"r": 0},
    ),
    "residual": ("$x[$r * $dim + $i + $k] += $tile[$r][$k]", "$x[$r * $dim + $i + $k] = $tile[$r][$k]", None),
}
SERIAL = {"block": "serial", "norm": "rms", "qkv_bias": True, "xpos": False, "ff_inner_dim": 21, "targets": TARGETS}
MUTANTS_OF_SERIAL = {
    "mean": ("if (!$shape->rms)", "if (1)", {"norm": "layer"}),
    "scale of all heads": ("$shape->rms ? 0 : $dim_head", "$dim_head", {"qk_norm": False}),
    "bias": ("$sum + OF(load)($bias[$i + $k])", "$sum + OF(load)($bias[$k])", {"qkv_bias": False}),
    "norm of the feed-forward": ("$layer->ff_norm, $dim", "$layer->norm, $dim", None),
    "input of the feed-forward": (
        "$layer->ff_norm, $dim, $normed + $r",
        "$layer->ff_norm, $dim, $normed + 0 * $r",
        {"lengths": (7,)},
    ),
    "adapter of the gate": ("$low + $part * $b * $shape->rank, $inner", "$low, $inner", {"r": 0}),
    "adapter's tile": ("$i, $i + $rows, $tiles[$part][0]", "0, $rows, $tiles[$part][0]", {"ff_inner_dim": 7}),
    "adapter of the feed-forward": (
        "OF(add_adapter)($shape, $layer, FF_OUT",
        "if (0) OF(add_adapter)($shape, $layer, FF_OUT",
        {"r": 0},
    ),
}


def error(lengths=(7, 5, 6), r=2, alpha=3.0, targets=ATTENTION, **changes):
    """Of the kernel's logits, for a model with all options and an odd number of blocks."""
    palm, rows = palm_of(**{"depth": 3, "qk_norm": True, "xpos": True, **changes}), rows_of(lengths)
    scope = add_scope(palm, r, alpha=alpha, targets=targets) if r else {}
    logits, cache = read(palm, rows, **scope)
    assert_way(cache, "kernel")
    return (logits - read_at_once(palm, rows, **scope)).abs().nan_to_num(nan=math.inf).max()


@pytest.fixture
def use_mutant(compile_native, monkeypatch):
    """Decodes with a kernel of which one piece is wrong."""

    def use(code, wrong):
        sources = {name: (native_library.SOURCES / name).read_text() for name in SOURCES}
        mutant = compile_native(plant(sources, code, wrong), optimize=False)
        monkeypatch.setattr("palm_rlhf.ops.cpu.native_decoding.library", lambda: mutant)

    return use


def test_the_kernel_is_right_where_its_mutants_are_wrong():
    assert error() < EXACT
    assert error(**SERIAL) < EXACT


@pytest.mark.slow(10)
@pytest.mark.parametrize("without", ["-mno-avx512bf16", "-mno-avx512f", "-mno-avx"])
def test_the_kernel_is_right_on_older_processors(without, compile_native, monkeypatch):
    if native_library.why_not() is None and platform.machine() == "x86_64":
        older = compile_native({name: (native_library.SOURCES / name).read_text() for name in SOURCES}, more=[without])
        monkeypatch.setattr("palm_rlhf.ops.cpu.native_decoding.library", lambda: older)
        assert error() < EXACT and error(**SERIAL) < EXACT
        assert bfloat16_error(pairs=False) < 2e-6


@pytest.mark.slow(10)
@pytest.mark.parametrize("name", [*MUTANTS, *MUTANTS_OF_SERIAL])
def test_a_wrong_line_is_noticed(name, use_mutant):
    if native_library.why_not() is None:
        options = SERIAL if name in MUTANTS_OF_SERIAL else {}
        code, wrong, harmless = {**MUTANTS, **MUTANTS_OF_SERIAL}[name]
        use_mutant(code, wrong)
        assert error(**options) > 1e-7
        assert harmless is None or error(**{**options, **harmless}) < EXACT


def test_an_own_value_that_is_not_rounded_is_noticed_in_bfloat16(use_mutant):
    if native_library.why_not() is None:
        use_mutant("OF(load)(OF(store)($value))", "$value")
        assert error() < EXACT
        assert bfloat16_error() > 1e-4
