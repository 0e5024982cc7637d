"""Bad GGUF files: one error that says what is wrong, whatever the bytes, and nothing loaded by halves."""

import builtins
import struct
import tracemalloc

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palm_rlhf.data.templates import load_template
from palm_rlhf.data.tokenizer import load_tokenizer
from palm_rlhf.model.palm import PaLM
from tests.model.interop.gguf_files import SIZES, hugging_face_model, write_gguf

TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": [chr(ord("!") + index) for index in range(SIZES["vocab_size"] - 1)] + ["<|end|>"],
    "tokenizer.ggml.token_type": [1] * (SIZES["vocab_size"] - 1) + [3],
    "tokenizer.ggml.merges": ["! !"],
    "tokenizer.ggml.eos_token_id": SIZES["vocab_size"] - 1,
    "tokenizer.chat_template": "{{ messages[0]['content'] }}",
}
TOKENIZER["tokenizer.ggml.tokens"][5] = "!!"


@pytest.fixture(scope="module")
def model():
    return hugging_face_model("llama")


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "model.gguf"
    return write_gguf(path, model, "llama", "Q8_0", others=TOKENIZER).read_bytes()


@pytest.fixture
def opened(tmp_path):
    """`opened(contents)` opens a file of these bytes."""

    def run(contents: bytes) -> PaLM:
        (tmp_path / "model.gguf").write_bytes(contents)
        return PaLM.from_pretrained(tmp_path / "model.gguf")

    return run


def header_of(*, version: int = 3, tensors: int = 0, values: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values) + rest


def value_of(name: bytes, kind: int, rest: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + rest


HUGE = struct.pack("<Q", 2**60)
BROKEN = {
    "empty": (b"", r"begins with b'', expected b'GGUF'"),
    "another format": (b"PK\x03\x04" + bytes(100), r"begins with b'PK\\x03\\x04', expected b'GGUF'"),
    "nothing but the magic": (b"GGUF", "ends in the middle of its header"),
    "an old version": (header_of(version=1), r"the GGUF version 1, expected one of \(2, 3\)"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian.*gguf-convert-endian"),
    "2^60 tensors": (header_of(tensors=2**60), f"announces {2**60} tensors, expected at most 0"),
    "2^60 values": (header_of(values=2**60), f"announces {2**60} entries of metadata"),
    "a name of 2^60 bytes": (header_of(values=1, rest=HUGE + bytes(50)), "ends in the middle of its header"),
    "a string of 2^60 bytes": (header_of(values=1, rest=value_of(b"a", 8, HUGE)), "ends in the middle of its header"),
    "2^60 numbers": (
        header_of(values=1, rest=value_of(b"a", 9, struct.pack("<I", 4) + HUGE + bytes(50))),
        f"announces {2**60} numbers in a",
    ),
    "2^60 strings": (
        header_of(values=1, rest=value_of(b"a", 9, struct.pack("<I", 8) + HUGE + bytes(50))),
        f"announces {2**60} strings in a",
    ),
    "lists of lists": (
        header_of(values=1, rest=value_of(b"a", 9, struct.pack("<IQ", 9, 1))),
        "an array a of the type 9",
    ),
    "an unknown type": (header_of(values=1, rest=value_of(b"a", 99, bytes(8))), "has a of the type 99"),
    "not UTF-8": (header_of(values=1, rest=value_of(b"\xff", 4, bytes(4))), "a string that is not UTF-8"),
    "a name twice": (header_of(values=2, rest=value_of(b"a", 4, bytes(4)) * 2), "has 'a' twice"),
    "a shape of 2^120": (
        header_of(tensors=1, rest=struct.pack("<QcI", 1, b"t", 2) + HUGE + HUGE + struct.pack("<IQ", 0, 0)),
        "has the shape",
    ),
    "an empty shape": (
        header_of(tensors=1, rest=struct.pack("<QcIQIQ", 1, b"t", 1, 0, 0, 0)),
        r"has the shape \(0,\) of t",
    ),
    "100 axes": (header_of(tensors=1, rest=struct.pack("<QcI", 1, b"t", 100) + bytes(20)), "has 100 axes in t"),
    "alignment": (
        header_of(values=1, rest=value_of(b"general.alignment", 4, struct.pack("<I", 3))),
        "general.alignment 3, expected a power of two",
    ),
    "no metadata": (header_of(), "has the architecture None, expected one of"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_header_is_refused_without_memory_for_what_it_announces(case, opened):
    contents, message = BROKEN[case]
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message):
            opened(contents)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_a_file_that_is_cut_anywhere_is_refused(whole, opened, tmp_path):
    """In its header, in front of its first tensor, in the last one."""
    for size in [*range(8, len(whole), len(whole) // 40), len(whole) - 40]:
        with pytest.raises(ValueError, match=r"middle of its header|announces|ends before the end of"):
            opened(whole[:size])
    assert opened(whole).num_tokens == SIZES["vocab_size"]


CHANGED = {
    "another architecture": ({}, {}, (), "has the architecture 'gemma', expected one of"),
    "an architecture with experts": ({"expert_count": 8}, {}, (), "has expert_count=8, which a PaLM cannot"),
    "a sliding window": ({"attention.sliding_window": 4096}, {}, (), "has attention.sliding_window=4096"),
    "an unknown number": ({"attention.scale": 0.5}, {}, (), r"has attention\.scale=0\.5"),
    "a missing number": ({}, {}, ("embedding_length",), "lacks the metadata embedding_length"),
    "a number for each block": ({"feed_forward_length": [64, 32]}, {}, (), r"feed_forward_length \[64, 32\]"),
    "a text for a number": ({"block_count": "two"}, {}, (), "has the block_count 'two'"),
    "more blocks": ({"block_count": 2**31}, {}, (), "block_count 2147483648 and 18 tensors of 2 blocks"),
    "blocks of one tensor": (
        {"block_count": 5002},
        {f"blk.{index}.attn_norm.weight": (1,) for index in range(2, 5002)},
        (),
        "5018 tensors of 5002 blocks, expected as many blocks, and at least 8 tensors of each",
    ),
    "a partial rotary": ({"rope.dimension_count": 4}, {}, (), "has the rope.dimension_count 4, expected .* 8"),
    "another rotary": ({"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0}, {}, (), "longrope"),
    "a part of a model": (
        {},
        {},
        (),
        "is a part of a model, with split.count 3 and split.no None, expected the first part",
    ),
    "no embeddings": ({}, {}, ("token_embd.weight",), "lacks token_embd.weight"),
    "a missing tensor": ({}, {}, ("blk.1.attn_q.weight",), "lacks model.layers.1.self_attn.q_proj.weight"),
    "another tensor": ({}, {"blk.0.ffn_gate_inp.weight": (32, 32)}, (), "the unexpected blk.0.ffn_gate_inp"),
    "another shape": ({}, {"blk.0.ffn_up.weight": (32, 32)}, (), r"another shape of .*up_proj.*\(32, 32\)"),
    "two for one place": ({}, {"model.norm.weight": (32,)}, (), "two tensors for one place"),
    "another vocabulary": ({}, {"token_embd.weight": (39, 32)}, (), "of 40 tokens and 39 rows of embeddings"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_a_model_that_differs_from_its_metadata_is_refused_by_name(case, model, tmp_path):
    values, shapes, left_out, message = CHANGED[case]
    path = write_gguf(
        tmp_path / "model.gguf",
        model,
        "llama",
        values=values,
        others={**TOKENIZER, **({"split.count": 3} if case == "a part of a model" else {})},
        tensors={name: np.ones(shape, np.float32) for name, shape in shapes.items()},
        left_out=left_out,
    )
    if case == "another architecture":
        path.write_bytes(path.read_bytes().replace(b"llama", b"gemma"))
    with pytest.raises(ValueError, match=message) as error:
        PaLM.from_pretrained(path)
    assert str(path) in str(error.value)
    palm = PaLM(num_tokens=40, dim=32, depth=2, heads=4, dim_head=8)
    before = {name: tensor.clone() for name, tensor in palm.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        palm.load(path)
    assert all(torch.equal(before[name], tensor) for name, tensor in palm.state_dict().items())


@pytest.mark.parametrize(("number", "name"), [(24, "I8"), (999, "999")])
def test_a_type_of_quantisation_that_is_not_read_is_refused_by_name(number, name, whole, opened):
    place = whole.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 2 * 8
    assert whole[place : place + 4] == struct.pack("<I", gguf.GGMLQuantizationType.Q8_0)
    changed = whole[:place] + struct.pack("<I", number) + whole[place + 4 :]
    with pytest.raises(ValueError, match=rf"has token_embd\.weight of the type {name}, which the package gguf cannot"):
        opened(changed)


def test_the_extra_is_named_where_the_package_is_missing(whole, opened, monkeypatch):
    whole_import = builtins.__import__

    def without_gguf(name, *args):
        if name == "gguf":
            raise ModuleNotFoundError("No module named 'gguf'", name="gguf")
        return whole_import(name, *args)

    monkeypatch.setattr(builtins, "__import__", without_gguf)
    with pytest.raises(ImportError, match=r"pip install 'palm-rlhf\[gguf\]'"):
        opened(whole)


@settings(max_examples=80)
@given(places=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 7)), min_size=1, max_size=4))
def test_flipped_bits_of_a_header_are_refused_or_read(places, whole, tmp_path_factory):
    """Never another error than ValueError, or FileNotFoundError where the tokenizer is gone."""
    path = tmp_path_factory.getbasetemp() / "flipped.gguf"
    contents = bytearray(whole)
    header = whole.index(b"blk.1.ffn_up.weight") + 60
    for place, bit in places:
        contents[place % header] ^= 1 << bit
    path.write_bytes(contents)
    for read in (PaLM.from_pretrained, load_tokenizer, load_template):
        try:
            read(path)
        except (ValueError, FileNotFoundError):
            pass
