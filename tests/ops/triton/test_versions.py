"""Known faults of versions of Triton, as a table that is read without a GPU."""

import pytest
import torch

from palm_rlhf.ops.triton.versions import FAULTS, INSTALLED, explain_fault, find_fault, parse_version


@pytest.mark.parametrize("version, numbers", [("3.2.0", (3, 2)), ("3.10.0+git1", (3, 10)), ("4.0.0.post1", (4, 0))])
def test_versions_are_compared_as_numbers(version, numbers):
    assert parse_version(version) == numbers


@pytest.mark.parametrize(
    "version, capability, runs",
    [
        ("3.1.0", (8, 0), False),
        ("3.2.0", (8, 0), True),
        ("3.2.0", (9, 0), True),
        ("3.2.0", (10, 0), False),
        ("3.2.0", (12, 0), False),
        ("3.3.1", (12, 0), True),
        ("3.6.0", (9, 0), True),
        ("3.10.0", (10, 0), True),
    ],
)
def test_kernels_run_where_a_version_knows_the_gpu(version, capability, runs):
    reason = explain_fault("kernels", version, capability=capability)
    assert (reason is None) == runs
    if reason is not None:
        assert reason.startswith(f"Triton {version}: ") and "; use torch 2." in reason


@pytest.mark.parametrize("version, has_them", [("3.2.0", False), ("3.3.1", False), ("3.4.0", True), ("3.9.0", True)])
def test_descriptors_are_used_where_a_version_has_them(version, has_them):
    assert (find_fault("descriptors", version) is None) == has_them


@pytest.mark.parametrize("version, crashes", [("3.3.1", False), ("3.4.0", True), ("3.6.0", True), ("3.7.1", False)])
def test_a_single_key_is_read_through_a_pointer_where_the_assembler_crashes(version, crashes, monkeypatch):
    pytest.importorskip("triton.tools.tensor_descriptor", reason="needs a newer Triton, with tensor descriptors")
    from palm_rlhf.ops.triton import tiles

    fault = find_fault("descriptors of one row", version, capability=(9, 0))
    assert (fault is not None) == crashes and find_fault("descriptors of one row", version) is None
    monkeypatch.setattr(tiles, "TMA_ARCHITECTURES", ("sm_80",))
    monkeypatch.setattr(tiles, "POINTERS_TO_ONE_ROW", crashes)
    one, two = (torch.zeros(2, 3, n, 64, dtype=torch.bfloat16) for n in (1, 2))
    assert (tiles.describe(one, (1, 1, 64, 64)) is None) == crashes
    assert tiles.describe(two, (1, 1, 64, 64)) is not None
    assert tiles.describe(one, (1, 1, 1, 64)) is not None  # one head in a block of one


@pytest.mark.parametrize(
    "version, numpy, works",
    [("3.2.0", "2.3.5", True), ("3.6.0", "2.4.6", False), ("3.6.0", "1.26.4", True), ("3.7.1", "2.4.6", True)],
)
def test_an_interpreter_fails_with_a_newer_numpy(version, numpy, works):
    reason = explain_fault("interpreter", version, numpy=numpy)
    assert (reason is None) == works and (works or "install numpy<2.4" in reason)


def test_each_fault_has_versions_and_says_what_to_do():
    for fault in FAULTS:
        assert (0, 0) <= fault.since < fault.until and fault.problem and fault.instead


def test_the_installed_version_uses_descriptors_if_it_has_them():
    from palm_rlhf.ops.triton.tiles import TensorDescriptor

    assert (TensorDescriptor is None) == (find_fault("descriptors", INSTALLED) is not None)
