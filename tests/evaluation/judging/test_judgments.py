"""Judges behind a real server: both orders, every failure, and that no judgment is paid for twice."""

import json
import os
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from palm_rlhf.evaluation.comparisons import summarise
from palm_rlhf.evaluation.judging.answers import Pair, Question, pair_answers, read_answers, read_questions
from palm_rlhf.evaluation.judging.chat_judge import ChatJudge, completions_url, parse_retry_after, retry_delay
from palm_rlhf.evaluation.judging.journal import Journal
from palm_rlhf.evaluation.judging.judgments import collect_judgments, compare, pairwise_requests, rate, rating_requests

PATIENCE = 300  # seconds: on a busy machine a process may take a minute to start
QUALITY = {"alpha": 9, "beta": 6}


def shown(body):
    """The models whose answers a request shows, in that order."""
    return re.findall(r"(alpha|beta) says", body["messages"][-1]["content"])


def fair(body):
    first, *_, second = shown(body)
    return f"{QUALITY[first]} {QUALITY[second]}\nBecause."


def first_is_better(body):
    return "9 5\nIt comes first."


def read_pairs(bench):
    questions, first, second = bench
    return pair_answers(read_questions(questions), read_answers(first), read_answers(second))


def judged(server, bench, path, *, method="scores", samples=1, concurrency=4, **options):
    """All judgments of the two models, as requests and what they come to."""
    options = {"backoff": 0, "timeout": PATIENCE} | options
    requests = pairwise_requests(read_pairs(bench), ("alpha", "beta"), method, samples=samples)
    with Journal(path) as journal:
        entries = collect_judgments(requests, ChatJudge(server.url, "gpt", **options), journal, concurrency=concurrency)
    return compare(requests, entries)


def test_every_turn_is_judged_in_both_orders(judge_server, bench, tmp_path):
    server = judge_server(fair)
    comparisons, unparsed = judged(server, bench, tmp_path / "judgments.jsonl")
    assert len(server.calls) == 2 * (4 + 2 * 2)  # four questions of one turn and two of two, in two orders
    orders = [shown(body)[0] for body in server.calls]
    assert orders.count("alpha") == orders.count("beta") == 8
    summary = summarise(comparisons, "alpha", "beta")
    assert (summary.wins, summary.losses, summary.conflict_rate) == (8, 0, 0)
    assert (summary.score_1, summary.score_2) == (8 * 9.0, 8 * 6.0)
    assert unparsed == []
    assert {comparison.category for comparison in comparisons} == {"easy", "hard"}


def test_a_judge_of_positions_gives_ties_and_conflicts(judge_server, bench, tmp_path):
    comparisons, _ = judged(judge_server(first_is_better), bench, tmp_path / "judgments.jsonl")
    summary = summarise(comparisons, "alpha", "beta")
    assert (summary.wins, summary.losses, summary.ties, summary.conflict_rate) == (0, 0, 8, 1.0)
    assert (summary.score_1, summary.score_2) == (8 * 7.0, 8 * 7.0)
    # The mutants: who forgets the second order, or to turn its scores around, sees eight wins.
    only_first = [c.__class__(c.question_id, c.given, ()) for c in comparisons]
    assert summarise(only_first, "alpha", "beta").wins == 8
    not_turned = [c.__class__(c.question_id, c.given, tuple(s[::-1] for s in c.swapped)) for c in comparisons]
    assert summarise(not_turned, "alpha", "beta").wins == 8


def test_samples_are_different_requests_and_their_mean_counts(judge_server, bench, tmp_path):
    lock, turns = threading.Lock(), {}

    def vary(body):
        key = json.dumps(body["messages"])
        with lock:
            turns[key] = turns.get(key, 0) + 1
            number = turns[key]
        first = shown(body)[0]
        return f"Evidence.\n{number} 2" if first == "alpha" else f"Evidence.\n2 {number}"

    server = judge_server(vary)
    comparisons, _ = judged(server, bench, tmp_path / "judgments.jsonl", method="evidence", samples=3, temperature=1)
    assert len(server.calls) == 3 * 16
    assert all(comparison.scores == ((1 + 2 + 3) / 3, 2.0) for comparison in comparisons)
    assert {body.get("seed") for body in server.calls} == {None, 1, 2}
    assert {body["temperature"] for body in server.calls} == {1.0}


def test_unparsable_judgments_are_stored_counted_and_not_asked_again(judge_server, bench, tmp_path):
    def garbage_about_two(body):
        return "I cannot say." if "Question 2?" in body["messages"][-1]["content"] else fair(body)

    server = judge_server(garbage_about_two)
    comparisons, unparsed = judged(server, bench, tmp_path / "judgments.jsonl")
    assert [(text.question_id, text.text) for text in unparsed] == [("2", "I cannot say.")] * 2
    summary = summarise(comparisons, "alpha", "beta")
    assert (summary.parsed, summary.unparsed, summary.questions) == (14, 2, 7)
    assert judged(server, bench, tmp_path / "judgments.jsonl")[1] == unparsed
    assert len(server.calls) == 16  # they are paid for


@pytest.mark.parametrize("method, text", [("verdict", "So: [[A]]"), ("scores", "8 7"), ("evidence", "So:\n8 7")])
def test_each_method_reads_its_own_form(judge_server, bench, tmp_path, method, text):
    comparisons, unparsed = judged(judge_server(lambda body: text), bench, tmp_path / "judgments.jsonl", method=method)
    assert unparsed == [] and all(comparison.conflicts for comparison in comparisons)


def test_failures_that_may_pass_are_asked_again(judge_server, bench, tmp_path):
    server = judge_server(fair)
    server.plans = [
        {"status": 500},
        {"status": 429, "headers": {"Retry-After": "0"}},
        {"raw": b"no json"},
        {"raw": b'{"choices": []}'},
        {"raw": b'{"choices": [{"message": 5}]}'},
        {"raw": b'{"choices": [{"message": {"content": 5}}]}'},
        {"raw": b"[" * 100_000},
        {"status": 503},
    ]
    num_plans = len(server.plans)
    comparisons, unparsed = judged(server, bench, tmp_path / "judgments.jsonl", concurrency=2, retries=num_plans)
    assert len(server.attempts) == 16 + num_plans and len(server.calls) == 16
    assert summarise(comparisons, "alpha", "beta").parsed == 16 and unparsed == []


def test_a_server_that_hangs_is_asked_again(judge_server, bench):
    server = judge_server(fair)
    server.plans = [{"hang": True}]
    request = pairwise_requests(read_pairs(bench), ("alpha", "beta"), "scores")[0]
    # On a busy machine other attempts may take longer than the timeout as well, but hardly all.
    reply = ChatJudge(server.url, "gpt", backoff=0, timeout=0.5, retries=100)(request)
    assert reply.text == fair(server.calls[0]) and len(server.attempts) > 1


def test_a_reply_in_parts_is_its_texts(judge_server, bench):
    server = judge_server(fair)
    request = pairwise_requests(read_pairs(bench), ("alpha", "beta"), "scores")[0]
    thought, said = {"type": "thinking", "thinking": "1 2"}, {"type": "text", "text": "9 8\n"}
    for content, expected in (
        ([thought, said, {"type": "text", "text": "So."}], "9 8\nSo."),
        ([thought], ""),
        (None, ""),
        ("\ud83d", "?"),  # half a character, which no terminal and no file could show
    ):
        server.plans = [{"raw": json.dumps({"choices": [{"message": {"content": content}}]}).encode()}]
        assert ChatJudge(server.url, "gpt", retries=0)(request).text == expected


def test_a_judgment_that_was_changed_since_is_refused_before_any_is_asked_for(judge_server, bench, tmp_path):
    server, path = judge_server(fair), tmp_path / "judgments.jsonl"
    judged(server, bench, path)
    lines = path.read_text().splitlines()
    for change in ({"text": None}, {"text": 5}, {"scores": [1]}, {"scores": [1, "2"]}, {"scores": 3}):
        path.write_text("\n".join([*lines[1:5], json.dumps(json.loads(lines[0]) | change), ""]))
        with pytest.raises(ValueError, match=r"judgments\.jsonl: got a damaged judgment under the key"):
            judged(server, bench, path)
    assert len(server.calls) == 16


def test_a_retry_waits_as_long_as_the_server_asks_and_no_longer_than_the_run(judge_server, bench):
    server = judge_server(fair)
    request = pairwise_requests(read_pairs(bench), ("alpha", "beta"), "scores")[0]
    server.plans = [{"status": 429, "headers": {"Retry-After": "0.4"}}]
    started = time.monotonic()
    assert ChatJudge(server.url, "gpt", backoff=0)(request).text == fair(server.calls[0])
    assert time.monotonic() - started >= 0.4  # a wait may be longer on a busy machine, but never shorter

    server.plans = [{"status": 429, "headers": {"Retry-After": "60"}}]
    judge = ChatJudge(server.url, "gpt")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(judge, request)
        judge.stop()  # a run that ends does not wait a minute
        with pytest.raises(ConnectionError, match="HTTP 429"):
            waiting.result(timeout=PATIENCE)


def test_requests_go_out_together(judge_server, bench, tmp_path):
    server = judge_server(fair)
    server.barrier = threading.Barrier(8)  # no request is answered until eight are there
    comparisons, _ = judged(server, bench, tmp_path / "judgments.jsonl", concurrency=8)
    assert summarise(comparisons, "alpha", "beta").parsed == 16


@pytest.mark.parametrize("status, error", [(400, ConnectionError), (401, PermissionError), (302, ConnectionError)])
def test_a_refusal_is_not_asked_again_and_keeps_what_came(judge_server, bench, tmp_path, status, error):
    server, path = judge_server(fair), tmp_path / "judgments.jsonl"
    server.plans = [{}, {}, {"status": status, "headers": {"Location": f"{server.url}/elsewhere"}}]
    with pytest.raises(error, match=f"HTTP {status}"):
        judged(server, bench, path, concurrency=1)
    assert len(server.attempts) == 3 and len(path.read_text().splitlines()) == 2
    judged(server, bench, path)
    assert len(server.calls) == 16  # two before, and the fourteen that were left


def test_a_judge_that_stays_away_ends_the_run_soon(judge_server, bench, tmp_path):
    server, path = judge_server(fair), tmp_path / "judgments.jsonl"
    server.plans = [{}, *({"status": 500} for _ in range(100))]
    with pytest.raises(ConnectionError, match="did not answer after 3 attempts: HTTP 500"):
        judged(server, bench, path, concurrency=2, retries=2)
    assert len(server.attempts) < 20
    server.plans = []
    judged(server, bench, path)
    assert len(server.calls) == 16


def test_the_key_is_sent_and_only_when_it_is_given(judge_server, bench, tmp_path):
    server = judge_server(fair)
    judged(server, bench, tmp_path / "1.jsonl", api_key="secret")
    assert set(server.keys) == {"Bearer secret"}
    server.keys.clear()
    judged(server, bench, tmp_path / "2.jsonl")
    assert set(server.keys) == {None}
    assert "secret" not in (tmp_path / "1.jsonl").read_text()


def test_another_model_prompt_or_answer_is_another_judgment(judge_server, bench, tmp_path):
    server, path = judge_server(fair), tmp_path / "judgments.jsonl"
    judged(server, bench, path)
    judged(server, bench, path, method="evidence")
    assert len(server.calls) == 32
    judged(server, bench, path, temperature=0.5)
    assert len(server.calls) == 48
    bench[1].write_text(bench[1].read_text().replace("alpha says 1-0", "alpha says otherwise"))
    judged(server, bench, path)
    assert len(server.calls) == 50  # only the question whose answer changed, in both orders
    judged(judge_server(fair), bench, path)  # the same judge at another address
    assert len(server.calls) == 50


@pytest.mark.slow(5)
def test_a_killed_run_goes_on_and_pays_nothing_twice(judge_server, bench, tmp_path, start_evaluate):
    enough, path = threading.Event(), tmp_path / "judgments.jsonl"

    def count(body):
        if len(server.calls) >= 6:
            enough.set()
            server.closing.wait()  # the rest of the requests of this process stay without an answer
        return fair(body)

    server = judge_server(count)
    questions, first, second = bench
    arguments = ["judge", "--questions", questions, "--answers", first, second, "--out", path, "--model", "gpt"]
    process = start_evaluate(*arguments, "--judge", server.url, "--concurrency", "1")
    assert enough.wait(PATIENCE), process.stderr.read() if process.poll() is not None else "it asks too little"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    stored = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(stored) == len(server.calls) == 6

    path.write_bytes(path.read_bytes() + b'{"key": "tor')  # as if the kill had come in the middle of a line
    again = judge_server(fair)
    process = start_evaluate(*arguments, "--judge", again.url)
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    assert len(again.calls) == 16 - 6
    asked = [json.dumps(body["messages"]) for body in server.calls + again.calls]
    assert len(asked) == len({*asked}) == 16
    assert json.loads(output.splitlines()[-1])["parsed"] == 16


def test_one_journal_has_one_writer(bench, tmp_path):
    with Journal(tmp_path / "judgments.jsonl"):
        with pytest.raises(BlockingIOError, match="another process"):
            Journal(tmp_path / "judgments.jsonl")
    Journal(tmp_path / "judgments.jsonl").__exit__()


def test_single_answers_are_rated_turn_by_turn(judge_server, bench, tmp_path):
    def by_turn(body):
        content = body["messages"][-1]["content"]
        if "Question 1?" in content:
            return "no rating"
        return "Rating: [[8]]" if "And then" not in content else "Rating: [[5]]"

    server = judge_server(by_turn)
    questions, answers = read_questions(bench[0]), read_answers(bench[1])
    requests = rating_requests(questions, answers, samples=2)
    with Journal(tmp_path / "ratings.jsonl") as journal:
        ratings = rate("alpha", requests, collect_judgments(requests, ChatJudge(server.url, "gpt"), journal))
    assert len(server.calls) == 16
    assert ratings.by_turn() == {1: [8.0] * 5, 2: [5.0] * 2}
    assert ratings.num_parsed == 14 and [text.question_id for text in ratings.unparsed] == ["1", "1"]


def test_the_command_compares_rates_and_writes_annotations(judge_server, bench, tmp_path, evaluate):
    server = judge_server(lambda body: "[[7]]" if len({*shown(body)}) == 1 else fair(body))
    questions, first, second = bench
    common = ["--questions", questions, "--answers", first, second, "--judge", server.url, "--model", "gpt"]
    annotations = tmp_path / "annotations.json"
    result, _ = evaluate("judge", *common, "--out", tmp_path / "1.jsonl", "--annotations", annotations)
    assert (result["wins"], result["losses"], result["conflict_rate"], result["win_rate"]) == (8, 0, 0, 1.0)
    assert evaluate("alpaca", annotations)[0]["n_losses"] == 6
    assert [row["generator_1"] for row in json.loads(annotations.read_text())] == ["alpha"] * 6
    again = ["--out", tmp_path / "1.jsonl", "--annotations", annotations]  # of the same judgments, written over
    assert evaluate("judge", *common, *again)[0] == result
    annotations.write_text('{"mine": 1}\n')
    with pytest.raises(ValueError, match=r"annotations\.json exists and holds no annotations"):
        evaluate("judge", *common, *again)
    assert annotations.read_text() == '{"mine": 1}\n'

    result, _ = evaluate("judge", "--method", "rating", *common, "--out", tmp_path / "2.jsonl")
    expected = {"rating": 7.0, "by_turn": {"1": 7.0, "2": 7.0}, "parsed": 8, "unparsed": 0}
    assert result["ratings"] == {"alpha": expected, "beta": expected}


@pytest.mark.parametrize(
    "url, expected",
    [
        ("http://127.0.0.1:18888", "http://127.0.0.1:18888/v1/chat/completions"),
        ("http://127.0.0.1:18888/", "http://127.0.0.1:18888/v1/chat/completions"),
        ("https://host/v1/", "https://host/v1/chat/completions"),
        ("https://host/api/v3/chat/completions", "https://host/api/v3/chat/completions"),
        ("https://host/v1?version=2", "https://host/v1/chat/completions?version=2"),
    ],
)
def test_addresses(url, expected):
    assert completions_url(url) == expected


@pytest.mark.parametrize("url", ["ftp://host/v1", "http://", "judge", "file:///etc/passwd"])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(ValueError, match="expected one such as"):
        completions_url(url)


def test_delays_double_and_obey_the_server():
    for attempt in range(12):
        assert min(2.0**attempt, 60) / 2 <= retry_delay(attempt, None, 1.0) <= min(2.0**attempt, 60)
    assert retry_delay(0, 7.0, 1.0) == 7.0
    assert retry_delay(0, 1e9, 1.0) == 60.0
    assert retry_delay(0, -5.0, 1.0) == 0.0
    assert retry_delay(3, None, 0) == 0.0
    assert parse_retry_after("2.5") == 2.5
    assert parse_retry_after("Thu, 01 Jan 1970 00:01:40 GMT", now=40.0) == 60.0
    assert parse_retry_after("soon") is None and parse_retry_after(None) is None


def test_wrong_numbers_are_refused(bench, tmp_path):
    with pytest.raises(ValueError, match="samples"):
        pairwise_requests(read_pairs(bench), ("a", "b"), "scores", samples=0)
    with pytest.raises(ValueError, match="rating"):
        pairwise_requests(read_pairs(bench), ("a", "b"), "rating")
    with Journal(tmp_path / "j.jsonl") as journal, pytest.raises(ValueError, match="concurrency"):
        collect_judgments([], ChatJudge("http://localhost", "m"), journal, concurrency=0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--judge", "http://127.0.0.1:9"], "no model"),
        (["--judge", "nowhere"], "no folder"),
        (["--judge", "http://127.0.0.1:9", "--model", "m", "--api-key-env", "NO_SUCH_KEY"], "NO_SUCH_KEY"),
        (["--judge", "person", "--method", "rating"], "single answers"),
        (["--judge", "person", "--models", "x", "x"], "two models called"),
        (["--judge", "person", "--models", "x"], "1 names for 2"),
        (["--judge", "person", "--model", "m"], "a person has no model"),
        (["--judge", "person", "--samples", "2"], "asked once"),
        (["--judge", "person", "--ask-person", "-1"], "got ask_person -1"),
        (["--judge", "http://127.0.0.1:9", "--model", "m", "--retries", "-1"], "retries=-1"),
        (["--judge", "http://127.0.0.1:9", "--model", "m", "--backoff", "-1"], "backoff=-1"),
        (["--judge", "http://127.0.0.1:9", "--model", "m", "--timeout", "0"], "timeout=0"),
        (["--judge", "folder", "--api-key-env", "KEY"], "for a server"),
        (["--judge", "http://127.0.0.1:9", "--model", "m", "--template", "oasst"], "for a model in a folder"),
        (["--judge", "http://127.0.0.1:9", "--model", "m", "--samples", "2", "--temperature", "0"], "be the same"),
    ],
)
def test_the_command_says_what_is_missing(bench, tmp_path, evaluate, arguments, message):
    questions, first, second = bench
    with pytest.raises((ValueError, OSError), match=message):
        evaluate("judge", "--questions", questions, "--answers", first, second, "--out", tmp_path / "o", *arguments)


def test_pairs_need_all_answers():
    question = Question("1", ("a?", "b?"))
    with pytest.raises(ValueError, match="one for each turn"):
        pair_answers([question], answers("x", ("1",)), answers("y", ("1", "2")))
    assert pair_answers([question], answers("x", ("1", "2")), answers("y", ("1", "2", "3"))) == [
        Pair(question, ("1", "2"), ("1", "2"))
    ]


def answers(model, turns):
    from palm_rlhf.evaluation.judging.answers import ModelAnswers

    return ModelAnswers(model, {"1": turns})


def test_the_options_reach_the_server(judge_server, bench, tmp_path, evaluate, monkeypatch):
    server = judge_server(fair)
    monkeypatch.setitem(os.environ, "JUDGE_KEY", "abc")
    questions, first, second = bench
    common = ["--questions", questions, "--answers", first, second, "--judge", server.url, "--model", "gpt"]
    evaluate("judge", *common, "--out", tmp_path / "1.jsonl", "--api-key-env", "JUDGE_KEY")
    assert set(server.keys) == {"Bearer abc"}
    assert {body["max_tokens"] for body in server.calls} == {1024}
    evaluate("judge", *common, "--out", tmp_path / "2.jsonl", "--max-tokens", "0", "--temperature", "1")
    last = server.calls[-1]
    assert "max_tokens" not in last and last["temperature"] == 1 and last["model"] == "gpt"
