"""Messages that are pieces of a chat's page, told apart from HTML that somebody wrote."""

import re
from collections.abc import Sequence
from typing import Any

from beartype import beartype

from palm_rlhf.data.curation.copied_buttons import without_page_counter

# The class names of a chat's page. The pages of other people also have the class names of MAYBE_PAGE.
CHAT_PAGE = re.compile(
    r"<(?:div|p|span)\b[^<>]*(?:\bmarkdown\b[^<>]*\bprose\b|\bdata-message-author-role=)", re.IGNORECASE
)
PAGE_START = 1000
MAYBE_PAGE = re.compile(r"\s*<(?:div|p|span)\b[^<>]*\b(?:markdown|prose|whitespace-pre-?wrap)\b", re.IGNORECASE)
FORMULA = re.compile(r"<span\b[^<>]*\bkatex\b", re.IGNORECASE)
HIGHLIGHTED = re.compile(r"<code\b[^<>]*\b(?:hljs|language-\w)", re.IGNORECASE)

# The tags and attributes that Markdown is rendered to; the content of <pre> is ignored.
WRAPPED = re.compile(
    r"\s*(?:<div>\s*)*<(p|pre|ol|ul|table|blockquote|h[1-6])\b.*</\w+>\s*\Z", re.DOTALL | re.IGNORECASE
)
RENDERED = frozenset(
    "a b blockquote br code del div em h1 h2 h3 h4 h5 h6 hr i img input li ol p pre s span strong sub sup table tbody "
    "td th thead tr ul".split()
)
ATTRIBUTES = frozenset("align alt checked disabled href rel src start target title type".split())
TAG = re.compile(r"</?([a-zA-Z][\w-]*)([^<>]*)>")
ATTRIBUTE = re.compile(r"""([\w:-]+)(?:\s*=\s*(?:"[^"]*"|'[^']*'|[^\s"'>]+))?""")
RENDERED_CLASS = re.compile(r"""class\s*=\s*["']?(?:language-|lang-|hljs|contains-task-list|task-list|footnote)""")
PARAGRAPH = re.compile(r"<p[ >]", re.IGNORECASE)
CODE_BLOCK = re.compile(r"<(/?)pre\b[^<>]*>", re.IGNORECASE)
INDENTED = re.compile(r"^[ \t]+<", re.MULTILINE)

# A user who names one of these may want HTML for an answer.
ASKED = re.compile(
    r"\b(?:x?html5?|markup|css|tailwind|bootstrap|jsx|svg|xml|vue|react|angular|web ?(?:page|site)s?|landing pages?|"
    r"divs?|iframes?)\b|<[a-z][a-z0-9]*[ >/]",
    re.IGNORECASE,
)


@beartype
def are_pages(messages: Sequence[dict[str, Any]]) -> list[bool]:
    """Return for each message of a conversation whether it is a piece of a chat's page in HTML.

    Class names of a chat's page show it. A reply is also one if it has only tags that Markdown is rendered to, and if
    all replies are of this kind, one of them has a paragraph, and nobody asked for HTML. The last conditions do not
    hold for replies with formulas or highlighted code, since people do not write their tags. A message of a user needs
    the class names, and replies that are pieces of a page.
    """
    texts = [without_page_counter(message["content"]) for message in messages]
    roles = [message["role"] for message in messages]
    replies = [text for text, role in zip(texts, roles) if role == "assistant" and text.strip()]
    asked = any(ASKED.search(_words(text)) for text, role in zip(texts, roles) if role in ("user", "system"))
    # All replies of a chat were copied in the same way.
    maybe = not asked and all(_is_chat_page(reply) or _may_be_page(reply) for reply in replies)
    maybe = maybe and (not replies or any(PARAGRAPH.search(reply) for reply in replies))
    return [_is_page(text, role == "assistant", maybe) for text, role in zip(texts, roles)]


def _is_page(text: str, is_reply: bool, maybe: bool) -> bool:
    if _is_chat_page(text) or (maybe and MAYBE_PAGE.match(text) and text.rstrip().endswith(">")):
        return True
    return is_reply and _is_rendered(text) and bool(maybe or FORMULA.search(text) or HIGHLIGHTED.search(text))


def _is_chat_page(text: str) -> bool:
    return text.lstrip()[:1] == "<" and CHAT_PAGE.search(text[:PAGE_START]) is not None


def _words(text: str) -> str:
    """Return the words of a user, without the element in which a page shows them."""
    return TAG.sub(" ", text) if MAYBE_PAGE.match(text) else text


def _may_be_page(text: str) -> bool:
    return bool(MAYBE_PAGE.match(text)) or _is_rendered(text)


def _is_rendered(text: str) -> bool:
    """Return whether all tags are those of rendered Markdown: known, not indented, and a head in every table."""
    if not WRAPPED.match(text):
        return False
    if FORMULA.search(text):
        return True
    text = _without_code_blocks(text)
    if INDENTED.search(text):
        return False
    names = [(found[1].lower(), found[2]) for found in TAG.finditer(text)]
    if not all(name in RENDERED and _are_rendered(attributes) for name, attributes in names):
        return False
    return text.lower().count("<table") <= text.lower().count("<thead")


def _are_rendered(attributes: str) -> bool:
    names = {found[1].lower() for found in ATTRIBUTE.finditer(attributes)}
    return names <= ATTRIBUTES | {"class"} and ("class" not in names or RENDERED_CLASS.search(attributes) is not None)


def _without_code_blocks(text: str) -> str:
    kept, start, inside = [], 0, False
    for tag in CODE_BLOCK.finditer(text):
        if not inside and not tag[1]:
            kept.append(text[start : tag.start()])
            inside = True
        elif inside and tag[1]:
            start, inside = tag.end(), False
    return "".join(kept if inside else [*kept, text[start:]])
