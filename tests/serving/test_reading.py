"""Prompts that wait are read together, whatever their lengths, where that is worth it; replies do not change."""

import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from palm_rlhf.model.palm import PaLM
from palm_rlhf.serving.engine import Engine, EngineConfig
from palm_rlhf.serving.engine.batch import FORWARD_COST, Batch
from palm_rlhf.serving.generation import Request
from tests.factories import palm_of

CHUNK = 128


@pytest.fixture(scope="module")
def palm() -> PaLM:
    """A model whose choices are clear ones: its logits are far from each other."""
    palm = palm_of(num_tokens=256, dim=32, heads=4, kv_heads=2, logit_scale=4.0, max_seq_len=512)
    return palm.double().eval()


def ask_all(palm: PaLM, served_model, prompts: list[list[int]], **config) -> tuple[list, list[torch.Size]]:
    """The replies to prompts that come at the same moment, and the shapes that the model was given meanwhile."""
    shapes = []
    with Engine(palm, served_model.tokenizer, EngineConfig(prefill_chunk=CHUNK, **config)) as engine:
        hook = palm.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
        replies = engine.submit_all([Request(prompt, 4, temperature=0) for prompt in prompts])
        for reply in replies:
            reply.text()
        hook.remove()
    return replies, [shape for shape in shapes if shape[1] > 1]


def random_prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def expected(palm: PaLM, prompt: list[int]) -> list[int]:
    """The reply that no batch, cache or chunk has touched."""
    sequence = list(prompt)
    with torch.no_grad():
        for _ in range(4):
            sequence.append(int(palm(torch.tensor([sequence]))[0, -1].argmax()))
    return sequence[len(prompt) :]


def test_prompts_that_fit_the_chunk_are_read_at_once(palm, served_model):
    prompts = [random_prompt(30, seed) for seed in range(10)]
    replies, shapes = ask_all(palm, served_model, prompts)
    assert shapes == [(4, 30), (4, 30), (2, 30)]
    assert [reply.tokens for reply in replies] == [expected(palm, prompt) for prompt in prompts]


def test_a_prompt_joins_where_its_padding_costs_less_than_a_forward(palm, served_model):
    for length, together in ((20 + FORWARD_COST // 2, True), (22 + FORWARD_COST, False)):
        _, shapes = ask_all(palm, served_model, [random_prompt(20, 1), random_prompt(length, 2)])
        # padded to the second, the first costs what one is longer than the other
        assert shapes == ([(2, length)] if together else [(1, 20), (1, length)])


def test_who_begins_as_one_that_is_read_waits_for_it(palm, served_model):
    system = random_prompt(60)
    prompts = [system + random_prompt(9 + seed, seed) for seed in range(1, 5)]
    replies, shapes = ask_all(palm, served_model, prompts, prefix_memory=0)
    assert [reply.num_cached for reply in replies] == [0, 60, 60, 60]
    assert shapes == [(1, 70), (3, 13)]
    assert [reply.tokens for reply in replies] == [expected(palm, prompt) for prompt in prompts]


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 90)), min_size=1, max_size=7), st.booleans())
def test_replies_are_those_of_each_alone_and_no_forward_is_longer_than_the_chunk(palm, served_model, parts, remember):
    systems = [[], random_prompt(40, 100), random_prompt(150, 101)]
    prompts = [systems[kind] + random_prompt(length, seed) for seed, (kind, length) in enumerate(parts)]
    replies, shapes = ask_all(palm, served_model, prompts, max_batch=4, prefix_memory=2**20 if remember else 0)
    assert [reply.tokens for reply in replies] == [expected(palm, prompt) for prompt in prompts]
    assert all(rows * width <= CHUNK for rows, width in shapes)


def test_a_mutant_that_goes_on_from_the_padding_is_noticed(palm, served_model, monkeypatch):
    embed = Batch._embed

    def from_the_end(batch, tokens, cache, members):
        embeds = embed(batch, tokens, cache, members)
        return embeds[:, -1:].expand_as(embeds)

    prompts = [random_prompt(length, length) for length in (20, 30)]
    right = [expected(palm, prompt) for prompt in prompts]
    assert [reply.tokens for reply in ask_all(palm, served_model, prompts)[0]] == right
    monkeypatch.setattr(Batch, "_embed", from_the_end)
    assert [reply.tokens for reply in ask_all(palm, served_model, prompts)[0]] != right


def test_a_prompt_given_up_between_two_chunks_leaves_the_rows_whole(palm, served_model):
    prompts = [random_prompt(30, 1), random_prompt(28, 2), random_prompt(400, 3)]
    with Engine(palm, served_model.tokenizer, EngineConfig(prefill_chunk=64, prefix_memory=0)) as engine:
        replies = [None, None, None]

        def deliver(generation, piece):
            if generation is replies[1]:
                replies[0].cancel()  # its row goes to the one behind it, and that one's to the prompt being read
            if piece.finish_reason is not None:
                ended.release()

        ended = threading.Semaphore(0)
        lengths = (300, 40, 4)
        replies[:] = engine.submit_all(
            [Request(prompt, n, temperature=0) for prompt, n in zip(prompts, lengths)], deliver
        )
        for _ in replies:
            assert ended.acquire(timeout=900)
    assert replies[0].finish_reason == "cancelled"
    assert replies[1].tokens[:4] == expected(palm, prompts[1])
    assert replies[2].tokens == expected(palm, prompts[2])
