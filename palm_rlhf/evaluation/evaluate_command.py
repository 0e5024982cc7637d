"""The command ``palm-rlhf evaluate``: reviews, annotations, judges, studies, models, runs and reports."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union

from beartype import beartype
from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes, Positional, arg, subcommand

from palm_rlhf.evaluation.alpaca import evaluate_annotations, read_annotations
from palm_rlhf.evaluation.commands.evaluate_arguments import (
    File,
    Files,
    Name,
    NamedFile,
    Number,
    OptionalFile,
    Page,
    TwoFiles,
    TwoNames,
    different_names,
    finish,
    require_files,
)
from palm_rlhf.evaluation.commands.judge_command import judge
from palm_rlhf.evaluation.commands.model_commands import lm, reward, run
from palm_rlhf.evaluation.comparisons import summarise
from palm_rlhf.evaluation.judging.answers import pair_answers, read_answers, read_questions
from palm_rlhf.evaluation.judging.journal import Journal
from palm_rlhf.evaluation.judging.reviews import compare_reviews, read_reviews
from palm_rlhf.evaluation.judging.study import Person, count_votes, read_votes, run_study
from palm_rlhf.evaluation.length_control import read_regularizer
from palm_rlhf.evaluation.measures.answer_statistics import read_output_texts, statistics_by_language
from palm_rlhf.evaluation.measures.text_prediction import ALL
from palm_rlhf.evaluation.ratings import rating_table, read_battles
from palm_rlhf.evaluation.reports import tables
from palm_rlhf.evaluation.reports.report import Report, merge_reports, read_report


@beartype
def reviews(
    file: File,
    *,
    models: Annotated[tuple[str, str], arg(metavar="A B")] = ("model_1", "model_2"),
    reparse: bool = False,
    questions: OptionalFile = None,
    report: Page = None,
) -> None:
    """Count the reviews of two models' answers in Vicuna's form, by their stored scores or by their texts.

    The last line is JSON: model_1, model_2, score_1, score_2, relative (sum over sum), wins, losses and ties of model
    1, parsed, unparsed.

    Args:
        file: Lines of {"question_id", "text", "score": [first, second]}.
        models: Names for the two models.
        reparse: Read the scores from the first line of the texts; texts without scores are counted and shown.
        questions: Vicuna's questions, for a table by their categories.
        report: Write a page with tables and pictures here, and JSON beside it.
    """
    categories = {}
    if questions is not None:
        categories = {q.question_id: q.category for q in read_questions(questions) if q.category is not None}
    comparisons, unparsed = compare_reviews(read_reviews(file), reparse=reparse, categories=categories)
    summary = summarise(comparisons, *models)
    names = ("model_1", "model_2", "score_1", "score_2", "relative", "wins", "losses", "ties", "parsed", "unparsed")
    numbers = summary.numbers()
    sections = tables.pairwise(comparisons, summary, unparsed)
    finish(Report(f"Reviews of {models[0]} and {models[1]}", sections, numbers), report, {n: numbers[n] for n in names})


@beartype
def alpaca(
    file: Annotated[Positional[Path], arg(metavar="ANNOTATIONS.json")],
    *,
    generator: Name = None,
    regularizer: OptionalFile = None,
    report: Page = None,
) -> None:
    """Compute the win rates of AlpacaEval, of the second output over the first, from annotations.

    The last line is JSON: win_rate and standard_error in percent, n_wins, n_losses, n_draws, and
    length_controlled_win_rate, which is null if the file lacks the outputs.

    Args:
        file: Objects with a preference of 1 to 2 (0 is a draw), output_1, output_2, generator_1 and generator_2.
        generator: The model to evaluate, if the file has several.
        regularizer: df_gamed.csv of the data set tatsu-lab/alpaca_eval, which makes the length-controlled win rate
            that of the leaderboard; for AlpacaEval's own instructions only.
        report: Write a page with tables and pictures here, and JSON beside it.
    """
    annotations = read_annotations(file, generator)
    loaded = None if regularizer is None else read_regularizer(regularizer)
    result = evaluate_annotations(annotations, regularizer=loaded)
    names = tuple(str(annotations[0].get(key, key)) for key in ("generator_2", "generator_1"))
    finish(
        Report(f"AlpacaEval of {names[0]} against {names[1]}", tables.alpaca(result), result.numbers()),
        report,
        result.summary(),
    )


@beartype
def study(
    *,
    questions: NamedFile,
    answers: TwoFiles,
    out: Annotated[Path, arg(metavar="VOTES.jsonl")],
    models: TwoNames = None,
    participant: str = "anonymous",
    seed: int = 0,
    report: Page = None,
) -> None:
    """Ask a person in the terminal which of two models' answers is better: blind, shuffled, in any number of sittings.

    Each vote is written to disk at once; the same command continues where the participant stopped. The last line is
    JSON with the shares of all participants so far.

    Args:
        questions: Questions of Vicuna, MT-bench or AlpacaEval.
        answers: The two models' answers, in one of these forms.
        out: The file of the votes of all participants.
        models: Names for the models in the results; by default the names in their files.
        participant: Name of the person who is asked.
        seed: Of the order of questions and answers.
        report: Write a page with tables and pictures here, and JSON beside it.
    """
    both = [read_answers(path, None if models is None else models[place]) for place, path in enumerate(answers)]
    names = different_names(both[0].model, both[1].model)
    pairs = pair_answers(read_questions(questions), *both)
    with Journal(out) as journal:
        person = Person(sys.stdin, sys.stdout)
        done = run_study(pairs, names, person, journal, participant=participant, seed=seed)
        result = count_votes(read_votes(journal, names))
    print(f"\n{'Thank you: every question is answered' if done else 'Stopped: the same command continues here'}.\n")
    numbers = {**result.numbers(names), "complete": done}
    finish(Report(f"Study of {names[0]} and {names[1]}", tables.study(result, pairs, names), numbers), report, numbers)


@beartype
def outputs(files: Files, *, report: Page = None) -> None:
    """Measure the length and variety of the answers in files, by file and by language.

    The last line is JSON with the figures by file and language: lengths in characters and words, distinct_1 to
    distinct_4 (the share of distinct n-grams; only sets of similar size compare).

    Args:
        files: Answers of Vicuna, MT-bench or AlpacaEval, samples.jsonl of a run, or conversations.
        report: Write a page with tables and pictures here, and JSON beside it.
    """
    require_files(files)
    rows = {}
    for path in files:
        for language, statistics in statistics_by_language(read_output_texts(path)).items():
            rows[path.name if language == ALL else f"{path.name}, {language}"] = statistics.numbers()
    sections = tables.by_group("Answers", "file", rows, plotted="characters_mean", y_label="mean length in characters")
    finish(Report("Answers", sections, rows), report, rows)


@beartype
def ranking(
    files: Files,
    *,
    prior_draws: Number = 0.0,
    num_resamples: int = 200,
    seed: int = 0,
    report: Page = None,
) -> None:
    """Rank many models by pairwise battles: Bradley-Terry ratings with intervals, and Elo over shuffled orders.

    The last line is JSON: {"ratings": [{"model", "rating", "interval", "elo", "battles", "win_rate"}, ...]}, the best
    first.

    Args:
        files: Records of model_a, model_b, winner, or annotations as `judge --annotations` writes them.
        prior_draws: Draws against an average model that each model starts with; above 0, ratings are finite without
            a defeat too.
        num_resamples: Bootstrap samples for the intervals.
        seed: Of the bootstrap and the shuffles.
        report: Write a page with tables and pictures here, and JSON beside it.
    """
    require_files(files)
    battles = [battle for path in files for battle in read_battles(path)]
    rows = rating_table(battles, prior_draws=prior_draws, num_resamples=num_resamples, seed=seed)
    numbers = {"ratings": [row.numbers() for row in rows]}
    finish(Report("Ratings", tables.ratings(rows), numbers), report, numbers)


@beartype
def merge(files: Files, *, out: Annotated[Path, arg(metavar="PAGE.html")], title: str = "Evaluation") -> None:
    """Put the reports of other commands on one page, with JSON beside it.

    The last line is JSON with the figures of each report under its title.

    Args:
        files: The JSON files that lie beside the pages of `--report`.
        out: The page to write.
        title: The title of the page.
    """
    require_files(files)
    merged = merge_reports(title, [read_report(path) for path in files])
    finish(merged, out, merged.results)


COMMANDS = {
    "reviews": reviews,
    "alpaca": alpaca,
    "judge": judge,
    "study": study,
    "lm": lm,
    "reward": reward,
    "outputs": outputs,
    "ranking": ranking,
    "run": run,
    "report": merge,
}
if TYPE_CHECKING:
    Command = Any
else:
    Command = Union[  # noqa: UP007
        tuple(Annotated[Any, subcommand(name=name, constructor=call)] for name, call in COMMANDS.items())
    ]


def evaluate(command: OmitSubcommandPrefixes[OmitArgPrefixes[Command]]) -> None:
    """Judge answers, count preferences and win rates, measure models and runs, and write reports.

    Every command prints its tables on stdout, and last one line of JSON with its figures.
    """
