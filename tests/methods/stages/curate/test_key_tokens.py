"""key_tokens: a tool call is judged by its first fault; failed calls are read and not learned; of a call;
one tool without parameters is plain sft.
"""

from __future__ import annotations

import copy

import pytest
import torch

from helpers.models import make_tokenizer
from helpers.objectives import average
from luthier.recipe.validate import DryRunRoles
from luthier.registry import build
from luthier.text.encode import Renderer


def declared(name: str, *parameters: str) -> dict:
    return {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {"type": "object", "properties": {p: {} for p in parameters}},
        },
    }


@pytest.mark.parametrize(
    "said, score",
    [
        ("no call", -2.0),
        ('{"name": "fly", "arguments": {}}', -2.0),
        ('{"name": "get_time", "arguments": {}}', -1.5),
        ('{"name": "get_weather", "arguments": {"zip": 1, "day": "x"}}', -1.8),
        ('{"name": "get_weather", "arguments": {"zip": 1, "day": "x", "city": "Rome"}}', -1.3),
        ('{"name": "get_weather", "arguments": {"zip": 1}}', -1.3),
        ('{"name": "get_weather", "arguments": {"day": "x"}}', -1.0),
        ('{"name": "get_weather", "arguments": {"zip": 1, "city": "Rome"}}', -0.8),
        ('{"name": "get_weather", "arguments": {"day": "x", "city": "Rome"}}', -0.5),
        ('{"name": "get_weather", "arguments": {}}', -0.5),
        ('{"name": "get_weather", "arguments": {"city": "Oslo"}}', -0.25),
        ('So: <tool_call>{"name": "get_weather", "arguments": {"city": "Rome"}}</tool_call>', 1.0),
    ],
)
def test_a_tool_call_is_judged_by_its_first_fault(said, score):
    row = {"id": "a", "tools": [declared("get_weather", "city", "day"), declared("get_time")]}
    row["answer"] = {"name": "get_weather", "arguments": {"city": "Rome"}}
    assert build("reward", "tool_call").scores(row, [said]) == [score]


def test_failed_calls_are_read_and_not_learned():
    call = lambda c: {"role": "assistant", "content": c}  # noqa: E731
    turns = [
        call("one"),
        {"role": "tool", "content": "NameError: name 'x' is not defined"},
        call("two"),
        {"role": "tool", "content": "4"},
        call("4"),
    ]
    row = {"id": "a", "prompt": [{"role": "user", "content": "2+2"}], "completions": [turns]}
    (out,) = build("stage", "mask_failed_calls")([row], DryRunRoles())
    assert [t.get("loss") for t in out["completions"][0] if t["role"] == "assistant"] == [False, None, None]
    assert "⟦two" in Renderer(make_tokenizer()).decode_marked(out) and "⟦one" not in Renderer(
        make_tokenizer()
    ).decode_marked(out)
    assert not build("stage", "mask_failed_calls")([{**row, "completions": [turns[:2]]}], DryRunRoles())


@pytest.fixture
def calling(roles):
    """The same roles, with a chat template that writes tool calls."""
    made = copy.copy(roles)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    made.renderer = Renderer(tokenizer, chat_template="plain")
    return made


def tool_row(tools: list[dict], arguments: dict) -> dict:
    said = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "get_weather", "arguments": arguments}}],
    }
    return {"id": "a", "prompt": [{"role": "user", "content": "?"}], "completions": [[said]], "tools": tools}


def test_key_tokens_of_a_call(calling):
    stage = build("stage", "key_tokens")
    row = tool_row([declared("get_weather", "city"), declared("get_time")], {"city": "Rome"})
    (out,) = list(stage([row], calling))
    encoded = calling.policy.architecture.encode(row, calling.renderer)
    learned = [t for t, m in zip(encoded.completions[0], encoded.supervised[0], strict=True) if m]
    weights = out["token_weights"][0]
    keys = [calling.text([t]) for t, w in zip(learned, weights, strict=True) if w > 1]
    assert keys == ["w", "c", "R"], "where the name parts from get_time, the parameter, its value"
    w = min((len(learned) - 3) / 3, 9.0)
    assert sum(weights) == pytest.approx(len(learned) - 3 + 3 * w)


def test_one_tool_without_parameters_is_plain_sft(calling):
    row = tool_row([declared("get_weather")], {})
    (out,) = list(build("stage", "key_tokens")([row], calling))
    assert set(out["token_weights"][0]) == {1.0}
    made = build("objective", {"name": "sft", "normalize": "weights"})
    with torch.no_grad():
        a, b = (average(made, calling, calling.batch([r])) for r in (row, out))
    torch.testing.assert_close(a, b)
