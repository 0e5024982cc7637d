"""Mistakes are planted where they belong, and nowhere else."""

import pytest

from tests.planting_in_c import plant

LOOP = "for (long k = 0; k < n; k++) out[k] = x[k] * s->scale;\n"
SOURCES = {"a.c": LOOP, "b.h": "if (x->rank && from != to) memcpy(to, from, (n - k) * sizeof(A));"}


@pytest.mark.parametrize(
    "code, wrong, expected",
    [
        ("out[k] = x[k] * s->scale", "out[k] = x[k]", "out[k] = x[k];"),
        ("out[ k ]=x[k]*s -> scale", "0", "k++) 0;"),
        ("$y[$i] = $x[$i] * $factor", "$y[$i] = $factor", "out[k] = s->scale;"),
        ("$y = $x * $factor", "$y = $factor * $x * $x", "out[k] = s->scale * x[k] * x[k];"),
        ("$k < $n", "$k <= $n", "k <= n;"),
    ],
)
def test_code_is_found_by_its_tokens(code, wrong, expected):
    planted = plant(SOURCES, code, wrong)
    assert expected in planted["a.c"] and planted["b.h"] == SOURCES["b.h"]
    laid_out = {**SOURCES, "a.c": LOOP.replace(" = ", "\n    = ").replace(" * ", "*")}
    assert plant(laid_out, code, wrong)["a.c"] != laid_out["a.c"]


def test_variables_may_have_other_names_but_are_the_same_throughout():
    renamed = {"a.c": LOOP.replace("x", "input").replace("k", "place")}
    assert "out[place] = 0;" in plant(renamed, "$y[$i] = $x[$i] * $factor", "$y[$i] = 0")["a.c"]
    with pytest.raises(AssertionError, match="0 times"):
        plant({"a.c": LOOP.replace("x[k]", "x[n]")}, "$y[$i] = $x[$i] * $factor", "0")


@pytest.mark.parametrize("code, count", [("out[k] = z[k]", 0), ("k", 6), ("ran && from", 0), ("$a * $b", 1)])
def test_code_that_is_not_there_once_is_reported(code, count):
    if count == 1:
        assert plant(SOURCES, code, "0") != SOURCES
    else:
        with pytest.raises(AssertionError, match=rf"is {count} times in a.c, b.h .* write this mutant anew"):
            plant(SOURCES, code, "0")
