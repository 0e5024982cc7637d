"""The pages of the leaderboard, statistics and rounds."""

import re

import pytest

from palm_rlhf.feedback.learning.round_rows import record_stage
from palm_rlhf.feedback.store.answer_tables import KnownModel
from palm_rlhf.feedback.store.table_base import utc_now
from palm_rlhf.feedback.web.charts import bar_chart, curve_chart
from tests.feedback.comparing import (
    NEW,
    OLD,
    add_answers,
    add_comparison,
    add_models,
    add_round,
    add_vote,
)
from tests.feedback.test_coverage import add_ranking, add_review, add_tree


def words(browser):
    return " ".join(browser.page.main.get_text(" ").split())


def rows(browser):
    return [
        [cell.get_text(" ", strip=True) for cell in row.find_all(["th", "td"])] for row in browser.page.find_all("tr")
    ]


def test_pages_without_any_data(join):
    ann = join("Ann", "moderator")
    for path, text in {
        "/leaderboard": "Nobody has contributed anything in this time.",
        "/statistics": "No two people have judged the same thing yet.",
        "/rounds": "There is no round yet.",
        "/moderator": "Nothing was refused or marked.",
        "/moderator/trees": "There are no such trees.",
        "/moderator/checks": "The database is in order",
    }.items():
        assert ann.open(path).status == 200 and text in words(ann), path


def test_the_leaderboard_by_its_period(join, site):
    ann, bob = join("Ann"), join("<b>Bob</b>")
    with site.store.writing() as session:
        prompt, *_ = add_tree(session, "growing", [True], author=bob.person, at=utc_now())
        add_review(session, prompt, ann.person, at=utc_now())
    ann.open("/leaderboard?window=day")
    assert rows(ann)[1:] == [
        ["1", "<b>Bob</b>", "1", "1", "", "", "", "", "2"],
        ["2", "Ann (you)", "", "", "1", "", "", "", "1"],
    ]
    assert ann.page.select_one(".tabs [aria-current]").get_text() == "Last 24 hours"
    assert ann.open("/leaderboard?window=month").status == 422
    assert "排行榜" in ann.open("/leaderboard?lang=zh").page.get_text()


@pytest.fixture
def judged(site, join):
    """Two people who compared, ranked and labelled the same things, and a third."""
    ann, bob, mod = join("Ann"), join("Bob"), join("Mod", "moderator")
    with site.store.writing() as session:
        add_models(session)
        round_ = add_round(session, 1)
        for number in range(4):
            answers = add_answers(session, round_, f"Why {number}?", ["a", "b"])
            for browser, verdict in ((ann, "left"), (bob, "left" if number else "right")):
                comparison = add_comparison(session, browser.person, *answers, round_=round_)
                add_vote(session, comparison, verdict)
        prompt, *replies = add_tree(session, "growing", [None, None], language="zh")
        for browser, values in ((ann, (0, 1)), (bob, (0, 0))):
            for message, value in zip(replies, values):
                add_review(session, message, browser.person, spam=value)
            add_ranking(session, prompt, browser.person).best_first = [reply.id for reply in replies]
    return ann, bob, mod


def test_statistics_show_agreement_coverage_and_ones_own_reliability(judged):
    ann, _, mod = judged
    ann.open("/statistics")
    agreement = {
        row["data-agreement"]: row.get_text(" ", strip=True).split() for row in ann.page.select("[data-agreement]")
    }
    assert agreement["rankings"][-3:] == ["1.00", "–", "1"]
    assert agreement["votes"][-3:] == ["0.53", "–", "4"]  # from both sides, 1 - 4 / (2 * 8 * 8 / 15)
    assert agreement["spam"][-3:] == ["0.00", "–", "2"] and agreement["lang_mismatch"][-3:] == ["–", "–", "2"]
    done = ann.page.select_one("[data-coverage=reviews] .number").get_text(strip=True)
    assert done == "3 of 3 (100%)"  # of the prompt, which was accepted, and two replies; one review each
    own = [row[0] for row in rows(ann) if row[0] in ("Ann", "Bob")]
    everybody = [row for row in rows(mod.open("/statistics")) if row[0] in ("Ann", "Bob")]
    assert own == ["Ann"] and sorted(row[0] for row in everybody) == ["Ann", "Bob"]
    assert {(row[3], row[4]) for row in everybody} == {("80%", "5")}  # three of four votes, and the ranking
    assert "Chinese" in words(ann) and "中文" in ann.open("/statistics?lang=zh").page.get_text()


def add_finished_round(site, people, num_wins):
    """A round with all its stages and ten blind comparisons, of which the new model wins some."""
    with site.store.writing() as session:
        add_models(session)
        round_ = add_round(session, 1)
        figures = {
            "answers": {"prompts": 4, "answers": 16, "scored": True},
            "votes": {"comparisons": 37, "rankings": 0, "corrections": 0, "new": 21},
            "reward": {"accuracy": 0.75, "low": 0.5, "high": 0.9, "num_pairs": 12},
            "policy": {"steps": [1, 2, 3], "score": [0.0, 0.5, 1.0], "kl": [None, 0.2, 0.4]},
            "model": {"model": NEW, "folder": "/somewhere"},
            "evaluation": {"prompts": 10, "models": [OLD, NEW]},
        }
        for stage, values in figures.items():
            record_stage(session, round_.id, stage, values, utc_now())
        for number in range(10):
            old, new = add_answers(session, round_, f"Why {number}?", ["a", "b"], "evaluation", [OLD, NEW])
            for browser in people:
                comparison = add_comparison(session, browser.person, new, old, "evaluation", round_)
                add_vote(session, comparison, "left" if number < num_wins else "right")
        return add_round(session, 2, base=NEW)


def test_a_round_says_whether_the_model_got_better(site, join):
    ann, bob = join("Ann"), join("Bob")
    add_finished_round(site, [ann, bob], 9)
    second, first = ann.open("/rounds").page.select(".round")
    verdict = first.select_one("[data-verdict]")
    assert verdict["data-verdict"] == "better"
    # both people say the same of each prompt, so that ten prompts count: 9 of 10, by Wilson 60% to 98%
    assert verdict.get_text() == (
        "The new model is better: people preferred it in 90% of 20 blind comparisons (95% interval 60% to 98%)."
    )
    text = " ".join(first.get_text(" ").split())
    assert "18 votes for the new model, 2 for the old one, 0 ties" in text
    assert "right in 75% of 12 held-out votes (95% interval 50% to 90%)" in text
    assert "37 comparisons so far; 21 new contributions in this round" in text
    assert "two people gave the same verdict in 100% of cases (alpha 1.00, on 10 pairs of answers)" in text
    assert [len(curve["points"].split()) for curve in first.select("polyline")] == [3, 2]
    assert "is not finished: the model answers the prompts" in " ".join(second.get_text(" ").split())
    assert not second.select("polyline") and not ann.page.select("[style], style, script:not([src])")
    assert "新模型更好" in ann.open("/rounds?lang=zh").page.get_text()


@pytest.mark.parametrize("num_wins, verdict", [(6, "unclear"), (1, "worse")])
def test_a_round_that_is_no_better_says_so(site, join, num_wins, verdict):
    ann = join("Ann")
    add_finished_round(site, [ann], num_wins)
    shown = ann.open("/rounds").page.select_one("[data-verdict]")
    assert shown["data-verdict"] == verdict
    assert re.search("not shown to be better|is worse", shown.get_text())


def test_the_name_of_a_model_is_text(site, join):
    ann = join("Ann")
    with site.store.writing() as session:
        session.add(KnownModel(id=OLD, name="<script>alert(1)</script>"))
        session.flush()
        add_round(session, 1)
    assert "<script>alert(1)</script>" in words(ann.open("/rounds"))


def test_curves_and_bars_fill_their_picture():
    chart = curve_chart([0, 5, 10], [1.0, None, 3.0])
    assert chart.points == "44.0,120.0 312.0,10.0" and chart.last == (312.0, 10.0)
    assert [tick.label for tick in chart.y_ticks] == ["1", "2", "3"]
    assert [(tick.at, tick.label) for tick in chart.x_ticks] == [(44.0, "0"), (312.0, "10")]
    flat = curve_chart([4], [0.5])
    assert flat.points == "44.0,65.0" and [tick.label for tick in flat.x_ticks] == ["4"]
    rounded = curve_chart([1, 2], [9.6e-9, 5.5])
    assert [tick.label for tick in rounded.y_ticks] == ["0", "2.75", "5.5"]
    assert curve_chart([1], [None]) is None and curve_chart([], []) is None
    bars = bar_chart([("a", 0), ("b", 4), ("c", 2), ("d", 1)])
    assert [(bar.x, bar.height, bar.y) for bar in bars] == [
        (0, 0, 120),
        (80, 110, 10),
        (160, 55, 65),
        (240, 27.5, 92.5),
    ]
    assert [bar.height for bar in bar_chart([("a", 0)])] == [0]
