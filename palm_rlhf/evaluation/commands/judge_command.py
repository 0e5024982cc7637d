"""The command ``palm-rlhf evaluate judge``: a server, a model or a person judges the answers of models."""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from beartype import beartype
from tyro.conf import arg

from palm_rlhf.data.files.records import read_records
from palm_rlhf.evaluation.alpaca import write_alpaca
from palm_rlhf.evaluation.commands.evaluate_arguments import (
    Name,
    NamedFile,
    Number,
    OptionalFile,
    Page,
    Preset,
    different_names,
    finish,
)
from palm_rlhf.evaluation.comparisons import Comparison, UnparsedText, most_doubtful, summarise
from palm_rlhf.evaluation.judging.answers import (
    ModelAnswers,
    Pair,
    Question,
    pair_answers,
    read_answers,
    read_questions,
)
from palm_rlhf.evaluation.judging.chat_judge import ChatJudge
from palm_rlhf.evaluation.judging.journal import Journal
from palm_rlhf.evaluation.judging.judge_prompts import Method
from palm_rlhf.evaluation.judging.judges import Judge
from palm_rlhf.evaluation.judging.judgments import (
    annotations_of,
    collect_judgments,
    compare,
    pairwise_requests,
    rate,
    rating_requests,
)
from palm_rlhf.evaluation.judging.model_judges import LocalJudge, RewardJudge
from palm_rlhf.evaluation.judging.study import Person, run_study, vote_key
from palm_rlhf.evaluation.measures.model_folders import is_reward_model, name_of, open_chat_model, version_of
from palm_rlhf.evaluation.reports import tables
from palm_rlhf.evaluation.reports.report import Report
from palm_rlhf.evaluation.verdicts import Scores
from palm_rlhf.model.local_model import local_model
from palm_rlhf.policy.reward_model import RewardModel

PERSON = "person"
SCHEMES = ("http://", "https://")


@beartype
def judge(
    *,
    questions: NamedFile,
    answers: Annotated[tuple[Path, ...], arg(metavar="A B")],
    judge: Annotated[str, arg(metavar="URL|MODEL|person")],
    out: Annotated[Path, arg(metavar="JUDGMENTS.jsonl")],
    method: Method = "scores",
    samples: int = 1,
    model: Name = None,
    models: Annotated[tuple[str, ...], arg(metavar="A B", help_behavior_hint="(default: as in the files)")] = (),
    api_key_env: Name = None,
    temperature: Annotated[float | None, arg(metavar="NUMBER")] = None,
    max_tokens: int = 1024,
    concurrency: int = 8,
    retries: int = 5,
    backoff: Number = 1.0,
    timeout: Number = 120.0,
    template: Preset = None,
    ask_person: int = 0,
    annotations: OptionalFile = None,
    report: Page = None,
) -> None:
    """Compare two models' answers in both orders, or rate answers one by one.

    Each judgment is written to disk at once: after a kill, the same command asks only for the missing ones. The last
    line is JSON: the judge, scores, wins, losses, ties and win rate of the first model with its interval, the conflict
    rate, and the numbers of parsed and unparsed judgments; for ratings, the ratings of each model.

    Args:
        questions: Questions of Vicuna, MT-bench (two turns) or AlpacaEval.
        answers: The models' answers in one of these formats: two files, or any number to rate.
        judge: The URL of a chat-completions API, a PaLM or a RewardModel in a folder or on the hub, or "person" for
            this terminal.
        out: The file of the judgments; another model under the same name needs another file.
        method: scores: two numbers first, then reasons. evidence: reasons first. verdict: A, B or a tie. rating: each
            answer alone.
        samples: Judgments of each answer or order.
        model: The name of the model on the server.
        models: Names for the judged models.
        api_key_env: The environment variable with the server's key; by default no key is sent.
        temperature: Sampling temperature of the judge; by default 0, and 1 for several samples.
        max_tokens: Longest judgment, in tokens; 0 leaves it to the server.
        concurrency: Simultaneous requests.
        retries: Attempts after a failed request.
        backoff: Seconds before the first retry, doubled for each further one.
        timeout: Seconds to wait for a reply.
        template: The chat template, if the folder has none.
        ask_person: Number of the most doubtful questions that are shown to you; your verdict counts.
        annotations: Write the outcomes as AlpacaEval's annotations, for `ranking` or `alpaca`.
        report: Write a page with tables and pictures here, and JSON beside it.
    """
    asked = read_questions(questions)
    if models and len(models) != len(answers):
        raise ValueError(f"got {len(models)} names for {len(answers)} files of answers, expected one for each")
    loaded = [read_answers(path, name) for path, name in zip(answers, models or [None] * len(answers))]
    if method != "rating" and len(loaded) != 2:
        raise ValueError(f"got {len(loaded)} files of answers, expected two; only --method rating takes another number")
    if method == "rating" and (ask_person or annotations or judge == PERSON):
        raise ValueError("ratings are of single answers: expected no person, --ask-person or --annotations with them")
    if ask_person < 0:
        raise ValueError(f"got ask_person {ask_person}, expected 0 or more questions")
    if annotations is not None:
        _refuse_to_lose(annotations)
    _refuse_unused(judge, model, api_key_env, template, temperature, samples)
    options = {"temperature": float(samples > 1) if temperature is None else temperature, "max_tokens": max_tokens}
    network = {"retries": retries, "backoff": backoff, "timeout": timeout}
    judging = None if judge == PERSON else open_judge(judge, model, api_key_env, template, options, network)
    with Journal(out) as journal:
        if method == "rating" and judging is not None:
            made, numbers = _rate(loaded, asked, judging, journal, samples, concurrency)
        else:
            pairs, names = pair_answers(asked, *loaded), different_names(*(part.model for part in loaded))
            made, numbers = _compare(
                pairs, names, judging, journal, method, samples, concurrency, ask_person, annotations
            )
    finish(made, report, numbers)


def _refuse_to_lose(path: Path) -> None:
    """Raise ValueError for a file with other content than the annotations of an earlier run."""
    if path.is_file():
        try:
            is_ours = all("preference" in record for _, record in read_records(path))
        except ValueError:
            is_ours = False
        if not is_ours:
            raise ValueError(f"{path} exists and holds no annotations: choose another name for --annotations")


def _refuse_unused(
    judge: str,
    model: str | None,
    api_key_env: str | None,
    template: str | None,
    temperature: float | None,
    samples: int,
) -> None:
    """Raise ValueError for an option that would have no effect."""
    is_url, is_person = judge.startswith(SCHEMES), judge == PERSON
    may_be_reward = temperature is not None and not is_url and not is_person
    is_reward = may_be_reward and is_reward_model(local_model(judge))
    for option, given, unused, reason in (
        ("--api-key-env", api_key_env, not is_url, "it is for a server"),
        ("--template", template, is_url or is_person, "it is for a model in a folder"),
        ("--model", model, is_person, "a person has no model"),
        ("--temperature", temperature, is_person, "a person has none"),
        ("--temperature", temperature, is_reward, "a reward model has none"),
        ("--samples", samples if samples > 1 else None, is_person, "a person is asked once"),
        ("--samples", samples if temperature == 0 else None, samples > 1, "at temperature 0 they would be the same"),
    ):
        if given is not None and unused:
            raise ValueError(f"got {option} {given} for the judge {judge!r}, expected none: {reason}")


def _compare(
    pairs: Sequence[Pair],
    names: tuple[str, str],
    judging: Judge | None,
    journal: Journal,
    method: Method,
    samples: int,
    concurrency: int,
    ask_person: int,
    annotations: Path | None,
) -> tuple[Report, dict[str, Any]]:
    unparsed: list[UnparsedText] = []
    if judging is None:
        name, comparisons = PERSON, judged_by_person(pairs, names, journal)
    else:
        name = judging.name
        requests = pairwise_requests(pairs, names, method, samples=samples, sees_order=judging.sees_order)
        entries = collect_judgments(requests, judging, journal, concurrency=concurrency)
        comparisons, unparsed = compare(requests, entries)
        comparisons = with_person(comparisons, pairs, names, journal, ask_person)
    if annotations is not None:
        write_alpaca(annotations, annotations_of(comparisons, pairs, names, name))
    summary = summarise(comparisons, *names)
    numbers = {"judge": name, **summary.numbers()}
    sections = tables.pairwise(comparisons, summary, unparsed)
    return Report(f"{names[0]} and {names[1]}, by {name}", sections, numbers), numbers


@beartype
def open_judge(
    judge: str,
    model: str | None,
    api_key_env: str | None,
    template: str | None,
    options: dict[str, Any],
    network: dict[str, Any],
) -> Judge:
    """Open the judge at an address or in a folder. Raises ValueError or FileNotFoundError if there is none."""
    if judge.startswith(SCHEMES):
        if model is None:
            raise ValueError(f"got no model for the judge at {judge}, expected its name on the server: set --model")
        key = None if api_key_env is None else os.environ.get(api_key_env)
        if api_key_env is not None and not key:
            raise ValueError(f"got no value of {api_key_env}, expected the key of the judge: export the variable first")
        options = options | {"max_tokens": options["max_tokens"] or None}
        return ChatJudge(judge, model, api_key=key, **options, **network)
    folder = local_model(judge)
    found, tokenizer, chosen = open_chat_model(folder, template)
    name, version = model or name_of(judge), version_of(folder, template)
    if isinstance(found, RewardModel):
        return RewardJudge(found, tokenizer, chosen, name=name, version=version)
    return LocalJudge(found, tokenizer, chosen, name=name, version=version, **options)


@beartype
def judged_by_person(pairs: Sequence[Pair], models: tuple[str, str], journal: Journal) -> list[Comparison]:
    """Return the comparisons by a person at the terminal, who sees each question once, in a random order."""
    verdicts = _ask(pairs, models, journal)
    return [
        Comparison(
            pair.question.question_id,
            given=(verdicts[pair.question.question_id],) if pair.question.question_id in verdicts else (),
            category=pair.question.category,
        )
        for pair in pairs
    ]


@beartype
def with_person(
    comparisons: Sequence[Comparison], pairs: Sequence[Pair], models: tuple[str, str], journal: Journal, count: int
) -> list[Comparison]:
    """Add the verdicts of a person to the `count` most doubtful questions, for all turns of each."""
    doubtful = list(dict.fromkeys(c.question_id for c in most_doubtful(comparisons, len(comparisons))))[:count]
    verdicts = _ask([pair for pair in pairs if pair.question.question_id in doubtful], models, journal)
    return [replace(comparison, verdict=verdicts.get(comparison.question_id)) for comparison in comparisons]


def _ask(pairs: Sequence[Pair], models: tuple[str, str], journal: Journal) -> dict[str, Scores]:
    run_study(pairs, models, Person(sys.stdin, sys.stdout), journal, participant=PERSON)
    entries = {pair.question.question_id: journal.entries.get(vote_key(models, *pair, PERSON)) for pair in pairs}
    return {
        question_id: (entry["share"], 1 - entry["share"])
        for question_id, entry in entries.items()
        if entry is not None and entry["share"] is not None
    }


def _rate(
    answers: Sequence[ModelAnswers],
    questions: Sequence[Question],
    judging: Judge,
    journal: Journal,
    samples: int,
    concurrency: int,
) -> tuple[Report, dict[str, Any]]:
    if len({part.model for part in answers}) < len(answers):
        raise ValueError("got two files of answers of the same model, expected different names: set them by --models")
    ratings = []
    for part in answers:
        requests = rating_requests(questions, part, samples=samples, sees_order=judging.sees_order)
        entries = collect_judgments(requests, judging, journal, concurrency=concurrency)
        ratings.append(rate(part.model, requests, entries))
    by_model = {
        rating.model: {
            "rating": sum(rating.means.values()) / len(rating.means) if rating.means else None,
            "by_turn": {str(turn): sum(means) / len(means) for turn, means in rating.by_turn().items()},
            "parsed": rating.num_parsed,
            "unparsed": len(rating.unparsed),
        }
        for rating in ratings
    }
    numbers = {"judge": judging.name, "ratings": by_model}
    return Report(f"Ratings by {judging.name}", tables.ratings_of_models(ratings), numbers), numbers
