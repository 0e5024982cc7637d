"""The layout of prompts with responses, and what a policy gives each action, against plain Python."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palm_rlhf.model.palm import PaLM
from palm_rlhf.policy.sequences import Sequences, action_logprobs, batches_by_length, join, response_logprobs

TOKENS = st.lists(st.integers(0, 5), min_size=1, max_size=5)  # 0 is also what pads are filled with
ROWS = st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=5)


def joined(rows: list[tuple[list[int], list[int]]]) -> Sequences:
    prompts, responses = zip(*rows, strict=True)
    return join([torch.tensor(prompt) for prompt in prompts], [torch.tensor(response) for response in responses])


def padded(rows: list[list], fill) -> list[list]:
    width = max(map(len, rows))
    return [row + [fill] * (width - len(row)) for row in rows]


# the layout


@given(ROWS)
def test_every_part_of_the_layout_by_hand(rows):
    sequences = joined(rows)
    assert len(sequences) == len(rows)
    assert sequences.tokens.tolist() == padded([prompt + response for prompt, response in rows], 0)
    assert sequences.prompt_lengths.tolist() == [len(prompt) for prompt, _ in rows]
    assert sequences.response_lengths.tolist() == [len(response) for _, response in rows]
    assert sequences.lengths.tolist() == [len(prompt) + len(response) for prompt, response in rows]
    assert sequences.num_actions == sum(len(response) for _, response in rows)

    def marked(of_prompt: bool, of_response: bool) -> list[list[bool]]:
        return padded([[of_prompt] * len(prompt) + [of_response] * len(response) for prompt, response in rows], False)

    assert sequences.key_mask.tolist() == marked(True, True)
    response_mask = [[False] * len(prompt) + [True] * len(response) for prompt, response in rows]
    assert sequences.response_mask.tolist() == padded(response_mask, False)
    width = sequences.tokens.shape[1]
    prompt_mask = [[column < len(prompt) for column in range(width)] for prompt, _ in rows]
    assert sequences.prompt_mask.tolist() == prompt_mask
    assert sequences.action_mask.tolist() == padded([[True] * len(response) for _, response in rows], False)
    assert sequences.actions.tolist() == padded([response for _, response in rows], 0)


@given(ROWS)
def test_what_stands_before_an_action_by_hand(rows):
    sequences = joined(rows)
    columns = torch.arange(sequences.tokens.shape[1]).expand(len(rows), -1)
    columns = sequences.before_actions(columns)[sequences.action_mask].tolist()
    assert columns == [len(prompt) + step - 1 for prompt, response in rows for step in range(len(response))]
    last_read = sequences.before_actions(sequences.tokens)[sequences.action_mask].tolist()
    assert last_read == [token for prompt, response in rows for token in (prompt[-1:] + response)[:-1]]

    deep = torch.randn(*sequences.tokens.shape, 3, 2)
    found = sequences.before_actions(deep)
    assert found.shape == (*sequences.actions.shape, 3, 2)
    for row, (prompt, response) in enumerate(rows):
        for step in range(len(response)):
            assert torch.equal(found[row, step], deep[row, len(prompt) + step - 1])


@given(ROWS, st.data())
def test_selected_rows_are_what_joining_them_alone_gives(rows, data):
    sequences = joined(rows)
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=6))
    first = data.draw(st.integers(0, len(rows) - 1))
    flags = torch.tensor([index in chosen for index in range(len(rows))])
    for index, kept in (
        (torch.tensor(chosen), [rows[index] for index in chosen]),
        (slice(first, first + 2), rows[first : first + 2]),
        (flags, [row for index, row in enumerate(rows) if index in chosen]),
    ):
        selected, alone = sequences.select(index), joined(kept)
        assert torch.equal(selected.tokens, alone.tokens)  # the same width as well
        assert torch.equal(selected.prompt_lengths, alone.prompt_lengths)
        assert torch.equal(selected.response_lengths, alone.response_lengths)
        assert torch.equal(selected.actions, alone.actions)


# A response in which an environment answered: True where the policy said a token.
TALKS = st.lists(
    st.tuples(TOKENS, st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=6)),
    min_size=1,
    max_size=5,
)


def joined_talks(talks) -> Sequences:
    prompts, responses = zip(*talks, strict=True)
    tokens, masks = ([torch.tensor([pair[part] for pair in row]) for row in responses] for part in (0, 1))
    return join([torch.tensor(prompt) for prompt in prompts], tokens, masks)


@given(TALKS)
def test_what_an_environment_wrote_is_read_but_is_no_action(talks):
    sequences = joined_talks(talks)
    plain = joined([(prompt, [token for token, _ in response]) for prompt, response in talks])
    for name in ("tokens", "prompt_lengths", "response_lengths", "lengths", "key_mask", "prompt_mask"):
        assert torch.equal(getattr(sequences, name), getattr(plain, name))
    assert sequences.num_actions == sum(said for _, response in talks for _, said in response)
    assert sequences.action_mask.tolist() == padded([[said for _, said in response] for _, response in talks], False)
    actions = [[token if said else 0 for token, said in response] for _, response in talks]
    assert sequences.actions.tolist() == padded(actions, 0)
    columns = [[False] * len(prompt) + [said for _, said in response] for prompt, response in talks]
    assert sequences.response_mask.tolist() == padded(columns, False)
    for row, (prompt, response) in enumerate(talks):  # what is read stays, an environment's words too
        read = (prompt[-1:] + [token for token, _ in response])[:-1]
        assert sequences.before_actions(sequences.tokens)[row, : len(read)].tolist() == read


@given(TALKS, st.data())
def test_selected_conversations_are_what_joining_them_alone_gives(talks, data):
    chosen = data.draw(st.lists(st.integers(0, len(talks) - 1), min_size=1, max_size=6))
    first = data.draw(st.integers(0, len(talks) - 1))
    for index, kept in (
        (torch.tensor(chosen), [talks[index] for index in chosen]),
        (slice(first, first + 2), talks[first : first + 2]),
    ):
        selected, alone = joined_talks(talks).select(index), joined_talks(kept)
        for name in ("tokens", "policy_mask", "action_mask", "response_mask", "actions"):
            assert torch.equal(getattr(selected, name), getattr(alone, name))


def test_all_parts_move_to_a_device():
    moved = joined_talks([([1], [(2, True), (3, False)])]).to("meta")
    parts = (moved.tokens, moved.prompt_lengths, moved.response_lengths, moved.policy_mask)
    assert {part.device.type for part in parts} == {"meta"}


def test_a_mask_of_other_lengths_than_the_responses_is_refused():
    with pytest.raises(ValueError, match="policy_masks of other lengths than the responses"):
        join([torch.tensor([1])], [torch.tensor([2, 3])], [torch.tensor([True])])


@pytest.mark.parametrize(
    "prompts, responses, message",
    [
        ([], [], "got 0 prompts and 0 responses; expected the same number, at least one"),
        ([[1]], [[1], [2]], "got 1 prompts and 2 responses"),
        ([[1], []], [[1], [2]], r"prompt 1 has the shape \(0,\); expected a 1-d tensor of at least one token"),
        ([[1]], [[]], r"response 0 has the shape \(0,\)"),
        ([[[1, 2]]], [[1]], r"prompt 0 has the shape \(1, 2\)"),
    ],
)
def test_rows_that_are_none_are_refused(prompts, responses, message):
    prompts, responses = ([torch.tensor(row, dtype=torch.long) for row in rows] for rows in (prompts, responses))
    with pytest.raises(ValueError, match=message):
        join(prompts, responses)


# log-probabilities and entropies

SIZE = 7
TRUNCATIONS = {
    "temperature": st.sampled_from([0.6, 1.0, 1.7]),
    "top_k": st.integers(1, SIZE + 2),
    "top_p": st.sampled_from([0.3, 0.8, 1.0]),
}


@pytest.fixture(scope="module")
def identity_palm() -> PaLM:
    """Its logits are the embeddings themselves."""
    palm = PaLM(num_tokens=SIZE, dim=SIZE, depth=1, heads=1, dim_head=2, logit_scale=1.0)
    palm.token_emb.weight.data.copy_(torch.eye(SIZE))
    return palm.double().requires_grad_(False)


@given(
    st.lists(st.floats(-4, 4, width=32), min_size=SIZE, max_size=SIZE, unique=True),
    st.integers(0, SIZE - 1),
    st.fixed_dictionaries({}, optional=TRUNCATIONS),
)
def test_logprobs_and_entropy_of_any_logits_by_hand(identity_palm, distribution, logits, action, truncation):
    embeds = torch.tensor(logits, dtype=torch.float64).view(1, 1, -1)
    found = action_logprobs(identity_palm, embeds, torch.tensor([[action]]), **truncation)
    probs = distribution(logits, always=action, **truncation)
    assert float(found.logprobs) == pytest.approx(math.log(probs[action]), abs=1e-10)
    assert float(found.entropy) == pytest.approx(-sum(p * math.log(p) for p in probs if p > 0), abs=1e-10)


@settings(max_examples=15)
@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4),
    st.fixed_dictionaries({}, optional=TRUNCATIONS),
)
def test_responses_of_a_padded_batch_by_hand(wandering_palm, draw_rows, said_by_hand, lengths, truncation):
    palm = wandering_palm()
    prompts, responses = (draw_rows(*part, seed=seed) for seed, part in enumerate(zip(*lengths, strict=True)))
    with torch.no_grad():
        found = response_logprobs(palm, join(prompts, responses), **truncation)
    assert found.logprobs.dtype == found.entropy.dtype == torch.float32
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        logprobs, entropies = said_by_hand(palm, prompt, response, **truncation)
        assert found.logprobs[row, : len(response)].tolist() == pytest.approx(logprobs, abs=1e-5)
        assert found.entropy[row, : len(response)].tolist() == pytest.approx(entropies, abs=1e-5)


@pytest.mark.parametrize("truncation", [{}, {"top_k": 30}, {"top_p": 0.8}, {"top_k": 40, "top_p": 0.9}])
def test_responses_in_chunks_by_hand(truncation, wandering_palm, draw_rows, said_by_hand, monkeypatch):
    """With a large vocabulary the logits are never held all at once."""
    monkeypatch.setattr("palm_rlhf.ops.logprobs.CHUNK", 200)
    palm = wandering_palm(num_tokens=70)
    prompts, responses = draw_rows(3, 1, 5), draw_rows(6, 2, 1, seed=1)
    sequences, held = join(prompts, responses), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(tuple(t.shape)) or t, lambda t: t):
        found = response_logprobs(palm, sequences, temperature=0.7, **truncation)
        assert not any(shape[-1:] == (70,) for shape in held)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        logprobs, entropies = said_by_hand(palm, prompt, response, temperature=0.7, **truncation)
        assert found.logprobs[row, : len(response)].tolist() == pytest.approx(logprobs, abs=1e-5)
        assert found.entropy[row, : len(response)].tolist() == pytest.approx(entropies, abs=1e-5)


def test_greedy_responses_have_all_the_mass_or_none(wandering_palm, draw_rows, monkeypatch):
    """With a large vocabulary too: a temperature of 0 scales no chunk of logits."""
    monkeypatch.setattr("palm_rlhf.ops.logprobs.CHUNK", 200)
    palm, (prompt,), (response,) = wandering_palm(num_tokens=70), draw_rows(3), draw_rows(6, seed=1)
    with torch.no_grad():
        response[0] = palm(prompt[None])[0, -1].argmax()
        likeliest = palm(torch.cat([prompt, response])[None])[0, len(prompt) - 1 : -1].argmax(dim=-1)
        found = response_logprobs(palm, join([prompt], [response]), temperature=0.0)
    assert found.logprobs[0].tolist() == [0.0 if same else -math.inf for same in response == likeliest]
    assert found.logprobs[0, 0] == 0.0 and found.entropy[0].tolist() == [0.0] * 6


PROBS = (0.4, 0.3, 0.2, 0.05, 0.03, 0.015, 0.005)


@pytest.mark.parametrize("truncation", [{"top_p": 0.65}, {"top_k": 2}], ids=str)
def test_an_action_that_is_cut_off_by_now_has_a_finite_logprob_and_a_gradient(identity_palm, truncation):
    """What was sampled then may lie outside the nucleus of the policy as it has become: tokens 0 and 1 are left."""
    logits = torch.tensor([[PROBS, PROBS]], dtype=torch.float64).log().requires_grad_()
    found = action_logprobs(identity_palm, logits, torch.tensor([[3, 1]]), **truncation).logprobs
    expected = [math.log(0.05 / (0.4 + 0.3 + 0.05)), math.log(0.3 / (0.4 + 0.3))]
    assert found[0].tolist() == pytest.approx(expected, abs=1e-12)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    kept = [[0.4, 0.3, 0.0, 0.05], [0.4, 0.3, 0.0, 0.0]]
    for step, (action, masses) in enumerate(zip((3, 1), kept, strict=True)):
        by_hand = [(token == action) - mass / sum(masses) for token, mass in enumerate(masses)] + [0.0] * 3
        assert gradient[0, step].tolist() == pytest.approx(by_hand, abs=1e-12)


def check_entropy_gradient(entropy_of, truncation: dict, kept: int) -> None:
    """d entropy / d logit = -p (log p + entropy) where a token is kept, and 0 where it is cut off."""
    logits = torch.tensor([[PROBS]], dtype=torch.float64).log().requires_grad_()
    (gradient,) = torch.autograd.grad(entropy_of(logits, **truncation).sum(), logits)
    probs = [p / sum(PROBS[:kept]) for p in PROBS[:kept]]
    entropy = -sum(p * math.log(p) for p in probs)
    by_hand = [-p * (math.log(p) + entropy) for p in probs] + [0.0] * (SIZE - kept)
    assert gradient.flatten().tolist() == pytest.approx(by_hand, abs=1e-12)


CUTS = [({}, SIZE), ({"top_k": 3}, 3), ({"top_p": 0.65}, 2), ({"top_k": 4, "top_p": 0.9}, 3)]


@pytest.mark.parametrize("truncation, kept", CUTS, ids=str)
def test_the_gradient_of_the_entropy_by_hand(identity_palm, truncation, kept):
    def entropy_of(logits, **truncation):
        actions = torch.zeros(1, 1, dtype=torch.long)
        found = action_logprobs(identity_palm, logits, actions, entropy_needs_grad=True, **truncation)
        return found.entropy

    check_entropy_gradient(entropy_of, truncation, kept)


def test_an_entropy_of_which_the_cut_tokens_spoil_the_gradient_is_told_apart(identity_palm):
    def entropy_of(logits, top_k=SIZE):
        logprobs = torch.where(torch.arange(SIZE) < top_k, logits, -torch.inf).log_softmax(dim=-1)
        return -torch.where(logprobs > -torch.inf, logprobs.exp() * logprobs, 0.0).sum(dim=-1)

    check_entropy_gradient(entropy_of, {}, SIZE)  # right while nothing is cut off
    with pytest.raises(AssertionError):
        check_entropy_gradient(entropy_of, {"top_k": 3}, 3)


def test_the_entropy_carries_a_gradient_only_where_asked(wandering_palm, draw_rows):
    palm, sequences = wandering_palm(), join(draw_rows(3, 1), draw_rows(2, 4))
    without, with_grad = (response_logprobs(palm, sequences, entropy_needs_grad=asked) for asked in (False, True))
    assert without.logprobs.requires_grad and not without.entropy.requires_grad
    assert with_grad.logprobs.requires_grad and with_grad.entropy.requires_grad
    torch.testing.assert_close(without.entropy, with_grad.entropy, rtol=0, atol=0)
    with torch.no_grad():
        assert not response_logprobs(palm, sequences, entropy_needs_grad=True).entropy.requires_grad


def test_batches_hold_rows_of_similar_length_in_a_stable_order():
    batches = batches_by_length(torch.tensor([5, 2, 9, 2, 7]), 2)
    assert [batch.tolist() for batch in batches] == [[1, 3], [0, 4], [2]]


@pytest.mark.parametrize("num_rows, num_shards", [(7, 3), (6, 3), (2, 3), (1, 2)])
def test_each_row_is_in_a_batch_of_one_process(num_rows, num_shards):
    lengths = torch.randint(1, 9, (num_rows,), generator=torch.Generator().manual_seed(num_rows))
    dealt = [batches_by_length(lengths, 2, (index, num_shards)) for index in range(num_shards)]
    assert sorted(torch.cat([row for batches in dealt for row in batches]).tolist()) == list(range(num_rows))
    assert all(0 < len(batch) <= 2 for batches in dealt for batch in batches)
    by_length = sorted(range(num_rows), key=lambda row: int(lengths[row]))
    assert [batch.tolist() for batch in dealt[0]] == [by_length[::num_shards][k : k + 2]
                                                      for k in range(0, len(by_length[::num_shards]), 2)]  # fmt: skip
