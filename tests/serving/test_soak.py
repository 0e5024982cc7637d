"""A short soak of the server in a process of its own; soak.py run alone makes the long one."""

import runpy

import pytest


@pytest.mark.slow(12)
def test_a_short_soak(root, checkpoint, dialogues):
    soak = runpy.run_path(str(root / "tests/serving/soak.py"))["soak"]
    report, wrong = soak(checkpoint, 8, 40, list(dialogues))
    assert wrong == []
    answered = {f"{kind} 200" for kind in ("patient", "plain", "slow", "vanishing")}
    refused = {"garbage 400", "garbage 415", "greedy 400", "greedy 413", "hostile 400", "hostile 403", "dangling 408"}
    seen = answered | refused | {"hasty left", "stopped left"}
    assert seen <= set(report["answers"])
    assert report["replies"]["cancelled"] > 0
    assert {"unfair 200", "unfair 429"} & set(report["answers"])
    assert 0 < report["first_text_p50"] <= report["first_text_p99"]
