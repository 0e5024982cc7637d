"""The tables and plots of reports."""

from collections.abc import Mapping, Sequence
from typing import Any

from beartype import beartype

from palm_rlhf.evaluation.alpaca import AlpacaResult
from palm_rlhf.evaluation.comparisons import Comparison, Summary, UnparsedText, by_category, summarise
from palm_rlhf.evaluation.judging.answers import Pair
from palm_rlhf.evaluation.judging.judgments import SingleAnswerRatings
from palm_rlhf.evaluation.judging.study import StudyResult
from palm_rlhf.evaluation.measures.reward_bench import RewardBenchResult
from palm_rlhf.evaluation.measures.rlhf_runs import StepResult
from palm_rlhf.evaluation.ratings import RatingRow
from palm_rlhf.evaluation.reports.plots import BarPlot, Line, LinePlot, Plot
from palm_rlhf.evaluation.reports.report import Table
from palm_rlhf.training.run.log import Metrics

Sections = tuple[Table | Plot, ...]
MAX_SHOWN = 50
CURVES = (("kl", "KL to the reference, nats a response"), ("score", "score"), ("response_length", "tokens a response"))


@beartype
def pairwise(comparisons: Sequence[Comparison], summary: Summary, unparsed: Sequence[UnparsedText]) -> Sections:
    """Return the sections of a comparison: summary, categories, questions, and unparsed judgments."""
    names = summary.model_1, summary.model_2
    both_orders = summary.conflict_rate is not None
    figures = {
        "questions": summary.questions,
        f"sum of scores, {names[0]}": summary.score_1,
        f"sum of scores, {names[1]}": summary.score_2,
        "relative score": summary.relative,
        f"wins of {names[0]}": summary.wins,
        f"wins of {names[1]}": summary.losses,
        "ties": summary.ties,
        f"win rate of {names[0]} (a tie is a half)": summary.win_rate,
        "  its 95% interval, by bootstrap": span(summary.win_rate_interval),
        f"share of {names[0]} where one wins": summary.decided_share,
        "  its 95% interval, exact": span(summary.decided_interval),
        f"wins of {names[0]} in both orders": summary.agreed_wins if both_orders else None,
        f"wins of {names[1]} in both orders": summary.agreed_losses if both_orders else None,
        "conflict rate": summary.conflict_rate,
        "judgments parsed": summary.parsed,
        "judgments not parsed": summary.unparsed,
    }
    outcomes = (f"{names[0]} wins", "tie", f"{names[1]} wins")
    counts = (float(summary.wins), float(summary.ties), float(summary.losses))
    sections: list[Table | Plot] = [
        Table("Summary", ("", ""), tuple(figures.items())),
        BarPlot("Outcomes", "questions", outcomes, counts),
    ]
    groups = {name: summarise(group, *names) for name, group in by_category(comparisons).items()}
    if len(groups) > 1:
        rows = tuple(
            (name, part.questions, part.score_1, part.score_2, part.wins, part.losses, part.ties, part.win_rate)
            for name, part in groups.items()
        )
        columns = ("category", "questions", *names, "wins", "losses", "ties", "win rate")
        sections += [Table("By category", columns, rows), _win_rates(groups, names[0])]
    rows = tuple(
        (
            f"{comparison.question_id}{f', turn {comparison.turn}' if comparison.turn > 1 else ''}",
            *(comparison.scores or (None, None)),
            comparison.outcome or "none",
            comparison.entropy,
            "a person" if comparison.verdict else "scores",
        )
        for comparison in comparisons
    )
    sections.append(
        Table(
            "Questions",
            ("question", *names, f"for {names[0]}", "entropy", "decided by"),
            rows,
            "Entropy is the balanced position diversity entropy in nats: 0 if all judgments agree.",
        )
    )
    return (*sections, *not_parsed(unparsed))


def _win_rates(groups: Mapping[str, Summary], name: str) -> BarPlot:
    judged = {
        category: (rate, part.win_rate_interval)
        for category, part in groups.items()
        if (rate := part.win_rate) is not None
    }
    rates, intervals = tuple(rate for rate, _ in judged.values()), tuple(ends for _, ends in judged.values())
    return BarPlot(f"Win rate of {name} by category", "win rate", tuple(judged), rates, intervals)


@beartype
def not_parsed(unparsed: Sequence[UnparsedText]) -> Sections:
    """Return a table of unparsed judgments for a person to read; no section if there are none."""
    rows = tuple((text.question_id, text.turn, text.text[:300]) for text in unparsed[:MAX_SHOWN])
    note = f"{len(unparsed)} in all; none of them has a score."
    return (Table("Judgments not parsed", ("question", "turn", "text"), rows, note),) if rows else ()


@beartype
def ratings_of_models(ratings: Sequence[SingleAnswerRatings]) -> Sections:
    """Return the section of single-answer ratings: the mean of all turns and of each turn."""
    turns = sorted({turn for rating in ratings for turn in rating.by_turn()})
    rows = []
    for rating in ratings:
        by_turn, means = rating.by_turn(), list(rating.means.values())
        turn_means = [_mean(by_turn.get(turn, [])) for turn in turns]
        rows.append((rating.model, _mean(means), *turn_means, rating.num_parsed, len(rating.unparsed)))
    columns = ("model", "rating", *(f"turn {turn}" for turn in turns), "parsed", "not parsed")
    unparsed = [text for rating in ratings for text in rating.unparsed]
    return (Table("Ratings", columns, tuple(rows)), *not_parsed(unparsed))


@beartype
def alpaca(result: AlpacaResult) -> Sections:
    """Return the sections of AlpacaEval, in percent."""
    figures = {
        "win rate": result.win_rate,
        "  its standard error": result.standard_error,
        "  its 95% interval, by bootstrap": span(result.win_rate_interval),
        "length-controlled win rate": result.length_controlled_win_rate,
        "wins": result.n_wins,
        "losses": result.n_losses,
        "draws": result.n_draws,
        "share of wins where one wins, 95% interval, exact": span(result.decided_interval),
        "without a preference": result.n_unparsed,
    }
    if result.length_effect is not None:
        figures["coefficient of the length difference"] = result.length_effect.length
    counts = (float(result.n_wins), float(result.n_draws), float(result.n_losses))
    return (
        Table("AlpacaEval, in percent", ("", ""), tuple(figures.items())),
        BarPlot("Outcomes", "instructions", ("wins", "draws", "losses"), counts),
    )


@beartype
def study(result: StudyResult, pairs: Sequence[Pair], models: tuple[str, str]) -> Sections:
    """Return the sections of a preference study: the shares of all votes and of each question."""
    overall = result.overall
    figures = {
        f"share of {models[0]}": overall.share_1,
        f"share of {models[1]}": overall.share_2,
        f"  95% interval of {models[0]}, by bootstrap over questions": span(result.interval),
        "  the same without ties, exact over votes": span(result.decided_interval),
        "votes": overall.votes,
        "ties among them": overall.ties,
        "skipped": result.skipped,
        "participants": result.participants,
    }
    texts = {pair.question.question_id: pair.question.turns[0] for pair in pairs}
    rows = tuple(
        (texts.get(name, name)[:80], shares.share_1, shares.share_2, shares.votes)
        for name, shares in result.questions.items()
    )
    plotted = tuple(share for shares in result.questions.values() if (share := shares.share_1) is not None)
    places = tuple(map(str, range(1, len(plotted) + 1)))
    plot = BarPlot(f"Share of {models[0]} by question", "share", places, plotted)
    return (
        Table("Overall", ("", ""), tuple(figures.items())),
        Table("Questions", ("question", *models, "votes"), rows),
        plot,
    )


@beartype
def ratings(rows: Sequence[RatingRow]) -> Sections:
    """Return the sections of a rating table."""
    cells = tuple((row.model, row.rating, span(row.interval), row.elo, row.battles, row.win_rate) for row in rows)
    columns = ("model", "Bradley-Terry", "95% interval", "Elo", "battles", "win rate")
    note = "Elo is the mean over shuffled orders of the battles; 400 points are odds of ten to one."
    names, values = tuple(row.model for row in rows), tuple(row.rating for row in rows)
    plot = BarPlot("Bradley-Terry ratings", "points", names, values, tuple(row.interval for row in rows))
    return Table("Ratings", columns, cells, note), plot


@beartype
def reward_bench(result: RewardBenchResult) -> Sections:
    """Return the sections of a reward model's accuracies."""
    overall = {
        "score (mean over sections)": result.score,
        "accuracy of all pairs": result.accuracy,
        "  its 95% interval (Wilson)": span(result.interval),
        "pairs": result.num_pairs,
    }
    return (
        Table("Overall", ("", ""), tuple(overall.items())),
        Table("Sections", ("section", "accuracy"), tuple(result.sections.items())),
        Table("Subsets", ("subset", "accuracy", "pairs"), tuple((k, *v) for k, v in result.subsets.items())),
        BarPlot("Accuracy by section", "accuracy", tuple(result.sections), tuple(result.sections.values())),
    )


@beartype
def by_group(title: str, group: str, rows: Mapping[str, Mapping[str, Any]], *, plotted: str, y_label: str) -> Sections:
    """Return a table with a row for each group, such as a language or a file, and a plot of one column."""
    names = list(next(iter(rows.values())))
    cells = tuple((name, *(row[column] for column in names)) for name, row in rows.items())
    table = Table(title, (group, *(name.replace("_", " ") for name in names)), cells)
    if len(rows) < 2:
        return (table,)
    values = tuple(float(row[plotted]) for row in rows.values())
    return table, BarPlot(f"{title}: {y_label}", y_label, tuple(rows), values)


@beartype
def training_run(lines: Sequence[Metrics], wins: Sequence[StepResult]) -> Sections:
    """Return the sections of an RLHF run over its steps."""
    sections: list[Table | Plot] = []
    for name, label in CURVES:
        points = tuple((float(line["step"]), float(line[name])) for line in lines if line.get(name) is not None)
        if points:
            sections.append(LinePlot(label, "step", label, (Line(name, points),)))
    if wins:
        rows = tuple((str(w.step), w.win_rate, span(w.interval), w.wins, w.losses, w.ties) for w in wins)
        columns = ("step", "win rate", "95% interval, exact", "wins", "losses", "ties")
        sections.append(Table("Against the reference", columns, rows))
        points = tuple((float(result.step), result.win_rate) for result in wins)
        line = Line("win rate", points, tuple(result.interval for result in wins))
        sections.append(LinePlot("Win rate against the reference", "step", "win rate", (line,)))
    last = {name: value for name, value in lines[-1].items() if isinstance(value, int | float)}
    return (*sections, Table("Last step", ("", ""), tuple(last.items())))


def span(interval: Sequence[float] | None) -> str | None:
    """Return an interval as text."""
    return None if interval is None else f"{interval[0]:.4g} to {interval[1]:.4g}"


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
