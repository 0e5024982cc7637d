"""Pieces of web pages as Markdown."""

import re
from functools import cache
from typing import Any

from beartype import beartype

from palm_rlhf.data.extra_packages import missing_extra

# Most tags of an export: invisible parts, and tags that Markdown does not use (but formulas need theirs).
UNREAD = re.compile(r"<(/?)(button|svg|script(?![^<>]*\bmath/tex\b)|style)\b[^<>]*>", re.IGNORECASE)
SPAN = re.compile(r"</?span\b[^<>]*>", re.IGNORECASE)
FORMULA = "katex"
# The time of markdownify grows with the square of a run of blanks.
BLANKS = re.compile(r"\s{1000,}")

LANGUAGE = re.compile(r"(?:language|lang)-(\S+)")
LANGUAGE_NAME = re.compile(r"[\w+#.-]{1,30}")
BACKTICKS = re.compile(r"`+")
CELL_BREAK = re.compile(r"\s*\n\s*")
BAR = re.compile(r"(?<!\\)\|")
# The characters that Unicode has above and below the line; other text keeps its tags, which Markdown allows.
RAISED = str.maketrans("0123456789+-−=()ni", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻⁼⁽⁾ⁿⁱ")
LOWERED = str.maketrans("0123456789+-−=()", "₀₁₂₃₄₅₆₇₈₉₊₋₋₌₍₎")
BUTTON_WORDS = re.compile(r"\b(Copy code|Copy|Edit)\b")


@beartype
def html_to_markdown(html: str) -> str:
    """Return a piece of a web page in Markdown: code in fences with its language, formulas in TeX, no buttons.

    Raises ValueError if the page cannot be parsed or is nested too deeply.
    """
    html = BLANKS.sub(lambda run: run[0][:1000], without_unread(html))
    if FORMULA not in html:
        html = SPAN.sub("", html)
    converter, unreadable = _converter()
    try:
        return converter.convert(html).strip()
    except unreadable as error:
        raise ValueError("unreadable HTML") from error


@beartype
def without_unread(html: str) -> str:
    """Return the page without buttons, icons, scripts and styles."""
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
    """Return the converter, and the errors that it raises for a page that it cannot parse."""
    try:
        from bs4.builder import ParserRejectedMarkup
        from markdownify import MarkdownConverter
    except ImportError as error:
        raise missing_extra("HTML", error) from error

    class Converter(MarkdownConverter):
        def process_tag(self, node: Any, parent_tags: set[str] | None = None) -> str:
            if node.name == "pre":
                return _code(node)
            if _is_formula(node):
                return _formula(node)
            return super().process_tag(node, parent_tags)  # type: ignore[misc]  # not in its stubs

        def convert_sup(self, node: Any, text: str, parent_tags: set[str]) -> str:
            return _shifted(text, "sup", RAISED)

        def convert_sub(self, node: Any, text: str, parent_tags: set[str]) -> str:
            return _shifted(text, "sub", LOWERED)

        def convert_td(self, node: Any, text: str, parent_tags: set[str]) -> str:
            return super().convert_td(node, _cell(text), parent_tags)  # type: ignore[misc]  # not in its stubs

        def convert_th(self, node: Any, text: str, parent_tags: set[str]) -> str:
            return super().convert_th(node, _cell(text), parent_tags)  # type: ignore[misc]  # not in its stubs

        def convert_br(self, node: Any, text: str, parent_tags: set[str]) -> str:
            return "\n" if {"td", "th"} & parent_tags else super().convert_br(node, text, parent_tags)  # type: ignore[misc]  # not in its stubs

        def convert_p(self, node: Any, text: str, parent_tags: set[str]) -> str:
            return f"\n{text}\n" if {"td", "th"} & parent_tags else super().convert_p(node, text, parent_tags)  # type: ignore[misc]  # not in its stubs

        def convert_input(self, node: Any, text: str, parent_tags: set[str]) -> str:
            if node.get("type") != "checkbox":
                return text
            blank = "" if str(node.next_sibling or "")[:1].isspace() else " "
            return ("[x]" if node.has_attr("checked") else "[ ]") + blank

    converter = Converter(heading_style="atx", bullets="-", escape_asterisks=False, escape_underscores=False)
    return converter, (ParserRejectedMarkup, AssertionError, RecursionError)


def _shifted(text: str, tag: str, letters: dict[int, int]) -> str:
    """Return text above or below the line, so that `10<sup>8</sup>` does not become 108."""
    text = text.strip()
    if all(ord(letter) in letters for letter in text):
        return text.translate(letters)
    return f"<{tag}>{text}</{tag}>"


def _cell(text: str) -> str:
    """Return the content of a cell of a table on one line, without a bar that would end the cell."""
    return BAR.sub(r"\|", CELL_BREAK.sub("<br>", text.strip()))


def _code(block: Any) -> str:
    code = block.find("code") or block
    for line_end in code.find_all("br"):
        line_end.replace_with("\n")
    for part in code.find_all(["sup", "sub"]):
        part.replace_with(_shifted(part.get_text(), part.name, RAISED if part.name == "sup" else LOWERED))
    content = code.get_text().strip("\n").rstrip()
    if block.find_parent(["td", "th"]) is not None:
        return "\n".join(f"`{line}`" for line in content.splitlines() if line.strip())
    # A fence is longer than any in the code, or it would end there.
    fence = "`" * max(3, 1 + max(map(len, BACKTICKS.findall(content)), default=0))
    return f"\n\n{fence}{_language(block, code)}\n{content}\n{fence}\n\n" if content else ""


def _language(block: Any, code: Any) -> str:
    """Return the language that a block of code names, in a class or in the line above it."""
    for element in (code, block):
        if found := LANGUAGE.search(" ".join(element.get("class") or [])):
            return found[1]
    if code is block:
        return ""
    name = BUTTON_WORDS.sub("", block.get_text().removesuffix(code.get_text())).strip()
    return name if LANGUAGE_NAME.fullmatch(name) else ""


def _is_formula(element: Any) -> bool:
    if element.name == "script":
        return "math/tex" in (element.get("type") or "")
    return element.name == "math" or (element.name == "span" and FORMULA in (element.get("class") or []))


def _formula(element: Any) -> str:
    """Return the TeX of a formula, which a page holds beside boxes or MathML."""
    tex = element if element.name == "script" else element.find("annotation", encoding="application/x-tex")
    if tex is None:
        return element.get_text()
    is_display = (
        element.find_parent(class_="katex-display") is not None
        or element.get("display") == "block"
        or "mode=display" in (element.get("type") or "")
    )
    marks = "$$" if is_display else "$"
    return f"{marks}{tex.get_text().strip()}{marks}"
