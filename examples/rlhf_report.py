"""The report of examples/rlhf.py: scores with their errors, win rate, KL, curves and samples, before and after PPO."""

import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm


@dataclass(frozen=True)
class Measurement:
    """A policy on the held-out prompts, with a row for each prompt and a column for each of its answers."""

    answers: list[list[str]]
    gold: Tensor
    proxy: Tensor
    kl: Tensor  # to the fine-tuned model, nats

    def __str__(self) -> str:
        gold, proxy = ("{:.3f} ± {:.3f}".format(*mean_and_stderr(scores)) for scores in (self.gold, self.proxy))
        return f"gold score {gold}, proxy {proxy}, KL {self.kl.mean():.2f} nats an answer"


def mean_and_stderr(x: Tensor) -> tuple[float, float]:
    """Return the mean and its standard error, with the prompts as clusters: `prompts ...`."""
    by_prompt = x.flatten(1).mean(dim=1)
    return float(by_prompt.mean()), float(by_prompt.std() / len(by_prompt) ** 0.5)


def over_optimisation(history: list[Measurement]) -> str | None:
    """Return a warning if the gold score fell significantly from its best while the proxy rose, else None."""
    best, last = max(history, key=lambda measured: measured.gold.mean()), history[-1]
    fall, stderr = mean_and_stderr(best.gold - last.gold)
    rise = float(last.proxy.mean() - best.proxy.mean())
    if fall <= 2 * stderr or rise <= 0:
        return None
    return (
        f"the proxy is over-optimised: from a KL of {best.kl.mean():.1f} nats on, the gold score fell by {fall:.3f} "
        f"± {stderr:.3f} while the proxy rose by {rise:.3f}; end PPO there, raise kl_coef, or rank more answers"
    )


def report(prompts: list[str], history: list[Measurement]) -> dict[str, float]:
    """Print what PPO changed, and return the figures."""
    before, after = history[0], history[-1]
    say("\nprompt -> answer before PPO -> answer after")
    for prompt, old, new in itertools.islice(zip(prompts, before.answers, after.answers, strict=True), 8):
        say(f"  {prompt} -> {old[0]} -> {new[0]}")
    say(f"before: {before}\nafter:  {after}")
    gain, gold_stderr = mean_and_stderr(after.gold - before.gold)
    new, old = after.gold.unsqueeze(-1), before.gold.unsqueeze(-2)  # each answer against each to the same prompt
    win_rate, error = mean_and_stderr((new > old) + 0.5 * (new == old))
    say(f"gain in gold score: {gain:.3f}, standard error {gold_stderr:.3f}")
    low, high = win_rate - 1.96 * error, win_rate + 1.96 * error
    say(f"win rate {win_rate:.1%}, 95% interval {low:.1%} to {high:.1%}")
    say(over_optimisation(history) or "the proxy is not over-optimised: the gold score has not fallen from its best")
    numbers = {"gold_stderr": gold_stderr, "kl": float(after.kl.mean()), "win_rate": win_rate}
    numbers |= {"win_rate_low": low, "win_rate_high": high}
    for name, scores in (("before", before), ("after", after)):
        numbers |= {f"gold_{name}": float(scores.gold.mean()), f"proxy_{name}": float(scores.proxy.mean())}
    return {name: round(number, 4) for name, number in numbers.items()}


def draw_curves(path: Path, history: list[Measurement], steps: Sequence[Mapping[str, float]] = ()) -> None:
    """Plot both scores over the KL to the policy before PPO, and the distributions of the gold score.

    With the metrics of PPO's steps, which have a gold score and a proxy, plot these over the steps as well.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return say("no curves: they are drawn with matplotlib, pip install palm-rlhf[plot]")
    figure = Figure(figsize=(15 if steps else 10, 4), layout="constrained")
    scores, distribution, *more = figure.subplots(1, 3 if steps else 2)
    kl = [float(measured.kl.mean()) for measured in history]
    for axes, name, colour in ((scores, "gold", "C1"), (scores.twinx(), "proxy", "C0")):
        means, stderrs = zip(*(mean_and_stderr(getattr(measured, name)) for measured in history), strict=True)
        axes.errorbar(kl, means, stderrs, color=colour, marker="o", capsize=2)
        axes.set_ylabel(f"{name} score", color=colour)
    scores.set_xlabel("KL to the policy before PPO (nats per answer)")
    both = [measured.gold.flatten().numpy() for measured in (history[0], history[-1])]
    lowest = min(0.0, *(float(gold.min()) for gold in both))
    distribution.hist(both, bins=11, range=(-1 if lowest < 0 else 0, 1), label=["before PPO", "after"])
    distribution.set_xlabel("gold score of an answer")
    distribution.legend()
    for first in more:
        for axes, name, colour in ((first, "gold", "C1"), (first.twinx(), "proxy", "C0")):
            axes.plot([row["step"] for row in steps], [row[f"score/{name}"] for row in steps], color=colour)
            axes.set_ylabel(f"{name} score", color=colour)
        first.set_xlabel("step of PPO (answers to the prompts that it trains on)")
    figure.savefig(path, dpi=120)


def say(text: str) -> None:
    """Print a text for people to standard error."""
    tqdm.write(text, file=sys.stderr)


def correlation(one: Tensor, other: Tensor) -> float:
    """Return Pearson's correlation of two scores of the same answers; 0 where one of them is constant."""
    if min(float(scores.std()) for scores in (one, other)) == 0:
        return 0.0
    return float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])
