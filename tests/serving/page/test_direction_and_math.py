"""Right-to-left text in every kind of block, and math, which stays as it was written."""

INLINE = '<span class="math" dir="ltr">{0}</span>'
BLOCK = '<div class="math" dir="ltr">{0}</div>'
WRITTEN = [r"\(a_1^2\)", r"\[b*c*\]", "$x_i$", "$$y_*$$"]
MATH = {
    " and ".join(["for", *WRITTEN]): "<p>" + " and ".join(["for", *map(INLINE.format, WRITTEN)]) + "</p>",
    "\\[\n  a &= b_1 \\\\\n- c\n\\]\nafter": BLOCK.format("\\[\n  a &amp;= b_1 \\\\\n- c\n\\]") + "<p>after</p>",
    "before\n$$\na\n$$": "<p>before</p>" + BLOCK.format("$$\na\n$$"),
    "$$a$$": BLOCK.format("$$a$$"),
    "$$a$$ is inline": "<p>" + INLINE.format("$$a$$") + " is inline</p>",
    "- $$\n  a\n  $$": '<ul dir="auto"><li>' + BLOCK.format("$$\na\n$$") + "</li></ul>",
    r"from $5 to $6, *US* \$1\$ \(open \*": "<p>from $5 to $6, <em>US</em> $1$ (open *</p>",
    r"`\(a\)` and $`b`$": r"<p><code>\(a\)</code> and " + INLINE.format("$`b`$") + "</p>",
    "**$a_b$**": "<p><strong>" + INLINE.format("$a_b$") + "</strong></p>",
    r"\(<img src=x>\)": "<p>" + INLINE.format(r"\(&lt;img src=x&gt;\)") + "</p>",
    "$$never ends\n- a": '<p>$$never ends</p><ul dir="auto"><li>a</li></ul>',
}


def test_math_stays_as_it_was_written(page):
    assert dict(zip(MATH, page.render(*MATH))) == MATH


HEBREW, ENGLISH = "שלום עולם", "Hello world"


def test_each_block_has_the_direction_of_its_own_text(page):
    """Right-to-left text begins at the right, its lists are marked there, and its tables' first column stands there."""
    text = (
        f"{HEBREW}\n\n{ENGLISH}\n\n- {HEBREW}\n  - {ENGLISH}\n\n1. {ENGLISH}\n\n> {HEBREW}\n\n"
        f"| {HEBREW} | {HEBREW} |\n|---|---|\n| a | b |\n\n# {HEBREW}\n\n```\n{ENGLISH}\n```"
    )
    script = """
        const [text, done] = arguments;
        import(new URL("page/markdown.js", location)).then(({ show }) => {
            const element = document.createElement("div");
            element.className = "text";
            const message = document.createElement("div");
            message.className = "message assistant";
            message.append(element);
            document.querySelector("#thread").replaceChildren(message);
            show(element, text);
            const middle = (element.getBoundingClientRect().left + element.getBoundingClientRect().right) / 2;
            const edge = (node) => {
                const range = document.createRange();
                range.selectNodeContents(node);
                const box = range.getBoundingClientRect();
                return box.left + box.right > 2 * middle ? "right" : "left";
            };
            const direction = (selector) => getComputedStyle(element.querySelector(selector)).direction;
            const left = (cell) => cell.getBoundingClientRect().left;
            const [first, second] = [...element.querySelectorAll("th")].map(left);
            done({
                paragraphs: [...element.querySelectorAll(":scope > p")].map(edge),
                heading: edge(element.querySelector("h1")),
                lists: [direction("ul"), direction("ul ul"), direction("ol")],
                quote: direction("blockquote"),
                firstColumn: first > second ? "right" : "left",
                table: edge(element.querySelector("table")),
                code: direction("pre"),
            });
        });"""
    assert page.browser.execute_async_script(script, text) == {
        "paragraphs": ["right", "left"],
        "heading": "right",
        "lists": ["rtl", "ltr", "ltr"],
        "quote": "rtl",
        "firstColumn": "right",
        "table": "right",
        "code": "ltr",
    }
