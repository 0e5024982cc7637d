"""The preference study: blind, shuffled, stored vote by vote, and its shares by hand."""

import io
import json
import re
import subprocess

import pytest

from palm_rlhf.evaluation.judging.answers import pair_answers, read_answers, read_questions
from palm_rlhf.evaluation.judging.journal import Journal
from palm_rlhf.evaluation.judging.study import Person, Vote, count_votes, read_votes, run_study

MODELS = ("alpha", "beta")


@pytest.fixture
def pairs(bench):
    questions, first, second = bench
    return pair_answers(read_questions(questions), read_answers(first), read_answers(second))


class Reader(io.StringIO):
    """Reads the screen, and answers with the place of the answer that `prefers` says, from which models are told."""

    def __init__(self, screen, prefers, leaves_after=10**6):
        super().__init__()
        self.screen, self.prefers, self.left, self.seen = screen, prefers, leaves_after, []

    def readline(self):
        shown = self.screen.getvalue().split("─" * 72)[-1]
        question = re.search(r"Question (\d)", shown).group(1)
        order = re.findall(r"(alpha|beta) says 1", shown)
        self.seen.append((question, order[0]))
        if self.left == 0:
            return "q\n"
        self.left -= 1
        best = self.prefers(question)
        return "t\n" if best is None else f"{'AB'[order.index(best)]}\n"


def sit_down(pairs, path, prefers, **options):
    leaves_after = options.pop("leaves_after", 10**6)
    screen = io.StringIO()
    reader = Reader(screen, prefers, leaves_after)
    with Journal(path) as journal:
        done = run_study(pairs, MODELS, Person(reader, screen), journal, **options)
        return count_votes(read_votes(journal, MODELS)), reader.seen, done, screen.getvalue()


def test_votes_are_for_models_whatever_place_they_were_shown_in(pairs, tmp_path):
    result, seen, done, screen = sit_down(pairs, tmp_path / "votes.jsonl", lambda question: "alpha")
    assert done and (result.overall.wins_1, result.overall.wins_2, result.overall.share_1) == (6, 0, 1.0)
    assert sum(first == "alpha" for _, first in seen) == 3  # each model is shown first as often
    assert [question for question, _ in seen] != sorted(question for question, _ in seen)  # and of the questions
    firsts = [json.loads(line)["choice"] for line in (tmp_path / "votes.jsonl").read_text().splitlines()]
    assert firsts.count("first") == 3  # the mutant that forgets the order gives half of the votes to beta
    assert "1 of 6" in screen and "QUESTION (turn 2)" in screen


def test_the_screen_names_no_model(bench, tmp_path):
    for path in bench[1:]:
        path.write_text(re.sub(r"(alpha|beta) says", "an answer:", path.read_text()))
    questions, first, second = bench
    pairs = pair_answers(read_questions(questions), read_answers(first), read_answers(second))
    screen = io.StringIO()
    with Journal(tmp_path / "votes.jsonl") as journal:
        run_study(pairs, MODELS, Person(io.StringIO("a\nb\nt\ns\na\nb\n"), screen), journal)
    assert "alpha" not in screen.getvalue() and "beta" not in screen.getvalue()
    assert screen.getvalue().count("[a] the first") == 6


def test_a_sitting_goes_on_where_it_stopped(pairs, tmp_path):
    path = tmp_path / "votes.jsonl"
    result, first, done, _ = sit_down(pairs, path, lambda question: "beta", leaves_after=2)
    assert not done and result.overall.votes == 2
    result, second, done, _ = sit_down(pairs, path, lambda question: "beta")
    assert done and (result.overall.votes, result.overall.share_2) == (6, 1.0)
    asked = [question for question, _ in first[:2] + second]
    assert sorted(asked) == sorted({*asked}) and len(asked) == 6
    assert second[0] == first[2]  # the one that was on the screen when they left, in the same order
    assert sit_down(pairs, path, lambda question: "beta")[1] == []


def test_participants_have_orders_of_their_own(pairs, tmp_path):
    path = tmp_path / "votes.jsonl"
    orders = [sit_down(pairs, path, lambda question: "alpha", participant=name)[1] for name in ("ann", "ben")]
    assert orders[0] != orders[1]
    other_seed = sit_down(pairs, tmp_path / "other.jsonl", lambda question: "alpha", participant="ann", seed=1)[1]
    assert other_seed != orders[0]
    with Journal(path) as journal:
        assert count_votes(read_votes(journal, MODELS)).participants == 2
        with pytest.raises(ValueError, match="expected votes on"):
            read_votes(journal, ("alpha", "gamma"))


def test_shares_by_hand():
    votes = [Vote("1", "ann", 1.0), Vote("1", "ben", 0.5), Vote("2", "ann", 0.0), Vote("2", "ben", None)]
    result = count_votes(votes)
    assert (result.overall.share_1, result.overall.share_2) == (0.5, 0.5)
    assert (result.questions["1"].share_1, result.questions["2"].share_1) == (0.75, 0.0)
    assert (result.overall.votes, result.overall.ties, result.skipped, result.participants) == (3, 1, 1, 2)
    assert count_votes([]).overall.share_1 is None


def test_the_shares_that_open_assistant_published():
    """48.3 % v 51.7 % of 7,042 comparisons over 20 questions (Köpf et al. 2023)."""
    votes = [Vote(str(place % 20), str(place), float(place < 3401)) for place in range(7042)]
    result = count_votes(votes)
    assert (round(100 * result.overall.share_1, 1), round(100 * result.overall.share_2, 1)) == (48.3, 51.7)
    assert len(result.questions) == 20
    low, high = result.decided_interval
    assert low < 0.483 < high < 0.5


def test_the_command_asks_stores_and_counts(bench, tmp_path, start_evaluate):
    questions, first, second = bench
    arguments = ["study", "--questions", questions, "--answers", first, second, "--out", tmp_path / "votes.jsonl"]
    process = start_evaluate(*arguments, "--report", tmp_path / "study.html", stdin=subprocess.PIPE)
    output, errors = process.communicate("what?\na\nt\ns\n", timeout=600)  # and then they leave
    assert process.returncode == 0, errors
    assert "got 'what?', expected one of a, b, t, s, q" in output
    result = json.loads(output.splitlines()[-1])
    assert (result["votes"], result["skipped"], result["complete"], result["ties"]) == (2, 1, False, 1)
    assert result["share_1"] in (0.25, 0.75) and result["share_1"] + result["share_2"] == 1
    assert len((tmp_path / "votes.jsonl").read_text().splitlines()) == 3
    assert "alpha" in (tmp_path / "study.html").read_text()


def test_a_person_judges_all_or_only_what_is_doubtful(judge_server, bench, tmp_path, evaluate, monkeypatch):
    questions, first, second = bench
    common = ["judge", "--questions", questions, "--answers", first, second]
    monkeypatch.setattr("sys.stdin", io.StringIO("t\n" * 6))
    result, _ = evaluate(*common, "--judge", "person", "--out", tmp_path / "1.jsonl")
    assert (result["judge"], result["ties"], result["parsed"], result["win_rate"]) == ("person", 6, 6, 0.5)

    def flips_on_one(body):
        content = body["messages"][-1]["content"]
        if "Question 3?" in content:
            return "[[A]]"
        return "[[A]]" if content.index("alpha says") < content.index("beta says") else "[[B]]"

    server = judge_server(flips_on_one)
    rest = ["--judge", server.url, "--model", "gpt", "--method", "verdict", "--out", tmp_path / "2.jsonl"]
    monkeypatch.setattr("sys.stdin", io.StringIO("t\n"))
    result, printed = evaluate(*common, *rest, "--ask-person", "5")
    assert "Question 3?" in printed and "Question 2?" not in printed  # one is doubtful, and only that one is shown
    assert (result["wins"], result["ties"], result["conflict_rate"]) == (7, 1, 1 / 8)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert evaluate(*common, *rest, "--ask-person", "5")[0] == result  # the verdict is stored
