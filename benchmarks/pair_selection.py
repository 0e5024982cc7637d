"""How many votes the choice of pairs saves: the reward model's accuracy on new pairs, vote by vote, by simulation.

A hidden taste judges answers by their features, and votes on pairs of them. In each round a reward model is fitted to
all votes so far; the pairs of the next round come from new answers, chosen by the function that palm-rlhf collect
uses. Both models are Bradley-Terry with a linear score, but for the regime in which the taste bends. The last line is
JSON. Needs the extras `feedback` and `plot`.

python benchmarks/pair_selection.py --seeds 100
"""

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from palm_rlhf.feedback.pairs.pair_choice import CandidatePair, training_pair

HOW = {  # the method, and the share of random pairs
    "random": ("random", 1.0),
    "uncertainty": ("uncertainty", 0.0),
    "uncertainty, a quarter random": ("uncertainty", 0.25),
}
NUM_TESTS = 4000  # pairs on which a reward model is tested, by the taste without noise
PRIOR = 1.0  # the variance of a weight, before any vote


@dataclass(frozen=True)
class Regime:
    """What the people and the answers of a simulation are like."""

    flips: float = 0.1
    """The share of votes that are wrong, whatever the pair."""
    sharpness: float | None = None
    """Of the Bradley-Terry votes: how far the spread of the score differences counts; None for votes without doubt."""
    bend: float = 0.0
    """The share of the taste's variance that no linear score has."""
    num_features: int = 16
    num_prompts: int = 64
    num_answers: int = 4


REGIMES = {
    "10% of votes wrong": Regime(),
    "and doubt about close answers": Regime(sharpness=2.0),
    "and doubt about most answers": Regime(sharpness=1.0),
    "and a taste that bends": Regime(bend=0.25),
    "and few answers to choose from": Regime(num_prompts=12),
}


class Taste:
    """A hidden taste: a linear score of features, which may bend, and votes by it."""

    def __init__(self, regime: Regime, rng: np.random.Generator):
        self.regime = regime
        self.weights = rng.normal(size=regime.num_features) / np.sqrt(regime.num_features)
        self.bends = rng.normal(size=(2, regime.num_features)) / np.sqrt(regime.num_features)
        self.rng = rng

    def scores(self, answers: np.ndarray) -> np.ndarray:
        """The scores of answers, of variance about 1: `n f -> n`."""
        straight = answers @ self.weights
        bent = np.prod(answers @ self.bends.T, axis=-1)
        return np.sqrt(1 - self.regime.bend) * straight + np.sqrt(self.regime.bend) * bent

    def prefers_first(self, difference: float) -> bool:
        """A vote on two answers whose scores differ by so much."""
        sharpness = self.regime.sharpness
        wins = difference > 0 if sharpness is None else self.rng.random() < 1 / (1 + np.exp(-sharpness * difference))
        return bool(wins) != (self.rng.random() < self.regime.flips)


def fit(differences: np.ndarray, wins: np.ndarray) -> np.ndarray:
    """The weights of the Bradley-Terry model with the largest posterior, by Newton's method: `p f, p -> f`."""
    weights = np.zeros(differences.shape[1])
    for _ in range(50):
        chances = 1 / (1 + np.exp(-differences @ weights))
        gradient = differences.T @ (wins - chances) - weights / PRIOR
        hessian = (differences.T * (chances * (1 - chances))) @ differences + np.eye(len(weights)) / PRIOR
        step = np.linalg.solve(hessian, gradient)
        weights = weights + step
        if np.abs(step).max() < 1e-8:
            break
    return weights


def learn(regime: Regime, how: str, seed: int, num_rounds: int, votes_per_round: int) -> list[float]:
    """The accuracy on new pairs after each round."""
    rng, choice = np.random.default_rng(seed), random.Random(seed)
    taste = Taste(regime, rng)
    tests = rng.normal(size=(2, NUM_TESTS, regime.num_features))
    truth = np.sign(taste.scores(tests[0]) - taste.scores(tests[1]))
    differences, wins, accuracies = [], [], []
    weights: np.ndarray | None = None
    for _ in range(num_rounds):
        answers = rng.normal(size=(regime.num_prompts, regime.num_answers, regime.num_features))
        pool = candidates(answers, weights)
        for _ in range(min(votes_per_round, len(pool))):
            pair, _ = training_pair(pool, *HOW[how], choice)
            pool.remove(pair)
            first, second = (answers[int(pair.prompt_key), int(x)] for x in (pair.first_id, pair.second_id))
            differences.append(first - second)
            wins.append(taste.prefers_first(float(taste.scores(first) - taste.scores(second))))
        weights = fit(np.array(differences), np.array(wins, dtype=float))
        accuracies.append(float((np.sign((tests[0] - tests[1]) @ weights) == truth).mean()))
    return accuracies


def candidates(answers: np.ndarray, weights: np.ndarray | None) -> list[CandidatePair]:
    """All pairs of answers to one prompt, with the differences of their scores once there is a reward model."""
    num_prompts, num_answers, _ = answers.shape
    scores = None if weights is None else answers @ weights
    return [
        CandidatePair(str(p), str(i), str(j), 0, None if scores is None else float(scores[p, i] - scores[p, j]))
        for p in range(num_prompts)
        for i in range(num_answers)
        for j in range(i + 1, num_answers)
    ]


def votes_to_reach(target: float, accuracies: np.ndarray, votes_per_round: int) -> float:
    """After how many votes a run has an accuracy for good, between rounds in proportion; infinity if it never has."""
    below = np.flatnonzero(accuracies < target)
    if not len(below):
        return float(votes_per_round)
    place = int(below[-1]) + 1
    if place == len(accuracies):
        return float("inf")
    before, after = accuracies[place - 1], accuracies[place]
    return float(votes_per_round * (place + (target - before) / (after - before)))


def summary(curves: dict[str, np.ndarray], votes_per_round: int) -> dict[str, dict[str, object]]:
    """For each way: its accuracies, and the votes that it needs for the accuracy of random pairs in the end.

    Runs of one seed have the same taste and are compared with each other; the figures are medians over the seeds, with
    the 20th and 80th percentile. A way that does not get there in most runs has no number.
    """
    targets = curves["random"][:, -1]
    found: dict[str, dict[str, object]] = {}
    for how, runs in curves.items():
        votes = [votes_to_reach(target, run, votes_per_round) for target, run in zip(targets, runs, strict=True)]
        low, middle, high = (
            None if not np.isfinite(x) else round(float(x))
            for x in np.quantile(votes, [0.2, 0.5, 0.8], method="inverted_cdf")
        )
        quantiles = np.quantile(runs, [0.2, 0.5, 0.8], axis=0).round(4).tolist()
        found[how] = {"votes": middle, "votes_p20": low, "votes_p80": high, "accuracy": quantiles[1]}
        found[how] |= {"accuracy_p20": quantiles[0], "accuracy_p80": quantiles[2]}
    return found


def draw(results: dict[str, dict[str, dict[str, object]]], votes_per_round: int, path: Path) -> None:
    """Draw the accuracies by votes, a panel for each regime."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 3.4), layout="constrained")
    panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for panel, (regime, found) in zip(panels, results.items(), strict=True):
        for how, line in found.items():
            votes = votes_per_round * np.arange(1, len(line["accuracy"]) + 1)
            panel.plot(votes, line["accuracy"], label=how)
            panel.fill_between(votes, line["accuracy_p20"], line["accuracy_p80"], alpha=0.15)
        panel.set_title(regime, fontsize=10)
        panel.set_xlabel("votes")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy on new pairs")
    panels[-1].legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=80)


def table(results: dict[str, dict[str, dict[str, object]]], num_votes: int) -> str:
    """The votes that each way needs, in Markdown."""

    def cell(line: dict[str, object]) -> str:
        low, middle, high = (f"more than {num_votes}" if x is None else f"{x}" for x in numbers(line))
        return f"{middle} ({low} to {high})"

    def numbers(line: dict[str, object]) -> tuple[object, ...]:
        return line["votes_p20"], line["votes"], line["votes_p80"]

    rows = [["votes", *HOW], ["---"] * (1 + len(HOW))]
    rows += [[regime, *(cell(found[how]) for how in HOW)] for regime, found in results.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(argv: list[str] | None = None) -> None:
    """Run the simulations, print the votes that each way needs, and draw the accuracies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=100, help="tastes, each of which every way learns (default: 100)")
    parser.add_argument("--rounds", type=int, default=12, help="of votes and fitting (default: 12)")
    parser.add_argument("--votes", type=int, default=32, help="in a round (default: 32)")
    parser.add_argument("--regimes", nargs="+", default=list(REGIMES), choices=list(REGIMES), metavar="NAME")
    parser.add_argument("--plot", type=Path, default=Path("pair_selection.png"), help="where to draw the accuracies")
    args = parser.parse_args(argv)
    results = {}
    for name in args.regimes:
        curves = {
            how: np.array([learn(REGIMES[name], how, seed, args.rounds, args.votes) for seed in range(args.seeds)])
            for how in HOW
        }
        results[name] = summary(curves, args.votes)
        print(table({name: results[name]}, args.rounds * args.votes).splitlines()[-1], flush=True)
    print(f"\nvotes for the accuracy that random pairs have after {args.rounds * args.votes} votes:")
    print(table(results, args.rounds * args.votes))
    draw(results, args.votes, args.plot)
    about = {"seeds": args.seeds, "rounds": args.rounds, "votes": args.votes, "numpy": np.__version__}
    print(json.dumps({**about, "regimes": results}))


if __name__ == "__main__":
    main()
