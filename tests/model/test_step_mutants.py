"""Wrong lines in the kernel that reads the next token, each of which the laws of `test_step.py` notice."""

import math
import platform

import pytest

from palm_rlhf.ops.cpu import native_library

from .steps import EXACT, add_scope, assert_way, bfloat16_error, palm_of, read, read_at_once, rows_of

pytestmark = pytest.mark.usefixtures("one_thread")
SOURCES = ("native.h", "decode.c", "products.h", "products_body.h", "decode_body.h")
TURNED = "buffer[k < n / 2 ? k + n / 2 : k - n / 2] * sines[k]"
GATED = "gate[r][k] / (1 + EXP(-gate[r][k])) * value[r][k]"
# A line, a wrong one in its place, and the shape, if there is one, for which that is no mistake.
MUTANTS = {
    "own key": ("scores[h * s->capacity + length] = tile[h][0]", "scores[h * s->capacity + length] = 0", None),
    "own value": ("out[c] = scores[length] * own[c]", "out[c] = 0", None),
    "scale": ("(scores[j] - most) * scale", "(scores[j] - most)", None),
    "first": ("first[i / s->heads], lengths", "0 * first[i / s->heads], lengths", {"lengths": (6, 6, 6)}),
    "half": (TURNED, "buffer[k ^ 1] * sines[k]", {"dim_head": 2}),
    "sign": (TURNED, TURNED.replace("buffer", "-buffer"), None),
    "gate": (GATED, "value[r][k] / (1 + EXP(-value[r][k])) * gate[r][k]", None),
    "eps": ("sqrt(variance / n + eps)", "sqrt(variance / n)", {"norm_eps": 0.0}),
    "kv head": ("kv = head / (s->heads / s->kv_heads)", "kv = head % s->kv_heads", {"kv_heads": 4}),
    "norm's head": ("k_norm + kv * d", "k_norm", {"kv_heads": 1}),
    "table's head": ("s->table_heads == 1 ? 0 : d", "0", {"xpos": False}),
    "table's row": ("cosines += (s->table_rows == 1 ? 0 : row)", "cosines += 0", {"lengths": (6, 6, 6)}),
    "values' place": ("values[length * d + c] =", "values[(length - 1) * d + c] =", None),
    "rest of values": ("scores[j] * OF(load)(values[j * d + c])", "scores[j] * OF(load)(values[first * d + c])", None),
    "fourth value": ("w3 * OF(load)(v[3 * d + c])", "w3 * OF(load)(v[2 * d + c])", {"lengths": (4, 4, 4)}),
    "second head": ("out + h * d);", "out);", {"heads": 2}),
    "next rows": ("w + (i + q < rows ? i + q", "w + (i + q < rows ? q", None),
    "second token": (
        "x + (b + q < batch ? b + q",
        "x + (b + q < batch ? b",
        {"lengths": (7,), "heads": 1, "kv_heads": 1},
    ),
    "rest of tokens": (
        "case 3: OF(quad)(of_quad, tokens, n, 3",
        "case 3: OF(quad)(of_quad, tokens, n, 2",
        {"lengths": (7, 5)},
    ),
    "last entries": (
        "w[i] + k, (n - k) * sizeof(T)",
        "w[i] + k, (n - k - 1) * sizeof(T)",
        {"dim": 16, "dim_head": 8, "ff_inner_dim": 8},
    ),
    "adapter": ("low[r] * OF(load)(up[r * width + i])", "low[r] * OF(load)(up[i])", {"r": 1}),
    "adapter's factor": ("(A)s->adapter_scale * low", "low", {"alpha": None}),
    "adapter's place": ("qkv + begin, width", "qkv, width", None),
    "adapter of the output": ("if (s->rank && start", "if (0 && start", {"r": 0}),
    "residual": ("OF(sum_up)(s, layer, from", "OF(sum_up)(s, layer, x", {"depth": 1}),
    "result": ("thread == 0 && from != x", "thread == 0 && from == x", {"depth": 2}),
}


def error(lengths=(7, 5, 6), r=2, alpha=3.0, **changes):
    """Of the kernel's logits, for a model with all options and an odd number of blocks."""
    palm, rows = palm_of(**{"depth": 3, "qk_norm": True, "xpos": True, **changes}), rows_of(lengths)
    scope = add_scope(palm, r, alpha=alpha) if r else {}
    logits, cache = read(palm, rows, **scope)
    assert_way(cache, "kernel")
    return (logits - read_at_once(palm, rows, **scope)).abs().nan_to_num(nan=math.inf).max()


@pytest.fixture
def use_mutant(compile_native, monkeypatch):
    """Decodes with a kernel of which one line is wrong."""

    def use(line, wrong):
        sources = {name: (native_library.SOURCES / name).read_text() for name in SOURCES}
        assert sum(text.count(line) for text in sources.values()) == 1
        mutant = compile_native({name: text.replace(line, wrong) for name, text in sources.items()}, optimize=False)
        monkeypatch.setattr("palm_rlhf.ops.cpu.native_decoding.library", lambda: mutant)

    return use


def test_the_kernel_is_right_where_its_mutants_are_wrong():
    assert error() < EXACT


@pytest.mark.parametrize("without", ["-mno-avx512bf16", "-mno-avx512f", "-mno-avx"])
def test_the_kernel_is_right_on_older_processors(without, compile_native, monkeypatch):
    if native_library.refusal() is None and platform.machine() == "x86_64":
        older = compile_native({name: (native_library.SOURCES / name).read_text() for name in SOURCES}, more=[without])
        monkeypatch.setattr("palm_rlhf.ops.cpu.native_decoding.library", lambda: older)
        assert error() < EXACT
        assert bfloat16_error(pairs=False) < 2e-6


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_line_is_noticed(name, use_mutant):
    if native_library.refusal() is None:
        line, wrong, harmless = MUTANTS[name]
        use_mutant(line, wrong)
        assert error() > 1e-7
        assert harmless is None or error(**harmless) < EXACT


def test_an_own_value_that_is_not_rounded_is_noticed_in_bfloat16(use_mutant):
    if native_library.refusal() is None:
        line = "OF(load)(OF(store)(qkv[(s->heads + s->kv_heads + kv) * d + c]))"
        use_mutant(line, line.removeprefix("OF(load)(OF(store)(").removesuffix("))"))
        assert error() < EXACT
        assert bfloat16_error() > 1e-4
