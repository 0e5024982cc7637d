"""What cleaning mends: HTML, debris of buttons and turns; what it must leave alone."""

import re
from collections import Counter

import pytest
from bs4 import BeautifulSoup
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from palm_rlhf.data.curation.cleaning import mend_turns, to_markdown
from palm_rlhf.data.curation.copied_buttons import without_copied_buttons
from palm_rlhf.data.curation.html_to_markdown import html_to_markdown
from palm_rlhf.data.curation.page_detection import are_pages

CODE = """<div class="markdown prose w-full break-words dark:prose-invert light">
<p>Use <code>my_name</code> &amp; 2*3*4:</p>
<pre><div class="bg-black mb-4 rounded-md"><div class="flex items-center"><span class="">{above}</span>
<button class="flex ml-auto gap-2"><svg viewBox="0 0 24 24"><title>Icon</title></svg>Copy code</button></div>
<div class="p-4 overflow-y-auto"><code class="{classes}"><span class="hljs-keyword">if</span> a_b &lt; <span>3</span>:
    <span class="hljs-built_in">print</span>(a_b)

    x = <span>1</span>
</code></div></div></pre><p>Done.</p></div>"""
FORMULA = (
    '<span class="katex"><span class="katex-mathml"><math><semantics><mi>x</mi><annotation '
    'encoding="application/x-tex">x^2</annotation></semantics></math></span><span class="katex-html">x2</span></span>'
)

MATHML = '<math><semantics><mi>x</mi><annotation encoding="application/x-tex">x^2</annotation></semantics></math>'


def talk(*turns):
    """`talk("u: Hi", "a: Hello")` is a conversation."""
    roles = {"u": "user", "a": "assistant", "s": "system"}
    return {"messages": [{"role": roles[turn[0]], "content": turn[2:].strip()} for turn in turns]}


@pytest.mark.parametrize(
    "above, classes, language",
    [
        ("python", "!whitespace-pre hljs language-python", "python"),
        ("", "hljs language-c++", "c++"),
        ("python", "!whitespace-pre", "python"),
        ("", "", ""),
        ("A sentence, no language", "", ""),
    ],
)
def test_code_keeps_its_language_and_its_lines(above, classes, language):
    code = "if a_b < 3:\n    print(a_b)\n\n    x = 1"
    expected = f"Use `my_name` & 2*3*4:\n\n```{language}\n{code}\n```\n\nDone."
    assert html_to_markdown(CODE.format(above=above, classes=classes)) == expected


@pytest.mark.parametrize(
    "html, expected",
    [
        ("<p>a<br>b</p><p>c</p>", "a  \nb\n\nc"),
        ("<h2>Title</h2><p><strong>bold</strong> <em>italic</em></p>", "## Title\n\n**bold** *italic*"),
        ("<ol><li><p>one</p></li><li><p>two</p><ul><li>deep</li></ul></li></ol>", "1. one\n2. two\n\n   - deep"),
        ('<p><a href="https://x.org/a_b">link</a></p>', "[link](https://x.org/a_b)"),
        (
            "<table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td>1</td><td>2</td></tr></tbody></table>",
            "| a | b |\n| --- | --- |\n| 1 | 2 |",
        ),
        ("<pre><code>a ``` b</code></pre>", "````\na ``` b\n````"),
        ("<pre><code>\n</code></pre><p>b</p>", "b"),
        (f"<p>So {FORMULA} is</p>", "So $x^2$ is"),
        (f'<p>So</p><span class="katex-display">{FORMULA}</span>', "So\n\n$$x^2$$"),
        ("<p>a<script>alert(1)</script><style>p {}</style><svg><text>icon</text></svg><button>Run</button>b</p>", "ab"),
        ("<p>never closed <button>Copy", "never closed Copy"),
        ("<p>&lt;button&gt; stays</p>", "<button> stays"),
        # What stands above and below the line, in Unicode where that has it.
        ("<p>3 × 10<sup>8</sup>, 10<sup>-3</sup>, H<sub>2</sub>O</p>", "3 × 10⁸, 10⁻³, H₂O"),
        ("<p>the 1<sup>st</sup>, x<sub>max</sub></p>", "the 1<sup>st</sup>, x<sub>max</sub>"),
        ("<p>2<sup>3<sup>2</sup></sup></p>", "2<sup>3²</sup>"),
        ("<pre><code>10<sup>8</sup></code></pre>", "```\n10⁸\n```"),
        ("<h2>10<sup>8</sup></h2>", "## 10⁸"),
        # Formulas of other kinds, and of a display.
        ('<p>So <script type="math/tex">x^2</script></p>', "So $x^2$"),
        ('<script type="math/tex; mode=display">x^2</script>', "$$x^2$$"),
        (f"<p>So {MATHML}</p>", "So $x^2$"),
        (f"<p>So {MATHML.replace('<math', '<math display=' + chr(34) + 'block' + chr(34))}</p>", "So $$x^2$$"),
        # Other marks.
        ("<p><del>a</del> <kbd>Ctrl</kbd> <code>a `b`</code></p>", "~~a~~ `Ctrl` `` a `b` ``"),
        ("<ul><li><input type=checkbox checked> a</li><li><input type=checkbox>b</li></ul>", "- [x] a\n- [ ] b"),
        ("<dl><dt>Term</dt><dd>What it is</dd></dl>", "Term\n:   What it is"),
        ('<p><img src="a.png" alt="A cat"></p>', "![A cat](a.png)"),
        (
            "<ol start=3><li>a<pre><code class=language-c>x\n\ny</code></pre></li></ol>",
            "3. a\n\n   ```c\n   x\n\n   y\n   ```",
        ),
        ("<pre>a<br>b</pre>", "```\na\nb\n```"),
    ],
)
def test_html_becomes_markdown(html, expected):
    assert html_to_markdown(html) == expected


PAGE = '<div class="markdown prose w-full break-words dark:prose-invert light"><p>Hi</p></div>'
BUBBLE = '<div class="min-h-[20px] whitespace-pre-wrap">Hi</div>'
TABLE = "<table><thead><tr><th>a</th></tr></thead><tbody><tr><td>1</td></tr></tbody></table>"
CARD = '<div class="card">\n  <h2>Title</h2>\n  <p>Text</p>\n</div>'


CELLS = {
    "a|b": "a|b",
    "<code>x||y</code>": "<code>x||y</code>",
    "one<br>two": "one<br>two",
    "<p>one</p><p>two</p>": "one<br>two",
    "<ul><li>one</li><li>two</li></ul>": "- one<br>- two",
    "<pre><code>a|b\nc</code></pre>": "<code>a|b</code><br><code>c</code>",
    "10<sup>8</sup>": "10⁸",
    "<strong>a|b</strong>": "<strong>a|b</strong>",
    "$|x|$": "$|x|$",
}


@pytest.mark.parametrize("cell", CELLS)
def test_a_table_has_the_same_cells_when_it_is_rendered_again(cell):
    rows = f"<thead><tr><th>{cell}</th><th>b</th></tr></thead><tbody><tr><td>c</td><td>{cell}</td></tr></tbody>"
    html = f"<table>{rows}</table>"
    rendered = MarkdownIt("commonmark", {"html": True}).enable("table").render(html_to_markdown(html))
    rows = BeautifulSoup(rendered, "html.parser").find_all("tr")
    cells = [[found.decode_contents().replace("<br/>", "<br>") for found in row.find_all(["th", "td"])] for row in rows]
    assert cells == [[CELLS[cell], "b"], ["c", CELLS[cell]]]


def test_columns_that_are_joined_keep_their_places():
    html = "<table><thead><tr><th>a</th><th>b</th></tr></thead><tr><td colspan=2>both</td></tr></table>"
    assert html_to_markdown(html) == "| a | b |\n| --- | --- |\n| both | |"


@pytest.mark.parametrize(
    "turns, expected",
    [
        # A chat's page names itself, whatever is asked.
        (["u: Hi", f"a: {PAGE}"], "uA"),
        (["u: Some HTML, please", f"a: {PAGE}", "u: <p>Fix it</p>", "a: ok"], "uAua"),
        ([f"u: {BUBBLE}", f"a: {PAGE}"], "UA"),
        (["u: An HTML page", 'a: <div data-message-author-role="assistant"><b>Hi</b></div>'], "uA"),
        ([f"u: <div>2 / 2</div>{PAGE}", f"a: <div><span>1 / 3</span></div>{PAGE}"], "UA"),
        # What Markdown is rendered to, in all replies and not asked for.
        (["u: Hi", "a: <p>Hello</p>\n<p>there</p>"], "uA"),
        (["u: Hi", "a: <div><p>Hello</p></div>", "u: And?", "a: <ol start='2'><li>x</li></ol>"], "uAuA"),
        (["u: Hi", f"a: <p>So:</p>{TABLE}"], "uA"),
        (["u: Hi", f"a: {TABLE}"], "ua"),
        (["u: A list", "a: <ul><li>a</li></ul>"], "ua"),
        (["u: Hi", "a: <p>Hello</p>", "u: And?", "a: Plain **text**"], "uaua"),
        (["u: Hi", "a: <p>Hello</p>", "u: And?", "a: ```html\n<p>Hi</p>\n```"], "uaua"),
        (["u: Write this in HTML", "a: <p>Hello</p>"], "ua"),
        (["s: Answer in HTML.", "u: Hi", "a: <p>Hello</p>"], "sua"),
        (["u: What does <b> do?", "a: <p>Bold</p>"], "ua"),
        # ... unless only a renderer writes so.
        (["u: Some HTML", "a: <p>So:</p><pre><code class='hljs language-html'>&lt;b&gt;</code></pre>"], "uA"),
        (["u: A formula in HTML", f"a: <p>{FORMULA}</p>"], "uA"),
        # HTML that somebody wrote.
        (["u: A card", f"a: {CARD}"], "ua"),
        (["u: A card", "a: <section><p>Text</p></section>"], "ua"),
        (["u: A card", "a: <p style='color: red'>Text</p>"], "ua"),
        (["u: A card", "a: <p class='lead'>Text</p>"], "ua"),
        (["u: A list", "a: <ul>\n  <li>a</li>\n</ul>"], "ua"),
        (["u: A table", "a: <table><tr><td>1</td><td>2</td></tr></table>"], "ua"),
        (["u: A form", "a: <div><form><input name='a'></form></div>"], "ua"),
        (["u: <div>What is wrong here?</div>", "a: A word."], "ua"),
        ([f"u: {BUBBLE}", "a: Hello"], "ua"),
        (["u: Hi", "a: Use <b>this</b>"], "ua"),
        (["u: Hi", "a: <div> is a tag"], "ua"),
        (["u: Hi", "a: <think>Hm</think>"], "ua"),
        (["u: Hi", "a: "], "ua"),
        ([], ""),
    ],
)
def test_pages_are_told_from_html_that_was_written(turns, expected):
    conversation = talk(*turns)
    found = are_pages(conversation["messages"])
    marks = [turn[0].upper() if is_page else turn[0] for turn, is_page in zip(turns, found)]
    assert "".join(marks) == expected


def test_html_is_converted_where_it_is_and_when_asked():
    conversation = talk("u: fix *this*", "a: <p>like <b>so</b></p>", "u: a & b", "a: <p>yes</p>")

    def contents(html):
        (found,) = to_markdown([conversation], html)
        return [message["content"] for message in found["messages"]]

    assert contents("never") == [message["content"] for message in conversation["messages"]]
    assert contents("auto") == ["fix *this*", "like **so**", "a & b", "yes"]
    assert contents("always") == ["fix *this*", "like **so**", "a & b", "yes"]
    mended = Counter()
    list(to_markdown([conversation], mended=mended))
    assert mended == {"HTML to Markdown": 2}


FRACTIONS = [
    "3 / 4",
    "1 / 3",
    "3 / 4\n\nThe common denominator is 4.",
    "2 / 3\nHello",
    "3 / 4 is a fraction",
    "3 / 4, as a decimal 0.75",
    "3 / 4.",
    "1 / 2x + 1 = 3",
    "1 / 2cup of flour",
    "2 / 3rds of it",
    "3 / 4hours",
    "1 / 2Hz",
    "1 / 2sin(x)",
    "1 / 2Tr(A)",
    "1 / 2A + B",
    "1 / 2N",
    "1 / 2π",
    "1 / 2个小时",
    "5 / 3Because it is more than one",
    "0 / 5Points",
    "1 / 1Once",
    "100 / 200Euros",
    "1/2Hello",
    "2 / 2**Bold**",
]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("```python\nCopy code\nx = 1\n```", "```python\nx = 1\n```"),
        ("```\npythonCopy code\nx = 1\n```", "```python\nx = 1\n```"),
        ("```pythonCopy codex = 1\n```", "```python\nx = 1\n```"),
        ("```\nCopy code\n    x = 1\n```", "```\n    x = 1\n```"),
        ("1. so:\n   ```\n   c++Copy code\n   int x;\n   ```", "1. so:\n   ```c++\n   int x;\n   ```"),
        ("a\nCopy code\nb", "a\nb"),
        ("Copy12 chars / 3 wordsHello", "Hello"),
        # The choice between regenerated replies.
        ("1 / 2Hello", "Hello"),
        (" 2 / 2Sure, it is.", "Sure, it is."),
        ("2 / 3write it again", "write it again"),
        ("2 / 2I think so.", "I think so."),
        ("3 / 10A list:", "A list:"),
        ("1 / 2Don't", "Don't"),
        ("1 / 2HTML is", "HTML is"),
        ("2 / 2Élan", "Élan"),
        ("2 / 2你好", "你好"),
        ("1 / 2```python\nx\n```", "```python\nx\n```"),
        # Text that says the same in earnest.
        *((text, text) for text in FRACTIONS),
        ("Press the Copy code button", "Press the Copy code button"),
        ("Copy 12 chars", "Copy 12 chars"),
        ("```text\nx / y\n```", "```text\nx / y\n```"),
        ("Copy code", "Copy code"),
    ],
)
def test_what_buttons_left_is_removed(text, expected):
    assert without_copied_buttons(text) == expected


@pytest.mark.parametrize("text", [*FRACTIONS, "Copy code", "Translate the buttons:\nCopy code\nPaste"])
def test_no_word_of_a_user_is_lost(text):
    conversation = talk(f"u: {text}", f"a: {text}")
    (found,) = to_markdown([conversation])
    assert found["messages"][0] == conversation["messages"][0]
    if "Paste" not in text:
        assert found == conversation


@pytest.mark.parametrize(
    "html, expected",
    [
        (f"2 / 3{PAGE}", "Hi"),
        (f"<div class='flex'><div><button>x</button><span>2 / 3</span></div></div>{PAGE}", "Hi"),
        (f"<div><span>3 / 2</span></div>{PAGE}", "3 / 2\n\nHi"),  # no choice
        (PAGE.replace("Hi", "3 / 4"), "3 / 4"),
        (PAGE.replace("Hi", "3 / 4</p><p>Hi"), "3 / 4\n\nHi"),
    ],
)
def test_a_page_loses_the_choice_above_the_message_only(html, expected):
    (found,) = to_markdown([talk("u: x", f"a: {html}")])
    assert found["messages"][1]["content"] == expected


@given(st.text().filter(lambda text: "Copy" not in text and " / " not in text))
def test_other_text_is_left_alone(text):
    assert without_copied_buttons(text) == text.strip()


SCRAPS = ["<p>", "</p>", "<div", ">", "<pre><code>", "<!", "<![", "&#x;", "</", "<li>", "a", "`", "\0"]


@given(st.lists(st.sampled_from(SCRAPS)))
def test_broken_html_is_read_or_rejected(pieces):
    rejected = Counter()
    found = list(to_markdown([talk("u: x", "a: " + "".join(pieces))], "always", rejected=rejected))
    assert len(found) + rejected["unreadable HTML"] == 1


@pytest.mark.parametrize(
    "piece", ["<div>", "<p><b>", "<button>", "<button ", "</svg>", "<span", "```  \n", "```", "Copy code ", " ", "1 / "]
)
def test_absurd_text_is_read_or_rejected_in_linear_time(piece):
    # A quadratic pattern would take hours here, and a recursive parser would crash.
    text = f"a: <p>{piece * 20_000}Copy code</p>"
    rejected = Counter()
    found = list(to_markdown([talk("u: x", text)], rejected=rejected))
    assert len(found) + rejected["unreadable HTML"] == 1


# u and a are turns that say something, U and A empty ones: this is what a conversation is mended to.
MENDED = re.compile(r"[aA]*((?:ua)+)u*(?:[UA].*)?")


@given(system=st.sampled_from(["", "s", "S"]), turns=st.text("uaUA", max_size=9))
def test_turns_are_mended_or_rejected(system, turns):
    messages = [
        {"role": {"s": "system", "u": "user", "a": "assistant"}[mark.lower()], "content": str(place) * mark.islower()}
        for place, mark in enumerate(system + turns)
    ]
    found, rejected, mended = [], Counter(), Counter()
    found = list(mend_turns([{"id": 7, "messages": messages}], rejected=rejected, mended=mended))
    expected = MENDED.fullmatch(turns)
    if expected is None:
        assert found == [] and rejected.total() == 1
    else:
        start, end = (len(system) + place for place in expected.span(1))
        kept = messages[: len(system)] if system == "s" else []
        assert found == [{"id": 7, "messages": kept + messages[start:end]}]
        assert mended.total() == len(turns) - (end - start) and not rejected


def test_calls_of_tools_stand_between_a_question_and_its_reply():
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    tool, user, reply = ({"role": role, "content": role} for role in ("tool", "user", "assistant"))
    silent = {**tool, "content": ""}
    for messages in (
        [user, call, tool, reply],
        [user, call, tool, silent, call, tool, reply, user, reply],
        [user, call],
        [user, reply, tool, reply],
    ):
        assert list(mend_turns([{"messages": messages}])) == [{"messages": messages}]
    assert list(mend_turns([{"messages": [user, call, tool]}])) == [{"messages": [user, call]}]
    rejected = Counter()
    assert list(mend_turns([{"messages": [user, tool, reply]}], rejected=rejected)) == []
    assert rejected == {"roles do not alternate": 1}


def test_what_a_tool_says_is_left_to_the_letter():
    tool = {"role": "tool", "content": " <div><p>2 / 2</p></div> "}
    (found,) = to_markdown([{"messages": [tool]}], "always")
    assert found["messages"] == [tool]


@pytest.mark.parametrize(
    "turns, reason",
    [
        (["u: a", "u: b", "a: c"], "roles do not alternate"),
        (["u: a", "a: b", "a: c"], "roles do not alternate"),
        (["u: a", "s: b", "a: c"], "roles do not alternate"),
        (["s: a", "s: b", "u: c", "a: d"], "roles do not alternate"),
        (["a: b"], "no exchange"),
        (["u: a"], "no exchange"),
        (["s: a"], "no exchange"),
        (["u: a", "a: "], "no exchange"),
        ([], "no exchange"),
    ],
)
def test_what_cannot_be_mended_is_counted(turns, reason):
    rejected = Counter()
    assert list(mend_turns([talk(*turns)], rejected=rejected)) == []
    assert rejected == {reason: 1}
