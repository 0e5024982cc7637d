"""The engine on a GPU: replies by CUDA graphs are those of steps that run as they are."""

from dataclasses import replace

import pytest
import torch

from palm_rlhf.data.tokenizer import ByteTokenizer
from palm_rlhf.serving.engine import Engine, EngineConfig
from palm_rlhf.serving.generation import Request
from tests.factories import palm_of

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def palm(gpu):
    """A model whose choices are clear ones."""
    palm = palm_of(num_tokens=256, dim=64, heads=4, kv_heads=1, dim_head=64, logit_scale=4.0, max_seq_len=512)
    return palm.eval().to(gpu)


def requests(num_tokens=40) -> list[Request]:
    """Prompts of different lengths, some with a common beginning, greedy and seeded, with options of every kind."""
    options = [
        {"temperature": 0},
        {"temperature": 0, "logprobs": 3},
        {},
        {"top_p": 0.9},
        {"top_k": 20, "min_p": 0.01},
        {"presence_penalty": 0.5, "repetition_penalty": 1.2, "logit_bias": {7: 1.0}},
    ]
    return [
        Request([*range(30 * (index % 3)), index, *range(index)], num_tokens, **{"seed": index, **options[index % 6]})
        for index in range(21)
    ]


def replies(palm, asked=None, **config) -> tuple[list[list[int]], int]:
    with Engine(palm, ByteTokenizer(), EngineConfig(**{"max_batch": 16, "context": 400, **config})) as engine:
        generations = engine.submit_all(asked or requests())
        for generation in generations:
            generation.text()
        batch = engine._scheduler.batch
        captured = 0 if batch.slots.static_step is None else sum(
            graph is not None for graph in batch.slots.static_step.graphs.graphs.values()
        )  # fmt: skip
    return [generation.tokens for generation in generations], captured


@pytest.mark.parametrize("config", [{}, {"max_batch": 5}, {"prefill_chunk": 16}, {"cache_memory": 2**20}])
def test_captured_replies_are_those_of_plain_steps(palm, monkeypatch, config):
    found, captured = replies(palm, **config)
    assert captured > 0
    monkeypatch.setenv("PALM_RLHF_CUDA_GRAPHS", "0")
    expected, captured = replies(palm, **config)
    assert captured == 0
    assert found == expected


def test_greedy_replies_are_those_of_generate(palm, gpu):
    with Engine(palm, ByteTokenizer(), EngineConfig(max_batch=8, context=400)) as engine:
        prompts = [[index, *range(10 * index)] for index in range(8)]
        for generation in engine.submit_all([Request(prompt, 60, temperature=0) for prompt in prompts]):
            generation.text()
            prompt = torch.tensor(generation.request.prompt, device=gpu)
            alone = palm.generate(prompt=prompt, max_new_tokens=60, temperature=0)
            assert generation.tokens == alone.tolist()


def test_a_step_waits_for_the_gpu_once(palm):
    """With every wait an error but those of `Tensor.tolist`, a step still runs: it has no other."""
    with Engine(palm, ByteTokenizer(), EngineConfig(max_batch=4, context=400)) as engine:
        generations = engine.submit_all([Request([1, index], 300, seed=index, top_p=0.9) for index in range(3)])
        for generation in generations:
            next(iter_without_leaving(generation))

        def count_waits() -> int:
            import warnings

            batch = engine._scheduler.batch
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    for generation, found in batch.step():
                        generation.push(*found)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            return sum("synchronizing" in str(warning.message) for warning in caught)

        assert engine.call(count_waits).result() <= 1
        for generation in generations:
            generation.cancel()


def iter_without_leaving(reply):
    """The pieces of a reply, which goes on when the loop is left."""
    while True:
        yield reply._pieces.get(timeout=900)


def test_captured_replies_under_adapters_are_those_of_plain_steps(palm, monkeypatch):
    for number, scope in enumerate(("one", "two")):
        for parameter in palm.add_finetune_params(scope, 2 + number, targets=("q", "v", "ff_out")).parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    asked = [replace(request, adapter=(None, "one", "two")[i % 3]) for i, request in enumerate(requests())]
    try:
        found, captured = replies(palm, asked)
        assert captured > 0
        monkeypatch.setenv("PALM_RLHF_CUDA_GRAPHS", "0")
        expected, captured = replies(palm, asked)
        assert captured == 0 and found == expected
        assert found != replies(palm)[0]
    finally:
        for scope in ("one", "two"):
            palm.remove_finetune_params(scope)
