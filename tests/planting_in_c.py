"""Plants a mistake into C: code is found by its tokens, however it is laid out and its variables are named."""

import re
from collections.abc import Mapping

TOKEN = re.compile(r"\$?\w+|->|\+\+|--|<<|>>|&&|\|\||[-+*/%&|^<>=!]=|\S")
VARIABLE = r"[A-Za-z_]\w*(?:(?:->|\.)\w+|\[[^][]*\])*"  # with its members and places: `s->heads`, `gate[r][k]`


def pattern_of(code: str) -> re.Pattern:
    """What finds code with any spaces and line breaks between its tokens.

    `$name` is any variable, the same wherever the name stands.
    """
    known: set[str] = set()
    parts: list[str] = []
    for token in TOKEN.findall(code):
        name = token[1:] if token.startswith("$") else None
        if name is None:
            parts.append(rf"\b{token}\b" if re.fullmatch(r"\w+", token) else re.escape(token))
        else:
            parts.append(rf"(?P={name})(?!\w)" if name in known else rf"(?<![\w.>])(?P<{name}>{VARIABLE})(?!\w)")
            known.add(name)
    return re.compile(r"\s*".join(parts))


def plant(sources: Mapping[str, str], code: str, wrong: str) -> dict[str, str]:
    """The sources, by their names, in which one piece of code is another; AssertionError where it is not there once."""
    pattern = pattern_of(code)
    found = [(name, match) for name, text in sources.items() for match in pattern.finditer(text)]
    places = [f"{name}:{sources[name].count(chr(10), 0, match.start()) + 1}" for name, match in found]
    assert len(found) == 1, (
        f"`{code}` is {len(found)} times in {', '.join(sources)} {places}, expected once: write this mutant anew as "
        "the code is now, with $name for a variable of any name"
    )
    ((name, match),) = found
    new = re.sub(r"\$(\w+)", lambda variable: match[variable[1]], wrong)
    text = sources[name]
    return {**sources, name: text[: match.start()] + new + text[match.end() :]}
