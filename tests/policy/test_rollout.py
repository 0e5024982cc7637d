"""Sampler parity, how responses end, and the best of several."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palm_rlhf.model.palm import PaLM
from palm_rlhf.policy.actor_critic import ActorCritic
from palm_rlhf.policy.best_of_n import best_of_n
from palm_rlhf.policy.reward_model import RewardModel
from palm_rlhf.policy.rollout import ResponseSampling, Rollout, collect
from palm_rlhf.policy.sequences import Sequences, action_logprobs, join, response_logprobs, spoken
from tests.factories import SERIAL

EOS = 4
LENGTHS = (3, 1, 6, 2)
TOLERANCE = {"cpu": 1e-5, "cuda": 1e-4}  # a GPU adds float32 up in the order of its kernels, which differ


def seeded(seed: int = 0, device: str | torch.device = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def responses_of(rollout: Rollout) -> list[list[int]]:
    return [row.tolist() for row in spoken(rollout.sequences)[1]]


def assert_parity(rollout: Rollout, logprobs: torch.Tensor) -> None:
    """Recorded while sampling or read afterwards, the log-probability of every action is the same."""
    action_mask = rollout.sequences.action_mask
    assert rollout.logprobs.shape == action_mask.shape and not rollout.logprobs[~action_mask].any()
    tolerance = TOLERANCE[logprobs.device.type]
    torch.testing.assert_close(logprobs[action_mask], rollout.logprobs[action_mask], rtol=0, atol=tolerance)


# sampler parity


@settings(max_examples=20)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.fixed_dictionaries(
        {"eos_token": st.sampled_from([None, EOS])},
        optional={
            "temperature": st.sampled_from([0.6, 1.5]),
            "top_k": st.sampled_from([1, 5]),
            "top_p": st.sampled_from([0.4, 0.9]),
        },
    ),
    st.sampled_from([{"max_new_tokens": 1}, {"max_new_tokens": 6}, {"max_seq_len": 12}]),
    st.integers(1, 3),
    st.integers(1, 7),
    st.integers(0, 99),
    st.sampled_from([{}, SERIAL]),
)
def test_what_is_recorded_while_sampling_is_what_training_reads(
    device, wandering_palm, draw_rows, said_by_hand, lengths, sampling, limit, num_samples, batch_size, seed, block
):
    palm, generator = wandering_palm(dropout=0.5, **block).to(device), seeded(seed, device)
    actor_critic = ActorCritic(palm, value="none").train()
    prompts = [row.to(device) for row in draw_rows(*lengths, seed=seed)]
    sampling = ResponseSampling(**sampling, **limit)
    rollout = collect(palm, prompts, sampling, num_samples=num_samples, batch_size=batch_size, generator=generator)
    assert_parity(rollout, response_logprobs(palm, rollout.sequences, **sampling.truncation).logprobs.detach())
    assert_parity(rollout, actor_critic(rollout.sequences, **sampling.truncation).logprobs.detach())
    for row, (prompt, response) in enumerate(zip(*spoken(rollout.sequences), strict=True)):
        assert torch.equal(prompt, prompts[row // num_samples])  # the samples of a prompt stand next to each other
        logprobs, _ = said_by_hand(palm, prompt, response, **sampling.truncation)
        assert rollout.logprobs[row, : len(response)].tolist() == pytest.approx(logprobs, abs=TOLERANCE[device.type])


def test_parity_with_adapters(device, wandering_palm, draw_rows, stir):
    palm, prompts = wandering_palm(), [row.to(device) for row in draw_rows(*LENGTHS)]
    actor_critic = ActorCritic(palm, value="none", actor_lora_r=2)
    stir(actor_critic.actor_parameters())
    actor_critic.to(device)
    sampling, generator = ResponseSampling(max_new_tokens=8, temperature=0.8, eos_token=EOS), seeded(device=device)
    rollout = collect(palm, prompts, sampling, finetune_scope="actor", num_samples=2, generator=generator)
    assert_parity(rollout, actor_critic(rollout.sequences, **sampling.truncation).logprobs.detach())
    with pytest.raises(AssertionError):  # without them it is another policy
        assert_parity(rollout, response_logprobs(palm, rollout.sequences, **sampling.truncation).logprobs.detach())


def with_left_pads_unmasked(palm: PaLM, sequences: Sequences, **truncation) -> torch.Tensor:
    """As a trainer reads that pads prompts on the left and forgets about it."""
    width = int(sequences.prompt_lengths.max())
    rows = [torch.cat((torch.zeros(width - len(prompt)).long(), prompt)) for prompt in spoken(sequences)[0]]
    return response_logprobs(palm, join(rows, spoken(sequences)[1]), **truncation).logprobs


def with_columns_of_the_longest_prompt(palm: PaLM, sequences: Sequences, **truncation) -> torch.Tensor:
    """As one reads that cuts the same columns out of every row."""
    first, (rows, width) = int(sequences.prompt_lengths.max()), sequences.actions.shape
    embeds = palm(sequences.tokens, return_only_embedding=True)[:, first - 1 : -1][:, :width]
    cut = action_logprobs(palm, embeds, sequences.tokens[:, first:][:, :width], **truncation).logprobs
    return torch.cat((cut, torch.zeros(rows, width - cut.shape[1])), dim=1)


def shifted(palm: PaLM, sequences: Sequences, by: int, **truncation) -> torch.Tensor:
    """The log-probabilities of the actions where others are about to be said."""
    embeds = palm(sequences.tokens, return_only_embedding=True).roll(by, dims=1)
    return action_logprobs(palm, sequences.before_actions(embeds), sequences.actions, **truncation).logprobs


def with_dropout(palm: PaLM, sequences: Sequences, **truncation) -> torch.Tensor:
    dropping = PaLM.from_config(palm.config).train()
    dropping.load_state_dict(palm.state_dict())
    return response_logprobs(dropping, sequences, **truncation).logprobs


def right(palm: PaLM, sequences: Sequences, **truncation) -> torch.Tensor:
    return response_logprobs(palm, sequences, **truncation).logprobs


MUTANTS = {
    "temperature forgotten": lambda palm, sequences, **o: right(palm, sequences, **{**o, "temperature": 1.0}),
    "top-p forgotten": lambda palm, sequences, **o: right(palm, sequences, **{**o, "top_p": None}),
    "top-k forgotten": lambda palm, sequences, **o: right(palm, sequences, **{**o, "top_k": None}),
    "one place late": functools.partial(shifted, by=-1),
    "one place early": functools.partial(shifted, by=1),
    "left pads unmasked": with_left_pads_unmasked,
    "columns of the longest prompt": with_columns_of_the_longest_prompt,
    "dropout on": with_dropout,
}


@pytest.mark.parametrize("mutant", MUTANTS)
@torch.no_grad()
def test_parity_tells_a_broken_reading_apart(wandering_palm, draw_rows, mutant):
    palm = wandering_palm(dropout=0.1)
    sampling = ResponseSampling(max_new_tokens=8, temperature=0.7, top_k=9, top_p=0.8, eos_token=EOS)
    rollout = collect(palm, draw_rows(*LENGTHS), sampling, num_samples=2, generator=seeded())
    palm.eval()
    assert_parity(rollout, right(palm, rollout.sequences, **sampling.truncation))
    with pytest.raises(AssertionError):
        assert_parity(rollout, MUTANTS[mutant](palm, rollout.sequences, **sampling.truncation))


# where responses end


def test_eos_is_the_last_action_and_a_response_without_it_is_truncated(wandering_palm, draw_rows):
    prompts = [*draw_rows(*LENGTHS), torch.tensor([EOS, 1, EOS])]  # in a prompt it ends nothing
    rollout = collect(
        wandering_palm(), prompts, ResponseSampling(max_new_tokens=10, eos_token=EOS), num_samples=6, generator=seeded()
    )
    responses = responses_of(rollout)
    for row, response in enumerate(responses):
        assert EOS not in response[:-1]
        assert bool(rollout.truncated[row]) == (response[-1] != EOS)
        assert len(response) == 10 or response[-1] == EOS
        assert rollout.sequences.action_mask[row].sum() == len(response)  # EOS included
        assert rollout.logprobs[row, len(response) - 1] < 0
    ended = [response for response in responses if response[-1] == EOS]
    assert 5 < len(ended) < 25 and len({len(response) for response in ended}) > 3


def test_nothing_is_truncated_where_no_eos_is_looked_for(wandering_palm, draw_rows):
    rollout = collect(wandering_palm(), draw_rows(*LENGTHS), ResponseSampling(max_new_tokens=5), generator=seeded())
    assert not rollout.truncated.any() and rollout.truncated.dtype == torch.bool
    assert rollout.sequences.response_lengths.tolist() == [5] * len(LENGTHS)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_max_seq_len_leaves_each_row_its_own_room(wandering_palm, draw_rows, batch_size):
    palm, prompts = wandering_palm(), draw_rows(*LENGTHS)
    rollout = collect(palm, prompts, ResponseSampling(max_seq_len=9), batch_size=batch_size, num_samples=2)
    assert rollout.sequences.response_lengths.tolist() == [9 - length for length in LENGTHS for _ in range(2)]
    sampling = ResponseSampling(max_seq_len=9, eos_token=EOS)
    rollout = collect(palm, prompts, sampling, num_samples=8, batch_size=batch_size, generator=seeded())
    full = rollout.sequences.lengths == 9
    assert (rollout.sequences.lengths <= 9).all() and not rollout.truncated[~full].any()
    assert rollout.truncated.tolist() == [response[-1] != EOS for response in responses_of(rollout)]


def test_greedy_responses_do_not_depend_on_how_many_are_drawn_at_once(wandering_palm, draw_rows):
    palm, sampling = wandering_palm(), ResponseSampling(max_new_tokens=6, temperature=0.0)
    whole = collect(palm, draw_rows(*LENGTHS), sampling, num_samples=2)
    for batch_size in (1, 3, 4, 6):
        parts = collect(palm, draw_rows(*LENGTHS), sampling, num_samples=2, batch_size=batch_size)
        assert torch.equal(parts.sequences.tokens, whole.sequences.tokens)


def test_the_rows_drawn_at_once_and_that_every_token_is_read_once(wandering_palm, draw_rows):
    palm, blocks = wandering_palm(), []
    palm.token_emb.register_forward_pre_hook(lambda _, tokens: blocks.append(tokens[0].shape))
    sampling = ResponseSampling(max_new_tokens=8, eos_token=EOS)
    rollout = collect(palm, draw_rows(*[5] * 7), sampling, num_samples=3, batch_size=7, generator=seeded())
    assert max(rows for rows, _ in blocks) == 6
    # each prompt once for all its samples, and every action but the last of each response
    assert sum(rows * columns for rows, columns in blocks) == 7 * 5 + rollout.sequences.num_actions - 7 * 3
    blocks.clear()
    collect(palm, draw_rows(5), sampling, num_samples=3, batch_size=1)
    assert max(rows for rows, _ in blocks) == 3


def test_draws_repeat_with_the_generator_alone(wandering_palm, draw_rows):
    def drawn(seed):
        sampling = ResponseSampling(max_new_tokens=8)
        return collect(wandering_palm(), draw_rows(4), sampling, num_samples=4, generator=seeded(seed))

    one, again, other = drawn(0), drawn(0), drawn(1)
    assert torch.equal(one.sequences.tokens, again.sequences.tokens) and torch.equal(one.logprobs, again.logprobs)
    assert not torch.equal(one.sequences.tokens, other.sequences.tokens)
    assert len({tuple(response) for response in responses_of(one)}) == 4


def test_what_is_kept_does_not_grow_with_the_vocabulary(wandering_palm):
    def kept_bytes(num_tokens: int) -> int:
        prompts = [torch.arange(length) for length in LENGTHS]
        sampling = ResponseSampling(max_new_tokens=5)
        rollout = collect(wandering_palm(num_tokens=num_tokens), prompts, sampling, num_samples=2)
        s = rollout.sequences
        kept = (s.tokens, s.prompt_lengths, s.response_lengths, rollout.logprobs, rollout.truncated)
        storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in kept}
        return sum(storages.values())  # of a view, all that it keeps alive

    rows, width = 2 * len(LENGTHS), max(LENGTHS) + 5
    assert kept_bytes(16) == kept_bytes(4096) == rows * (8 * width + 8 + 8 + 4 * 5 + 1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_samples": 0}, "num_samples=0 and batch_size=64, expected at least 1 of each"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"prompts": []}, "expected the same number, at least one"),
        ({"prompts": [torch.tensor([[1, 2]])]}, "wrong number of axes"),
        ({"prompts": [torch.tensor([13])]}, "outside the vocabulary"),
        ({"sampling": ResponseSampling()}, "expected exactly one of them"),
        ({"sampling": ResponseSampling(max_new_tokens=3, max_seq_len=9)}, "expected exactly one of them"),
        ({"sampling": ResponseSampling(max_seq_len=2)}, "seq_len=2 counts the prompt"),
        ({"sampling": ResponseSampling(max_new_tokens=3, eos_token=13)}, "got eos_token=13"),
    ],
)
def test_bad_arguments_of_collect_are_refused(wandering_palm, options, message):
    options = {"prompts": [torch.tensor([1, 2, 3])], "sampling": ResponseSampling(max_new_tokens=3), **options}
    with pytest.raises(ValueError, match=message):
        collect(wandering_palm(), options.pop("prompts"), options.pop("sampling"), **options)


# the best of several


@pytest.fixture(scope="module")
def candidates(wandering_palm):
    """A palm, a prompt, how to sample, and what comes then: responses of different lengths, all of them different."""
    palm, prompt = wandering_palm(), torch.tensor([3, 1, 2])
    sampling = ResponseSampling(max_new_tokens=9, eos_token=EOS)
    responses = responses_of(collect(palm, [prompt], sampling, num_samples=8, generator=seeded()))
    assert len({tuple(response) for response in responses}) == 8 and len({*map(len, responses)}) > 2
    return palm, prompt, sampling, responses


def best(palm: PaLM, reward, prompt: torch.Tensor, sampling: ResponseSampling, **options) -> list[int]:
    return best_of_n(palm, reward, prompt, sampling, num_samples=8, generator=seeded(), **options).tolist()


def liking(token: int):
    return lambda prompts, completions: [completion.tolist().count(token) for completion in completions]


@pytest.mark.parametrize("token", [0, 1, EOS, 7, 11])
def test_the_best_of_n_is_what_the_reward_likes_most(candidates, token):
    palm, prompt, sampling, responses = candidates
    expected = max(responses, key=lambda response: response.count(token))
    assert best(palm, liking(token), prompt, sampling) == expected


def test_the_best_of_n_is_one_that_the_reward_could_judge(candidates):
    palm, prompt, sampling, responses = candidates
    judged = {2: -3.0, 5: -1.0, 6: -2.0}  # None is no 0, which would be above all of these
    found = best(palm, lambda prompts, completions: [judged.get(n) for n in range(8)], prompt, sampling)
    assert found == responses[5]
    with pytest.raises(ValueError, match="returned None for all 8 responses"):
        best(palm, lambda prompts, completions: [None] * 8, prompt, sampling)


def test_the_best_of_n_by_text(candidates, tokenizer):
    palm, prompt, sampling, responses = candidates
    texts = [tokenizer.decode([token for token in response if token != EOS]) for response in responses]

    def reward(prompts, completions):
        assert prompts == [tokenizer.decode(prompt.tolist())] * 8 and completions == texts
        return [-len(completion) for completion in completions]

    shortest = min(range(8), key=lambda n: len(texts[n]))
    assert best(palm, reward, prompt, sampling, tokenizer=tokenizer) == responses[shortest]


def test_the_best_of_n_by_a_reward_model(candidates):
    palm, prompt, sampling, responses = candidates
    model = RewardModel(palm)
    scores = [model(torch.cat((prompt, torch.tensor(response)))[None]).item() for response in responses]
    assert best(palm, model, prompt, sampling) == responses[scores.index(max(scores))]


def test_the_best_of_n_with_adapters(candidates, wandering_palm, stir):
    _, prompt, sampling, without = candidates
    palm = wandering_palm()
    stir(palm.add_finetune_params("mine", 2).parameters())
    drawn = collect(palm, [prompt], sampling, finetune_scope="mine", num_samples=8, generator=seeded())
    found = best(palm, liking(7), prompt, sampling, finetune_scope="mine")
    assert found == max(responses_of(drawn), key=lambda response: response.count(7))
    assert found not in without
