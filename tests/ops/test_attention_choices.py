"""The table of measured choices as a pure function, and that `auto` takes what it ranks first and can run."""

import copy
import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from palm_rlhf.ops.attention import attention, choose
from palm_rlhf.ops.attention_choices import (
    GROUPS,
    IMPLEMENTATIONS,
    MASKS,
    PACKAGED,
    PASSES,
    VARIABLE,
    AttentionWork,
    ChoiceTable,
    generation_of,
    nearest,
    use_table,
)

WORK = AttentionWork("sequence", "none", "bfloat16", 64, "multi-head", 1024, 8)
GENERATIONS = ["sm_70", "sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx90a", "cpu", "mps", "meta"]


@pytest.fixture(scope="module")
def packaged() -> ChoiceTable:
    return ChoiceTable.load(PACKAGED)


@pytest.fixture
def plant():
    """Lets `auto` read the packaged table with changes, until the test ends."""

    def change(**defaults_of_cpu) -> ChoiceTable:
        entries = copy.deepcopy(ChoiceTable.load(PACKAGED).entries)
        for name, ranking in defaults_of_cpu.items():
            pass_name, mask = name.split("_")
            entries["cpu"]["defaults"][pass_name][mask] = ranking
        table = ChoiceTable(entries)
        use_table(table)
        return table

    yield change
    use_table(None)


def row(ranking=("fused",), **keys) -> dict:
    """A row of the table for `WORK`, with changes."""
    values = WORK._replace(**keys)._asdict()
    return {"pass": values.pop("pass_name"), **values, "ranking": list(ranking)}


def test_every_question_has_an_answer_with_all_implementations(packaged):
    keys = itertools.product(
        PASSES, MASKS, ("bfloat16", "float16", "float32", "float64"), (8, 64, 96, 512), GROUPS, (1, 1000, 1 << 20), (1,)
    )
    for key in keys:
        for generation in GENERATIONS:
            assert sorted(packaged.ranking(generation, AttentionWork(*key))) == sorted(IMPLEMENTATIONS)


@pytest.mark.parametrize(
    "generation, work, first",
    [
        # the rows that were measured on an H200
        ("sm_90", WORK._replace(length=8192), ["fused", "triton"]),
        ("sm_90", WORK._replace(dim=256, group="multi-query", length=4096), ["fused", "triton"]),
        ("sm_90", WORK._replace(mask="documents", dim=128, group="multi-query", length=8192), ["flex", "triton"]),
        ("sm_90", WORK._replace(pass_name="decode", group="multi-query", batch=64, length=2048), ["fused", "triton"]),
        # and what has no figures: PyTorch's kernels without a mask, ours with one
        ("sm_80", WORK, ["fused", "triton"]),
        ("sm_100", WORK._replace(mask="documents"), ["triton", "flex"]),
        ("gfx942", WORK._replace(mask="padding"), ["triton", "flex"]),
        ("sm_90", WORK._replace(pass_name="extend"), ["triton", "chunked"]),
        ("cpu", WORK._replace(mask="padding", dtype="float32"), ["chunked", "fused"]),
        ("cpu", WORK._replace(pass_name="decode", mask="padding"), ["fused", "chunked"]),
        ("mps", WORK, ["fused", "chunked"]),
    ],
)
def test_known_answers(packaged, generation, work, first):
    assert list(packaged.ranking(generation, work)[:2]) == first


@pytest.mark.parametrize(
    "generation, entry",
    [
        ("sm_70", "sm_80"),  # the oldest
        ("sm_86", "sm_80"),
        ("sm_90", "sm_90"),
        ("sm_103", "sm_100"),
        ("sm_120", "sm_100"),  # 12.0 is after 10.0, not before 9.0
        ("gfx1100", "gfx942"),
        ("cpu", "cpu"),
        ("mps", "other"),
    ],
)
def test_a_device_without_an_entry_has_that_of_its_kin(packaged, generation, entry):
    assert packaged.entry_of(generation) == entry


def test_buckets_are_monotone():
    """A longer sequence never gets the row of a shorter one, and the border is where the ratios are equal."""
    lengths = [256, 1024, 16384]
    rows = [row(length=length) for length in lengths]
    found = [nearest(rows, WORK._replace(length=n))["length"] for n in range(1, 40000, 37)]
    assert found == sorted(found) and set(found) == set(lengths)
    assert [nearest(rows, WORK._replace(length=n))["length"] for n in (511, 513, 4095, 4097)] == [
        256,
        1024,
        1024,
        16384,
    ]


def test_what_counts_first():
    """Each pair differs from the work in one key more important than the next."""
    alike = row(["eager"])
    for worse in ({"dtype": "float16"}, {"dim": 128}, {"group": "grouped"}, {"length": 2048}):
        assert nearest([row(**worse), alike], WORK)["ranking"] == ["eager"]
    for less, more in itertools.pairwise([{"length": 1 << 20}, {"group": "multi-query"}, {"dim": 65}]):
        assert nearest([row(**more), row(["eager"], **less)], WORK)["ranking"] == ["eager"]


def test_rows_of_other_work_do_not_count():
    assert nearest([row(mask="documents"), row(pass_name="decode"), row(dtype="float32")], WORK) is None
    assert nearest([row(dtype="float16")], WORK) is not None, "both take the same kernels"


def test_the_batch_counts_for_decoding_alone():
    """Responses are scored in large batches and trained on in small ones, by one kernel."""
    for pass_name, expected in (("decode", ["eager"]), ("sequence", ["fused"])):
        rows = [row(batch=64, pass_name=pass_name), row(["eager"], batch=1, pass_name=pass_name)]
        assert nearest(rows, WORK._replace(pass_name=pass_name, batch=2))["ranking"] == expected
    unknown = {**row(["eager"]), "batch": None}
    assert nearest([unknown, row()], WORK)["ranking"] == ["eager"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda entries: entries.pop("cpu"), "expected one for cpu as well"),
        (lambda entries: entries["cpu"].update(how="guessed"), "got how='guessed', expected one of"),
        (lambda entries: entries["cpu"]["defaults"].pop("decode"), "at cpu: got no default for decode with mask none"),
        (lambda entries: entries["sm_90"]["rows"][0].update(mask="all"), "at sm_90: got a row with mask='all'"),
        (lambda entries: entries["sm_90"]["rows"][0]["ranking"].append("flash"), "got the implementation 'flash'"),
    ],
)
def test_a_table_that_is_not_whole_is_refused(packaged, change, message):
    entries = copy.deepcopy(packaged.entries)
    change(entries)
    with pytest.raises(ValueError, match=message):
        ChoiceTable(entries)


def test_a_table_comes_back_from_its_file(packaged, tmp_path):
    path = tmp_path / "choices.json"
    path.write_text(packaged.to_json())
    assert ChoiceTable.load(path).entries == packaged.entries
    assert PACKAGED.read_text() == packaged.to_json(), "the packaged file is as the benchmark writes it"


def test_measured_entries_say_where_and_rank_by_their_figures(packaged):
    for entry in packaged.entries.values():
        assert (entry["how"] == "measured") == bool(entry["rows"])
        if entry["rows"]:
            assert entry["card"] and entry["torch"] and entry["date"]
        for measured in entry["rows"]:
            faster_is_more = measured["unit"].startswith("TFLOP/s")
            last = [measured["figures"][name][-1] for name in measured["ranking"]]
            assert last == sorted(last, reverse=faster_is_more), measured


def qkv(num_queries=7, num_keys=7) -> list[torch.Tensor]:
    return [torch.randn(2, heads, length, 8) for heads, length in ((4, num_queries), (2, num_keys), (2, num_keys))]


CALLS = {
    "sequence_none": ({}, 7),
    "sequence_padding": ({"key_mask": torch.ones(2, 7, dtype=torch.bool)}, 7),
    "sequence_documents": ({"document_ids": torch.zeros(2, 7, dtype=torch.long)}, 7),
    "extend_none": ({}, 3),
    "extend_padding": ({"key_mask": torch.ones(2, 7, dtype=torch.bool)}, 3),
    "decode_none": ({}, 1),
    "decode_padding": ({"key_mask": torch.ones(2, 7, dtype=torch.bool)}, 1),
}


@pytest.mark.parametrize("name", CALLS)
def test_auto_takes_the_first_of_the_table(plant, name):
    """Each planted alone, so that it moves its own calls and no others."""
    before = {other: choose(*qkv(queries), causal=True, **masks) for other, (masks, queries) in CALLS.items()}
    plant(**{name: ["eager"]})
    after = {other: choose(*qkv(queries), causal=True, **masks) for other, (masks, queries) in CALLS.items()}
    assert after == {**before, name: "eager"} and before[name] != "eager"


def test_what_is_chosen_computes(plant):
    """The implementations round in different places, so that their bits tell which one computed."""
    q, k, v = (torch.randn(2, heads, 200, 64) for heads in (4, 2, 2))
    masks = {"causal": True, "document_ids": (torch.arange(200) // 37).expand(2, 200)}
    names = ["eager", "fused", "chunked"]
    bits = {name: attention(q, k, v, **masks, implementation=name) for name in names}
    for name in names:
        plant(sequence_documents=[name])
        auto = attention(q, k, v, **masks)
        assert [other for other in names if torch.equal(auto, bits[other])] == [name]


def test_what_cannot_run_is_passed_over(plant):
    plant(sequence_none=["triton", "flex", "eager"])
    q, k, v = qkv()  # 8 dimensions are too few for FlexAttention, and Triton's kernels are for GPUs
    assert choose(q, k, v, causal=True) == "eager"


def test_gradients_and_the_batch_do_not_change_the_choice(plant):
    """Though the table has a row for each batch: it is for decoding."""
    table = plant(sequence_none=["eager"])
    rows = [{**row([name]), "dim": 8, "dtype": "float32", "batch": b} for name, b in (("fused", 2), ("chunked", 64))]
    table.entries["cpu"]["rows"] += rows
    chosen = set()
    for batch, needs_grad in itertools.product((2, 64), (True, False)):
        tensors = [t[:1].expand(batch, -1, -1, -1).requires_grad_(needs_grad) for t in qkv()]
        chosen.add(choose(*tensors, causal=True))
    assert chosen == {"fused"}


def test_a_graph_of_any_length_has_one_choice(plant):
    """torch.compile traces no look-up by length, which would be compiled anew for each bucket."""
    table = plant()
    rows = [{**row([name]), "dim": 8, "dtype": "float32", "length": n} for name, n in (("eager", 2048), ("fused", 8))]
    table.entries["cpu"]["rows"] += rows
    assert choose(*qkv(), causal=True) == "fused"
    seen = []

    def backend(graph, example_inputs):
        seen.append({node.target.__name__ for node in graph.graph.nodes if callable(node.target)})
        return graph

    torch.compiler.reset()
    compiled = torch.compile(lambda *t: attention(*t, causal=True), fullgraph=True, backend=backend, dynamic=True)
    for length in (7, 300):
        compiled(*qkv(length, length))
    assert len(seen) == 1 and "einsum" in seen[0], "the definition, which the row of 2048 tokens ranks first"


def test_a_gpu_that_is_not_here_gets_a_choice_too():
    with FakeTensorMode():
        tensors = [torch.empty(2, 4, 50, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        assert choose(*tensors, causal=True) == "fused"
        ids = torch.empty(2, 50, device="cuda", dtype=torch.long)
        assert choose(*tensors, causal=True, document_ids=ids) in ("triton", "flex", "chunked")
    assert generation_of(torch.device("cpu")) == "cpu" and generation_of(torch.device("meta")) == "meta"


def test_the_environment_names_a_table(packaged, tmp_path):
    entries = copy.deepcopy(packaged.entries)
    entries["cpu"]["defaults"]["sequence"]["none"] = ["eager"]
    path = tmp_path / "choices.json"
    path.write_text(json.dumps(entries))
    code = (
        "import torch; from palm_rlhf.ops.attention import choose; q = torch.ones(1, 1, 3, 8);"
        "print(choose(q, q, q, causal=True))"
    )
    environment = {**os.environ, VARIABLE: str(path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "eager\n"
