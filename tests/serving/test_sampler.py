"""Sampling: every row by its own request and its own random numbers, from the distribution that it asks for."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palm_rlhf.data.tokenizer import ByteTokenizer
from palm_rlhf.model.palm import PaLM
from palm_rlhf.ops.sampling import Sampling, penalise_repetition, sampling_logprobs, truncate
from palm_rlhf.serving.engine import sampler as sampler_module
from palm_rlhf.serving.engine.row_options import Column, RowOptions
from palm_rlhf.serving.engine.sampler import Sampler, adjust
from palm_rlhf.serving.generation import Generation, Request
from palm_rlhf.serving.token_text import TextStream


def row(index: int = 0, **options) -> Generation:
    request = Request([1], 1000, **{"seed": 0, "index": index, **options})
    return Generation(request, TextStream(ByteTokenizer()), None, lambda: None)


def choose(logits, rows):
    """The sampler's choice, by options made for these rows."""
    return sampler_module.choose(logits, rows, RowOptions([one.request for one in rows], logits.device))


TRUNCATIONS = [
    {"top_k": 2},
    {"min_p": 0.4},
    {"temperature": 2.0, "top_k": 4, "top_p": 0.9, "min_p": 0.2},
]


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"top_p": 0.7}, {"temperature": 1.5, "top_p": 0.8}, *TRUNCATIONS]
)
def test_draws_have_the_distribution_that_is_asked_for(options):
    logits = torch.tensor([1.0, 0.3, -torch.inf, -0.5, 0.9, -2.0])
    num_draws = 4000
    rows = [row(index, **options) for index in range(num_draws)]
    found = choose(logits.expand(num_draws, -1), rows).bincount(minlength=6) / num_draws
    assert is_distributed(found, sampling_logprobs(logits[None], Sampling(**options))[0].exp(), num_draws)
    for wrong in ({"temperature": 0.8}, {"top_p": 0.9}):  # near enough to what is asked for to be mistaken for it
        assert not is_distributed(found, sampling_logprobs(logits[None], Sampling(**wrong))[0].exp(), num_draws)


def is_distributed(found, expected, num_draws):
    """Whether shares of draws are what is expected, within 4.5 standard deviations each."""
    deviation = (expected * (1 - expected) / num_draws).sqrt()
    return bool(((found - expected).abs() <= 4.5 * deviation).all())


def draws(logits, rows, num_steps):
    return [choose(logits, rows).tolist() for _ in range(num_steps)]


def test_a_row_does_not_depend_on_the_others():
    logits = torch.randn(4, 50)
    options = [{"temperature": 0.9}, {"top_p": 0.5}, {"top_k": 3}, {"temperature": 2, "min_p": 0.1}]
    together = draws(logits, [row(index, **option) for index, option in enumerate(options)], 20)
    for index, option in enumerate(options):
        alone = draws(logits[index : index + 1], [row(index, **option)], 20)
        assert [step[index] for step in together] == [step[0] for step in alone]


def test_temperature_0_takes_the_first_largest():
    logits = torch.tensor([[0.0, 2.0, 2.0], [3.0, 1.0, 3.0]])
    assert choose(logits, [row(temperature=0)] * 2).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 2])
def test_extreme_temperatures_and_a_top_p_of_0_take_tokens_that_can_be_taken(temperature):
    logits = torch.tensor([[-torch.inf, 1e4, 9e3, -1e4, -torch.inf]])
    assert choose(logits, [row(temperature=temperature)]).item() in (1, 2)
    assert choose(logits, [row(temperature=temperature, top_p=0)]).item() == 1


class Largest:
    """A generator whose number is the largest there is."""

    def random(self) -> float:
        return 1 - 2**-53


def test_the_largest_random_number_takes_the_last_token_that_can_be_taken():
    one = row()
    one.random = Largest()
    for width in (3, 1000):
        logits = torch.full((1, width + 2), -torch.inf)
        logits[0, :width] = torch.rand(width) * 1e-3
        assert choose(logits, [one]).item() == width - 1


def require_penalties(adjust, sampled, presence, frequency):
    """The formula of OpenAI's reference, over the tokens that were sampled."""
    one = row(presence_penalty=presence, frequency_penalty=frequency, logit_bias={3: 1.5, 0: -100})
    for token in sampled:
        one.push(token, None)
    logits = torch.linspace(-1, 1, 6)[None]
    expected = logits.clone()
    expected[0, 3] += 1.5
    expected[0, 0] -= 100
    for token in range(6):  # mu[j] - c[j] * alpha_frequency - (c[j] > 0) * alpha_presence
        count = sampled.count(token)
        expected[0, token] -= count * frequency + (count > 0) * presence
    torch.testing.assert_close(adjust(logits, [one]), expected)


@settings(max_examples=50)
@given(st.lists(st.integers(0, 5), max_size=12), st.floats(-2, 2), st.floats(-2, 2))
def test_penalties_count_what_was_sampled(sampled, presence, frequency):
    require_penalties(adjust, sampled, presence, frequency)


def wrong_sign(logits, rows):
    return 2 * logits - adjust(logits, rows)


def presence_each_time(logits, rows):
    request = rows[0].request
    changed = adjust(logits, rows)
    for token, count in rows[0].counts.items():
        changed[0, token] -= (count - 1) * request.presence_penalty
    return changed


def counted_once(logits, rows):
    rows[0].counts = dict.fromkeys(rows[0].counts, 1)
    return adjust(logits, rows)


@pytest.mark.parametrize("mutant", [wrong_sign, presence_each_time, counted_once])
def test_wrong_penalties_are_noticed(mutant):
    with pytest.raises(AssertionError):
        require_penalties(mutant, [1, 1, 2], 0.5, 0.75)


@pytest.mark.parametrize("penalty", [0.5, 1.2, 5])
def test_repetition_is_penalised_in_the_prompt_and_the_reply(penalty):
    one = row(repetition_penalty=penalty)  # whose prompt is 1
    for token in (3, 3, 4):
        one.push(token, None)
    logits = torch.tensor([[2.0, 2.0, -1.0, -1.0, 3.0, 0.0]])
    expected = torch.tensor([[2.0, 2.0 / penalty, -1.0, -1.0 * penalty, 3.0 / penalty, 0.0]])
    torch.testing.assert_close(adjust(logits, [one]), expected)
    assert torch.equal(adjust(logits, [row()]), logits)
    both = row(repetition_penalty=penalty, logit_bias={1: -3.0, 0: 1.0})
    torch.testing.assert_close(adjust(logits, [both])[0, :2], torch.tensor([3.0, 2.0 / penalty - 3.0]))


def test_a_row_without_penalties_is_left_alone():
    logits = torch.randn(2, 6)
    found = adjust(logits, [row(), row(logit_bias={2: 7.0})])
    assert torch.equal(found[0], logits[0])
    assert float(found[1, 2] - logits[1, 2]) == pytest.approx(7, abs=1e-5)


def test_logprobs_are_those_of_the_model_alone():
    logits = torch.randn(3, 9)
    rows = [row(logprobs=2, temperature=0.1, logit_bias={4: 50}), row(), row(logprobs=0, logit_bias={8: 99})]
    found = [sampled.logprob for sampled in Sampler()(logits, rows)]
    expected = logits.log_softmax(-1)
    assert found[1] is None
    assert (found[0].token, found[2].token) == (4, 8)
    for one, place in ((found[0], 0), (found[2], 2)):
        assert one.logprob == pytest.approx(float(expected[place, one.token]), abs=1e-6)
        assert one.rank == 1 + int((expected[place] > expected[place, one.token]).sum())
    best = expected[0].topk(2)
    assert [token for token, _ in found[0].alternatives] == best.indices.tolist()
    assert [value for _, value in found[0].alternatives] == pytest.approx(best.values.tolist(), abs=1e-6)
    assert found[2].alternatives == ()


def test_forbidden_ids_have_no_part_of_any_distribution():
    allowed = torch.tensor([True, False, True, True])
    logits = torch.tensor([[0.0, 50.0, 0.0, math.log(2)]])
    sampler = Sampler(allowed)
    one = row(logprobs=20, logit_bias={1: 100})
    seen = {sampler(logits, [one])[0].token for _ in range(50)}
    assert seen == {0, 2, 3}
    logprob = sampler(logits, [row(logprobs=20, temperature=0)])[0].logprob
    assert logprob.token == 3
    assert logprob.logprob == pytest.approx(math.log(0.5))
    assert sorted(token for token, _ in logprob.alternatives) == [0, 2, 3]


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_numbers_that_are_none_are_said(broken):
    logits = torch.tensor([[0.0, 1.0, 2.0], [0.0, broken, 2.0]])
    for temperature in (0, 1):
        fine, lost = Sampler()(logits, [row(temperature=temperature), row(temperature=temperature)])
        assert fine.token in range(3)
        assert lost is None


# all rows at once, and each by itself


def alone(logits, one) -> tuple[int, float]:
    """The token of one row, `v`, computed by itself from Python's numbers; and how near the draw was to another one."""
    request, logits = one.request, logits.float().clone()
    if request.repetition_penalty != 1:
        seen = torch.zeros_like(logits, dtype=torch.bool)
        seen[torch.tensor(request.prompt + one.tokens)] = True
        logits = penalise_repetition(logits, seen, request.repetition_penalty)
    for token in {*request.logit_bias, *one.tokens}:
        count = one.tokens.count(token)
        change = request.logit_bias.get(token, 0.0) - count * request.frequency_penalty
        logits[token] += change - (count > 0) * request.presence_penalty
    if request.temperature == 0:
        return int(logits.argmax()), math.inf
    scaled = (logits.double() - logits.double().max()) / request.temperature
    mass = truncate(scaled, top_k=request.top_k, top_p=request.top_p, min_p=request.min_p).exp().cumsum(0)
    drawn = one.random.random() * float(mass[-1])
    return int(torch.searchsorted(mass, drawn, right=True)), float((mass - drawn).abs().min() / mass[-1])


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0, 0.3, 1, 1.7]),
        "top_k": st.sampled_from([1, 3, 20, 5000]),
        "top_p": st.sampled_from([0.0, 0.3, 0.9, 0.99, 1.0]),
        "min_p": st.sampled_from([0.0, 0.02, 0.3]),
        "repetition_penalty": st.sampled_from([0.7, 1.0, 1.6]),
        "presence_penalty": st.sampled_from([-1.0, 0.0, 0.8]),
        "frequency_penalty": st.sampled_from([-0.3, 0.0, 0.6]),
        "logit_bias": st.sampled_from([{}, {3: 2.5, 17: -100.0}, {9: -0.5}]),
        "logprobs": st.sampled_from([0, 2, 7]),
    },
)


def require_rows_alone(options, num_tokens, num_steps=3):
    """All rows at once take the tokens of each row alone, over several steps; one row leaves before the last step."""
    any_token = {"stop_tokens": frozenset(range(num_tokens))}  # whose text nobody asks for
    together, single = ([row(index, **option, **any_token) for index, option in enumerate(options)] for _ in range(2))
    sampler, generator = Sampler(), torch.Generator().manual_seed(len(options))
    for step in range(num_steps):
        logits = 3 * torch.randn(len(options), num_tokens, generator=generator)
        if step == num_steps - 1:
            together, single, logits = together[1:], single[1:], logits[1:]
        for one, same, sampled, own in zip(together, single, sampler(logits, together), logits, strict=True):
            expected, gap = alone(own, same)
            assert sampled.token == expected or gap < 1e-9
            assert (sampled.logprob is None) == (one.request.logprobs is None)
            if sampled.logprob is not None:
                assert sampled.logprob.token == sampled.token
                assert len(sampled.logprob.alternatives) == one.request.logprobs
                expected_logprob = float(own.log_softmax(-1)[sampled.token])
                assert sampled.logprob.logprob == pytest.approx(expected_logprob, abs=1e-5)
            for copy in (one, same):
                copy.push(sampled.token, None)


@settings(max_examples=100)
@given(st.lists(OPTIONS, min_size=2, max_size=7), st.sampled_from([30, 2500]))
def test_every_row_takes_the_token_that_it_would_alone(options, num_tokens):
    require_rows_alone(options, num_tokens)


class FirstRows(Column):
    """A wrong column, which takes the first rows for those that have an option."""

    def of(self, rows):
        return rows[: len(self.values)]


@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "min_p", "scored"])
def test_options_of_the_wrong_rows_are_noticed(monkeypatch, name):
    made = RowOptions.__init__

    def wrong(options, *arguments):
        made(options, *arguments)
        if (column := getattr(options, name)) is not None:
            setattr(options, name, FirstRows(*column))

    monkeypatch.setattr(RowOptions, "__init__", wrong)
    narrow = {"top_k": 1, "top_p": 0.3, "min_p": 0.3, "logprobs": 2}
    with pytest.raises(AssertionError):
        require_rows_alone([{"temperature": 0}, {}, {"temperature": 1.7, **narrow}, {"temperature": 0.3, **narrow}], 30)


def test_options_of_rows_that_have_left_are_noticed(monkeypatch):
    monkeypatch.setattr(RowOptions, "are_of", lambda *_: True)
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        require_rows_alone([{"temperature": 0}, {"top_k": 1}, {}], 30)


def test_replies_have_the_distribution_of_generate(start_engine):
    palm = PaLM(num_tokens=261, dim=32, depth=1, heads=2, dim_head=16)
    prompt, num_draws = [7, 42, 7], 1500
    options = {"temperature": 1.5, "top_k": 12, "top_p": 0.97, "min_p": 0.35, "repetition_penalty": 1.5}
    tokens, logprobs = palm.generate(
        prompt=torch.tensor(prompt), max_new_tokens=1, num_samples=2000, return_logprobs=True, **options
    )
    expected = torch.zeros(261)
    expected[tokens.flatten()] = logprobs.exp().flatten()
    assert float(expected.sum()) == pytest.approx(1, abs=1e-4)  # no token that may come has been missed
    assert 5 <= int((expected > 0).sum()) <= 12
    engine = start_engine(palm, ByteTokenizer(), max_batch=64, queue=num_draws)
    requests = [Request(prompt, 1, seed=1, index=index, **options) for index in range(num_draws)]
    drawn = []
    for generation in engine.submit_all(requests):
        generation.text()
        drawn += generation.tokens
    found = torch.tensor(drawn).bincount(minlength=261) / num_draws
    assert is_distributed(found, expected, num_draws)
    logits, seen = palm(torch.tensor([prompt]))[:, -1].detach(), torch.zeros(1, 261, dtype=torch.bool)
    seen[0, prompt] = True
    for name, value in (("repetition_penalty", 1.0), ("top_k", 4), ("min_p", 0.0)):
        wrong = sampling_logprobs(logits, Sampling(**{**options, name: value}), seen=seen)[0].exp()
        assert not is_distributed(found, wrong, num_draws), name
