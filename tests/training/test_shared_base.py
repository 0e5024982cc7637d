"""One base for four roles: every number is that of four separate models, and nothing is in memory twice."""

import copy
import itertools
import weakref
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from palm_rlhf import PPOConfig, RewardModel, RLHFTrainer
from palm_rlhf.policy.actor_critic import ACTOR_SCOPE, Reference
from palm_rlhf.policy.sequences import response_logprobs
from palm_rlhf.training import Ranking, RewardConfig, RewardModelTrainer, SupervisedConfig, SupervisedTrainer
from palm_rlhf.training.weighted_examples import Example
from tests.factories import evens, palm_of

SERIAL = {"block": "serial", "norm": "rms", "tie_embeddings": False, "kv_heads": 2}
BLOCKS = pytest.mark.parametrize("fields", [{}, SERIAL], ids=["parallel", "serial"])
PROMPTS = [torch.arange(1 + index % 4) for index in range(8)]
SETTINGS = {"num_steps": 3, "rollouts_per_step": 4, "minibatch_size": 2, "epochs": 2, "max_new_tokens": 5,
            "kl_coef": 0.2, "eos_token": 5, "learning_rate": 3e-2, "actor_lora_r": 2, "plot": False}  # fmt: skip
GROUPS = {"num_samples": 2}
ALGORITHMS = {
    "ppo": {},
    "ppo, new critic": {"critic_lora_r": 3, "micro_batch_size": 3},
    "ppo, shared trunk": {"shared_trunk": True},
    "grpo": {"algorithm": "grpo", **GROUPS},
    "rloo": {"algorithm": "rloo", **GROUPS},
}


def stirred(model: RewardModel, seed: int = 3) -> RewardModel:
    """The model with adapters, embeddings and a head away from their starts, the same at every call."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def reward_model_of(palm, **options) -> RewardModel:
    torch.manual_seed(2)
    return stirred(RewardModel(palm, use_lora=True, lora_r=2, **options))


def trainer_of(options, fields, *, shared: bool, output_dir=None, resume=False) -> RLHFTrainer:
    """A trainer over one base, or one with four models; all of them have the same weights."""
    palm = palm_of(**fields)
    reward_model = reward_model_of(palm if shared else palm_of(**fields), share_base=shared)
    config = PPOConfig(**{**SETTINGS, **options}, share_base=shared)
    has_start = config.algorithm == "ppo" and not config.shared_trunk and not config.critic_lora_r
    critic = reward_model if has_start else None
    return RLHFTrainer(
        palm=palm,
        reward_model=reward_model,
        critic=critic,
        reference=None if shared else palm_of(**fields),
        prompt_token_ids=PROMPTS,
        config=config,
        output_dir=output_dir,
        resume=resume,
    )


def run(trainer: RLHFTrainer) -> tuple[list[dict], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The metrics of all steps, the gradients of the last minibatch, and the weights at the end."""
    clock = {"elapsed", "tokens_per_second"}
    lines = [{name: value for name, value in line.items() if name not in clock} for line in trainer.steps()]
    module = trainer.actor_critic
    grads = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return lines, grads, {name: tensor.clone() for name, tensor in module.state_dict().items()}


def check_equal(one, other) -> None:
    for mine, theirs in zip(one[0], other[0], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5, rel=1e-5)
    for mine, theirs in zip(one[1:], other[1:], strict=True):
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "algorithm, fields",
    [*((name, {}) for name in ALGORITHMS), ("ppo", SERIAL), ("ppo, new critic", SERIAL), ("grpo", SERIAL)],
)
@pytest.mark.law("PPOConfig.share_base")
def test_every_number_of_training_is_that_of_four_models(algorithm, fields):
    """Scores, KL, losses, norms and ratios of three steps, the gradients, and the weights after them."""
    if algorithm == "ppo":
        fields = {**fields, "gradient_checkpointing": True, "dropout": 0.2}
    shared = trainer_of(ALGORITHMS[algorithm], fields, shared=True)
    found = run(shared)
    separate = trainer_of(ALGORITHMS[algorithm], fields, shared=False)
    assert separate.reference.palm is not separate.palm and shared.reference.palm is shared.palm
    check_equal(found, run(separate))
    assert abs(found[0][-1]["kl"]) > 1e-4 and len({line["score"] for line in found[0]}) == 3
    start, weights = palm_of(**fields).state_dict(), shared.palm.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in start.items())


class ActorAsReference(Reference):
    """The mutant whose reference has the actor's adapter."""

    def logprobs(self, sequences, **sampling):
        """Those of the policy."""
        with torch.no_grad():
            return response_logprobs(self.palm, sequences, finetune_scope=ACTOR_SCOPE, **sampling)


def reference_with_adapter(trainer):
    trainer.reference = ActorAsReference(trainer.actor_critic)


def reward_without_adapter(trainer):
    trainer.reward_model.lora_scope = None


def critic_trains_the_actor(trainer):
    """One adapter, in both roles."""
    critic = trainer.actor_critic.critic.palm
    critic.finetune_modules["reward"] = trainer.palm.finetune_modules[ACTOR_SCOPE]


def critic_trains_the_reward(trainer):
    """The critic's adapter is the reward model's own, not a copy."""
    trainer.reward_model.palm.finetune_modules["reward"] = trainer.actor_critic.critic.palm.finetune_modules["reward"]


MUTANTS = [reference_with_adapter, reward_without_adapter, critic_trains_the_actor, critic_trains_the_reward]


@pytest.mark.parametrize("mutate", MUTANTS, ids=lambda mutate: mutate.__name__)
def test_roles_that_are_mixed_up_are_told_apart(mutate):
    expected = run(trainer_of({}, {}, shared=False))
    mutant = trainer_of({}, {}, shared=True)
    mutate(mutant)
    with pytest.raises(AssertionError):
        check_equal(run(mutant), expected)


@pytest.mark.parametrize("options", [{}, {"critic_lora_r": 2}], ids=["from the reward model", "new"])
def test_a_run_over_one_base_resumes_to_the_bit_and_saves_the_base_once(options, tmp_path):
    whole = trainer_of(options, {}, shared=True, output_dir=tmp_path / "whole")
    lines, _, weights = run(whole)
    settings = {**options, "save_every": 2}
    list(itertools.islice(trainer_of(settings, {}, shared=True, output_dir=tmp_path / "cut").steps(), 2))
    resumed = trainer_of(settings, {}, shared=True, output_dir=tmp_path / "cut", resume=True)
    assert resumed.run.step == 2
    more, _, their_weights = run(resumed)
    assert more == lines[2:]
    assert all(torch.equal(tensor, their_weights[name]) for name, tensor in weights.items())
    checkpoint = tmp_path / "cut/checkpoints/step_00000003"
    saved = load_file(checkpoint / "critic.safetensors")
    assert saved and not any(".layers." in name or "token_emb" in name for name in saved)
    assert not (checkpoint / "reference").exists()
    policy = load_file(checkpoint / "policy/model.safetensors")
    assert {name.split(".")[1] for name in policy if name.startswith("finetune_modules")} == {ACTOR_SCOPE}
    with pytest.raises(ValueError, match="share_base=False"):
        trainer_of(settings, {}, shared=False, output_dir=tmp_path / "cut", resume=True)


def test_what_cannot_be_shared_is_refused():
    palm = palm_of()
    shared, own = reward_model_of(palm, share_base=True), reward_model_of(palm_of())
    one = {"actor_lora_r": 2, "critic_lora_r": 2, "share_base": True}
    grpo = {"algorithm": "grpo", **GROUPS, "actor_lora_r": 2, "share_base": True}
    refused = [
        ({"reward_model": shared}, {"actor_lora_r": 0}, "training the base would change the reward model"),
        ({"reward_model": own}, one, "reward model with a base of its own"),
        ({"reward_model": {"one": shared, "two": own}}, one, "reward model with a base of its own"),
        ({"reward_model": shared, "reference": palm_of()}, one, "the policy's base is the reference"),
        ({"reward_model": evens}, grpo, "without a critic or a reward model to share with"),
    ]
    for models, options, message in refused:
        with pytest.raises(ValueError, match=message):
            RLHFTrainer(palm=palm, prompt_token_ids=PROMPTS, config=PPOConfig(**{**SETTINGS, **options}), **models)
        assert not palm.finetune_modules
    with pytest.raises(ValueError, match="actor_lora_r is 0, expected 1 or more with share_base"):
        PPOConfig(share_base=True)


def test_no_trainer_trains_a_base_that_a_reward_model_holds():
    palm = palm_of()
    reward_model = reward_model_of(palm, share_base=True)
    palm.requires_grad_(True)
    config = SupervisedConfig(plot=False)
    data = [Example(torch.arange(4), torch.ones(4))]
    with pytest.raises(ValueError, match="whose base other models hold"):
        SupervisedTrainer(palm, train_data=data, config=config)
    del reward_model
    SupervisedTrainer(palm, train_data=data, config=config)


def test_merging_the_policy_at_the_end_does_not_change_the_reward_behind_its_back():
    trainer = trainer_of({"num_steps": 1}, {}, shared=True)
    run(trainer)
    tokens = torch.tensor([[1, 2, 3]])
    before = trainer.reward_model(tokens)
    with pytest.raises(ValueError, match="on a base that 2 other models hold"):
        trainer.palm.merge_finetune_params(ACTOR_SCOPE)
    merged = copy.deepcopy(trainer.palm)
    merged.merge_finetune_params(ACTOR_SCOPE)
    expected = trainer.palm(tokens, finetune_scope=ACTOR_SCOPE)
    torch.testing.assert_close(merged(tokens), expected, rtol=0, atol=1e-5)
    assert torch.equal(trainer.reward_model(tokens), before)


# the reward model's training


def rankings() -> list[Ranking]:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(12, (2 + index % 3,), generator=generator) for index in range(18)]
    return [Ranking(rows[3 * index], tuple(rows[3 * index + 1 : 3 * index + 3])) for index in range(6)]


@BLOCKS
def test_a_reward_model_is_trained_over_a_base_as_over_its_own_and_resumes(fields, tmp_path):
    config = RewardConfig(batch_size=2, grad_accum=1, num_epochs=2, learning_rate=1e-2, warmup_steps=0,
                          precision="float32", save_every=2, plot=False)  # fmt: skip

    def trainer(shared: bool, name: str, resume: bool = False) -> RewardModelTrainer:
        palm = palm_of(**{**fields, "dropout": 0.2, "gradient_checkpointing": True})
        policies.append(palm)
        model = reward_model_of(palm, share_base=shared)
        folder = tmp_path / name
        return RewardModelTrainer(model, train_data=rankings(), config=config, output_dir=folder, resume=resume)

    policies: list = []

    def run_of(made: RewardModelTrainer) -> list[dict]:
        clock = {"elapsed", "responses_per_second"}
        return [{name: value for name, value in line.items() if name not in clock} for line in made.steps()]

    shared = trainer(True, "shared")
    found = run_of(shared)
    separate = trainer(False, "separate")
    expected = run_of(separate)
    assert found == expected and found[0]["loss"] > found[-1]["loss"]
    pairs = zip(shared.reward_model.parameters(), separate.reward_model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    start = palm_of(**fields).state_dict()
    assert all(torch.equal(tensor, start[name]) for name, tensor in policies[0].state_dict().items())

    list(itertools.islice(trainer(True, "cut").steps(), 2))
    resumed = trainer(True, "cut", resume=True)
    assert resumed.step == 2
    assert [line["loss"] for line in resumed.steps()] == [line["loss"] for line in found[2:]]
    pairs = zip(resumed.reward_model.parameters(), shared.reward_model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


# memory


class AliveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operators inside of it have made and that are still alive."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak, self.sizes = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Add the storages of the results, each once."""
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    self.alive += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage._cdata)
        self.peak = max(self.peak, self.alive)
        return results

    def _gone(self, key: int) -> None:
        self.alive -= self.sizes.pop(key)


WIDE = {"num_tokens": 64, "dim": 128, "depth": 2, "dim_head": 32}


def bytes_of_base(fields) -> int:
    """The bytes of the weights in float32."""
    return 4 * sum(parameter.numel() for parameter in palm_of(**{**WIDE, **fields}).parameters())


BASE = bytes_of_base({})


def memory_of_a_step(fields, *, shared: bool = True, spoil=lambda trainer: None, **options) -> SimpleNamespace:
    """The bytes at rest, with all moments of the optimiser, and at the peak of the step after it."""
    with AliveBytes() as bytes_of:
        short = {"rollouts_per_step": 2, "minibatch_size": 1, "max_new_tokens": 3, "epochs": 1, "num_steps": 2}
        trainer = trainer_of({**short, "num_samples": 1, **options}, {**WIDE, **fields}, shared=shared)
        spoil(trainer)
        steps = trainer.steps()
        next(steps)
        at_rest, bytes_of.peak = bytes_of.alive, bytes_of.alive
        next(steps)
        return SimpleNamespace(at_rest=at_rest, peak=bytes_of.peak, trainer=trainer)


def copy_of_the_policy(trainer):
    trainer.planted = copy.deepcopy(trainer.palm)


def copied_in_each_update(trainer):
    update = trainer.update

    def with_copy(experience):
        planted = copy.deepcopy(trainer.reward_model)
        return update(experience) if planted else None

    trainer.update = with_copy


@pytest.fixture(scope="module")
def shared_step() -> SimpleNamespace:
    """The memory of a step over one base."""
    return memory_of_a_step({})


@BLOCKS
def test_a_step_of_ppo_takes_one_base_the_adapters_and_the_activations(shared_step, fields):
    found = memory_of_a_step(fields) if fields else shared_step
    base = bytes_of_base(fields)
    groups = found.trainer.run.optimizer.param_groups
    trained = 4 * sum(parameter.numel() for group in groups for parameter in group["params"])
    of_reward = 4 * sum(parameter.numel() for parameter in found.trainer.reward_model.finetune_parameters())
    expected = base + 4 * trained + of_reward  # weights, gradients and the two moments of AdamW
    assert trained < base / 8 and of_reward < base / 8
    assert expected <= found.at_rest + trained and found.at_rest < expected + base / 10
    assert found.peak < expected + base / 2


def test_four_models_take_three_bases_more(shared_step):
    """Of the reward model, the critic and the reference."""
    more = memory_of_a_step({}, shared=False).peak - shared_step.peak
    assert more == pytest.approx(3 * BASE, rel=0.05)


@pytest.mark.parametrize("plant", [copy_of_the_policy, copied_in_each_update], ids=lambda plant: plant.__name__)
def test_a_hidden_copy_is_seen(shared_step, plant):
    assert memory_of_a_step({}, spoil=plant).peak > shared_step.peak + 0.9 * BASE
