"""A check by JSON Schema, for the keywords that this protocol needs: the description of the API is what is checked.

Pydantic does not fit here. It refuses strings with half a surrogate pair, which JSON may hold; and it works through a
whole body in one call that collects every error and that no deadline can interrupt.
"""

import json
import re
from collections.abc import Iterable
from itertools import chain
from typing import Any

from palm_rlhf.serving.deadline import check_deadline
from palm_rlhf.serving.protocol.errors import ApiError

TAGS = ("type", "role")
KINDS: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "array": list,
    "object": dict,
}
Place = tuple[str | int, ...]  # where a value stands in the body: keys of objects and indices of arrays


class Refusal(ApiError):
    """A value that its schema does not allow.

    `value` and `expected`, in words, are kept where the value itself is wrong, so that the schemas of a union can be
    named together.
    """

    def __init__(self, place: Place, message: str, code: str, value: Any = None, expected: Iterable[str] = ()):
        super().__init__(400, message, param=path(place) or None, code=code)
        self.place, self.value, self.expected = place, value, tuple(expected)

    @property
    def progress(self) -> tuple[int, ...]:
        """A measure of how far the check came before it failed: greater for later entries and deeper values."""
        return tuple(part if isinstance(part, int) else 0 for part in self.place)


def check(value: Any, schema: dict[str, Any], place: Place = ()) -> Any:
    """Return the value without entries that are null, and with whole numbers as integers where these are expected.

    Raises ApiError, which names the place, what was got and what is expected there. The keywords are type, enum,
    minimum, maximum, minLength, maxLength, pattern, minItems, maxItems, items, properties, required,
    additionalProperties (true for an object that is taken as it is), maxProperties, propertyNames of digits or of a
    length, and anyOf. An enum without a type lists the values at which an unsupported parameter changes nothing.
    """
    check_deadline()
    if "anyOf" in schema:
        return _check_any(value, schema["anyOf"], place)
    if "type" not in schema:
        return _check_neutral(value, schema, place)
    kind = schema["type"]
    if kind == "integer" and isinstance(value, float) and value.is_integer():
        value = int(value)
    if not _fits(value, schema):
        raise mismatch(place, value, [described(schema)])
    if kind == "array":
        return [check(item, schema["items"], (*place, index)) for index, item in enumerate(value)]
    if kind == "object" and schema.get("additionalProperties") is not True:
        return _check_object(value, schema, place)
    return value


def _fits(value: Any, schema: dict[str, Any]) -> bool:
    """Return whether a value is of the type of its schema and within its bounds; its entries are not looked at."""
    kind = schema["type"]
    if not _is_of(value, kind):
        return False
    if ("enum" in schema and value not in schema["enum"]) or (
        "pattern" in schema and not re.fullmatch(schema["pattern"], value)
    ):
        return False
    if kind in ("integer", "number"):
        return schema["minimum"] <= value <= schema["maximum"]
    if kind in ("string", "array"):
        unit = "Length" if kind == "string" else "Items"
        return schema.get(f"min{unit}", 0) <= len(value) <= schema.get(f"max{unit}", len(value))
    return True


def _is_of(value: Any, kind: str) -> bool:
    """Return whether a value is of a type of JSON; true and false are not numbers."""
    return isinstance(value, KINDS[kind]) and (kind == "boolean" or not isinstance(value, bool))


def _check_neutral(value: Any, schema: dict[str, Any], place: Place) -> Any:
    """Take a parameter that is not supported at a value that asks for nothing."""
    if any(_same(value, one) for one in schema["enum"]):
        return value
    expected = described(schema)
    message = f"{path(place)} is {shown(value)}, not supported here; expected it left out, or {expected}"
    raise Refusal(place, message, "unsupported_parameter", value, [expected])


def _check_any(value: Any, options: list[dict[str, Any]], place: Place) -> Any:
    """Check by the schema that the value's tag names, or else by the first that fits.

    Where none fits, the error is that of the schema that came furthest; of several, it names what all of them expect.
    """
    if isinstance(value, dict) and (option := _tagged(value, options, place)):
        return check(value, option, place)
    refusals = []
    for option in options:
        try:
            return check(value, option, place)
        except Refusal as refusal:
            refusals.append(refusal)
    furthest = max(refusal.progress for refusal in refusals)
    first, *others = (refusal for refusal in refusals if refusal.progress == furthest)
    if others and all(refusal.expected for refusal in (first, *others)):
        raise mismatch(first.place, first.value, chain(first.expected, *(other.expected for other in others)))
    raise first


def _tagged(value: dict[str, Any], options: list[dict[str, Any]], place: Place) -> dict[str, Any] | None:
    """Return the schema that the type or role of an object names, where each schema has one of its own."""
    options = [option for option in options if option.get("type") == "object"]
    for tag in TAGS:
        known = [option.get("properties", {}).get(tag, {}).get("enum", []) for option in options]
        if len(options) > 1 and all(known) and value.get(tag) is not None:
            found = check(value[tag], {"type": "string", "enum": list(chain(*known))}, (*place, tag))
            return next(option for option, names in zip(options, known, strict=True) if found in names)
    return None


def _check_object(value: dict[str, Any], schema: dict[str, Any], place: Place) -> dict[str, Any]:
    found, properties = {}, schema.get("properties", {})
    if len(value) > schema.get("maxProperties", len(value)):
        message = f"{path(place)} has {len(value)} entries; expected at most {schema['maxProperties']}"
        raise Refusal(place, message, "invalid_value")
    for key, item in value.items():
        if item is None:
            continue
        if key in properties:
            found[key] = check(item, properties[key], (*place, key))
        elif schema["additionalProperties"] is False:
            supported = ", ".join(name for name, known in properties.items() if "type" in known or "anyOf" in known)
            message = f"{path((*place, key))} is not supported here; expected only {supported}"
            raise Refusal((*place, key), message, "unsupported_parameter")
        elif complaint := _bad_key(key, schema["propertyNames"]):
            raise Refusal(place, f"{path(place)} has the key {shown(key)}; expected {complaint}", "invalid_value")
        else:
            found[key] = check(item, schema["additionalProperties"], (*place, key))
    for key in schema.get("required", ()):
        if key not in found:
            raise Refusal((*place, key), f"{path((*place, key))} is missing; it is required", "missing")
    return found


def _bad_key(key: str, schema: dict[str, Any]) -> str | None:
    """Return the keys that were expected, in words; None for a key that is allowed."""
    if "pattern" in schema:
        return None if key.isascii() and key.isdigit() and len(key) < 10 else 'a token id, such as "42"'
    return None if len(key) <= schema["maxLength"] else f"at most {schema['maxLength']} characters"


def _same(one: Any, other: Any) -> bool:
    """Return whether two values of JSON are equal; 1 and 1.0 are, 1 and true are not."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def mismatch(place: Place, value: Any, expected: Iterable[str]) -> Refusal:
    """Make the error for a value that is none of the expected ones; `expected` are in words."""
    expected = tuple(dict.fromkeys(expected))
    message = f"{path(place) or 'the body'} is {shown(value)}; expected {' or '.join(expected)}"
    return Refusal(place, message, "invalid_value", value, expected)


def path(place: Place) -> str:
    """Return a place as OpenAI's errors write it, such as "messages[0].content"."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return "".join(parts).removeprefix(".")


def shown(value: Any) -> str:
    """Return a value as JSON, shortened, in ASCII; of a large one, no more is written than is shown."""
    text = ""
    for part in json.JSONEncoder().iterencode(value):
        text += part
        if len(text) > 80:
            return f"{text[:77]}..."
    return text


def described(schema: dict[str, Any]) -> str:
    """Return a schema of one type, or of unsupported values, in words."""
    if "enum" in schema:
        return " or ".join(map(shown, schema["enum"]))
    if "pattern" in schema:
        return f"a string that matches {schema['pattern']}"
    kind = schema["type"]
    article = "an" if kind[0] in "aio" else "a"
    if "minimum" in schema:
        return f"{article} {kind} from {schema['minimum']} to {schema['maximum']}"
    for end, unit in (("Length", "characters"), ("Items", "entries")):
        if f"max{end}" in schema:
            return f"{article} {kind} of {schema.get(f'min{end}', 0)} to {schema[f'max{end}']} {unit}"
        if least := schema.get(f"min{end}"):
            return f"{article} {kind} of {least} or more {unit}"
    return f"{article} {kind}"
