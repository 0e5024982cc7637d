"""Generation against a loop without a cache, and the forms of its answers."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palm_rlhf import PaLM
from palm_rlhf.ops.sampling import Sampling, sampling_logprobs
from tests.factories import wandering_palm

VOCABULARY = 23
GREEDY = {"temperature": 0}
OPTIONS = {
    "temperature": st.sampled_from([0, 0.6, 1, 1.7]),
    "top_k": st.integers(1, VOCABULARY + 3),
    "top_p": st.sampled_from([0.3, 0.9, 1.0]),
    "min_p": st.sampled_from([0.0, 0.1]),
    "repetition_penalty": st.sampled_from([0.7, 1.5]),
    "presence_penalty": st.sampled_from([-0.4, 0.6]),
    "frequency_penalty": st.sampled_from([-0.2, 0.3]),
}


def palm_with(*, dtype=torch.float64, **options) -> PaLM:
    sizes = {"num_tokens": VOCABULARY, "heads": 4, "kv_heads": 2, "dim_head": 4}
    return wandering_palm(**{**sizes, **options}).to(dtype)


palm_of = functools.cache(lambda device="cpu": palm_with().to(device).eval())


def prompts_of(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (length,), generator=generator) for length in lengths]


def seeded(seed=0, device="cpu"):
    return torch.Generator(device).manual_seed(seed)


@torch.no_grad()
def slowly(palm, prompt, num_new, *, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0):
    """Greedy, reading everything again at each step."""
    tokens = prompt.tolist()
    for _ in range(num_new):
        logits = palm(torch.tensor([tokens], device=palm.device))[0, -1].tolist()
        for token in set(tokens):
            logits[token] *= repetition_penalty if logits[token] < 0 else 1 / repetition_penalty
        for token in tokens[len(prompt) :]:
            logits[token] -= frequency_penalty
        for token in set(tokens[len(prompt) :]):
            logits[token] -= presence_penalty
        tokens.append(max(range(VOCABULARY), key=logits.__getitem__))
    return tokens[len(prompt) :]


@torch.no_grad()
def recomputed_logprobs(palm, prompt, answer, **options):
    """Of each token of an answer, from forwards without a cache."""
    found = []
    for n, token in enumerate(answer.tolist()):
        prefix = torch.cat((prompt, answer[:n]))
        seen = torch.zeros(1, VOCABULARY, dtype=torch.bool, device=palm.device).index_fill_(1, prefix, True)
        counts = answer[:n].bincount(minlength=VOCABULARY)[None]
        logits = palm(prefix[None])[:, -1]
        found.append(sampling_logprobs(logits, Sampling(**options), seen=seen, counts=counts)[0, token])
    return torch.stack(found)


def cut(tokens, eos):
    """Up to the first EOS, and with it."""
    return tokens[: tokens.index(eos) + 1] if eos in tokens else tokens


# what is sampled


@settings(max_examples=25)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(1, 10), st.integers(0, 99))
def test_greedy_rows_of_any_length_equal_the_slow_loop(device, lengths, num_new, seed):
    palm, rows = palm_of(device), [row.to(device) for row in prompts_of(*lengths, seed=seed)]
    got = palm.generate(prompt=rows, max_new_tokens=num_new, **GREEDY)
    assert [row.tolist() for row in got] == [slowly(palm, row, num_new) for row in rows]


@settings(max_examples=20)
@given(st.lists(st.integers(1, 8), min_size=1, max_size=3), st.fixed_dictionaries({}, optional=OPTIONS), st.just(2))
def test_recorded_logprobs_are_those_of_a_forward_without_a_cache(device, lengths, options, num_samples):
    palm, rows = palm_of(device), [row.to(device) for row in prompts_of(*lengths)]
    answers, logprobs = palm.generate(
        prompt=rows,
        seq_len=10,
        num_samples=num_samples,
        generator=seeded(device=device),
        return_logprobs=True,
        **options,
    )
    assert len(answers) == len(rows) * num_samples
    for n, (answer, recorded) in enumerate(zip(answers, logprobs, strict=True)):
        row = rows[n // num_samples]
        assert len(answer) == 10 - len(row)
        expected = recomputed_logprobs(palm, row, answer, **options)
        torch.testing.assert_close(recorded, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "option",
    [{"temperature": 0.6}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.2}, {"repetition_penalty": 1.5},
     {"presence_penalty": 0.6}, {"frequency_penalty": 0.3}],
    ids=str,
)  # fmt: skip
def test_logprobs_of_another_distribution_are_told_apart(option):
    """What the law above says of a sampler that records before, say, the temperature."""
    palm, (row,) = palm_of(), prompts_of(6)
    (answer,), (recorded,) = palm.generate(
        prompt=[row], max_new_tokens=12, generator=seeded(), return_logprobs=True, **option
    )
    torch.testing.assert_close(recorded, recomputed_logprobs(palm, row, answer, **option), rtol=0, atol=1e-10)
    assert (recorded - recomputed_logprobs(palm, row, answer)).abs().max() > 1e-2


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.1)], ids=str)
def test_recorded_logprobs_in_lower_precision(dtype, tolerance):
    palm, rows = palm_with(dtype=dtype), prompts_of(1, 6, 3)
    options = {"temperature": 0.8, "repetition_penalty": 1.2}
    answers, logprobs = palm.generate(prompt=rows, seq_len=24, generator=seeded(), return_logprobs=True, **options)
    for row, answer, recorded in zip(rows, answers, logprobs, strict=True):
        assert recorded.dtype == torch.float32
        expected = recomputed_logprobs(palm, row, answer, **options)
        torch.testing.assert_close(recorded, expected, rtol=0, atol=tolerance)


def test_autocast_generates_through_the_cache():
    palm, rows = palm_with(dtype=torch.float32), prompts_of(4, 7)
    with torch.autocast("cpu", torch.bfloat16):
        answers, logprobs = palm.generate(prompt=rows, max_new_tokens=10, generator=seeded(), return_logprobs=True)
    for row, answer, recorded in zip(rows, answers, logprobs, strict=True):
        torch.testing.assert_close(recorded, recomputed_logprobs(palm, row, answer), rtol=0, atol=0.1)


def test_samples_come_as_often_as_the_model_says():
    palm, (prompt,) = palm_of(), prompts_of(5)
    probs = (palm(prompt[None])[0, -1] / 1.3).softmax(dim=-1).detach()
    got = palm.generate(prompt=prompt, max_new_tokens=1, temperature=1.3, num_samples=20_000, generator=seeded())
    counts = torch.bincount(got[:, 0], minlength=VOCABULARY)
    assert ((counts - probs * 20_000) ** 2 / (probs * 20_000)).sum() < 48.27  # chi-square, 22 degrees of freedom, 0.1%
    assert ((counts - 20_000 / VOCABULARY) ** 2 / (20_000 / VOCABULARY)).sum() > 1000  # and no uniform draws


def test_samples_of_one_prompt_differ_and_stay_next_to_each_other():
    palm, prompts = palm_of(), torch.stack(prompts_of(4, 4))
    got, logprobs = palm.generate(
        prompt=prompts, max_new_tokens=8, num_samples=3, generator=seeded(), return_logprobs=True
    )
    assert got.shape == (6, 8) and len({tuple(row) for row in got.tolist()}) == 6
    for n, row in enumerate(got):
        expected = recomputed_logprobs(palm, prompts[n // 3], row)
        torch.testing.assert_close(logprobs[n], expected, rtol=0, atol=1e-10)


def test_repetition_is_penalised_in_prompt_and_answer():
    palm, rows = palm_of(), prompts_of(3, 6)
    got = palm.generate(prompt=rows, max_new_tokens=12, repetition_penalty=1.8, **GREEDY)
    assert [row.tolist() for row in got] == [slowly(palm, row, 12, repetition_penalty=1.8) for row in rows]
    assert [row.tolist() for row in got] != [slowly(palm, row, 12) for row in rows]
    positive = palm_with(logit_scale=1e-3)  # every logit is small: an enormous penalty forbids those above 0 twice
    (row,) = positive.generate(prompt=rows[:1], max_new_tokens=5, repetition_penalty=1e9, **GREEDY)
    assert len({*row.tolist(), *rows[0].tolist()}) == 5 + len(set(rows[0].tolist()))


@pytest.mark.parametrize("penalty", [{"presence_penalty": 1.5}, {"frequency_penalty": 0.8}], ids=str)
def test_presence_and_frequency_are_penalised_in_the_answer_alone(penalty):
    palm, rows, eos = palm_of(), prompts_of(3, 6), 5
    got = palm.generate(prompt=rows, max_new_tokens=12, eos_token=eos, **penalty, **GREEDY)
    expected = [slowly(palm, row, 12, **penalty) for row in rows]
    assert [row.tolist() for row in got] == [cut(row, eos) for row in expected]
    assert expected != [slowly(palm, row, 12) for row in rows]
    copies = palm.generate(prompt=rows, max_new_tokens=12, num_samples=2, eos_token=eos, **penalty, **GREEDY)
    assert [row.tolist() for row in copies] == [cut(row, eos) for row in expected for _ in range(2)]


def test_greedy_is_certain():
    _, logprobs = palm_of().generate(prompt=prompts_of(4)[0], max_new_tokens=6, return_logprobs=True, **GREEDY)
    assert not logprobs.any()


def test_the_same_generator_gives_the_same_answer_and_leaves_the_global_one_alone():
    palm, rows, state = palm_of(), prompts_of(4, 2), torch.get_rng_state()
    answers = [palm.generate(prompt=rows, max_new_tokens=9, generator=seeded(seed)) for seed in (5, 5, 6)]
    first, second, other = ([row.tolist() for row in answer] for answer in answers)
    assert first == second != other
    unprompted = [palm.generate(9, generator=seeded(seed)).tolist() for seed in (5, 5, 6)]
    assert unprompted[0] == unprompted[1] != unprompted[2]
    assert torch.equal(torch.get_rng_state(), state)


# the forms of an answer


@pytest.mark.parametrize(
    "prompt, num_samples, shape",
    [("n", 1, (6,)), ("n", 3, (3, 6)), ("b n", 1, (2, 6)), ("b n", 3, (6, 6)), ("1 n", 1, (1, 6))],
)
@pytest.mark.parametrize("length", [{"seq_len": 10}, {"max_new_tokens": 6}], ids=["seq_len", "max_new_tokens"])
def test_a_tensor_gives_a_tensor_without_the_prompt(prompt, num_samples, shape, length):
    prompt = {"n": prompts_of(4)[0], "b n": torch.stack(prompts_of(4, 4)), "1 n": prompts_of(4)[0][None]}[prompt]
    before = prompt.clone()
    tokens, logprobs = palm_of().generate(prompt=prompt, num_samples=num_samples, return_logprobs=True, **length)
    assert tokens.shape == logprobs.shape == shape
    assert tokens.dtype == torch.int64 and logprobs.is_floating_point() and not logprobs.requires_grad
    assert (logprobs < 0).all() and torch.equal(prompt, before)
    assert palm_of().generate(prompt=prompt, num_samples=num_samples, **length).shape == shape


def test_a_list_gives_a_list_of_rows():
    rows = prompts_of(2, 5, 3)
    for length, expected in (
        ({"max_new_tokens": 4}, [4] * 6),
        ({"seq_len": 7}, [5, 5, 2, 2, 4, 4]),
        ({"max_new_tokens": torch.tensor([3, 1, 5])}, [3, 3, 1, 1, 5, 5]),
    ):
        tokens, logprobs = palm_of().generate(prompt=rows, num_samples=2, return_logprobs=True, **length)
        assert isinstance(tokens, list) and isinstance(logprobs, list)
        assert [row.shape for row in tokens] == [row.shape for row in logprobs] == [(n,) for n in expected]
        greedy = palm_of().generate(prompt=rows, **GREEDY, **length)
        assert [row.tolist() for row in greedy] == [
            slowly(palm_of(), row, n) for row, n in zip(rows, expected[::2], strict=True)
        ]
    (alone,) = palm_of().generate(prompt=rows[:1], max_new_tokens=4)
    assert alone.shape == (4,)


def test_limits_of_another_integer_type_end_rows_alike():
    rows, limits = prompts_of(2, 5, 3), torch.tensor([3, 1, 5])
    expected = palm_of().generate(prompt=rows, max_new_tokens=limits, **GREEDY)
    for dtype in (torch.int32, torch.uint8):
        got = palm_of().generate(prompt=rows, max_new_tokens=limits.to(dtype), **GREEDY)
        assert [row.tolist() for row in got] == [row.tolist() for row in expected]


def test_without_a_prompt_the_whole_sequence_comes_back():
    palm = palm_of()
    tokens, logprobs = palm.generate(12, return_logprobs=True, generator=seeded())
    assert tokens.shape == logprobs.shape == (1, 12)
    assert logprobs[0, 0].item() == pytest.approx(-math.log(VOCABULARY))  # the first token is any of them
    expected = recomputed_logprobs(palm, tokens[0, :1], tokens[0, 1:])
    torch.testing.assert_close(logprobs[0, 1:], expected, rtol=0, atol=1e-10)
    assert palm.generate(seq_len=12, num_samples=3).shape == (3, 12)
    starts = {palm.generate(2, generator=seeded(seed))[0, 0].item() for seed in range(60)}
    assert len(starts) > VOCABULARY / 2


def test_prompts_of_other_integer_types_are_read():
    prompt = prompts_of(4)[0]
    expected = palm_of().generate(prompt=prompt, max_new_tokens=5, **GREEDY)
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert torch.equal(palm_of().generate(prompt=prompt.to(dtype), max_new_tokens=5, **GREEDY), expected)


def ending_rows():
    """Three prompts whose greedy answers of 10 tokens hold one token at different places, or not at all."""
    palm = palm_of()
    for seed in range(200):
        rows = prompts_of(6, 6, 6, seed=seed)
        answers = [slowly(palm, row, 10) for row in rows]
        for eos in set(answers[0][2:7]):
            lengths = [len(cut(answer, eos)) for answer in answers]
            if eos not in answers[2] and len({*lengths}) == 3 and min(lengths) > 1:
                rows[0][1], rows[1][-1] = eos, eos  # an EOS in a prompt ends nothing
                answers = [slowly(palm, row, 10) for row in rows]
                if len({len(cut(answer, eos)) for answer in answers}) == 3 and eos not in answers[2]:
                    return rows, eos, [cut(answer, eos) for answer in answers]
    raise AssertionError("no such prompts")


def test_eos_ends_a_row_is_kept_and_fills_what_follows():
    rows, eos, expected = ending_rows()
    tokens, logprobs = palm_of().generate(
        prompt=torch.stack(rows), max_new_tokens=10, eos_token=eos, return_logprobs=True, temperature=1e-6
    )
    assert tokens.tolist() == [answer + [eos] * (10 - len(answer)) for answer in expected]
    for row, row_logprobs, answer in zip(rows, logprobs, expected, strict=True):
        recomputed = recomputed_logprobs(palm_of(), row, torch.tensor(answer), temperature=1e-6)
        torch.testing.assert_close(row_logprobs[: len(answer)], recomputed, rtol=0, atol=1e-6)
        assert not row_logprobs[len(answer) :].any()


def test_eos_cuts_the_rows_of_a_list():
    rows, eos, expected = ending_rows()
    tokens, logprobs = palm_of().generate(prompt=rows, max_new_tokens=10, eos_token=eos, return_logprobs=True, **GREEDY)
    assert [row.tolist() for row in tokens] == expected
    assert [len(row) for row in logprobs] == [len(row) for row in expected]
    one_by_one = [palm_of().generate(prompt=[row], max_new_tokens=10, eos_token=eos, **GREEDY)[0] for row in rows]
    assert [row.tolist() for row in one_by_one] == expected


def test_a_row_that_reaches_seq_len_is_not_given_an_eos():
    rows = [row[: len(row) - n] for n, row in enumerate(prompts_of(6, 6, 6))]
    answers = [slowly(palm_of(), row, 8 + n) for n, row in enumerate(rows)]
    eos = next(token for token in range(VOCABULARY) if not any(token in answer for answer in answers))
    got = palm_of().generate(14, rows, eos_token=eos, **GREEDY)
    assert [row.tolist() for row in got] == answers


def test_generation_stops_when_every_row_has_ended():
    rows, eos, expected = ending_rows()
    longest = max(map(len, expected[:2]))
    tokens = palm_of().generate(prompt=torch.stack(rows[:2]), max_new_tokens=500, eos_token=eos, **GREEDY)
    assert tokens.shape == (2, longest)


def test_token_0_is_a_token_like_any_other():
    """Two tokens that change names change them in the answers too."""
    palm, (row,) = palm_with(), prompts_of(5)
    answer = slowly(palm, row, 6)
    other = answer[2]
    palm.token_emb.weight.data[[0, other]] = palm.token_emb.weight.data[[other, 0]]
    renamed, expected = (
        [{0: other, other: 0}.get(token, token) for token in tokens] for tokens in (row.tolist(), answer)
    )
    options = {"prompt": [torch.tensor(renamed)], "max_new_tokens": 6, **GREEDY}
    assert 0 in expected and palm.generate(**options)[0].tolist() == expected
    assert palm.generate(**options, eos_token=0)[0].tolist() == cut(expected, 0)
    zeros = torch.tensor([0, 0, 5, 0])
    assert palm.generate(prompt=zeros, max_new_tokens=6, **GREEDY).tolist() == slowly(palm, zeros, 6)


# how it gets there


def counted(palm, function):
    """How many rows and tokens each call of the embedding reads while a function runs."""
    shapes = []
    hook = palm.token_emb.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(inputs[0].shape)))
    try:
        function()
    finally:
        hook.remove()
    return shapes


def test_every_token_is_read_once():
    palm, prompts = palm_of(), torch.stack(prompts_of(5, 5))
    read = counted(palm, lambda: palm.generate(prompt=prompts, max_new_tokens=4, num_samples=3))
    assert read == [(2, 5), (6, 1), (6, 1), (6, 1)]  # a prompt once for all its samples; the last token never
    assert counted(palm, lambda: palm.generate(4)) == [(1, 1)] * 3
    read = counted(palm, lambda: palm.generate(prompt=prompts_of(2, 5), seq_len=7))
    assert read == [(2, 5), (2, 1), (1, 1), (1, 1), (1, 1)]  # the longer one may add two tokens only


def test_rows_that_have_ended_cost_nothing():
    rows, eos, expected = ending_rows()
    read = counted(palm_of(), lambda: palm_of().generate(prompt=rows, max_new_tokens=10, eos_token=eos, **GREEDY))
    running = [sum(len(answer) > step for answer in expected) for step in range(1, 10)]
    assert read == [(3, 6), *((n, 1) for n in running if n)]


def test_what_is_written_to_a_yielded_token_changes_no_later_one():
    palm, prompt = palm_of(), prompts_of(3, 3)
    expected = palm.generate(prompt=torch.stack(prompt), max_new_tokens=6, **GREEDY)
    got = []
    for tokens in palm.stream(torch.stack(prompt), max_new_tokens=6, **GREEDY):
        got.append(tokens.clone())
        tokens.fill_(0)
    assert torch.equal(torch.stack(got, dim=-1), expected)


def test_stream_yields_what_generate_returns():
    rows, eos, _ = ending_rows()
    options = {"max_new_tokens": 10, "eos_token": eos, "num_samples": 2, "temperature": 0.5}
    expected, expected_logprobs = palm_of().generate(
        prompt=torch.stack(rows), generator=seeded(), return_logprobs=True, **options
    )
    steps = list(palm_of().stream(torch.stack(rows), generator=seeded(), **options))
    assert all(step.shape == (6,) for step in steps) and torch.equal(torch.stack(steps, dim=1), expected)
    pairs = list(palm_of().stream(rows, generator=seeded(), return_logprobs=True, **options))
    assert torch.equal(torch.stack([logprobs for _, logprobs in pairs], dim=1), expected_logprobs)
    assert [step.shape for step in palm_of().stream(seq_len=4)] == [(1,)] * 3


@pytest.mark.parametrize(
    "option",
    [{"temperature": 0.6}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.2}, {"repetition_penalty": 1.5},
     {"presence_penalty": 0.6}, {"frequency_penalty": 0.3}, {"allowed_tokens": torch.arange(VOCABULARY) % 2 == 0}],
    ids=lambda option: next(iter(option)),
)  # fmt: skip
def test_stream_has_every_option_of_generate(option):
    palm, (row,), options = palm_of(), prompts_of(6), {"max_new_tokens": 12, "return_logprobs": True}
    _, expected = palm.generate(prompt=row, generator=seeded(), **options, **option)
    found = torch.cat([logprobs for _, logprobs in palm.stream(row, generator=seeded(), **options, **option)])
    assert torch.equal(found, expected)
    plain = torch.cat([logprobs for _, logprobs in palm.stream(row, generator=seeded(), **options)])
    assert not torch.equal(found, plain)


@pytest.mark.parametrize("stop_after", [1, 3, 99])
def test_a_stream_leaves_mode_and_gradients_as_they_were_at_every_step(stop_after):
    palm, (prompt,) = palm_with(dropout=0.5).train(), prompts_of(5)
    palm.layers[1].eval()  # a part that its owner switched off stays off
    expected = slowly(palm_of(), prompt, 5)
    assert palm.generate(prompt=prompt, max_new_tokens=5, **GREEDY).tolist() == expected
    got = []
    for token in palm.stream(prompt, max_new_tokens=5, **GREEDY):
        assert torch.is_grad_enabled() and palm.training and palm.layers[0].training and not palm.layers[1].training
        assert not token.requires_grad
        got.append(token.item())
        if len(got) == stop_after:
            break
    assert got == expected[:stop_after] and palm.training and torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in palm.parameters())


def test_generate_speaks_with_the_voice_of_a_scope():
    palm, rows = palm_with(), prompts_of(3, 5)
    for adapters in palm.add_finetune_params("voice", r=2):
        for name, parameter in adapters.named_parameters():
            parameter.data.normal_(std=0.5) if name.endswith("B") else None
    options = {"prompt": rows, "max_new_tokens": 8, **GREEDY}
    base, voice = ([row.tolist() for row in palm.generate(**options, finetune_scope=s)] for s in (None, "voice"))
    assert base == [slowly(palm_of(), row, 8) for row in rows] != voice
    streamed = palm.stream(rows, max_new_tokens=8, finetune_scope="voice", **GREEDY)
    assert torch.stack(list(streamed), dim=1).tolist() == voice
    palm.merge_finetune_params("voice")
    assert [row.tolist() for row in palm.generate(**options)] == voice
    with pytest.raises(ValueError, match="finetune scope 'voice'"):
        palm.generate(**options, finetune_scope="voice")


def test_a_progress_bar_comes_when_asked(capsys):
    palm_of().generate(5)
    assert capsys.readouterr() == ("", "")
    palm_of().generate(5, use_tqdm=True)
    out, err = capsys.readouterr()
    assert not out and "generate" in err and "4/4" in err
