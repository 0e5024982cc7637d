"""The policy with its critic, and the reference: what is trained and what is not; pads and dropout are nothing."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palm_rlhf.model.palm import PaLM
from palm_rlhf.policy.actor_critic import ActorCritic, Reference
from palm_rlhf.policy.reward_model import RewardModel
from palm_rlhf.policy.sequences import Sequences, join, response_logprobs

KINDS = ("separate", "shared", "none", "another palm", "reward model", "reward model with lora", "lora", "shared lora")
WITH_VALUES = [kind for kind in KINDS if kind != "none"]
LENGTHS = [(3, 2), (1, 5), (6, 1)]
TOLERANCE = {"cpu": 1e-5, "cuda": 1e-4}  # a GPU adds float32 up in the order of its kernels, which differ


@pytest.fixture(scope="module")
def build(wandering_palm, stir):
    """`build("shared", dropout=0.1)` is an actor-critic of one kind, always with the same weights."""

    def build(kind: str, *, at_rest: bool = False, **palm_options) -> ActorCritic:
        palm, options, critic = wandering_palm(**palm_options), {}, None
        if kind in ("shared", "none"):
            options = {"value": kind}
        elif kind == "another palm":
            critic = wandering_palm(depth=1, dim=12, **palm_options)
        elif kind.startswith("reward model"):
            use_lora = kind.endswith("lora")
            critic = RewardModel(wandering_palm(**palm_options), num_binned_output=3, use_lora=use_lora, lora_r=2)
            stir([critic.prompt_embed, critic.response_embed, *critic.palm.finetune_modules.parameters()], scale=1.0)
        elif kind == "lora":
            options = {"actor_lora_r": 2, "critic_lora_r": 3}
        elif kind == "shared lora":
            options = {"value": "shared", "actor_lora_r": 2}
        torch.manual_seed(0)  # of the adapters
        actor_critic = ActorCritic(palm, critic, **options)
        if not at_rest:  # then neither values nor adapters are zero
            stir([*palm.finetune_modules.parameters(), *actor_critic.critic_parameters()])
        return actor_critic

    return build


@pytest.fixture(scope="module")
def rows_of(draw_rows):
    """`rows_of([(3, 2), (1, 5)])` are two rows, of 3 + 2 and of 1 + 5 tokens."""

    def rows_of(lengths: list[tuple[int, int]], seed: int = 0) -> Sequences:
        prompts, responses = zip(*lengths, strict=True)
        return join(draw_rows(*prompts, seed=seed), draw_rows(*responses, seed=seed + 1))

    return rows_of


def loss_of(said) -> torch.Tensor:
    """Anything that all of a policy and a critic has a part in."""
    loss = said.logprobs.square().mean()
    return loss if said.values is None else loss + (said.values - 1).square().mean()


def train(actor_critic: ActorCritic, sequences: Sequences, num_steps: int = 3) -> None:
    optimizer = torch.optim.SGD(actor_critic.parameters(), 0.1)
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss_of(actor_critic(sequences)).backward()
        optimizer.step()


def weights_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def moved(module: torch.nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    """The names of what changed."""
    return {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}


# pads, batch-mates and dropout


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=3)
@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=2, max_size=4),
    st.sampled_from([{}, {"temperature": 0.7, "top_k": 7, "top_p": 0.8}]),
    st.integers(0, 99),
)
def test_a_row_alone_equals_the_row_among_others_and_pads(device, build, rows_of, kind, lengths, truncation, seed):
    actor_critic, sequences = build(kind).to(device), rows_of(lengths, seed).to(device)
    reference = Reference(actor_critic)
    filled = torch.where(sequences.key_mask, sequences.tokens, 5)  # garbage where the pads are, and more of it
    filled = torch.cat((filled, torch.randint(13, (len(sequences), 3), device=device)), dim=1)
    filled = Sequences(filled, sequences.prompt_lengths, sequences.response_lengths)

    @torch.no_grad()
    def all_of(batch: Sequences) -> list[torch.Tensor]:
        said = (*actor_critic(batch, **truncation), *reference.logprobs(batch, **truncation))
        return [part for part in said if part is not None]

    together, among_pads = all_of(sequences), all_of(filled)
    assert len(together) == (4 if kind == "none" else 5)
    for row, (_, num_actions) in enumerate(lengths):
        alone = all_of(sequences.select(slice(row, row + 1)))
        for batch in (together, among_pads):
            for found, expected in zip(batch, alone, strict=True):
                assert expected.shape == (1, num_actions)
                tolerance = TOLERANCE[device.type]  # values of this reward model are larger than 1
                torch.testing.assert_close(found[row, :num_actions], expected[0], rtol=tolerance, atol=tolerance)


def test_a_value_is_read_before_its_action(build, rows_of):
    """By hand; and values of one place late, or of the same columns in every row, are told apart."""
    actor_critic, sequences = build("separate"), rows_of(LENGTHS)
    values = actor_critic.value_head(actor_critic.critic(sequences.tokens, return_only_embedding=True)).squeeze(-1)

    def check(found: torch.Tensor) -> None:
        for row, (prompt, response) in enumerate(LENGTHS):
            torch.testing.assert_close(found[row, :response], values[row, prompt - 1 :][:response], rtol=0, atol=1e-5)

    check(actor_critic(sequences).values)
    late = sequences.before_actions(values.roll(-1, dims=1))
    of_the_longest_prompt = torch.nn.functional.pad(values[:, 5:], (0, 3))
    for mutant in (late, of_the_longest_prompt):
        with pytest.raises(AssertionError):
            check(mutant)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_of_the_config_is_off_in_every_part(build, rows_of, kind):
    sequences, dropping, without = rows_of(LENGTHS), build(kind, dropout=0.5).train(), build(kind)
    reference = Reference(dropping)
    reference.palm.train()
    for one, other in (
        (dropping(sequences), without(sequences)),
        (dropping(sequences), dropping(sequences)),
        (reference.logprobs(sequences), Reference(without).logprobs(sequences)),
    ):
        for found, expected in zip(one, other, strict=True):
            assert (found is None and expected is None) or torch.equal(found, expected)
    for module in (dropping, reference.palm):
        for part in module.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.5  # the mutant: left as it is in the config
    assert not torch.equal(dropping(sequences).logprobs, without(sequences).logprobs)
    if kind in WITH_VALUES:
        assert not torch.equal(dropping(sequences).values, without(sequences).values)
    assert not torch.equal(reference.logprobs(sequences).logprobs, Reference(without).logprobs(sequences).logprobs)


# what is said


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_0_at_the_start_and_the_policy_is_the_given_one(build, rows_of, wandering_palm, kind):
    actor_critic, sequences = build(kind, at_rest=True), rows_of(LENGTHS)
    said = actor_critic(sequences)
    assert torch.equal(said.logprobs, response_logprobs(wandering_palm(), sequences).logprobs)
    if kind == "none":
        assert said.values is None and not actor_critic.critic_parameters()
    else:
        assert said.values.shape == sequences.actions.shape and not said.values.any()
        said.values.sum().backward()
        assert actor_critic.value_head.weight.grad.abs().sum() > 0  # and they can leave it


@pytest.mark.parametrize("kind", WITH_VALUES)
def test_policy_and_values_can_be_had_apart(build, rows_of, kind):
    actor_critic, sequences = build(kind), rows_of(LENGTHS)
    both = actor_critic(sequences, temperature=0.7)
    values = actor_critic(sequences, policy=False, temperature=0.7)
    policy = actor_critic(sequences, values=False, temperature=0.7)
    assert values.logprobs is None and values.entropy is None and policy.values is None
    assert torch.equal(values.values, both.values)
    assert torch.equal(policy.logprobs, both.logprobs) and torch.equal(policy.entropy, both.entropy)
    assert both.values.abs().min() > 1e-4


@pytest.mark.parametrize("kind", ["separate", "shared", "reward model"])
def test_all_is_float32_in_lower_precision(build, rows_of, kind):
    actor_critic, sequences = build(kind), rows_of(LENGTHS)
    expected = actor_critic(sequences)
    with torch.autocast("cpu", torch.bfloat16):
        found = actor_critic(sequences)
    for said in (found, actor_critic.bfloat16()(sequences)):
        for part, wanted in zip(said, expected, strict=True):
            assert part.dtype == torch.float32
            torch.testing.assert_close(part, wanted, rtol=0, atol=0.3)


@pytest.mark.parametrize("kind", ["separate", "shared", "reward model"])
def test_values_are_not_rounded_to_bfloat16(build, rows_of, kind):
    """Under autocast, and of weights in bfloat16: around 100, values of bfloat16 go in steps of 0.5."""
    actor_critic, sequences = build(kind), rows_of(LENGTHS)
    torch.nn.init.constant_(actor_critic.value_head.bias, 100.0)
    for model, autocast in ((actor_critic, True), (copy.deepcopy(actor_critic).bfloat16(), False)):
        trunk, head = model.critic or model.palm, model.value_head
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            values = model(sequences).values
            if isinstance(trunk, RewardModel):
                embeds = trunk.embed(sequences.tokens, sequences.key_mask, prompt_mask=sequences.prompt_mask)
            else:
                embeds = trunk(sequences.tokens, key_mask=sequences.key_mask, return_only_embedding=True)
        weight, bias = head.weight[0].double(), head.bias.double()
        by_hand = sequences.before_actions(embeds).double() @ weight + bias
        torch.testing.assert_close(values.double(), by_hand, rtol=1e-6, atol=0)
        assert values.dtype == torch.float32 and (values != values.bfloat16().float()).any()


def test_the_entropy_bonus_reaches_the_policy_only_where_asked(build, rows_of):
    actor_critic, sequences = build("shared"), rows_of(LENGTHS)
    assert not actor_critic(sequences).entropy.requires_grad
    actor_critic(sequences, entropy_needs_grad=True, top_k=5).entropy.sum().backward()
    gradients = [parameter.grad for parameter in actor_critic.actor_parameters()]
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)
    assert all(parameter.grad is None for parameter in actor_critic.critic_parameters())


# what is trained


@pytest.mark.parametrize("kind", KINDS)
def test_actor_and_critic_parameters_are_all_that_is_trained_without_overlap(build, rows_of, kind):
    actor_critic = build(kind)
    actor, critic = (
        {id(parameter) for parameter in part}
        for part in (actor_critic.actor_parameters(), actor_critic.critic_parameters())
    )
    names = {id(parameter): name for name, parameter in actor_critic.named_parameters()}
    assert actor and not actor & critic and (bool(critic) == (kind != "none"))
    loss_of(actor_critic(rows_of(LENGTHS))).backward()
    has_gradient = {id(parameter) for parameter in actor_critic.parameters() if parameter.grad is not None}
    assert has_gradient == actor | critic == {id(p) for p in actor_critic.parameters() if p.requires_grad}
    assert all(names[parameter].startswith("palm.") for parameter in actor)
    assert {".actor." in names[parameter] for parameter in actor} == {"lora" in kind and "reward" not in kind}
    head = {"value_head.weight", "value_head.bias"}
    critic_names = {names[parameter] for parameter in critic} - (head if kind != "none" else set())
    if "shared" in kind or kind == "none":
        assert not critic_names and actor_critic.critic is None
    elif kind == "lora":
        assert critic_names == {name for name in names.values() if ".finetune_modules.critic." in name} != set()
    elif kind == "reward model with lora":
        adapters = {name for name in names.values() if name.startswith("critic.palm.finetune_modules.reward.")}
        assert critic_names == adapters | {"critic.prompt_embed", "critic.response_embed"} != set()
    else:
        trunk = {name for name in names.values() if name.startswith("critic.") and ".head." not in name}
        assert critic_names == trunk != set()


@pytest.mark.parametrize("kind", WITH_VALUES)
def test_a_value_loss_reaches_the_policy_through_a_shared_trunk_only(build, rows_of, kind):
    actor_critic = build(kind)
    actor_critic(rows_of(LENGTHS)).values.square().sum().backward()
    reached = {parameter.grad is not None for parameter in actor_critic.actor_parameters()}
    assert reached == {"shared" in kind}
    assert all(parameter.grad is not None for parameter in actor_critic.critic_parameters())


def test_training_a_separate_critic_leaves_the_policy_and_what_it_started_from(wandering_palm, rows_of):
    palm, start, sequences = wandering_palm(), wandering_palm(dim=12), rows_of(LENGTHS)
    reward_model = RewardModel(start)
    for critic in (None, start, reward_model):
        actor_critic = ActorCritic(palm, critic)
        before = [weights_of(module) for module in (palm, start, reward_model)]
        optimizer = torch.optim.SGD(actor_critic.parameters(), 0.1)
        for _ in range(2):  # the first moves the head alone, which was zero
            (actor_critic(sequences, policy=False).values - 1).square().sum().backward()
            optimizer.step()
        for module, weights in zip((palm, start, reward_model), before, strict=True):
            assert not moved(module, weights)
        origin = weights_of(palm if critic is None else critic)
        assert moved(actor_critic.critic, origin) == {
            name for name in origin if "head" not in name and "score" not in name
        }


@pytest.mark.parametrize("start", ["another palm", "the policy"])
def test_the_copy_of_a_frozen_palm_is_trained_as_a_critic(wandering_palm, rows_of, start):
    """And its original stays frozen; where a part alone was frozen, so is that part of the copy."""
    frozen, sequences = wandering_palm().requires_grad_(False), rows_of(LENGTHS)
    given = {"actor_lora_r": 2} if start == "the policy" else {"critic": frozen}
    actor_critic = ActorCritic(frozen if start == "the policy" else wandering_palm(), **given)
    torch.nn.init.ones_(actor_critic.value_head.weight)
    actor_critic(sequences).values.square().sum().backward()
    trunk = {name for name, p in actor_critic.critic.named_parameters() if p.grad is not None and p.grad.any()}
    assert trunk == {name for name, _ in wandering_palm().named_parameters()}
    assert all(p.grad is None for p in frozen.parameters())
    if start == "another palm":
        frozen.layers[0].requires_grad_(True)
        in_part = ActorCritic(wandering_palm(), frozen).critic
        assert {name for name, p in in_part.named_parameters() if p.requires_grad} == {
            name for name in trunk if name.startswith("layers.0.")
        }
    with_adapters = ActorCritic(wandering_palm(), wandering_palm().requires_grad_(False), critic_lora_r=2)
    assert all(".critic." in name for name, p in with_adapters.critic.named_parameters() if p.requires_grad)


# the critic that starts from a reward model


@pytest.mark.parametrize("use_lora", [False, True])
def test_a_critic_reads_the_reward_models_embeddings(wandering_palm, stir, rows_of, use_lora):
    reward_model = RewardModel(wandering_palm(dim=12), use_lora=use_lora)
    stir(reward_model.parameters(), scale=0.5)
    frozen = copy.deepcopy(reward_model).requires_grad_(False)  # as one that only scores often is
    sequences = rows_of(LENGTHS)
    embeds = reward_model.embed(sequences.tokens, sequences.key_mask, prompt_mask=sequences.prompt_mask)
    for start in (reward_model, frozen):
        actor_critic = ActorCritic(wandering_palm(), start)
        stir(actor_critic.value_head.parameters())
        values = actor_critic(sequences).values
        for row, (prompt, response) in enumerate(LENGTHS):
            by_hand = actor_critic.value_head(embeds[row, prompt - 1 : prompt - 1 + response]).squeeze(-1)
            torch.testing.assert_close(values[row, :response], by_hand, rtol=0, atol=1e-5)
        values.square().sum().backward()
        trained = {name for name, parameter in actor_critic.critic.named_parameters() if parameter.grad is not None}
        assert trained == {
            name
            for name, parameter in reward_model.named_parameters()
            if parameter.requires_grad and "head" not in name
        }
        assert all(parameter.grad is None for parameter in actor_critic.critic.head.parameters())
        assert all(parameter.grad is None for parameter in start.parameters())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    without_marks = reward_model.embed(sequences.tokens, sequences.key_mask)
    assert not torch.allclose(embeds, without_marks, atol=1e-2)  # so the prompt's marks were in the values


@pytest.mark.parametrize("use_lora", [False, True])
def test_the_first_values_are_the_scores_that_the_reward_model_gives_what_was_said_so_far(
    wandering_palm, stir, rows_of, use_lora
):
    """Its trained head is not lost; the value before an action is the score of all tokens before it, normalised."""
    reward_model = RewardModel(wandering_palm(dim=12), use_lora=use_lora)
    stir(reward_model.parameters(), scale=0.5)
    reward_model.score_mean.fill_(3.0)
    reward_model.score_std.fill_(0.25)
    sequences = rows_of(LENGTHS)
    values = ActorCritic(wandering_palm(), reward_model)(sequences).values
    for row, (prompt, response) in enumerate(LENGTHS):
        for step in range(response):
            said = sequences.tokens[row : row + 1, : prompt + step]
            score = reward_model(said, prompt_lengths=torch.tensor([prompt]))
            torch.testing.assert_close(values[row, step], score[0], rtol=0, atol=1e-4)
    assert values.std() > 0.1
    for options in ({"num_binned_output": 3}, {"pooling": "mean"}, {"pooling": "mean_all"}):  # no score of one token
        assert not ActorCritic(wandering_palm(), RewardModel(wandering_palm(), **options))(sequences).values.any()


# the reference


def check_reference(reference: Reference, actor_critic: ActorCritic, sequences: Sequences, is_base: bool) -> None:
    """At the start it is the policy; training then moves the policy and leaves the reference to the bit."""
    before, logprobs = weights_of(reference.palm), reference.logprobs(sequences)
    start = actor_critic(sequences)
    torch.testing.assert_close(logprobs.logprobs, start.logprobs, rtol=0, atol=1e-6)
    train(actor_critic, sequences)
    changed = moved(reference.palm, before)
    assert all(".actor." in name for name in changed) if is_base else not changed
    again = reference.logprobs(sequences)
    assert torch.equal(again.logprobs, logprobs.logprobs) and torch.equal(again.entropy, logprobs.entropy)
    assert not again.logprobs.requires_grad
    assert not any(parameter.requires_grad for parameter in reference.palm.palm_parameters())
    assert all(parameter.grad is None for parameter in reference.palm.palm_parameters())
    assert not torch.allclose(actor_critic(sequences).logprobs, start.logprobs, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_stays_what_the_policy_was(build, rows_of, kind):
    actor_critic = build(kind, at_rest=True)
    is_base = kind in ("lora", "shared lora")
    reference = Reference(actor_critic)
    assert reference.is_base == is_base
    check_reference(reference, actor_critic, rows_of(LENGTHS), is_base)


class Aliased(Reference):
    """The mutant that is the policy itself."""

    def __init__(self, actor_critic: ActorCritic):
        self.palm, self.is_base = actor_critic.palm, False


class WithAdapter(Reference):
    """The mutant that forgets to switch the adapter off."""

    def logprobs(self, sequences: Sequences, **sampling):
        with torch.no_grad():
            return response_logprobs(self.palm, sequences, finetune_scope="actor", **sampling)


@pytest.mark.parametrize("mutant, kind", [(Aliased, "separate"), (Aliased, "shared"), (WithAdapter, "lora")])
def test_a_reference_that_moves_with_the_policy_is_told_apart(build, rows_of, mutant, kind):
    actor_critic = build(kind, at_rest=True)
    reference = mutant(actor_critic)
    with pytest.raises(AssertionError):
        check_reference(reference, actor_critic, rows_of(LENGTHS), reference.is_base)


@pytest.mark.parametrize("kind", ["lora", "shared lora"])
def test_with_lora_the_reference_is_the_base_and_costs_nothing(build, rows_of, wandering_palm, kind):
    actor_critic, sequences = build(kind), rows_of(LENGTHS)
    reference = Reference(actor_critic)

    def pointers(*modules) -> set[int]:
        return {parameter.data_ptr() for module in modules for parameter in module.parameters()}

    assert pointers(actor_critic, reference.palm) == pointers(actor_critic)
    with torch.no_grad():
        base = response_logprobs(wandering_palm(), sequences)
        assert torch.equal(reference.logprobs(sequences).logprobs, base.logprobs)
        assert (actor_critic(sequences).logprobs - base.logprobs).abs().max() > 1e-2  # the adapter is not zero


def test_without_lora_the_reference_shares_nothing_with_the_policy(build):
    actor_critic = build("separate")
    pointers = [
        {parameter.data_ptr() for parameter in module.parameters()}
        for module in (actor_critic.palm, actor_critic.critic, Reference(actor_critic).palm)
    ]
    assert len(set.union(*pointers)) == sum(map(len, pointers))


@pytest.mark.parametrize("kind", ["separate", "lora"])
def test_a_reference_of_ones_own(build, rows_of, wandering_palm, stir, kind):
    actor_critic, sequences, other = build(kind), rows_of(LENGTHS), wandering_palm(dim=12, dropout=0.5)
    stir(other.parameters())
    sampling = {"temperature": 0.6, "top_p": 0.9}
    expected = response_logprobs(copy.deepcopy(other).eval(), sequences, **sampling).logprobs.detach()
    reference = Reference(actor_critic, other)
    assert not reference.is_base
    assert other.dropout.p == 0.5 and all(parameter.requires_grad for parameter in other.parameters())
    for _ in range(2):
        torch.testing.assert_close(reference.logprobs(sequences, **sampling).logprobs, expected, rtol=0, atol=1e-6)
        stir(other.parameters())  # it was copied


# what is refused


@pytest.mark.parametrize(
    "options, message",
    [
        ({"value": "both"}, "got value='both'"),
        ({"value": "shared", "critic": "palm"}, "value='shared' and a critic of type PaLM"),
        ({"value": "none", "critic": "reward model"}, "value='none' and a critic of type RewardModel"),
        ({"value": "shared", "critic_lora_r": 2}, "got critic_lora_r=2 with value='shared'"),
        ({"value": "none", "critic_lora_r": 2}, "got critic_lora_r=2 with value='none'"),
        (
            {"critic": "reward model", "critic_lora_r": 2},
            "critic_lora_r=2 with value='separate' and a critic of type R",
        ),
        ({"actor_lora_r": -1}, "rank r is -1"),
        ({"critic_lora_r": -1}, "rank r is -1"),
        ({"palm": {"causal": False}}, "the policy has causal=False"),
        ({"critic": "palm", "critic_options": {"causal": False}}, "the critic has causal=False"),
        ({"critic": "reward model", "critic_options": {"causal": False}}, "the critic has causal=False"),
        ({"critic": "palm", "critic_options": {"num_tokens": 5}}, "the critic has num_tokens=5; expected 13"),
        ({"scope": "sft"}, r"the policy has the LoRA scopes \['sft'\]; expected none: merge them"),
        ({"critic": "palm", "critic_scope": "sft"}, r"the critic has the LoRA scopes \['sft'\]"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(wandering_palm, options, message):
    options = dict(options)
    palm, critic = wandering_palm(**options.pop("palm", {})), None
    if kind := options.pop("critic", None):
        critic = wandering_palm(**options.pop("critic_options", {}))
        critic = critic if kind == "palm" else RewardModel(critic)
    for model, scope in ((palm, options.pop("scope", None)), (critic, options.pop("critic_scope", None))):
        if scope is not None:
            model.add_finetune_params(scope, 2)
    with pytest.raises(ValueError, match=message):
        ActorCritic(palm, critic, **options)


@pytest.mark.parametrize("value", ["separate", "shared", "none"])
def test_a_frozen_policy_is_refused_unless_adapters_are_trained(wandering_palm, value):
    palm = wandering_palm().requires_grad_(False)
    with pytest.raises(ValueError, match="the policy is frozen; expected weights to train"):
        ActorCritic(palm, value=value)
    assert ActorCritic(palm, value=value, actor_lora_r=2).actor_parameters()


def test_a_reference_that_cannot_be_one_is_refused(build, wandering_palm):
    actor_critic = build("none")
    for options, message in (
        ({"causal": False}, "the reference has causal=False"),
        ({"num_tokens": 5}, "num_tokens=5"),
    ):
        with pytest.raises(ValueError, match=message):
            Reference(actor_critic, PaLM.from_config(wandering_palm(**options).config))
    with_scope = wandering_palm()
    with_scope.add_finetune_params("sft", 2)
    with pytest.raises(ValueError, match=r"the reference has the LoRA scopes \['sft'\]"):
        Reference(actor_critic, with_scope)
