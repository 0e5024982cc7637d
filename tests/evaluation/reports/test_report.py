"""The page: it needs nothing but itself, says what the JSON says, and loses nothing."""

import json
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palm_rlhf.evaluation.reports.plots import BarPlot, Line, LinePlot, draw, nice_ticks
from palm_rlhf.evaluation.reports.report import (
    Report,
    Table,
    as_text,
    merge_reports,
    read_report,
    render,
    shown,
    write_report,
)

TABLE = Table("A <table>", ("name", "value"), (("<script>alert(1)</script>", 1.5), ("none", None)), "A & note")
LINES = LinePlot("Lines", "step", "KL", (Line("kl", ((1.0, 0.5), (2.0, 0.75)), ((0.4, 0.6), (0.7, 0.8))),))
BARS = BarPlot("Bars", "win rate", ("a", "b<"), (0.25, 0.5), ((0.1, 0.4), None))
REPORT = Report("Title & more", (TABLE, LINES, BARS), {"x": 1.5, "nothing": float("nan")})


class Page(HTMLParser):
    """The elements of a page with their attributes, its texts, and whether all that opens closes in order."""

    VOID = frozenset({"meta", "link", "img", "br"})

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.texts.append(text)


def test_the_page_needs_nothing_but_itself():
    page = Page(render(REPORT))
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "img", "iframe", "object", "image", "use")
        assert not {"src", "href", "srcset", "data", "action"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
    text = render(REPORT)
    assert not re.search(r"https?:|url\(|@import|//", text)
    policies = [a["content"] for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_what_texts_say_stays_text():
    page = Page(render(REPORT))
    assert "<script>alert(1)</script>" in page.texts and "Title & more" in page.texts and "A & note" in page.texts
    assert [a["aria-label"] for t, a in page.elements if t == "svg"] == ["Lines", "Bars"]


@settings(max_examples=40)
@given(st.text(max_size=30), st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5))
def test_any_text_and_numbers_make_a_whole_page(text, numbers):
    points = tuple((float(place), number) for place, number in enumerate(numbers))
    sections = (
        Table(text, (text, "n"), tuple((text, number) for number in numbers)),
        LinePlot(text, text, text, (Line(text, points), Line("other", points))),
        BarPlot(text, text, (text,) * len(numbers), tuple(numbers)),
    )
    page = Page(render(Report(text, sections, {})))
    for _, attributes in page.elements:
        for name in ("cx", "cy", "x", "y", "x1", "y1", "height", "width"):
            if re.fullmatch(r"-?[\d.]+", attributes.get(name) or ""):
                assert -1 <= float(attributes[name]) <= 641


def test_points_stand_where_their_numbers_say():
    svg = draw(LinePlot("t", "x", "y", (Line("l", ((0.0, 0.0), (5.0, 5.0), (10.0, 10.0))),)))
    (x1, y1), (x2, y2), (x3, y3) = (
        map(float, p.split(",")) for p in re.search(r'polyline points="([^"]+)"', svg)[1].split()
    )
    assert x1 < x2 < x3 and y1 > y2 > y3  # up is less on a screen
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.02) and y1 - y2 == pytest.approx(y2 - y3, abs=0.02)
    heights = re.findall(r'height="([\d.]+)" fill', draw(BarPlot("t", "y", ("a", "b"), (1.0, 2.0))))
    assert float(heights[1]) == pytest.approx(2 * float(heights[0]), abs=0.05)
    assert "no data" in draw(LinePlot("t", "x", "y", ())) and "no data" in draw(BarPlot("t", "y", (), ()))


@settings(max_examples=80)
@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_round_and_hold_the_range(low, width):
    high = low + width
    if high <= low:
        return
    ticks = nice_ticks(low, high)
    tolerance = 1e-6 * (ticks[1] - ticks[0]) + 1e-9 * abs(low)
    assert ticks[0] <= low + tolerance and ticks[-1] >= high - tolerance and 3 <= len(ticks) <= 14
    with pytest.raises(ValueError, match="finite"):
        nice_ticks(0.0, float("inf"))


def test_the_json_beside_it_is_the_same_report(tmp_path):
    beside = write_report(REPORT, tmp_path / "deep" / "page.html")
    assert beside == tmp_path / "deep" / "page.json"
    assert json.loads(beside.read_text())["results"] == {"x": 1.5, "nothing": None}
    assert read_report(beside).sections == REPORT.sections
    assert render(read_report(beside)) == (tmp_path / "deep" / "page.html").read_text()
    write_report(REPORT, tmp_path / "deep" / "page.html")  # a report may be written again


def test_no_other_file_is_lost(tmp_path):
    (tmp_path / "annotations.json").write_text("[1]")
    with pytest.raises(ValueError, match="would overwrite"):
        write_report(REPORT, tmp_path / "annotations.html")
    assert (tmp_path / "annotations.json").read_text() == "[1]" and not (tmp_path / "annotations.html").exists()
    (tmp_path / "mine.html").write_text("<p>mine</p>")
    with pytest.raises(ValueError, match=r"mine\.html exists and is no report"):
        write_report(REPORT, tmp_path / "mine.html")
    assert (tmp_path / "mine.html").read_text() == "<p>mine</p>"
    with pytest.raises(ValueError, match=r"does not end in \.json"):
        write_report(REPORT, tmp_path / "page.json")


def test_reports_go_on_one_page(tmp_path, write_lines, evaluate):
    reviews = write_lines(tmp_path / "r.jsonl", [{"question_id": 1, "text": "9 8", "score": [9, 8]}])
    evaluate("reviews", reviews, "--models", "x", "y", "--report", tmp_path / "a.html")
    evaluate("reviews", reviews, "--models", "x", "z", "--report", tmp_path / "b.html")
    result, _ = evaluate("report", tmp_path / "a.json", tmp_path / "b.json", "--out", tmp_path / "all.html")
    assert set(result) == {"Reviews of x and y", "Reviews of x and z"}
    page = (tmp_path / "all.html").read_text()
    assert "Reviews of x and y: Summary" in page and "Reviews of x and z: Outcomes" in page
    with pytest.raises(ValueError, match="expected different titles"):
        merge_reports("t", [REPORT, REPORT])
    with pytest.raises(ValueError, match="is no report"):
        read_report(reviews)


@pytest.mark.parametrize(
    "value, expected",
    [
        (None, "–"),
        (True, "yes"),
        (12345, "12,345"),
        (664.0, "664"),
        (1.0129672, "1.013"),
        (1234.56, "1,234.6"),
        (0.000123456, "0.0001235"),
        ("text", "text"),
    ],
)
def test_numbers_for_people(value, expected):
    assert shown(value) == expected


def test_a_table_for_the_terminal():
    lines = as_text(TABLE).splitlines()
    assert lines[0] == "A <table>" and lines[-1] == "A & note"
    assert lines[1].split() == ["name", "value"] and lines[2].endswith("1.5") and lines[3].endswith("–")
    assert len({len(line) for line in lines[1:-1]}) == 1
