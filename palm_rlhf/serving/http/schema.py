"""The part of JSON Schema that the protocol needs: what the API's description says is what is checked."""

import json
import re
from itertools import chain
from typing import Any

from palm_rlhf.serving.deadline import check_deadline
from palm_rlhf.serving.http.errors import ApiError

TAGS = ("type", "role")
KINDS = {"string": str, "boolean": bool, "integer": int, "number": (int, float), "array": list, "object": dict}


def check(value: Any, schema: dict[str, Any], name: str) -> Any:
    """The value, without entries that are null; ApiError that names the place, what stands there and what is expected.

    Knows type, enum, minimum, maximum, minLength, maxLength, pattern, minItems, maxItems, items, properties, required,
    additionalProperties (true for an object that is taken as it is), maxProperties, propertyNames of digits or of a
    length, and anyOf of several types. An enum without a type lists the values at which a parameter changes nothing;
    others are not supported.
    """
    check_deadline()
    if "anyOf" in schema:
        return _check_any(value, schema, name)
    if "type" not in schema:
        if not any(_same(value, one) for one in schema["enum"]):
            message = f"{name} is {shown(value)}, not supported here; expected it left out, or {described(schema)}"
            raise ApiError(400, message, param=name, code="unsupported_parameter")
        return value
    kind = schema["type"]
    if kind == "integer" and isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, KINDS[kind]) or (isinstance(value, bool) and kind != "boolean"):
        raise refusal(value, schema, name)
    if "enum" in schema and value not in schema["enum"]:
        raise refusal(value, schema, name)
    if "pattern" in schema and not re.fullmatch(schema["pattern"], value):
        raise refusal(value, schema, name)
    if kind in ("integer", "number"):
        if not schema["minimum"] <= value <= schema["maximum"]:
            raise refusal(value, schema, name)
    elif kind in ("string", "array"):
        least, most = (schema.get(f"{end}{'Length' if kind == 'string' else 'Items'}") for end in ("min", "max"))
        if (least is not None and len(value) < least) or (most is not None and len(value) > most):
            raise refusal(value, schema, name)
        if kind == "array":
            return [check(item, schema["items"], f"{name}[{index}]") for index, item in enumerate(value)]
    elif kind == "object" and schema.get("additionalProperties") is not True:
        return _check_object(value, schema, name)
    return value


def _check_any(value: Any, schema: dict[str, Any], name: str) -> Any:
    """By the one that the value's tag names, or else the first that fits.

    Where none does, the complaint is that of the last of the value's own type.
    """
    if isinstance(value, dict) and (option := _tagged(value, schema["anyOf"], name)):
        return check(value, option, name)
    error = None
    for option in schema["anyOf"]:
        try:
            return check(value, option, name)
        except ApiError as found:
            if "type" in option and isinstance(value, KINDS[option["type"]]) and not isinstance(value, bool):
                error = found if error is None or found.param != name else error
    raise error or refusal(value, schema, name)


def _tagged(value: dict[str, Any], options: list[dict[str, Any]], name: str) -> dict[str, Any] | None:
    """The schema of an object that its type or role tells, where all schemas of objects can be told by it."""
    options = [option for option in options if option.get("type") == "object"]
    for tag in TAGS:
        known = [option.get("properties", {}).get(tag, {}).get("enum", []) for option in options]
        if len(options) > 1 and all(known) and value.get(tag) is not None:
            found = check(value[tag], {"type": "string", "enum": list(chain(*known))}, f"{name}.{tag}")
            return next(option for option, tags in zip(options, known, strict=True) if found in tags)
    return None


def _check_object(value: dict[str, Any], schema: dict[str, Any], name: str) -> dict[str, Any]:
    found, properties = {}, schema.get("properties", {})
    prefix = f"{name}." if name else ""
    if len(value) > schema.get("maxProperties", len(value)):
        raise ApiError(400, f"{name} has {len(value)} entries; expected at most {schema['maxProperties']}", param=name)
    for key, item in value.items():
        if item is None:
            continue
        if key in properties:
            found[key] = check(item, properties[key], prefix + key)
        elif schema["additionalProperties"] is False:
            raise ApiError(
                400,
                f"{prefix}{key} is not supported here; expected only {_supported(properties)}",
                param=prefix + key,
                code="unsupported_parameter",
            )
        elif complaint := _bad_key(key, schema["propertyNames"]):
            raise ApiError(400, f"{name} has the key {shown(key)}; expected {complaint}", param=name)
        else:
            found[key] = check(item, schema["additionalProperties"], prefix + key)
    for key in schema.get("required", ()):
        if key not in found:
            raise ApiError(400, f"{prefix}{key} is missing; it is required", param=prefix + key, code="missing")
    return found


def _bad_key(key: str, schema: dict[str, Any]) -> str | None:
    """What a key should have been; None for one that is fine."""
    if "pattern" in schema:
        return None if key.isascii() and key.isdigit() and len(key) < 10 else 'a token id, such as "42"'
    return None if len(key) <= schema["maxLength"] else f"at most {schema['maxLength']} characters"


def _supported(properties: dict[str, Any]) -> str:
    """The names of those that have an effect."""
    return ", ".join(name for name, schema in properties.items() if "type" in schema or "anyOf" in schema)


def _same(one: Any, other: Any) -> bool:
    """Whether two values of JSON are equal; 1 and 1.0 are, 1 and true are not."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def refusal(value: Any, schema: dict[str, Any], name: str) -> ApiError:
    """Says what was got and what was expected."""
    message = f"{name or 'the body'} is {shown(value)}; expected {described(schema)}"
    return ApiError(400, message, param=name or None, code="invalid_value")


def shown(value: Any) -> str:
    """A value as JSON, shortened, in ASCII."""
    try:
        text = json.dumps(value)
    except RecursionError:
        return f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def described(schema: dict[str, Any]) -> str:
    """A schema in words."""
    if "anyOf" in schema:
        return " or ".join(map(described, schema["anyOf"]))
    if "enum" in schema:
        return " or ".join(shown(value) for value in schema["enum"])
    if "pattern" in schema:
        return f"a string that matches {schema['pattern']}"
    kind = schema["type"]
    article = "an" if kind[0] in "aio" else "a"
    if "minimum" in schema:
        return f"{article} {kind} from {schema['minimum']} to {schema['maximum']}"
    for end, unit in (("Length", "characters"), ("Items", "entries")):
        if f"max{end}" in schema:
            return f"{article} {kind} of {schema.get(f'min{end}', 0)} to {schema[f'max{end}']} {unit}"
        if schema.get(f"min{end}"):
            return f"{article} {kind} of at least {schema[f'min{end}']} {unit}"
    return f"{article} {kind}"
