"""1 where a text is JSON that fits a schema, else 0; optionally something for JSON that does not fit.

The part of JSON Schema that structured outputs use: type, enum, const, properties, required,
additionalProperties, items, lengths and limits, pattern, anyOf, oneOf, allOf, not, and references within the
schema. A schema with any other keyword is refused, so that nothing is passed over in silence.
"""

from __future__ import annotations

import json
import re
from typing import Any

from luthier.errors import RecipeError
from luthier.methods.rewards._base import Reward
from luthier.registry import Column, reward

SCHEMA = Column("json_schema", says="rows with a JSON schema of the right answers", example=({},))
FENCE = re.compile(r"```(?:json)?\s*\n(.*?)```", re.S)
TYPES = {
    "object": lambda v: isinstance(v, dict),
    "array": lambda v: isinstance(v, list),
    "string": lambda v: isinstance(v, str),
    "integer": lambda v: is_number(v) and float(v).is_integer(),
    "number": lambda v: is_number(v),
    "boolean": lambda v: isinstance(v, bool),
    "null": lambda v: v is None,
}
NOTES = {"title", "description", "default", "examples", "$schema", "$id", "$defs", "definitions", "format"}


@reward(
    requires=[SCHEMA],
    use_when="answers are JSON of a known form: extraction, structured outputs, arguments of calls.",
    costs="parsing each completion.",
)
class JSONSchema(Reward):
    """The text, or its last fenced block, is parsed. The schema is the setting, else the row's
    `json_schema`.
    """

    schema: dict[str, Any] | None = None  # the schema; null: that of each row, in its column json_schema
    parsed: float = 0.0  # score of JSON that does not fit the schema
    fenced: bool = True  # read the last fenced block where there is one; false: the text must be JSON alone

    def __post_init__(self):
        if self.schema is not None:
            check(self.schema)

    @property
    def active_requires(self):
        return self.requires if self.schema is None else frozenset()

    def scores(self, row: dict, texts: list[str]) -> list[float]:
        """1.0, `parsed` or 0.0 per text."""
        schema = self.schema
        if schema is None:
            schema = self.column(row, "json_schema")
            schema = json.loads(schema) if isinstance(schema, str) else schema
            check(schema)
        return [self.score(schema, text) for text in texts]

    def score(self, schema: dict, text: str) -> float:
        """One text."""
        blocks = FENCE.findall(text) if self.fenced else []
        try:
            value = json.loads(blocks[-1] if blocks else text)
        except (ValueError, RecursionError):
            return 0.0
        return 1.0 if fits(value, schema, schema) else self.parsed


def check(schema: Any) -> None:
    """Raises RecipeError where a schema uses what is not read here."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise RecipeError(f"reward 'json_schema': a schema is an object, not {schema!r}"[:300])
    for word, value in schema.items():
        if word in ("properties", "$defs", "definitions"):
            for inner in value.values():
                check(inner)
        elif word in ("anyOf", "oneOf", "allOf"):
            for inner in value:
                check(inner)
        elif word in ("items", "additionalProperties", "not"):
            check(value)
        elif word not in RULES and word not in NOTES:
            raise RecipeError(f"reward 'json_schema': this schema uses '{word}', which is not supported")


def fits(value: Any, schema: Any, root: dict) -> bool:
    """Does a value keep every rule of a schema? root: what references point into."""
    if isinstance(schema, bool):
        return schema
    for word, limit in schema.items():
        rule = RULES.get(word)
        if rule is not None and not rule(value, limit, schema, root):
            return False
    return True


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def same(value: Any, other: Any) -> bool:
    """Equal, where true is not 1."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def of_type(value: Any, names: Any, schema: dict, root: dict) -> bool:
    names = [names] if isinstance(names, str) else names
    return any(TYPES[name](value) for name in names)


def refers(value: Any, path: str, schema: dict, root: dict) -> bool:
    """A reference such as #/$defs/item."""
    target: Any = root
    for key in path.removeprefix("#").strip("/").split("/"):
        target = target[key.replace("~1", "/").replace("~0", "~")] if key else target
    return fits(value, target, root)


def has_properties(value: Any, properties: dict, schema: dict, root: dict) -> bool:
    if not isinstance(value, dict):
        return True
    return all(fits(value[key], inner, root) for key, inner in properties.items() if key in value)


def has_no_others(value: Any, inner: Any, schema: dict, root: dict) -> bool:
    if not isinstance(value, dict):
        return True
    others = value.keys() - schema.get("properties", {}).keys()
    return all(fits(value[key], inner, root) for key in others)


def length(kind: type, least: bool):
    """The rule that a value of a type has at least, or at most, so many elements."""

    def rule(value: Any, limit: int, schema: dict, root: dict) -> bool:
        if not isinstance(value, kind):
            return True
        return len(value) >= limit if least else len(value) <= limit

    return rule


RULES = {
    "type": of_type,
    "$ref": refers,
    "properties": has_properties,
    "additionalProperties": has_no_others,
    "enum": lambda v, options, s, r: any(same(v, option) for option in options),
    "const": lambda v, other, s, r: same(v, other),
    "required": lambda v, keys, s, r: not isinstance(v, dict) or set(keys) <= v.keys(),
    "items": lambda v, inner, s, r: not isinstance(v, list) or all(fits(x, inner, r) for x in v),
    "minItems": length(list, least=True),
    "maxItems": length(list, least=False),
    "minLength": length(str, least=True),
    "maxLength": length(str, least=False),
    "minProperties": length(dict, least=True),
    "maxProperties": length(dict, least=False),
    "minimum": lambda v, limit, s, r: not is_number(v) or v >= limit,
    "maximum": lambda v, limit, s, r: not is_number(v) or v <= limit,
    "exclusiveMinimum": lambda v, limit, s, r: not is_number(v) or v > limit,
    "exclusiveMaximum": lambda v, limit, s, r: not is_number(v) or v < limit,
    "multipleOf": lambda v, step, s, r: not is_number(v) or abs(v / step - round(v / step)) < 1e-9,
    "pattern": lambda v, pattern, s, r: not isinstance(v, str) or re.search(pattern, v) is not None,
    "anyOf": lambda v, inner, s, r: any(fits(v, each, r) for each in inner),
    "oneOf": lambda v, inner, s, r: sum(fits(v, each, r) for each in inner) == 1,
    "allOf": lambda v, inner, s, r: all(fits(v, each, r) for each in inner),
    "not": lambda v, inner, s, r: not fits(v, inner, r),
}
