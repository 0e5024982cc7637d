"""Markdown in the browser: known HTML for what is known, and nothing but its own elements for whatever comes."""

import re
from html.parser import HTMLParser

from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

A = '<a href="{0}" target="_blank" rel="noopener noreferrer">{1}</a>'
CODE = (
    '<figure class="code"><figcaption><span>{0}</span><button type="button" class="copy">Copy</button></figcaption>'
    '<pre tabindex="0"><code>{1}</code></pre></figure>'
)
KNOWN = {
    "": "",
    "one\ntwo\n\nthree": "<p>one<br>two</p><p>three</p>",
    "# One\n### Three ###\n#no": "<h1>One</h1><h3>Three</h3><p>#no</p>",
    "*a* **b** ***c*** _d_ __e__ ~~f~~": "<p><em>a</em> <strong>b</strong> <em><strong>c</strong></em> <em>d</em> "
    "<strong>e</strong> <del>f</del></p>",
    "snake_case_name 2 * 3 * 4 \\*a\\*": "<p>snake_case_name 2 * 3 * 4 *a*</p>",
    "`a < b` and `` `c` ``, but ` not": "<p><code>a &lt; b</code> and <code>`c`</code>, but ` not</p>",
    "- a\n- b\n  - c\n\n    d\n- e": '<ul dir="auto"><li><p>a</p></li><li><p>b</p><ul dir="auto"><li><p>c</p>'
    "<p>d</p></li></ul></li><li><p>e</p></li></ul>",
    "1. a\n   ```\n   x\n   ```\n2. b": '<ol dir="auto"><li>a' + CODE.format("text", "x\n") + "</li><li>b</li></ol>",
    "7) a\n8) b\n\nIn\n1999. no": '<ol dir="auto" start="7"><li>a</li><li>b</li></ol><p>In<br>1999. no</p>',
    "a\n- b\n* c": '<p>a</p><ul dir="auto"><li>b</li></ul><ul dir="auto"><li>c</li></ul>',
    "> a\n> > b\n\n---": '<blockquote dir="auto"><p>a</p><blockquote dir="auto"><p>b</p></blockquote></blockquote><hr>',
    "```js x\n\t<b>\n\n# no\n```\nafter": CODE.format("js", "\t&lt;b&gt;\n\n# no\n") + "<p>after</p>",
    "~~~\n```\n~~~": CODE.format("text", "```\n"),
    "```py\nstill coming": CODE.format("py", "still coming\n"),
    "| a | b |\n|:-:|--:|\n| `x` | 1 \\| 2 |\n| y |": '<div class="table" dir="auto" tabindex="0"><table><thead><tr>'
    '<th class="center">a</th><th class="right">b</th></tr></thead><tbody><tr><td class="center"><code>x</code></td>'
    '<td class="right">1 | 2</td></tr><tr><td class="center">y</td></tr></tbody></table></div>',
    "a | b\nno table": "<p>a | b<br>no table</p>",
    "[a *b*](https://x.org/a_(b)?c=1&d 'title')": f"<p>{A.format('https://x.org/a_(b)?c=1&amp;d', 'a <em>b</em>')}</p>",
    "see (https://x.org/a_b). **http://y.org**": f"<p>see ({A.format('https://x.org/a_b', 'https://x.org/a_b')}). "
    f"<strong>{A.format('http://y.org/', 'http://y.org')}</strong></p>",
    "[https://x.org](https://y.org) <https://z.org>": f"<p>{A.format('https://y.org/', 'https://x.org')} "
    f"{A.format('https://z.org/', 'https://z.org')}</p>",
    "![a cat](https://x.org/cat.png)": f"<p>{A.format('https://x.org/cat.png', 'a cat')}</p>",
    "[a [b](https://x.org)](https://y.org/)": f"<p>[a {A.format('https://x.org/', 'b')}]"
    f"({A.format('https://y.org/', 'https://y.org/')})</p>",
    "<b>&amp;</b> &lt;": "<p>&lt;b&gt;&amp;amp;&lt;/b&gt; &amp;lt;</p>",
}


def test_known_markdown_gives_known_html(page):
    assert dict(zip(KNOWN, page.render(*KNOWN))) == KNOWN


@settings(max_examples=8)
@given(st.lists(st.text(alphabet="ab *_`\\.", max_size=24), min_size=40, max_size=40))
def test_emphasis_and_code_are_those_of_commonmark(renderer, texts):
    texts = [f"x{text}" for text in texts]  # a paragraph, whatever follows
    assert renderer.render(*texts) == [MarkdownIt("commonmark").render(text).strip() for text in texts]


LINES = [
    "",
    "a",
    "$$",
    "\\[ x",
    "x \\]",
    "- a",
    "  - b",
    "1. c",
    "> d",
    "```",
    "# e",
    "| f | g |",
    "|---|---|",
    "**h",
    "i**",
    "    j",
    "***",
]


@settings(max_examples=8)
@given(st.lists(st.lists(st.sampled_from(LINES), max_size=9).map("\n".join), min_size=20, max_size=20))
def test_a_growing_reply_looks_at_every_moment_as_if_it_had_come_at_once(renderer, texts):
    prefixes = [[text[:end] for end in range(0, len(text) + 1, 2)] + [text] for text in texts]
    shown = renderer.render_growing(prefixes)
    assert shown == [renderer.render(*texts) for texts in prefixes]


def test_what_does_not_change_keeps_its_elements(page):
    script = """
        const done = arguments[0];
        import(new URL("page/markdown.js", location)).then(({ show }) => {
            const element = document.createElement("div");
            show(element, "one\\n\\ntwo");
            const [one, two] = element.children;
            show(element, "one\\n\\ntwo and more\\n\\nthree");
            done([one === element.children[0], two === element.children[1], element.children.length]);
        });"""
    assert page.browser.execute_async_script(script) == [True, False, 3]


PLAIN = "p br hr em strong del code li figcaption h1 h2 h3 h4 h5 h6 table thead tbody tr"
ALLOWED = {
    **dict.fromkeys(PLAIN.split(), ""),
    "a": "href target rel",
    **dict.fromkeys(("ul", "blockquote"), "dir"),
    "ol": "dir start",
    "span": "class dir",
    "figure": "class",
    "button": "type class",
    "pre": "tabindex",
    "div": "class tabindex dir",
    "th": "class",
    "td": "class",
}
CLASSES = {None, "code", "copy", "table", "center", "right", "math"}


class Judge(HTMLParser):
    """Collects what HTML has that Markdown does not make, and how deep its elements nest."""

    def __init__(self, html: str):
        super().__init__()
        self.found, self.depth, self.deepest = [], 0, 0
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        fine = tag in ALLOWED and set(attributes) <= set(ALLOWED[tag].split()) and attributes.get("class") in CLASSES
        if tag == "a":
            fine = fine and re.match("https?://", attributes["href"]) and attributes["rel"] == "noopener noreferrer"
        if not fine:
            self.found.append((tag, attributes))
        self.depth += tag not in ("br", "hr")
        self.deepest = max(self.deepest, self.depth)

    def handle_endtag(self, tag):
        self.depth -= 1


ATTACKS = [
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
    "# <svg onload=alert(1)>",
    "- <iframe srcdoc='<script>alert(1)</script>'>",
    "| <b> | b |\n|---|---|\n| <img src=x onerror=alert(1)> | `<script>` |",
    '```"><script>alert(1)</script>\n</code></pre><script>alert(1)</script>\n```',
    "`</code><script>alert(1)</script>`",
    "[x](javascript:alert(1)) [x](JaVaScRiPt:alert(1)) [x]( javascript:alert(1))",
    "[x](<javascript:alert(1)>) <javascript:alert(1)> [x](java\nscript:alert(1)) [x](java\tscript:alert(1))",
    "[x](data:text/html,<script>alert(1)</script>) [x](vbscript:x) [x](blob:https://x.org/1) [x](file:///etc/passwd)",
    "[x](//evil.example) [x](/v1/models) [x](?a) [x](#a) [x](&#106;avascript:alert(1)) [x](\\javascript:alert(1))",
    '[x](https://x.org/"onmouseover="alert(1)) <https://x.org/"onclick="alert(1)>',
    "![x](javascript:alert(1)) ![x](https://evil.example/track.png) ![<img src=x>](https://evil.example)",
    "[<img src=x onerror=alert(1)>](https://x.org)",
    "\0<\0script>alert(1)</script>",
    "<style>*{display:none}</style><base href=//evil.example><meta http-equiv=refresh content=0>",
    "<!-- --><![CDATA[ <b> ]]><?x?>",
]


def test_no_reply_brings_elements_of_its_own(page):
    htmls = page.render(*ATTACKS)
    assert [Judge(html).found for html in htmls] == [[]] * len(ATTACKS)
    for attack, text in zip(ATTACKS[:2], htmls):
        assert text == "<p>" + attack.replace("<", "&lt;").replace(">", "&gt;") + "</p>"  # it is shown as it is
    hrefs = re.findall('href="([^"]*)"', "".join(htmls))
    assert all(re.match(r"https://(x\.org|evil\.example)/", href) for href in hrefs)


@settings(max_examples=6)
@given(st.lists(st.text(alphabet="a<>\"'&[]()!*_`~#|-:/.\n \\h=$", max_size=60), min_size=50, max_size=50))
def test_no_text_brings_elements_of_its_own(renderer, texts):
    assert [Judge(html).found for html in renderer.render(*texts)] == [[]] * len(texts)


HUGE = ["*a ", "**a** ", "_a", "*a**b", "*_", "~~a", "[", "![", "](", "[a](", "[a](b) ", "[a](https://x.org ", "`"]
HUGE += ["`a``b", "> ", ">", "- ", "1. a\n", "|a", "```\n", "~~~a\n", "https://", "https://x.org/a)", "<", "<https://"]
HUGE += ["\\(", "\\[", "\\[\n", "$a", "$$\n", "$", "$$", "\\(a\\) ", "\\", "# ", "a\n", " ", "\t"]


def test_large_texts_take_little_time_and_do_not_nest_without_end(page):
    texts = [(piece * 10_000)[:20_000] for piece in HUGE]
    texts += ["*a " * 5_000 + "a* " * 5_000, "[" * 9_000 + "a](https://x.org)" * 3_000, "`" * 9_000 + " `" * 9_000]
    texts += ["|a" * 3_000 + "|\n" + "|-" * 3_000 + "|\n" + "|\n" * 9_000, "[a](b" + " " * 20_000 + "c)" * 9_000]
    texts += ["".join(" " * 2 * depth + "- a\n" for depth in range(150)), "".join("`" * n + "a" for n in range(250))]
    for html in page.render(*texts):
        judge = Judge(html)
        assert judge.found == []
        assert judge.deepest <= 40
        assert html.count("<t") < 50_000  # cells are not multiplied


def test_the_checks_of_markdown_see_what_they_look_for(open_page, odd_server):
    weak = {'url.protocol !== "http:" && url.protocol !== "https:"': "false", "MAX_HEIGHT = 16": "MAX_HEIGHT = 1e9"}
    page = open_page(odd_server(change=weak))
    assert any(Judge(html).found for html in page.render(*ATTACKS))
    assert Judge(page.render("*a " * 100 + "a* " * 100)[0]).deepest > 40
    stale = open_page(odd_server(change={"blocks[same].source === before[same]": "before[same]"}))
    assert stale.render_growing([["# a", "# b"]])[0][1] != stale.render("# b")[0]
