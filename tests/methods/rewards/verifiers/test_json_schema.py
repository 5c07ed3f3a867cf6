"""json_schema: each rule by hand; what is not supported is refused."""

from __future__ import annotations

import json

import pytest

from luthier.errors import RecipeError
from luthier.methods.rewards.verifiers.json_schema import fits
from luthier.registry import build

ORDER = {
    "type": "object",
    "properties": {
        "item": {"type": "string", "minLength": 2},
        "count": {"type": "integer", "minimum": 1},
        "size": {"enum": ["S", "M", None]},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "maxItems": 2},
    },
    "required": ["item", "count"],
    "additionalProperties": False,
    "$defs": {"tag": {"type": "string", "pattern": "^[a-z]+$"}},
}


@pytest.mark.parametrize(
    "value, right",
    [
        ({"item": "cup", "count": 2}, True),
        ({"item": "cup", "count": 2.0, "size": None, "tags": ["a", "b"]}, True),
        ({"item": "cup"}, False),
        ({"item": "c", "count": 2}, False),
        ({"item": "cup", "count": 0}, False),
        ({"item": "cup", "count": True}, False),
        ({"item": "cup", "count": 2, "color": "red"}, False),
        ({"item": "cup", "count": 2, "size": "L"}, False),
        ({"item": "cup", "count": 2, "tags": ["A"]}, False),
        ({"item": "cup", "count": 2, "tags": ["a", "b", "c"]}, False),
        ([], False),
    ],
)
def test_orders(value, right):
    text = json.dumps(value)
    judge = build("reward", {"name": "json_schema", "schema": ORDER, "parsed": 0.25})
    assert judge.scores({"id": "r"}, [text, f"Here:\n```json\n{text}\n```"]) == [1.0 if right else 0.25] * 2
    assert judge.scores({"id": "r"}, [text + "}"]) == [0.0]


def test_words_that_combine():
    either = {"oneOf": [{"type": "number"}, {"type": "integer"}]}
    assert fits(1.5, either, either) and not fits(1, either, either)
    for schema, value, right in (
        ({"anyOf": [{"const": 1}, {"const": "a"}]}, True, False),
        ({"allOf": [{"minimum": 1}, {"maximum": 3}]}, 4, False),
        ({"not": {"type": "null"}}, None, False),
        ({"multipleOf": 0.1}, 0.3, True),
        ({"type": ["string", "null"]}, None, True),
        ({"additionalProperties": {"type": "string"}}, {"a": 1}, False),
    ):
        assert fits(value, schema, schema) == right


def test_the_schema_of_the_row_and_words_that_are_not_read():
    judge = build("reward", "json_schema")
    assert judge.scores({"id": "r", "json_schema": json.dumps({"type": "array"})}, ["[1]", "{}"]) == [
        1.0,
        0.0,
    ]
    with pytest.raises(RecipeError, match="patternProperties"):
        build("reward", {"name": "json_schema", "schema": {"patternProperties": {}}})
