"""Ids that a model has and its tokenizer lacks: never sampled, and no part of any distribution that is compared."""

import copy

import pytest
import tokenizers
import torch

from palm_rlhf import PaLM, PPOConfig, RLHFTrainer
from palm_rlhf.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer
from palm_rlhf.model.token_ids import known_tokens
from palm_rlhf.ops.logprobs import chunks_are_faster
from palm_rlhf.policy.rollout import ResponseSampling, collect
from palm_rlhf.policy.sequences import action_logprobs, response_logprobs

BYTES = ByteTokenizer()
NUM_TOKENS = 320


def palm_that_likes_padding(known: torch.Tensor) -> PaLM:
    """A random model whose logits are the largest, by far, at the ids that are not known."""
    torch.manual_seed(0)
    palm = PaLM(num_tokens=len(known), dim=32, depth=1, heads=2, dim_head=16, dropout=0.1)
    with torch.no_grad():
        palm.token_emb.weight *= 2
        like = palm.token_emb.weight[known].repeat(len(known), 1)
        palm.token_emb.weight[~known] = like[: int((~known).sum())] * 3
    return palm


def mask(kind: str, num_tokens: int = NUM_TOKENS) -> torch.Tensor:
    known = torch.ones(num_tokens, dtype=torch.bool)
    known[261:] = False
    if kind == "gaps":
        known[7], known[30:33] = False, False
    return known


both = pytest.mark.parametrize("kind", ["padding", "gaps"])


def test_a_tokenizer_tells_which_ids_of_a_model_are_tokens():
    assert known_tokens(BYTES, 300).tolist() == [True] * 261 + [False] * 39
    assert known_tokens(BYTES, 261) is None and known_tokens(BYTES, 256) is None
    assert known_tokens(None, 300) is None
    gaps = HuggingFaceTokenizer.train(["some text"], 300)
    named = [gaps.backend.id_to_token(index) is not None for index in range(400)]
    assert known_tokens(gaps, 400).tolist() == named
    assert known_tokens(gaps.backend, 400).tolist() == named
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=gaps.backend)
    assert known_tokens(theirs, 400).tolist() == named


def test_gaps_of_a_tokenizer_are_found():
    vocabulary = {"a": 0, "b": 3, "<s>": 5}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="a"))
    gaps = HuggingFaceTokenizer(backend, ["<s>"], eos_token="<s>")
    assert known_tokens(gaps, 7).nonzero().squeeze(-1).tolist() == [0, 3, 5]
    assert gaps.num_tokens == 6


@both
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.0}, {"temperature": 0.7, "top_k": 5}, {"top_p": 0.8}, {"min_p": 0.2},
     {"repetition_penalty": 1.5}],
)  # fmt: skip
def test_an_id_that_is_not_allowed_is_never_sampled(kind, options):
    known = mask(kind)
    palm = palm_that_likes_padding(known).eval()
    prompt = [torch.tensor([104, 105]), torch.tensor([106])]
    generate = {"max_new_tokens": 12, "num_samples": 4, **options}
    free = palm.generate(prompt=prompt, generator=torch.Generator().manual_seed(1), **generate)
    assert not known[torch.cat(free)].all(), "the model was to like ids that are no tokens"
    rows, logprobs = palm.generate(
        prompt=prompt,
        generator=torch.Generator().manual_seed(1),
        allowed_tokens=known,
        return_logprobs=True,
        **generate,
    )
    assert known[torch.cat(rows)].all()
    if options in ({}, {"temperature": 0.0}):
        sequence = torch.cat((prompt[0], rows[0])).unsqueeze(0)
        logits = palm(sequence)[0, 1:-1]
        if options:
            assert rows[0].tolist() == known.nonzero().squeeze(-1)[logits[:, known].argmax(dim=-1)].tolist()
        else:
            expected = logits[:, known].log_softmax(dim=-1)
            place = known.cumsum(0)[rows[0]] - 1
            torch.testing.assert_close(logprobs[0], expected.gather(-1, place.unsqueeze(-1)).squeeze(-1), atol=1e-5,
                                       rtol=0)  # fmt: skip


def test_without_a_prompt_the_first_token_is_an_allowed_one_too():
    known = torch.zeros(NUM_TOKENS, dtype=torch.bool)
    known[[5, 300]] = True
    palm = palm_that_likes_padding(known).eval()
    rows, logprobs = palm.generate(4, num_samples=1, allowed_tokens=known, return_logprobs=True)
    assert known[rows].all()
    assert float(logprobs[0, 0]) == pytest.approx(-0.6931472)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.ones(5, dtype=torch.bool), r"shape \(5,\); expected torch.bool of \(320,\)"),
        (torch.ones(NUM_TOKENS), "torch.float32"),
        (torch.zeros(NUM_TOKENS, dtype=torch.bool), "expected at least one"),
    ],
)
def test_a_mask_that_is_none_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        palm_that_likes_padding(mask("padding")).generate(prompt=torch.tensor([1]), max_new_tokens=1,
                                                          allowed_tokens=wrong)  # fmt: skip


@both
@pytest.mark.parametrize("num_tokens, tied", [(NUM_TOKENS, True), (9000, True), (9000, False)])
def test_log_probabilities_entropies_and_gradients_are_those_of_the_known_tokens_alone(kind, num_tokens, tied):
    known = mask(kind, num_tokens)
    if num_tokens > NUM_TOKENS:
        known[261:-100] = True
    torch.manual_seed(0)
    palm = PaLM(num_tokens=num_tokens, dim=16, depth=1, heads=2, dim_head=8, tie_embeddings=tied).double()
    output = palm.token_emb.weight if tied else palm.lm_head.weight
    embeds = torch.randn(8, 128, 16, dtype=torch.float64, requires_grad=True)
    actions = known.nonzero().squeeze(-1)[torch.randint(int(known.sum()), (8, 128))]
    if num_tokens > NUM_TOKENS:
        assert chunks_are_faster(embeds, output), "this size was to take the way in chunks"
    found = action_logprobs(palm, embeds, actions, temperature=0.7, allowed_tokens=known)
    found.logprobs.square().sum().backward()
    gradients = embeds.grad.clone(), output.grad.clone()
    embeds.grad = output.grad = None

    places = known.nonzero().squeeze(-1)
    logprobs = (embeds @ output[places].mT * palm.config.output_scale / 0.7).log_softmax(dim=-1)
    expected = logprobs.gather(-1, (known.cumsum(0)[actions] - 1).unsqueeze(-1)).squeeze(-1)
    expected.square().sum().backward()
    torch.testing.assert_close(found.logprobs, expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(found.entropy, -(logprobs.exp() * logprobs).sum(dim=-1), atol=1e-9, rtol=0)
    torch.testing.assert_close(gradients[0], embeds.grad, atol=1e-8, rtol=0)
    torch.testing.assert_close(gradients[1], output.grad, atol=1e-8, rtol=0)


@both
@pytest.mark.parametrize("truncation", [{}, {"top_k": 9}, {"temperature": 0.6, "top_p": 0.9}])
def test_what_is_recorded_while_sampling_is_what_the_training_forward_says(kind, truncation):
    known = mask(kind)
    palm = palm_that_likes_padding(known).eval()
    sampling = ResponseSampling(max_new_tokens=9, eos_token=10, allowed_tokens=known, **truncation)
    prompts = [torch.tensor([65, 66, 67]), torch.tensor([68])]
    rollout = collect(palm, prompts, sampling, num_samples=5, generator=torch.Generator().manual_seed(3))
    assert known[rollout.sequences.actions].all()
    again = response_logprobs(palm, rollout.sequences, **sampling.truncation)
    action_mask = rollout.sequences.action_mask
    torch.testing.assert_close(rollout.logprobs[action_mask], again.logprobs[action_mask], atol=1e-5, rtol=0)
    assert again.entropy[action_mask].isfinite().all()


@pytest.mark.parametrize("options", [{}, {"algorithm": "grpo", "num_samples": 4}, {"top_k": 20, "entropy_coef": 0.01}])
def test_rlhf_trains_a_model_of_more_ids_than_its_tokenizer(options):
    palm = palm_that_likes_padding(mask("padding"))
    texts = []

    def reward(prompts, completions):
        texts.extend(completions)
        return [float(index % 4) for index in range(len(completions))]

    config = PPOConfig(num_steps=2, rollouts_per_step=8, max_new_tokens=8, eos_token=10, learning_rate=1e-6, **options)
    before = copy.deepcopy(palm.token_emb.weight)
    trainer = RLHFTrainer(palm=palm, reward_model=reward, prompts=["hi", "you there"], tokenizer=BYTES, config=config)
    for metrics in trainer.steps():
        assert metrics["kl"] == pytest.approx(0.0, abs=1e-5) or metrics["step"] > 1
        if metrics["step"] == 1:
            assert metrics["ratio_min"] == pytest.approx(1.0, abs=5e-3)
    assert len(texts) == 16 and all(isinstance(text, str) for text in texts)
    assert not torch.equal(before, palm.token_emb.weight)
    assert known_tokens(BYTES, NUM_TOKENS)[trainer.generate(12, prompt=torch.tensor([104]), num_samples=3)].all()


def test_an_eos_that_the_tokenizer_lacks_can_still_be_said():
    palm = palm_that_likes_padding(mask("padding"))
    config = PPOConfig(num_steps=1, rollouts_per_step=8, max_new_tokens=8, eos_token=300)
    trainer = RLHFTrainer(
        palm=palm,
        reward_model=lambda prompts, completions: [1.0] * len(prompts),
        prompts=["hi"],
        tokenizer=BYTES,
        config=config,
    )
    assert trainer.sampling.allowed_tokens.nonzero().squeeze(-1).tolist() == [*range(261), 300]
    list(trainer.steps())
