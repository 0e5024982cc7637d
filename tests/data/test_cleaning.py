"""What cleaning mends: HTML, debris of buttons and turns; what it must leave alone."""

import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palm_rlhf.data.cleaning import mend_turns, to_markdown
from palm_rlhf.data.markdown import html_to_markdown, is_html, without_debris

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
    ],
)
def test_html_becomes_markdown(html, expected):
    assert html_to_markdown(html) == expected


@pytest.mark.parametrize(
    "text, role, expected",
    [
        ("<div><p>Hi</p></div>", "assistant", True),
        ("\n<p>Hi</p>\n<p>there</p> ", "assistant", True),
        ("<div>What is wrong here?</div>", "user", False),  # pasted, as it is
        ('<div class="min-h-[20px] whitespace-pre-wrap">Hi</div>', "user", True),
        ("Use <b>this</b>", "assistant", False),
        ("<div> is a tag", "assistant", False),
        ("```html\n<p>Hi</p>\n```", "assistant", False),
        ("<think>Hm</think>", "assistant", False),
        ("", "assistant", False),
    ],
)
def test_html_is_told_from_text_about_html(text, role, expected):
    assert is_html(text, role) is expected


def test_html_is_converted_where_it_is_and_when_asked():
    conversation = talk("u: <p>fix <b>this</b></p>", "a: <p>like <b>so</b></p>", "u: ok", "a: `<p>`")

    def contents(html):
        (found,) = to_markdown([conversation], html)
        return [message["content"] for message in found["messages"]]

    assert contents("never") == [message["content"] for message in conversation["messages"]]
    assert contents("auto") == ["<p>fix <b>this</b></p>", "like **so**", "ok", "`<p>`"]
    assert contents("always")[:3] == ["fix **this**", "like **so**", "ok"]
    mended = Counter()
    list(to_markdown([conversation], mended=mended))
    assert mended == {"HTML to Markdown": 1}


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
        ("2 / 3\nHello", "Hello"),
        ("1 / 2Hello", "Hello"),
        ("1 / 2", ""),
        # Text that says the same in earnest.
        ("3 / 4 is a fraction", "3 / 4 is a fraction"),
        ("Press the Copy code button", "Press the Copy code button"),
        ("Copy 12 chars", "Copy 12 chars"),
        ("```text\nx / y\n```", "```text\nx / y\n```"),
    ],
)
def test_what_buttons_left_is_removed(text, expected):
    assert without_debris(text) == expected


@given(st.text().filter(lambda text: "Copy" not in text and " / " not in text))
def test_other_text_is_left_alone(text):
    assert without_debris(text) == text.strip()


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
