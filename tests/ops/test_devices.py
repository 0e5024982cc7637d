"""Which implementation runs where: each answer of `why_not` names its reason, and None means that it computes."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from palm_rlhf.ops.cpu import native_decoding, native_library
from palm_rlhf.ops.cpu.native_decoding import BlockTensors
from palm_rlhf.ops.devices import available_implementations, meta_device, why_not_native, why_not_triton


class Wrapped(torch.Tensor):
    """A tensor of another class, as those of a sharded model are."""


@pytest.mark.parametrize(
    "tensor, reason",
    [
        (torch.empty(3, 4, device="meta"), "not on the CPU"),
        (torch.ones(3, 4).as_subclass(Wrapped), "subclass"),
        (torch.ones(3, 4).mT, "not dense"),
    ],
)
def test_kernels_in_c_say_why_they_cannot_read_a_tensor(tensor, reason):
    assert reason in why_not_native(tensor)
    assert reason in why_not_native(torch.ones(3), tensor), "each of the tensors counts"


def test_kernels_in_c_read_what_nothing_speaks_against(kernels):
    reason = why_not_native()
    assert why_not_native(torch.ones(3, 4), torch.nn.Parameter(torch.ones(3, 4, 5)[:, 1])) == reason
    assert reason == native_library.why_not()
    if reason is None:
        assert native_library.library() is not None
    else:
        with pytest.raises(RuntimeError, match="cannot run here: "):
            native_library.library()


def test_triton_is_for_gpus():
    assert why_not_triton(torch.ones(3)) == "a tensor is not on a GPU"
    assert available_implementations("mps")["triton"] is not None


def block(**changes) -> BlockTensors:
    """A block of width 6 with 2 heads of 4, 1 key head and 5 hidden units, whose cache has 2 rows and room for 7."""
    sizes = {"norm": (6,), "in_proj": (26, 6), "attn_out": (6, 8), "ff_out": (6, 5), "q_norm": None, "k_norm": None}
    sizes |= {"keys": (2, 1, 7, 4), "values": (2, 1, 7, 4)}
    tensors = {name: None if size is None else torch.ones(size) for name, size in sizes.items()}
    return BlockTensors(**{**tensors, **changes})


@pytest.mark.parametrize(
    "blocks, reason",
    [
        ([block(), block()], None),
        ([block(), block(norm=torch.ones(6).double())], "another dtype"),
        ([block(), block(in_proj=torch.ones(6, 26).mT)], "not contiguous"),
        ([block(keys=torch.ones(2, 1, 7, 4).mT), block()], "not contiguous"),
        ([block(), block(values=torch.ones(3, 1, 7, 4))], "another shape or dtype"),
        ([block(), block(keys=torch.ones(2, 1, 7, 4).bfloat16())], "another shape or dtype"),
        ([block(q_down=torch.ones(6, 2)), block(q_down=torch.ones(6, 3))], "different ranks"),
    ],
)
def test_the_kernel_of_decoding_says_why_it_cannot_take_blocks(blocks, reason):
    got = native_decoding.why_not(blocks, torch.float32, (2, 1, 4), torch.float32)
    assert got is None if reason is None else reason in got


def test_the_kernel_of_decoding_is_for_few_rows_of_types_that_it_knows(monkeypatch):
    monkeypatch.setattr("palm_rlhf.ops.cpu.native_decoding.has_amx", lambda: True)
    fast = native_decoding.is_faster
    assert fast(64, torch.float32) and not fast(65, torch.float32)
    assert fast(8, torch.bfloat16) and not fast(9, torch.bfloat16), "AMX multiplies many rows of bfloat16 faster"
    assert not fast(1, torch.float16), "for which there is no kernel"


def test_a_model_on_the_meta_device_draws_no_normal_numbers():
    """For which PyTorch would import its compiler."""

    class Drawn(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(func.name())
            return func(*args, **(kwargs or {}))

    def drawn(device) -> list[str]:
        with Drawn() as mode, device:
            linear = torch.nn.Linear(3, 2)
            torch.nn.init.normal_(linear.weight)
            linear.weight.data.normal_(std=2.0)
            made = [linear.weight, linear.bias, torch.nn.Embedding(4, 3).weight, torch.randn(3, 5)]
        assert [(tuple(one.shape), one.device.type) for one in made] == [
            *(((2, 3), "meta"), ((2,), "meta")),
            *(((4, 3), "meta"), ((3, 5), "meta")),
        ]
        return [name for name in mode.names if "normal" in name or "randn" in name]

    assert len(drawn(torch.device("meta"))) == 4
    assert drawn(meta_device()) == []
