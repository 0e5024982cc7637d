"""CUDA graphs on a GPU: replayed steps draw the tokens of the same steps run one by one, and of no stale weight."""

import pytest
import torch

from palm_rlhf.model import step_memory
from palm_rlhf.model.captured import why_not_captured
from palm_rlhf.model.prompts import read_prompts
from palm_rlhf.model.static_generate import StaticRows
from palm_rlhf.ops.sampling import Sampling
from tests.factories import wandering_palm

VOCABULARY = 61
OPTIONS = {
    "greedy": {"temperature": 0},
    "plain": {},
    "truncated": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.2, "frequency_penalty": 0.1},
    "allowed": {"allowed_tokens": torch.arange(VOCABULARY) % 3 != 0},
}


def palm_on(device, dtype=torch.bfloat16, **fields):
    sizes = {"num_tokens": VOCABULARY, "dim": 64, "depth": 3, "heads": 4, "dim_head": 64}
    return wandering_palm(**{**sizes, **fields}).to(device, dtype).eval()


def prompts_of(device, *lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (length,), generator=generator).to(device) for length in lengths]


def said(palm, prompts, seed=0, **options):
    """Tokens of every row, and the log-probabilities, of a seeded generator on the GPU."""
    generator = torch.Generator(palm.device).manual_seed(seed)
    length = {} if "max_new_tokens" in options else {"max_new_tokens": 30}
    found = palm.generate(prompt=prompts, generator=generator, return_logprobs=True, **length, **options)
    tokens, logprobs = found
    return [row.tolist() for row in tokens], [row.tolist() for row in logprobs]


def uncaptured(palm, prompts, monkeypatch, **options):
    """The same steps, none of them replayed."""
    with monkeypatch.context() as patch:
        patch.setattr("palm_rlhf.model.captured.GPUS", set())
        patch.setattr("palm_rlhf.model.step_memory._kept", step_memory.WeakKeyDictionary())
        patch.setattr("palm_rlhf.model.generate.why_not_captured", lambda palm: None)
        return said(palm, prompts, **options)


def graphs_of(palm):
    return [graph for memory in step_memory._kept[palm] for graph in memory.graphs.graphs.values() if graph is not None]


@pytest.mark.parametrize(
    "name, num_rows",
    [("greedy", 1), ("plain", 1), ("plain", 16), ("plain", 33), ("truncated", 3), ("penalties", 3), ("allowed", 3)],
)
def test_replayed_steps_draw_the_same_tokens(gpu, monkeypatch, name, num_rows):
    palm, prompts = palm_on(gpu), prompts_of(gpu, *[3 + n % 4 for n in range(num_rows)])
    assert why_not_captured(palm) is None
    expected = uncaptured(palm, prompts, monkeypatch, **OPTIONS[name])
    for _ in range(2):
        assert said(palm, prompts, **OPTIONS[name]) == expected
    assert graphs_of(palm)


@pytest.mark.parametrize(
    "fields, dtype",
    [({"qk_norm": True}, torch.bfloat16), ({"xpos": True}, torch.float32), ({"kv_heads": 4}, torch.bfloat16),
     ({"kv_heads": 2}, torch.float16), ({"flash_attn": False}, torch.float32)],
    ids=str,
)  # fmt: skip
def test_every_model(gpu, monkeypatch, fields, dtype):
    palm, prompts = palm_on(gpu, dtype, **fields), prompts_of(gpu, 2, 7, 5)
    assert said(palm, prompts, num_samples=2) == uncaptured(palm, prompts, monkeypatch, num_samples=2)


def test_graphs_grow_with_the_columns(gpu, monkeypatch):
    palm, prompts = palm_on(gpu), prompts_of(gpu, 250, 200)
    options = {"max_new_tokens": 300, "temperature": 0.9}
    assert said(palm, prompts, **options) == uncaptured(palm, prompts, monkeypatch, **options)
    assert len(graphs_of(palm)) == 3  # of 256, 512 and 768 columns


def test_rows_that_end_are_dropped(gpu, monkeypatch):
    palm, prompts = palm_on(gpu, torch.float32), prompts_of(gpu, *[4] * 32)
    limits = torch.tensor([5] * 20 + [40] * 9 + [100] * 3, device=gpu)
    for options in ({"eos_token": 3}, {}):
        expected = uncaptured(palm, prompts, monkeypatch, max_new_tokens=limits, **options)
        assert said(palm, prompts, max_new_tokens=limits, **options) == expected
    endless = said(palm, prompts, max_new_tokens=100)[0]
    assert said(palm, prompts, max_new_tokens=limits)[0] == [row[:n] for row, n in zip(endless, limits, strict=True)]


def test_the_loop_and_the_graphs_agree(gpu, monkeypatch):
    """In float32, with products in full precision, greedy tokens do not depend on the way."""
    palm, prompts = palm_on(gpu, torch.float32), prompts_of(gpu, 3, 9)
    captured = said(palm, prompts, temperature=0)
    monkeypatch.setenv("PALM_RLHF_CUDA_GRAPHS", "0")
    assert said(palm, prompts, temperature=0) == captured


def test_a_stream_is_what_generate_returns(gpu):
    """In float32: the two drop rows at different steps, and sums of fewer rows may be rounded otherwise."""
    palm, prompts = palm_on(gpu, torch.float32), torch.stack(prompts_of(gpu, *[5] * 6))
    options = {"max_new_tokens": 40, "eos_token": 3}
    tokens = palm.generate(prompt=prompts, generator=torch.Generator(gpu).manual_seed(2), **options)
    steps = list(palm.stream(prompts, generator=torch.Generator(gpu).manual_seed(2), **options))
    assert torch.equal(torch.stack(steps, dim=1), tokens)


def test_weights_that_change_in_place_keep_their_graphs_and_others_get_new_ones(gpu, monkeypatch):
    palm, other, prompts = palm_on(gpu), palm_on(gpu, seed=1), prompts_of(gpu, 4, 4)
    before, number = said(palm, prompts), len(graphs_of(palm))
    palm.load_state_dict(other.state_dict())
    changed = said(palm, prompts)
    assert changed == said(other, prompts) != before and len(graphs_of(palm)) == number
    palm.layers[0].ff_out.weight = torch.nn.Parameter(torch.zeros_like(palm.layers[0].ff_out.weight))
    replaced = said(palm, prompts)
    assert replaced == uncaptured(palm, prompts, monkeypatch) != changed
    palm.to(torch.float32)
    assert said(palm, prompts) == uncaptured(palm, prompts, monkeypatch)


def test_lora_before_and_after_it_is_merged(gpu, monkeypatch):
    palm, prompts = palm_on(gpu, torch.float32), prompts_of(gpu, 4, 6)
    base = said(palm, prompts, temperature=0)
    for adapters in palm.add_finetune_params("voice", r=2):
        for part in adapters.parts:
            part.B.data.normal_(std=0.5)
    voice = said(palm, prompts, temperature=0, finetune_scope="voice")
    assert voice == uncaptured(palm, prompts, monkeypatch, temperature=0, finetune_scope="voice") != base
    assert said(palm, prompts, temperature=0) == base
    palm.merge_finetune_params("voice")
    merged = said(palm, prompts, temperature=0)
    assert merged == uncaptured(palm, prompts, monkeypatch, temperature=0) and merged[0] != base[0]


def test_autocast_of_wide_weights(gpu, monkeypatch):
    """A graph reads no weights that autocast has cast and kept: they go with its context, and change with a step."""
    palm, prompts = palm_on(gpu, torch.float32), prompts_of(gpu, 4, 6)
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            captured = said(palm, prompts)
        torch.zeros(1 << 24, device=gpu).fill_(torch.nan)  # takes the memory that is free
        with torch.autocast("cuda", torch.bfloat16):
            assert said(palm, prompts) == captured == uncaptured(palm, prompts, monkeypatch)
        for parameter in palm.parameters():
            parameter.data.mul_(1.1)


def test_the_default_generator_and_other_streams(gpu):
    palm, prompts = palm_on(gpu), prompts_of(gpu, 4, 6)
    found = []
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda.manual_seed(5)
            found.append([row.tolist() for row in palm.generate(prompt=prompts, max_new_tokens=20)])
    assert found[0] == found[1]


@torch.no_grad()
def test_the_host_does_not_wait_for_a_step(gpu):
    """PyTorch raises where a step reads a number back, at the first time as at a replay."""
    palm, prompts = palm_on(gpu), read_prompts(palm_on(gpu), prompts_of(gpu, *[4] * 8), None)
    limits = torch.full((8,), 20, device=gpu)
    with step_memory.borrowed(palm, 8, 24) as memory:
        rows = StaticRows(palm, memory, prompts, limits, Sampling(top_p=0.9), 3, None, None, None)
        try:
            for number in range(20):
                torch.cuda.set_sync_debug_mode("default" if number == 2 else "error")  # a capture synchronises
                rows.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert graphs_of(palm)


def test_a_captured_step_is_much_faster(gpu):
    """Not a figure, but whether graphs are replayed at all: Python takes milliseconds a token."""
    palm, (prompt,) = palm_on(gpu, depth=24), prompts_of(gpu, 8)

    def milliseconds(**options):
        palm.generate(prompt=prompt, max_new_tokens=100, **options)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        palm.generate(prompt=prompt, max_new_tokens=100, **options)
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop)

    captured = milliseconds()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PALM_RLHF_CUDA_GRAPHS", "0")
        assert milliseconds() > 2 * captured
