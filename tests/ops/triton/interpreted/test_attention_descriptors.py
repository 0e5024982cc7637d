"""Whole blocks copied by descriptors, as on sm_90 and later, hold what pointers read: results are the same bits."""

import pytest
import torch

pytest.importorskip("triton.tools.tensor_descriptor", reason="needs a newer Triton, with tensor descriptors")

from palm_rlhf.ops.triton import attention_backward, attention_forward, tiles
from palm_rlhf.ops.triton.attention_backward import backward
from palm_rlhf.ops.triton.attention_forward import forward
from palm_rlhf.ops.triton.tiles import Tile, describe


@pytest.fixture
def descriptors(monkeypatch):
    """The interpreter's architecture copies blocks, in tiles so small that groups are larger than some."""
    monkeypatch.setattr(tiles, "TMA_ARCHITECTURES", ("sm_80",))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    for table in (
        attention_forward.TILES,
        attention_backward.KEY_TILES,
        attention_backward.QUERY_TILES,
    ):
        monkeypatch.setitem(table, "sm_80", {64: Tile(32, 32, 4)})


def gradients(q, k, v, d_out, *masks) -> list[torch.Tensor]:
    """out and the gradients of q, k, v."""
    out, lse = forward(q, k, v, *masks)
    return [out, *backward(d_out, q, k, v, out, lse, *masks)]


@pytest.mark.parametrize(
    "dtype, heads, kv_heads, num_queries, num_keys, dim, masked",
    [
        (torch.float16, 1, 1, 65, 65, 32, False),
        (torch.bfloat16, 4, 2, 40, 70, 64, True),
        (torch.float16, 64, 1, 3, 5, 16, False),  # a group fills two tiles
        (torch.bfloat16, 2, 2, 3, 33, 24, True),
        (torch.bfloat16, 3, 1, 20, 40, 40, False),  # tiles hold no whole number of groups
    ],
)
def test_descriptors_and_pointers_give_the_same_bits(
    request, dtype, heads, kv_heads, num_queries, num_keys, dim, masked
):
    q, d_out = (torch.randn(2, num_queries, heads, dim, dtype=dtype).transpose(1, 2) for _ in range(2))
    k, v = (torch.randn(2, kv_heads, num_keys, dim, dtype=dtype) for _ in range(2))
    masks = True, None, None
    if masked:
        ids = torch.arange(num_keys).div(20, rounding_mode="floor").expand(2, -1).contiguous()
        masks = False, torch.rand(2, num_keys) < 0.8, ids
    expected = gradients(q, k, v, d_out, *masks)
    request.getfixturevalue("descriptors")
    assert describe(k, (1, 1, 32, 64)) is not None
    got = gradients(q, k, v, d_out, *masks)
    assert all(map(torch.equal, got, expected))


def test_what_memory_cannot_copy_in_blocks_is_read_through_pointers(descriptors):
    x = torch.zeros(2, 3, 20, 32, dtype=torch.bfloat16)
    assert describe(x, (1, 1, 16, 32)).strides == [1920, 640, 32, 1]
    assert describe(x[:1].expand(2, -1, -1, -1), (1, 1, 16, 32)) is None  # a stride of 0
    assert describe(x[:, :, :, 1:], (1, 1, 16, 32)) is None  # starts at 2 bytes
    assert describe(x[:, :, :, :20].contiguous(), (1, 1, 16, 32)) is None  # rows of 40 bytes
    assert describe(x.transpose(2, 3), (1, 1, 16, 32)) is None
    assert describe(x.float(), (1, 1, 16, 32)) is None
    # the stride of an axis of 1 is never used, whatever it is
    assert describe(x.as_strided((2, 1, 20, 32), (640, 7, 32, 1)), (1, 1, 16, 32)).strides[0] == 640
