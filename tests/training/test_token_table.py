"""The records of tokens: each number by hand, from the weights before and after one update."""

import copy
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from palm_rlhf import PaLM, PPOConfig, RLHFTrainer
from palm_rlhf.training.rlhf.token_table import TOKENS_FILE, pieces, token_columns

EOS = 7


class ByteTokenizer:
    def encode(self, text):
        return list(text.encode())

    def decode(self, tokens):
        return bytes(tokens).decode(errors="replace")


def make_trainer(output_dir, **options) -> RLHFTrainer:
    torch.manual_seed(0)
    settings = {"rollouts_per_step": 8, "minibatch_size": 8, "epochs": 1, "max_new_tokens": 5, "eos_token": EOS,
                "learning_rate": 1e-2, "samples_kept": 3, "sample_every": 1, "num_steps": 1, "plot": False,
                "whiten_advantages": False, "kl_coef": 0.1}  # fmt: skip
    extra = {name: options.pop(name) for name in ("tokenizer", "resume", "reward", "environment") if name in options}
    if options.get("algorithm", "ppo") != "ppo":
        del settings["whiten_advantages"]
    return RLHFTrainer(
        palm=PaLM(num_tokens=11, dim=16, depth=1, heads=2, dim_head=8),
        reward_model=extra.pop("reward", lambda prompts, completions: [float(c[0]) for c in completions]),
        prompt_token_ids=[torch.tensor([1, 2, 3]), torch.tensor([4])],
        config=PPOConfig(**{**settings, **options}),
        output_dir=output_dir,
        **extra,
    )


def lines_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / TOKENS_FILE).read_text().splitlines()]


def logprobs_by_hand(palm: PaLM, prompt: list[int], response: list[int]) -> list[float]:
    """From the logits of each prefix by itself."""
    palm = copy.deepcopy(palm).double().eval().requires_grad_(False)
    found = []
    for place, token in enumerate(response):
        logits = palm(torch.tensor([prompt + response[:place]]))[0, -1]
        found.append(float(logits.log_softmax(-1)[token]))
    return found


def test_the_numbers_are_those_of_the_policy_before_and_after_the_update(tmp_path):
    trainer = make_trainer(tmp_path)
    before = copy.deepcopy(trainer.palm)
    list(trainer.steps())
    lines = lines_of(tmp_path)
    assert len(lines) == 3 and {line["step"] for line in lines} == {1}
    moved = 0.0
    for line in lines:
        old = logprobs_by_hand(before, line["prompt"], line["tokens"])
        new = logprobs_by_hand(trainer.palm, line["prompt"], line["tokens"])
        assert line["logprob"] == pytest.approx(old, abs=1e-4)
        assert line["ref_logprob"] == pytest.approx(old, abs=1e-4)
        assert line["new_logprob"] == pytest.approx(new, abs=1e-4)
        assert line["ratio"] == pytest.approx([math.exp(b - a) for a, b in zip(old, new)], abs=1e-3)
        assert line["score"] == float(line["tokens"][0])
        # GAE of a single step: the return is the advantage and the value together
        assert line["return"] == pytest.approx([a + v for a, v in zip(line["advantage"], line["value"])], abs=1e-4)
        moved = max(moved, *(abs(b - a) for a, b in zip(old, new)))
    assert moved > 1e-2, "an update that moves nothing would not tell before from after"


@pytest.mark.parametrize(
    "advantage, old, new, clipped",
    [(1.0, 0.5, 0.65, 1), (1.0, 0.5, 0.55, 0), (-1.0, 0.5, 0.65, 0), (-1.0, 0.5, 0.35, 1), (1.0, 0.5, 0.35, 0),
     (0.0, 0.5, 0.65, 0)],
)  # fmt: skip
def test_a_token_is_clipped_where_the_loss_has_no_gradient(tmp_path, advantage, old, new, clipped):
    """With clip_eps 0.2: max(-A r, -A clip(r)) is constant in r beyond the side that A pushes to."""
    trainer = make_trainer(tmp_path)
    experience = experience_of(trainer)
    object.__setattr__(experience, "logprobs", torch.full_like(experience.logprobs, math.log(old)))
    object.__setattr__(experience, "advantages", torch.full_like(experience.advantages, advantage))
    new_logprobs = torch.full_like(experience.logprobs, math.log(new))
    columns = token_columns(experience, new_logprobs, trainer.config, has_reference=True)
    expected = torch.where(experience.action_mask, clipped, 0)
    assert torch.equal(columns["clipped"], expected.int())
    r = new_logprobs.clone().requires_grad_()
    ratio = (r - experience.logprobs).exp()
    torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2)).sum().backward()
    if advantage:
        assert bool((r.grad == 0).all()) == bool(clipped)


def experience_of(trainer: RLHFTrainer):
    rollout = trainer.collect()
    return trainer.estimate_advantages(rollout, trainer.score(rollout))


def test_the_ratio_of_a_response_is_that_of_all_its_tokens(tmp_path):
    trainer = make_trainer(tmp_path, algorithm="rloo", num_samples=2)
    list(trainer.steps())
    for line in lines_of(tmp_path):
        whole = math.exp(sum(b - a for a, b in zip(line["logprob"], line["new_logprob"])))
        assert line["ratio"] == pytest.approx([whole] * len(line["tokens"]), rel=1e-3)
        assert "value" not in line and "return" not in line


def test_the_ratio_of_gspo_is_the_mean_of_a_response(tmp_path):
    list(make_trainer(tmp_path, algorithm="grpo", grpo_variant="gspo", num_samples=2, kl_coef=0.0).steps())
    for line in lines_of(tmp_path):
        moves = [b - a for a, b in zip(line["logprob"], line["new_logprob"])]
        mean = math.exp(sum(moves) / len(moves))
        assert line["ratio"] == pytest.approx([mean] * len(moves), rel=1e-3)
        beyond = mean > 1 + 4e-4 if line["advantage"][0] > 0 else mean < 1 - 3e-4
        assert set(line["clipped"]) == {int(beyond and line["advantage"][0] != 0)}


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("options, cut", [({}, (5.1, 9.0)), ({"clip_eps": 0.4}, (0.5, 5.1, 9.0))], ids=str)
def test_the_weight_of_cispo_is_cut_whatever_the_advantage(tmp_path, advantage, options, cut):
    trainer = make_trainer(tmp_path, algorithm="grpo", grpo_variant="cispo", num_samples=2, kl_coef=0.0, **options)
    experience = experience_of(trainer)
    object.__setattr__(experience, "advantages", torch.full_like(experience.advantages, advantage))
    for ratio in (0.5, 0.7, 1.0, 4.9, 5.1, 9.0):
        new_logprobs = experience.logprobs + math.log(ratio)
        columns = token_columns(experience, new_logprobs, trainer.config, has_reference=False)
        assert torch.equal(columns["clipped"].bool(), experience.action_mask & (ratio in cut))


def test_without_a_reference_there_is_none(tmp_path):
    list(make_trainer(tmp_path, kl_coef=0.0).steps())
    assert all("ref_logprob" not in line and "value" in line for line in lines_of(tmp_path))


def test_a_response_without_a_score_is_not_in_the_loss(tmp_path):
    list(make_trainer(tmp_path, reward=lambda prompts, completions: [None, *(1.0 for _ in prompts[1:])]).steps())
    first, second, _ = lines_of(tmp_path)
    assert first["score"] is None and set(first["in_loss"]) == {0} and set(first["clipped"]) == {0}
    assert second["score"] == 1.0 and set(second["in_loss"]) == {1}


def test_what_an_environment_wrote_is_not_in_the_loss(tmp_path):
    """It has no log-probability of the policy's either, and a ratio of 1."""
    options = {"environment": lambda messages: torch.tensor([9, 10]), "max_turns": 2, "max_turn_tokens": 2}
    list(make_trainer(tmp_path, eos_token=None, max_new_tokens=6, **options).steps())
    for line in lines_of(tmp_path):
        assert line["in_loss"] == [1, 1, 0, 0, 1, 1] and line["tokens"][2:4] == [9, 10]
        assert all(line[name][2:4] == [0, 0] for name in ("logprob", "new_logprob", "ref_logprob", "advantage"))
        assert all(line["logprob"][place] and line["new_logprob"][place] for place in (0, 1, 4, 5))
        assert line["ratio"][2:4] == [1, 1]


def test_recording_leaves_the_bits_of_a_run(tmp_path):
    weights = []
    for every in (1, 100):
        trainer = make_trainer(tmp_path / str(every), sample_every=every, num_steps=3)
        list(trainer.steps())
        weights.append(trainer.actor_critic.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert {line["step"] for line in lines_of(tmp_path / "1")} == {1, 2, 3}
    assert (tmp_path / "100" / TOKENS_FILE).read_text() == ""


def test_a_run_that_resumes_drops_the_lines_after_its_step(tmp_path):
    list(make_trainer(tmp_path, num_steps=2).steps())
    lines = (tmp_path / TOKENS_FILE).read_text()
    (tmp_path / TOKENS_FILE).write_text(lines + json.dumps({"step": 3}) + "\n")
    trainer = make_trainer(tmp_path, num_steps=3, resume=True)
    assert (tmp_path / TOKENS_FILE).read_text() == lines
    list(trainer.steps())
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 1, 1, 2, 2, 2, 3, 3, 3]


@given(st.text(max_size=8).map(lambda text: list(text.encode())) | st.lists(st.integers(0, 255), max_size=8))
def test_pieces_together_are_the_text(tokens):
    found = pieces(ByteTokenizer(), tokens)
    assert len(found) == len(tokens)
    if bytes(tokens).decode(errors="ignore").encode() == bytes(tokens):  # valid UTF-8: nothing is replaced
        assert "".join(found) == ByteTokenizer().decode(tokens)


def test_a_character_of_several_tokens_is_at_its_last():
    assert pieces(ByteTokenizer(), list("aé!".encode())) == ["a", "", "é", "!"]


def test_texts_are_kept_where_there_is_a_tokenizer(tmp_path):
    ones = lambda prompts, completions: [1.0] * len(prompts)  # noqa: E731
    trainer = make_trainer(tmp_path, tokenizer=ByteTokenizer(), reward=ones)
    list(trainer.steps())
    for line in lines_of(tmp_path):
        assert line["prompt"] in ("\x01\x02\x03", "\x04")
        assert line["pieces"] == [chr(token) for token in line["tokens"]]
