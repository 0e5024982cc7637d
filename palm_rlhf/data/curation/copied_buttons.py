"""The words of buttons and counters that were copied from a chat's page with its messages."""

import re

from beartype import beartype

# "```python\nCopy code\n", "```\npythonCopy code\n" and "```pythonCopy code" all begin a block of Python.
COPY_CODE = re.compile(
    r"(?<!`)(`{3,9})(?!`)[ \t]{0,8}(?:\n[ \t]{0,8})?([^\s`]{0,30}?)\s{0,8}(?:Copy code)+(?:[ \t]*\n)?"
)
COPY_LINE = re.compile(r"^[ \t]*Copy code[ \t]*(?:\n|\Z)", re.MULTILINE)
COPY_COUNT = re.compile(r"Copy\d{1,9} chars / \d{1,9} words")

# "2 / 3" counts messages that were regenerated or edited. In text it is glued to the first word; in a page it stands in
# elements before that of the message.
COUNTER = re.compile(r"\s{0,8}(\d{1,2}) / (\d{1,2})")
TAGS = r"(?:\s|<(?!div\b[^<>]*\bmarkdown\b)[^<>]*>){0,40}"
PAGE_COUNTER = re.compile(rf"{TAGS}(\d{{1,2}}) / (\d{{1,2}}){TAGS}(?=<div\b[^<>]*\bmarkdown\b)")
WORD = re.compile(r"[^\W\d_]+")
# Words that may be glued to a fraction: of measures and of mathematics.
MEASURES = frozenset(
    "st nd rd th sts nds rds ths of dozen percent degree degrees mol rad deg hz khz mhz ghz pa kpa wh kwh ah gb mb kb "
    "tb kg km cm mm nm ml dl lb lbs oz ft inch inches foot feet yard yards mile miles gram grams ounce ounces pound "
    "pounds litre litres liter liters metre metres meter meters cup cups tsp tbsp teaspoon teaspoons tablespoon "
    "tablespoons pint pints quart quarts gallon gallons sec secs second seconds min mins minute minutes hour hours day "
    "days week weeks month months year years sin cos tan cot log exp sqrt alpha beta theta lambda sigma omega".split()
)
MEASURES_OF_ONE_LETTER = frozenset("个個杯小时時分年天月日米克斤次人倍以的之本枚つ")


@beartype
def without_copied_buttons(text: str, role: str = "assistant") -> str:
    """Return a text without the words of buttons: "Copy code", "Copy12 chars / 3 words", and "2 / 3" at its start.

    A line "Copy code" belongs to a button in replies only. A text that consists of such words alone stays as it is.
    """
    plain = text
    if "Copy" in text:
        plain = COPY_COUNT.sub("", COPY_CODE.sub(r"\1\2\n", plain))
        if role == "assistant":
            plain = COPY_LINE.sub("", plain)
    counter = COUNTER.match(plain)
    if counter is not None and _is_choice(counter) and _is_glued(plain[counter.end() : counter.end() + 40]):
        plain = plain[counter.end() :]
    return plain.strip() or text.strip()


@beartype
def without_page_counter(html: str) -> str:
    """Return a piece of a chat's page without the counter of regenerated messages above the message."""
    counter = PAGE_COUNTER.match(html)
    return html if counter is None or not _is_choice(counter) else html[counter.end() :]


def _is_choice(counter: re.Match[str]) -> bool:
    return 1 <= int(counter[1]) <= int(counter[2]) and int(counter[2]) > 1


def _is_glued(following: str) -> bool:
    """Return whether the text after a counter starts a message, and is no unit or term that a fraction can have."""
    if following.startswith("```"):
        return True
    found = WORD.match(following)
    if found is None or following[found.end() : found.end() + 1] in ("(", "^", "_"):
        return False
    word = found[0]
    if word in ("I", "A"):
        return re.match(r"[ '’]\w", following[1:]) is not None
    if word.lower() in MEASURES or word[0] in MEASURES_OF_ONE_LETTER:
        return False
    if word[0].isupper():
        return len(word) > 1 and (word[1:].islower() or len(word) > 3)
    return len(word) > 2 if word[0].islower() else True  # some scripts have no capitals
