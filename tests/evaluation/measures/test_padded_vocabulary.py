"""Judges and reports on models that have more ids than their tokenizer, or several ends of a reply."""

import pytest
import torch

from palm_rlhf.data.conversation import encode_prompt
from palm_rlhf.data.templates import PRESETS
from palm_rlhf.data.tokenizer import DEFAULT_SPECIAL_TOKENS, EOS, ByteTokenizer, HuggingFaceTokenizer
from palm_rlhf.evaluation.judging.answers import Question
from palm_rlhf.evaluation.judging.judges import JudgeRequest
from palm_rlhf.evaluation.judging.model_judges import LocalJudge
from palm_rlhf.evaluation.measures.rlhf_runs import Sample, reference_scores
from palm_rlhf.model.palm import PaLM
from palm_rlhf.policy.reward_model import RewardModel
from palm_rlhf.policy.rollout import ResponseSampling, collect
from tests.factories import wandering_palm

BYTES = ByteTokenizer()


@pytest.fixture
def palm() -> PaLM:
    """A model that says little but ids beyond the 261 of its tokenizer, where it may."""
    torch.manual_seed(0)
    palm = PaLM(num_tokens=320, dim=32, depth=1, heads=2, dim_head=16).eval()
    with torch.no_grad():
        palm.token_emb.weight[261:] = palm.token_emb.weight[:59] * 30
    return palm


def test_a_judge_says_nothing_but_text(palm):
    judge = LocalJudge(palm, BYTES, PRESETS["default"], temperature=1.0, max_tokens=20)
    reply = judge(JudgeRequest(Question("1", ("a?",)), 1, ("x", "y"), (("b",), ("c",)), "verdict"))
    assert isinstance(reply.text, str) and reply.usage["completion_tokens"] > 0


def test_every_end_of_the_tokenizer_ends_a_verdict():
    """The turn of Qwen ends in <|im_end|>, and its base models end texts in <|endoftext|>."""
    request = JudgeRequest(Question("1", ("a?",)), 1, ("x", "y"), (("b",), ("c",)), "verdict")
    backend = HuggingFaceTokenizer.train(["a b c"], 270, DEFAULT_SPECIAL_TOKENS).backend
    eos, palm = backend.token_to_id(EOS), wandering_palm(num_tokens=270)
    prompt = encode_prompt(request.messages, HuggingFaceTokenizer(backend, eos_token=EOS), PRESETS["default"])
    said = palm.generate(None, prompt, max_new_tokens=6, temperature=0.0).tolist()
    assert len(set(said)) > 1 and eos not in said
    for end in (None, *said):
        ends = [eos] if end is None else [eos, end]
        tokenizer = HuggingFaceTokenizer(backend, eos_token=EOS, generation={"eos_token_id": ends})
        reply = LocalJudge(palm, tokenizer, PRESETS["default"], max_tokens=6)(request)
        expected = said if end is None else said[: said.index(end)]
        assert reply.text == tokenizer.decode(expected) and reply.usage["completion_tokens"] == len(expected)


def test_a_reference_draws_its_answers_from_tokens_alone(palm):
    torch.manual_seed(1)
    reward_model = RewardModel(palm).eval()
    torch.nn.init.normal_(reward_model.head.weight) if hasattr(reward_model.head, "weight") else None
    prompt = torch.tensor(BYTES.encode("hi"))
    _, theirs = reference_scores(
        [Sample(1, tuple(prompt.tolist()), (97, 98))], palm, reward_model, BYTES, max_new_tokens=8, seed=3
    )
    known = torch.arange(320) < 261
    rollout = collect(
        palm,
        [prompt],
        ResponseSampling(max_new_tokens=8, allowed_tokens=known),
        batch_size=16,
        generator=torch.Generator().manual_seed(3),
    )
    assert known[rollout.sequences.actions].all()
    assert theirs == pytest.approx(reward_model.score(rollout.sequences).tolist(), abs=1e-6)
