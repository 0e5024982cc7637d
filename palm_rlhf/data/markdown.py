"""Pieces of web pages as Markdown, and texts without the words of the buttons that were copied along with them."""

import re
from functools import cache
from typing import Any

from beartype import beartype

from palm_rlhf.data.extras import missing

# What a reply of an export is wrapped in, and what only the page of a chat names.
BLOCKS = "div|p|pre|ol|ul|table|blockquote|section|article|h[1-6]"
WRAPPED = re.compile(rf"\s*<({BLOCKS})\b[^>]*>.*</({BLOCKS})>\s*\Z", re.DOTALL | re.IGNORECASE)
PAGE = re.compile(r"\s*<(div|p|span)\b[^>]*\b(markdown|prose|whitespace-pre-?wrap)\b", re.IGNORECASE)
PAGE_START = 1000

# Most tags of an export: parts that nobody reads, and marks that Markdown has no use for (but formulas need theirs).
UNREAD = re.compile(r"<(/?)(button|svg|script|style)\b[^<>]*>", re.IGNORECASE)
SPAN = re.compile(r"</?span\b[^<>]*>", re.IGNORECASE)
FORMULA = "katex"
# The time that markdownify takes for a run of blanks grows with its square.
BLANKS = re.compile(r"\s{1000,}")

LANGUAGE = re.compile(r"(?:language|lang)-(\S+)")
LANGUAGE_NAME = re.compile(r"[\w+#.-]{1,30}")
BACKTICKS = re.compile(r"`+")
BUTTON_WORDS = re.compile(r"\b(Copy code|Copy|Edit)\b")

# "```python\nCopy code\n", "```\npythonCopy code\n", "```pythonCopy code": all are the head of a block of Python.
COPY_CODE = re.compile(
    r"(?<!`)(`{3,9})(?!`)[ \t]{0,8}(?:\n[ \t]{0,8})?([^\s`]{0,30}?)\s{0,8}(?:Copy code)+(?:[ \t]*\n)?"
)
COPY_LINE = re.compile(r"^[ \t]*Copy code[ \t]*(?:\n|\Z)", re.MULTILINE)
COPY_COUNT = re.compile(r"Copy\d{1,9} chars / \d{1,9} words")
# "2 / 3" before a reply is the choice between regenerated ones.
CHOICE = re.compile(r"\A\s{0,8}\d{1,3} / \d{1,3}(?=[ \t]{0,8}(\n|\Z)|[^\W\d_])")


@beartype
def is_html(text: str, role: str = "assistant") -> bool:
    """Whether a message is a piece of a web page rather than Markdown or plain text.

    A reply is if it is wrapped in block elements. A user may well have pasted just that, so for other roles it takes
    the class names of a chat's page too.
    """
    if text.lstrip()[:1] != "<":
        return False
    return bool(PAGE.match(text[:PAGE_START]) or (role == "assistant" and WRAPPED.match(text)))


@beartype
def html_to_markdown(html: str) -> str:
    """The text of a piece of a web page in Markdown: code in fences with its language, formulas in TeX, no buttons.

    Raises ``ValueError`` for a page that cannot be parsed or is nested too deeply.
    """
    html = BLANKS.sub(lambda run: run[0][:1000], _without_unread(html))
    if FORMULA not in html:
        html = SPAN.sub("", html)
    converter, unreadable = _converter()
    try:
        return converter.convert(html).strip()
    except unreadable as error:
        raise ValueError("unreadable HTML") from error


@beartype
def without_debris(text: str) -> str:
    """The text without what buttons left in it: "Copy code", "Copy12 chars / 3 words", and a "2 / 3" at the start."""
    if "Copy" in text:
        text = COPY_CODE.sub(r"\1\2\n", text)
        text = COPY_COUNT.sub("", COPY_LINE.sub("", text))
    return CHOICE.sub("", text).strip() if " / " in text[:20] else text.strip()


def _without_unread(html: str) -> str:
    kept, start, inside = [], 0, None
    for tag in UNREAD.finditer(html):
        is_end, name = bool(tag[1]), tag[2].lower()
        if inside is None and not is_end:
            kept.append(html[start : tag.start()])
            start, inside = tag.start(), name
        elif inside == name and is_end:
            start, inside = tag.end(), None
    return "".join([*kept, html[start:]])


@cache
def _converter() -> tuple[Any, tuple[type[Exception], ...]]:
    """What converts, and what it raises for a page that it cannot read."""
    try:
        from bs4.builder import ParserRejectedMarkup
        from markdownify import MarkdownConverter
    except ImportError as error:
        raise missing("HTML", error) from error

    class Converter(MarkdownConverter):
        def process_tag(self, node: Any, parent_tags: set[str] | None = None) -> str:
            if node.name == "pre":
                return _code(node)
            if node.name == "span" and FORMULA in (node.get("class") or []):
                return _formula(node)
            return super().process_tag(node, parent_tags)

    converter = Converter(heading_style="atx", bullets="-", escape_asterisks=False, escape_underscores=False)
    return converter, (ParserRejectedMarkup, AssertionError, RecursionError)


def _code(block: Any) -> str:
    code = block.find("code") or block
    content = code.get_text().strip("\n").rstrip()
    # A fence is longer than any in the code, or it would end there.
    fence = "`" * max(3, 1 + max(map(len, BACKTICKS.findall(content)), default=0))
    return f"\n\n{fence}{_language(block, code)}\n{content}\n{fence}\n\n" if content else ""


def _language(block: Any, code: Any) -> str:
    """The language that a block of code names: in a class, or in the line above it."""
    for element in (code, block):
        if found := LANGUAGE.search(" ".join(element.get("class") or [])):
            return found[1]
    if code is block:
        return ""
    name = BUTTON_WORDS.sub("", block.get_text().removesuffix(code.get_text())).strip()
    return name if LANGUAGE_NAME.fullmatch(name) else ""


def _formula(element: Any) -> str:
    """A formula is in the page twice, as MathML with its TeX and as boxes: the TeX is kept."""
    tex = element.find("annotation", encoding="application/x-tex")
    if tex is None:
        return element.get_text()
    marks = "$" if element.find_parent(class_="katex-display") is None else "$$"
    return f"{marks}{tex.get_text().strip()}{marks}"
