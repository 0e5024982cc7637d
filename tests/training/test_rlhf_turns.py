"""Learning from conversations: an environment's tokens are read, and in no loss, no advantage and no metric."""

import dataclasses
import itertools
import json

import pytest
import torch

from palm_rlhf import PaLM, PPOConfig, RewardModel, RLHFTrainer
from palm_rlhf.policy.rewards import Scores
from palm_rlhf.policy.rollout import Rollout
from palm_rlhf.policy.sequences import join
from palm_rlhf.policy.turns import Turns
from palm_rlhf.training.rlhf.objective import objective
from palm_rlhf.training.run.log import read_metrics
from tests.factories import Letters, evens, palm_of

EOS = 5
ALGORITHMS = [
    {},
    {"shared_trunk": True, "entropy_coef": 0.05},
    {"kl_penalty": "loss", "entropy_coef": 0.05},
    {"algorithm": "grpo", "num_samples": 4},
    {"algorithm": "grpo", "num_samples": 4, "grpo_variant": "dr_grpo", "kl_coef": 0.1},
    {"algorithm": "grpo", "num_samples": 4, "grpo_variant": "dapo", "entropy_coef": 0.05},
    {"algorithm": "grpo", "num_samples": 4, "grpo_variant": "gspo", "clip_eps": 0.3, "clip_eps_high": 0.3},
    {"algorithm": "grpo", "num_samples": 4, "grpo_variant": "cispo"},
    {"algorithm": "rloo", "num_samples": 4},
    {"algorithm": "rloo", "num_samples": 4, "ratio_level": "token"},
]


def echo(messages) -> torch.Tensor:
    """The policy's own last words, backwards, each token one higher, and one more."""
    said = messages[-1]["content"].flip(0)
    return torch.cat((said, said.new_tensor([7]))).add(1) % 12


def done(messages):
    return None


def make_trainer(palm=None, environment=echo, reward=evens, output_dir=None, resume=False, **options) -> RLHFTrainer:
    settings = {
        "rollouts_per_step": 16, "minibatch_size": 16, "epochs": 1, "max_new_tokens": 24, "eos_token": EOS,
        "learning_rate": 1e-3, "grad_clip": 0.0, "plot": False, "max_turns": 3, "max_turn_tokens": 7,
    }  # fmt: skip
    if environment is None:
        settings = {name: value for name, value in settings.items() if "turn" not in name}
    palm = palm_of() if palm is None else palm
    torch.nn.init.normal_(palm.token_emb.weight, std=0.02)  # every token about as likely as any other, the EOS too
    generator = torch.Generator().manual_seed(1)
    return RLHFTrainer(
        palm=palm,
        reward_model=reward,
        prompt_token_ids=[torch.randint(palm.num_tokens, (1 + index % 5,), generator=generator) for index in range(8)],
        environment=environment,
        config=PPOConfig(**{**settings, **options}),
        output_dir=output_dir,
        resume=resume,
    )


def experience_of(trainer: RLHFTrainer):
    rollout = trainer.collect()
    return rollout, trainer.estimate_advantages(rollout, trainer.score(rollout))


def gaps_of(sequences) -> torch.Tensor:
    """True for the environment's tokens: `b t`."""
    steps = torch.arange(sequences.action_mask.shape[1])
    return (steps < sequences.response_lengths.unsqueeze(-1)) & ~sequences.action_mask


def gradients(trainer: RLHFTrainer, experience) -> tuple[dict[str, torch.Tensor], dict]:
    trainer.run.base_rates = [0.0 for _ in trainer.run.base_rates]
    torch.manual_seed(2)  # the order of the rows
    metrics = trainer.update(experience)
    return {n: p.grad.clone() for n, p in trainer.actor_critic.named_parameters() if p.grad is not None}, metrics


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


# in no loss


def gradient_of_logits(trainer: RLHFTrainer, experience) -> torch.Tensor:
    """Of the whole objective, where each token of the responses is about to be said: `b t v`."""
    kept, to_logits = [], trainer.palm.to_logits

    def keeping(embeds, **options):
        kept.append(to_logits(embeds, **options))
        kept[-1].retain_grad()
        return kept[-1]

    trainer.palm.to_logits = keeping
    c, mask = trainer.config, experience.action_mask
    output = trainer.actor_critic(experience.sequences, entropy_needs_grad=True)
    parts = {"num_tokens": mask.sum(), "num_sequences": mask.any(dim=-1).sum(), "max_length": c.max_new_tokens}
    objective(c, experience, output, kl_coef=trainer.kl_coef if c.kl_in_loss else None, **parts).loss.backward()
    return kept[0].grad


@pytest.mark.parametrize("options", ALGORITHMS, ids=str)
def test_no_gradient_reaches_what_the_environment_said(options):
    """Not even one of rounding; with the mask of all of the response it would."""
    trainer = make_trainer(**options)
    rollout, experience = experience_of(trainer)
    gaps = gaps_of(rollout.sequences)
    assert gaps.sum() > 20
    # with ratios and values off their start, and the weights of every term at work
    moved = 0.1 * torch.randn(3, *gaps.shape)
    experience = dataclasses.replace(
        experience,
        logprobs=experience.logprobs + moved[0],
        ref_logprobs=experience.ref_logprobs + moved[1],
        values=experience.values + moved[2],
        advantages=torch.where(gaps, 3.0, experience.advantages),
    )
    gradient = gradient_of_logits(trainer, experience)
    assert torch.equal(gradient[gaps], torch.zeros_like(gradient[gaps]))
    assert gradient[experience.action_mask].abs().amax(dim=-1).gt(0).float().mean() > 0.5
    mutant = dataclasses.replace(experience, action_mask=experience.action_mask | gaps)
    assert gradient_of_logits(make_trainer(**options), mutant)[gaps].abs().max() > 1e-4


@pytest.mark.parametrize("options", ALGORITHMS, ids=str)
def test_what_stands_in_the_gaps_is_nothing(options):
    """Garbage in every number of the environment's tokens changes no gradient and no metric."""
    trainer = make_trainer(palm_of().double(), **options)
    rollout, experience = experience_of(trainer)
    gaps = gaps_of(rollout.sequences)
    names = ("logprobs", "ref_logprobs", "values", "advantages", "returns")
    spoilt = dataclasses.replace(
        experience, **{name: getattr(experience, name).masked_fill(gaps, torch.nan) for name in names}
    )
    plain, metrics = gradients(trainer, experience)
    same, same_metrics = gradients(trainer, spoilt)
    assert largest_difference(plain, same) == 0.0 and same_metrics == metrics


@pytest.mark.parametrize("options", ALGORITHMS, ids=str)
def test_micro_batches_of_conversations_add_up(options):
    trainer = make_trainer(palm_of().double(), **options)
    _, experience = experience_of(trainer)
    whole, _ = gradients(trainer, experience)
    trainer.config = dataclasses.replace(trainer.config, micro_batch_size=3)
    parts, _ = gradients(trainer, experience)
    assert largest_difference(whole, parts) < 1e-12


@pytest.mark.parametrize("options", [*ALGORITHMS, {"actor_lora_r": 2}, {"max_seq_len": 25}], ids=str)
def test_the_first_ratio_is_one(options):
    trainer = make_trainer(palm_of(dropout=0.3).double(), temperature=0.8, **options)
    _, experience = experience_of(trainer)
    metrics = trainer.update(experience)
    assert metrics["optimizer_steps"] == 1
    assert abs(metrics["ratio_min"] - 1) < 1e-9 and abs(metrics["ratio_max"] - 1) < 1e-9


# from the reward to the advantages


@pytest.mark.parametrize("whiten", [True, False])
def test_advantages_go_from_action_to_action_by_definition(whiten):
    """Two loops in float64 over the actions alone: the KL, the score at the last action, GAE, and whitening."""
    gamma, gae_lambda, kl_coef = 0.9, 0.8, 0.3
    trainer = make_trainer(
        palm_of().double(), gamma=gamma, gae_lambda=gae_lambda, kl_coef=kl_coef, whiten_advantages=whiten
    )
    torch.nn.init.normal_(trainer.actor_critic.value_head.weight)
    with torch.no_grad():
        for parameter in trainer.reference.palm.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    rollout = trainer.collect()
    scores = trainer.score(rollout)
    found = trainer.estimate_advantages(rollout, scores)
    expected, returns = torch.zeros_like(found.advantages), torch.zeros_like(found.returns)
    for row, own in enumerate(rollout.sequences.policy_mask):
        steps = own.nonzero().flatten().tolist()
        values = found.values[row].tolist()
        for first, t in enumerate(steps):
            for ahead, u in enumerate(steps[first:]):
                is_last, after = u == steps[-1], steps[first + ahead + 1 :]
                reward = -kl_coef * float(found.logprobs[row, u] - found.ref_logprobs[row, u])
                reward += float(scores.scores[row]) if is_last else 0.0
                delta = reward + gamma * (0.0 if is_last else values[after[0]]) - values[u]
                expected[row, t] += (gamma * gae_lambda) ** ahead * delta
            returns[row, t] = expected[row, t] + values[t]
    mask = rollout.sequences.action_mask
    if whiten:
        numbers = expected[mask]
        expected = torch.where(mask, (expected - numbers.mean()) / numbers.std(correction=0), 0.0)
    torch.testing.assert_close(found.advantages, expected, rtol=0, atol=1e-7)
    torch.testing.assert_close(found.returns, returns, rtol=0, atol=1e-9)


@pytest.mark.parametrize("options", ALGORITHMS[3:], ids=str)
def test_every_action_of_a_conversation_has_its_advantage_and_nothing_else_has(options):
    trainer = make_trainer(palm_of().double(), **options)
    rollout, experience = experience_of(trainer)
    gaps = gaps_of(rollout.sequences)
    assert not experience.advantages[gaps].any()
    for row, own in enumerate(experience.action_mask):
        assert len(set(experience.advantages[row, own].tolist())) <= 1


# by enumeration


def umpire(messages):
    """3 ends the game, 2 is answered by two tokens, and everything else by one."""
    (move,) = messages[-1]["content"].tolist()
    return {3: None, 2: torch.tensor([2, 0])}.get(move, torch.tensor([3 - move]))


REPLIES = {0: [3], 1: [2], 2: [2, 0]}
# Every course of a game of two moves: the moves, and all tokens after a prompt of 1.
GAMES = [((3,), [1, 3])] + [
    ((first, second), [1, first, *reply, second]) for first, reply in REPLIES.items() for second in range(4)
]


def worth(moves: tuple[int, ...]) -> float:
    """Any numbers that differ."""
    return float(sum((3 * move + 1) * (place + 1) ** 2 for place, move in enumerate(moves)) % 7)


def probability(palm: PaLM, moves: tuple[int, ...], tokens: list[int]) -> torch.Tensor:
    """Of a course of the game: that of each move after all tokens before it."""
    places = [1, len(tokens) - 1][: len(moves)]
    logprobs = [palm(torch.tensor([tokens[:place]]))[0, -1].log_softmax(dim=-1)[tokens[place]] for place in places]
    return sum(logprobs).exp()


def test_the_gradient_over_all_games_is_that_of_the_expected_reward():
    """Each course is played once, and scored by its worth times its probability."""
    trainer = make_trainer(
        palm_of(num_tokens=4).double(), umpire, rollouts_per_step=13, minibatch_size=13, eos_token=None, kl_coef=0.0,
        gae_lambda=1.0, whiten_advantages=False,
    )  # fmt: skip
    palm = trainer.palm
    probabilities = [probability(palm, *game) for game in GAMES]
    assert sum(p.item() for p in probabilities) == pytest.approx(1, abs=1e-12)
    expectation = sum(p * worth(moves) for p, (moves, _) in zip(probabilities, GAMES, strict=True))
    expected = torch.autograd.grad(expectation, list(palm.parameters()))
    scores = [p.item() * worth(moves) for p, (moves, _) in zip(probabilities, GAMES, strict=True)]

    turn = itertools.count()

    def draw(contexts, num_samples, limits):
        """The next move of each course that has one, with its log-probability."""
        place = next(turn)
        moves = [torch.tensor([moves[place]]) for moves, _ in GAMES if len(moves) > place]
        rows = list(contexts) * num_samples
        with torch.no_grad():
            return moves, [palm(row[None])[0, -1].log_softmax(-1)[move] for row, move in zip(rows, moves, strict=True)]

    talks = Turns(umpire, max_turns=2, max_turn_tokens=1).converse(
        palm, draw, [torch.tensor([1])], torch.tensor([5]), num_samples=len(GAMES), eos_token=None
    )
    parts, masks, logprobs = (
        [torch.cat(getattr(talk, name)) for talk in talks] for name in ("parts", "policy_mask", "logprobs")
    )
    assert [[1, *part.tolist()] for part in parts] == [tokens for _, tokens in GAMES]
    rollout = Rollout(
        join([talk.prompt for talk in talks], parts, masks),
        torch.nn.utils.rnn.pad_sequence(logprobs, batch_first=True),
        torch.zeros(len(GAMES), dtype=torch.bool),
    )
    scores = Scores(torch.tensor(scores, dtype=torch.float64), torch.ones(len(GAMES), dtype=torch.bool))
    experience = trainer.estimate_advantages(rollout, scores)
    found, _ = gradients(trainer, experience)
    num_moves = sum(len(moves) for moves, _ in GAMES)  # that the loss is divided by
    for (name, _), gradient in zip(palm.named_parameters(), expected, strict=True):
        torch.testing.assert_close(-num_moves * found[f"palm.{name}"], gradient, rtol=0, atol=1e-12)


def test_conversations_that_are_drawn_again_stay_whole():
    """Dynamic sampling puts longer ones in the place of shorter ones: each keeps its tokens, mask and messages."""

    def sometimes(messages):
        said = messages[-1]["content"]
        return None if int(said[0]) % 3 == 0 else said[: 1 + int(said[1]) % 3]

    def reward(prompts, completions):
        return [float(len(row) > 9) for row in completions]

    options = {"algorithm": "grpo", "num_samples": 2, "grpo_variant": "dapo", "max_redraws": 4, "eos_token": None}
    trainer = make_trainer(environment=sometimes, reward=reward, max_turns=4, max_turn_tokens=3, **options)
    sampled = trainer.sample()
    rollout = sampled.rollout
    assert sampled.metrics["redrawn_groups"] > 4
    for row, messages in enumerate(rollout.messages):
        prompt, *parts = (message["content"].tolist() for message in messages)
        own = [message["role"] == "assistant" for message in messages[1:] for _ in message["content"]]
        length = int(rollout.sequences.lengths[row])
        assert rollout.sequences.tokens[row, :length].tolist() == [*prompt, *itertools.chain(*parts)]
        assert rollout.sequences.action_mask[row, : len(own)].tolist() == own
        assert (rollout.logprobs[row, : len(own)] != 0).tolist() == own
    assert trainer.update(trainer.estimate_advantages(rollout, sampled.scores))["optimizer_steps"] == 1


# what is told


@pytest.mark.parametrize("options", [{}, {"algorithm": "rloo", "num_samples": 4}], ids=str)
def test_metrics_count_what_the_policy_said(options):
    trainer = make_trainer(palm_of().double(), kl_coef=0.1, num_steps=1, missing_eos_penalty=0.5, **options)
    with torch.no_grad():
        for parameter in trainer.reference.palm.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    seen = []

    def collect(own=trainer.collect):
        rollout = own()
        talks = [[{"role": "system", "content": ""}, *talk] for talk in rollout.messages]  # which is no turn
        seen.append(dataclasses.replace(rollout, messages=talks))
        return seen[-1]

    trainer.collect = collect
    metrics = next(trainer.steps())
    (rollout,) = seen
    rows = range(16)
    own = [row[: int(n)] for row, n in zip(rollout.sequences.policy_mask, rollout.sequences.response_lengths)]
    assert any(not row.all() for row in own)
    assert metrics["response_length"] == pytest.approx(sum(int(row.sum()) for row in own) / 16)
    assert metrics["turns"] == sum(len(talk) // 2 for talk in rollout.messages) / 16
    # nobody is ever done: a conversation goes on until it is cut off
    assert rollout.truncated.all() and metrics["eos_rate"] == 0
    reference = trainer.reference.logprobs(rollout.sequences).logprobs
    kl = sum(
        float((rollout.logprobs[row, : len(own[row])] - reference[row, : len(own[row])])[own[row]].sum())
        for row in rows
    )
    assert metrics["kl"] == pytest.approx(kl / 16, abs=1e-6)


@pytest.mark.parametrize("options", ALGORITHMS, ids=str)
def test_ratios_are_of_actions_alone(options):
    """With records that are off by 1 nat where the environment spoke, no ratio is seen to have moved."""
    trainer = make_trainer(palm_of().double(), **options)
    rollout, experience = experience_of(trainer)
    off = dataclasses.replace(experience, logprobs=experience.logprobs + gaps_of(rollout.sequences))
    metrics = trainer.update(off)
    assert metrics["clip_fraction"] == 0 and metrics["approx_kl"] < 1e-12
    assert abs(metrics["ratio_min"] - 1) < 1e-9 and abs(metrics["ratio_max"] - 1) < 1e-9


def test_samples_have_their_messages(tmp_path):
    trainer = make_trainer(num_steps=1, sample_every=1, samples_kept=4, output_dir=tmp_path)
    seen = []
    trainer.collect = lambda collect=trainer.collect: seen.append(collect()) or seen[-1]
    list(trainer.steps())
    lines = read_metrics(tmp_path / "samples.jsonl")
    assert len(lines) == 4 and any(len(line["messages"]) > 2 for line in lines)
    for line, messages in zip(lines, seen[0].messages, strict=False):
        assert line["messages"] == json.loads(json.dumps(messages, default=torch.Tensor.tolist))
        assert line["messages"][0] == {"role": "user", "content": line["prompt"]}


@pytest.mark.parametrize("max_turns, max_turn_tokens", [(1, 3), (2, 3), (4, 2)])
def test_turns_are_as_many_and_as_long_as_allowed(max_turns, max_turn_tokens):
    """Nobody is ever done, and no EOS is looked for."""
    options = {"max_turns": max_turns, "max_turn_tokens": max_turn_tokens, "eos_token": None, "max_new_tokens": 40}
    metrics = next(make_trainer(**options).steps())
    assert metrics["turns"] == max_turns and metrics["response_length"] == max_turns * max_turn_tokens


def test_the_environment_gets_texts_where_there_is_a_tokenizer(tmp_path):
    heard, scored = [], []

    def environment(messages):
        heard.append(messages)
        return "kk" if len(messages) == 2 else None

    def reward(prompts, completions):
        scored.extend(zip(prompts, completions))
        return [0.0] * len(prompts)

    trainer = RLHFTrainer(
        palm=palm_of(),
        reward_model=reward,
        prompts=["ab", "c"],
        tokenizer=Letters(),
        environment=environment,
        config=PPOConfig(
            num_steps=1, rollouts_per_step=4, max_new_tokens=8, max_turn_tokens=2, max_turns=2, plot=False
        ),
    )
    next(trainer.steps())
    first, second = heard[:4], heard[4:]
    assert {talk[0]["content"] for talk in heard} == {"ab", "c"} and len(second) == 4
    assert all(len(talk) == 2 and talk[1]["role"] == "assistant" and len(talk[1]["content"]) == 2 for talk in first)
    assert all(talk[2] == {"role": "user", "content": "kk"} and len(talk) == 4 for talk in second)
    assert scored == [(talk[0]["content"], talk[1]["content"] + "kk" + talk[3]["content"]) for talk in second]


def test_the_environment_gets_the_columns_of_the_prompt():
    """In training and for the best of n; what it asks for in vain is refused before the run."""
    heard = []

    def environment(messages, secret):
        heard.append((messages[0]["content"].tolist(), secret))
        return None

    def make(environment):
        return RLHFTrainer(
            palm=palm_of(),
            reward_model=lambda prompts, completions: [0.0] * len(prompts),
            prompts=[{"prompt": [index], "secret": 10 + index} for index in range(4)],
            environment=environment,
            config=PPOConfig(num_steps=1, rollouts_per_step=8, num_samples=2, max_new_tokens=4, plot=False),
        )

    trainer = make(environment)
    next(trainer.steps())
    assert sorted(heard) == [([index], 10 + index) for index in range(4) for _ in range(2)]
    heard.clear()
    trainer.generate(prompt=torch.tensor([1, 2]), max_new_tokens=3, num_samples=2, columns={"secret": 5})
    assert heard == [([1, 2], 5)] * 2
    with pytest.raises(ValueError, match=r"asks for 'goal' beside the messages; .* which are \['secret'\]"):
        make(lambda messages, goal: None)


# as without an environment


@pytest.mark.parametrize("options", [{}, *ALGORITHMS[3:4], {"algorithm": "rloo", "num_samples": 4}], ids=str)
def test_an_environment_that_is_done_at_once_changes_no_bit(options):
    """Of the weights, and of all metrics but the times and the count of turns."""
    trainers, lines = [], []
    for environment in (None, done):
        options = {"max_new_tokens": 7, "max_turn_tokens": None, "num_steps": 2, **options}
        if environment is None:
            given = {name: value for name, value in options.items() if "turn" not in name}
        trainers.append(make_trainer(environment=environment, **(given if environment is None else options)))
        lines.append(list(trainers[-1].steps()))
    for plain, talked in zip(*lines, strict=True):
        assert talked.pop("turns") == 1
        times = ("elapsed", "tokens_per_second")
        assert {name: plain[name] for name in plain if name not in times} == {
            name: talked[name] for name in talked if name not in times
        }
    weights = [trainer.actor_critic.state_dict() for trainer in trainers]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


def test_a_run_with_an_environment_resumes_to_the_bit(tmp_path):
    options = {"num_steps": 3, "save_every": 1}
    whole = list(make_trainer(output_dir=tmp_path / "whole", **options).steps())
    list(itertools.islice(make_trainer(output_dir=tmp_path / "cut", **options).steps(), 1))
    rest = list(make_trainer(output_dir=tmp_path / "cut", resume=True, **options).steps())
    names = ("score", "turns", "response_length", "policy_loss", "kl", "grad_norm")
    assert [[line[name] for name in names] for line in rest] == [[line[name] for name in names] for line in whole[1:]]


def test_a_reward_model_scores_whole_conversations():
    model = RewardModel(palm_of())
    trainer = make_trainer(reward=model)
    rollout = trainer.collect()
    found = trainer.score(rollout).scores
    for row, (prompt, end) in enumerate(zip(rollout.sequences.prompt_lengths, rollout.sequences.lengths)):
        alone = model(rollout.sequences.tokens[row : row + 1, :end], prompt_lengths=prompt[None])
        assert float(found[row]) == pytest.approx(float(alone.detach()), abs=1e-5)


def test_the_best_of_n_is_a_conversation():
    asked = []

    def reward(prompts, completions):
        asked.extend(completions)
        return [float(len(row)) for row in completions]

    best = make_trainer(reward=reward).generate(prompt=torch.tensor([1, 2]), max_new_tokens=24, num_samples=8)
    assert len(asked) == 8 and torch.equal(best, max(asked, key=len)) and len(best) > 7


# what is refused


@pytest.mark.parametrize("options", [{"max_turns": 3}, {"max_turn_tokens": 4}], ids=str)
def test_settings_of_turns_need_an_environment(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} is .*where there is no environment to talk with"):
        make_trainer(environment=None, **options)


@pytest.mark.parametrize("options", [{"max_turns": 0}, {"max_turn_tokens": 0}], ids=str)
def test_no_turns_are_refused(options):
    name = next(iter(options))
    with pytest.raises(ValueError, match=f"{name} is 0, expected"):
        PPOConfig(**options)


def test_an_environment_that_raises_stops_the_run_and_says_where():
    def broken(messages):
        raise OSError("no network")

    with pytest.raises(
        RuntimeError, match=r"the environment raised OSError\('no network'\) in the conversation on the pro"
    ):
        next(make_trainer(environment=broken).steps())
