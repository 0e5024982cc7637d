"""SimPO's and ORPO's losses beside TRL's own functions, in float64, value and gradient; each refuses mutants of ours.

Where ours differs by definition: the likelihood in ORPO's loss is of the response, a mean over its tokens, then over
pairs, as in the paper's equation 6; TRL takes the mean over all tokens of a batch, those of prompts among them. TRL's
odds ratio is in float32.
"""

from types import SimpleNamespace

import pytest
import torch

from palm_rlhf.algorithms.preferences import orpo_loss, simpo_loss

SEEDS = range(5)


@pytest.fixture(scope="module")
def trl():
    """TRL's functions of the two losses, and what of their trainers they read."""
    pytest.importorskip("trl", reason="needs the extra peers: pip install -e '.[peers]'", exc_type=ImportError)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        from trl.experimental.cpo import CPOTrainer
        from trl.experimental.orpo import ORPOTrainer

    accelerator = SimpleNamespace(device="cpu")
    simpo = SimpleNamespace(loss_type="simpo", label_smoothing=0.0, alpha=0.0, accelerator=accelerator)
    return SimpleNamespace(
        simpo=lambda *sides, beta, gamma: CPOTrainer.cpo_loss(
            SimpleNamespace(**vars(simpo), beta=beta, simpo_gamma=gamma), *sides
        ),
        orpo=lambda *sides, beta: ORPOTrainer.odds_ratio_loss(
            SimpleNamespace(beta=beta, accelerator=accelerator), *sides
        ),
    )


def sides_of(seed):
    """Mean log-probabilities of six chosen and six rejected responses."""
    generator = torch.Generator().manual_seed(seed)
    sides = -3 * torch.rand(2, 6, dtype=torch.float64, generator=generator) - 0.01
    return [side.clone().requires_grad_() for side in sides]


def check(ours, theirs, atol, **options):
    """The loss, the rewards and the gradients of both, of the same log-probabilities."""
    for seed in SEEDS:
        my_sides, sides = sides_of(seed), sides_of(seed)
        (mine, *my_rewards), (loss, *rewards) = ours(*my_sides, **options), theirs(*sides, **options)
        torch.testing.assert_close(mine.double(), loss.double(), rtol=0, atol=atol)
        for got, expected in zip(my_rewards, rewards, strict=True):
            torch.testing.assert_close(got.double(), expected.double(), rtol=0, atol=atol)
        followed, expected = torch.autograd.grad(mine, my_sides), torch.autograd.grad(loss, sides)
        assert min(float(part.abs().max()) for part in expected) > 1e-4
        torch.testing.assert_close(followed, expected, rtol=0, atol=atol)


def check_simpo(trl, simpo_loss):
    def theirs(*sides, **options):
        losses, *rewards = trl.simpo(*sides, **options)
        return losses.mean(), *rewards

    for beta, gamma in ((2.0, 1.0), (2.5, 0.3), (0.1, 0.5)):
        check(simpo_loss, theirs, 1e-12, beta=beta, gamma=gamma)


def check_orpo(trl, orpo_loss):
    def ours(*sides, **options):
        return (orpo_loss(*sides, **options).loss,)

    def theirs(chosen, rejected, **options):
        losses, *_ = trl.orpo(chosen, rejected, **options)
        return (-chosen.mean() - losses.mean(),)

    for beta in (0.1, 0.7):
        check(ours, theirs, 1e-6, beta=beta)


def test_simpo_is_that_of_trl(trl):
    check_simpo(trl, simpo_loss)


def test_orpo_is_that_of_trl(trl):
    check_orpo(trl, orpo_loss)


SIMPO_MUTANTS = {
    "labels swapped": lambda chosen, rejected, **o: simpo_loss(rejected, chosen, **o),
    "no margin": lambda *sides, beta, gamma: simpo_loss(*sides, beta=beta, gamma=0.0),
    "margin times beta": lambda *sides, beta, gamma: simpo_loss(*sides, beta=beta, gamma=gamma * beta),
    "a sum": lambda *sides, **o: simpo_loss(*sides, denominator=1, **o),
}
ORPO_MUTANTS = {
    "labels swapped": lambda chosen, rejected, **o: orpo_loss(rejected, chosen, **o),
    "twice beta": lambda *sides, beta: orpo_loss(*sides, beta=2 * beta),
    "a sum": lambda *sides, **o: orpo_loss(*sides, denominator=1, **o),
    "no gradient to the rejected": lambda chosen, rejected, **o: orpo_loss(
        chosen, 0 * rejected + rejected.detach(), **o
    ),
}


@pytest.mark.parametrize("mutant", SIMPO_MUTANTS.values(), ids=SIMPO_MUTANTS)
def test_simpo_sees_the_mutant(trl, mutant):
    with pytest.raises(AssertionError):
        check_simpo(trl, mutant)


@pytest.mark.parametrize("mutant", ORPO_MUTANTS.values(), ids=ORPO_MUTANTS)
def test_orpo_sees_the_mutant(trl, mutant):
    with pytest.raises(AssertionError):
        check_orpo(trl, mutant)
