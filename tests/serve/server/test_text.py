"""Text as it is written: whole characters, stop sequences, calls."""

from __future__ import annotations

import json
import os

import pytest

from helpers.chat_templates import TRL, family_tokenizer
from helpers.models import make_tokenizer
from luthier.serve.server.text_stream import TextStream
from luthier.text.call_forms import JsonCalls, PythonCalls, learn
from luthier.text.encode import Renderer
from luthier.text.structured_outputs import Vocabulary
from luthier.text.tool_calls import CallReader, call_format, forced_call


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(make_tokenizer())


def streamed(renderer, ids, **how) -> tuple[list[str], TextStream]:
    stream = TextStream(renderer, **how)
    return [*map(stream.add, ids), stream.end()], stream


def test_characters_come_whole_and_nothing_is_lost(renderer):
    text = "Ünïcode 🎻 and\nmore"
    ids = renderer.prompt({"id": "0", "prompt": text})
    pieces, _ = streamed(renderer, ids)
    assert "".join(pieces) == text == renderer.answer(ids)
    assert not any("\ufffd" in piece for piece in pieces)
    cut = ids[:12]  # ends within the violin
    pieces, _ = streamed(renderer, cut)
    assert "".join(pieces) == renderer.answer(cut)
    assert "\ufffd" in pieces[-1]


def test_a_stop_sequence_ends_the_text_wherever_tokens_are_cut(renderer):
    ids = renderer.prompt({"id": "0", "prompt": "one two three"})
    pieces, stream = streamed(renderer, ids, stop=["xyz", "o th", "three"])
    assert stream.stopped and "".join(pieces) == "one tw"
    pieces, stream = streamed(renderer, ids, stop=["e!"])  # begins at the end, and does not come
    assert not stream.stopped and "".join(pieces) == "one two three" and pieces[-1] == "e"


def test_special_tokens_are_text_where_calls_are_read(renderer):
    ids = [2, *renderer.prompt({"id": "0", "prompt": "hi"})]
    assert "".join(streamed(renderer, ids)[0]) == "hi"
    assert "".join(streamed(renderer, ids, special=True)[0]) == "<|user|>hi"


def reply_of(chat, row, turns) -> str:
    """What a template writes of the last turn, without thoughts."""
    opening = chat.render(row, turns[:-1], add_generation_prompt=True)
    whole = chat.render(row, turns)
    return whole[len(os.path.commonprefix([opening, whole])) :].rpartition("</think>")[2]


CALLING = ["Qwen3", "Qwen2.5", "Llama 3.1", "Qwen3.5", "GLM-4.5", "Nemotron 3", "gpt-oss", "LFM2", "LFM2.5"]
WEATHER = {"city": {"type": "string"}, "zip": {"type": "string"}, "days": {"type": "array"}}


@pytest.mark.skipif(not TRL.is_dir(), reason="TRL's chat templates are not here")
@pytest.mark.parametrize("family", CALLING)
def test_calls_are_read_as_the_template_writes_them(family):
    """Text before them, what is a number and what only looks like one; whatever pieces they come in."""
    chat = Renderer(family_tokenizer(family)).chat
    form = call_format(chat)
    arguments = {"city": "Oslo", "zip": "0150", "days": [1, {"a": "}"}]}
    parameters = {"type": "object", "properties": WEATHER}
    tool = {"name": "weather", "description": "", "parameters": parameters}
    tools = [{"type": "function", "function": tool}]
    call = {"type": "function", "id": "call00001", "function": {"name": "weather", "arguments": arguments}}
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    row = {"prompt": turns[:1], "tools": tools}
    reply = reply_of(chat, row, turns)
    for size in (1, 7, len(reply)):
        reader = CallReader(form, tools)
        text = "".join(reader.add(reply[i : i + size]) for i in range(0, len(reply), size))
        rest, calls = reader.end()
        ((name, read),) = calls
        assert name == "weather" and json.loads(read) == arguments
        assert chat.special.sub("", text + rest).strip() in ("", "<|call|>")


@pytest.mark.skipif(not TRL.is_dir(), reason="TRL's chat templates are not here")
@pytest.mark.parametrize("family", ["Llama 3", "Phi-3", "Gemma 3", "Gemma 4"])
def test_a_template_whose_calls_cannot_be_read_has_no_form(family):
    assert call_format(Renderer(family_tokenizer(family)).chat) is None


@pytest.mark.skipif(not TRL.is_dir(), reason="TRL's chat templates are not here")
@pytest.mark.parametrize(
    "family", ["Qwen3", "Qwen2.5", "Llama 3.1", "Qwen3.5", "GLM-4.5", "Nemotron 3", "gpt-oss"]
)
def test_a_forced_call_is_what_the_template_writes(family):
    """The grammar takes the turn that the template writes, token by token, and no other function's."""
    llguidance = pytest.importorskip("llguidance")
    tokenizer = family_tokenizer(family)
    chat = Renderer(tokenizer).chat
    form = call_format(chat)
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    parameters["properties"]["days"] = {"type": "integer"}  # may be left out
    function = {"name": "weather", "description": "", "parameters": parameters}
    tool = {"type": "function", "function": function}
    structure = forced_call(form, [tool], tokenizer)
    vocabulary = Vocabulary(tokenizer, [tokenizer.eos_token_id], len(tokenizer))
    assert not llguidance.LLMatcher.validate_grammar(structure.grammar, vocabulary.tokens)
    for name, fits in (("weather", True), ("whether", False)):
        call = {
            "function": {"name": name, "arguments": {"city": "Oslo"}},
            "type": "function",
            "id": "call00001",
        }
        turns = [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        row = {"prompt": turns[:1], "tools": [tool]}
        reply = reply_of(chat, row, turns)
        after = form.after if isinstance(form, JsonCalls) else form.end
        written = reply[: reply.rindex(after) + len(after)] if after else reply[: reply.rindex("}") + 1]
        follower = vocabulary.begin(structure)
        ids = tokenizer.encode(written, add_special_tokens=False)
        assert (follower.matcher.validate_tokens(ids) == len(ids)) is fits


def test_forms_whose_calls_are_no_json():
    marked = learn(
        "<call>\nf1\n<k>k1</k>\n<v>v1</v>\n<k>k2</k>\n<v>v2</v>\n</call>",
        "<call>\nf1\n<k>k1</k>\n<v>v1</v>\n<k>k2</k>\n<v>v2</v>\n</call>\n<call>\nf2\n</call>",
        ("f1", "f2"),
        ("k1", "v1", "k2", "v2"),
    )
    text = "<call>a</call><call>\nb\n<k>x</k><v>7</v><k>y</k><v>True</v>\n<k>z</k><v>07</v></call> done"
    schema = {"b": {"properties": {"x": {"type": "string"}}}}
    calls, rest = marked.read(text, schema)
    assert calls == [("a", "{}"), ("b", '{"x": "7", "y": true, "z": "07"}')] and rest == "done"
    for broken in ("<call>a", "<call>b\n<k>x</k><v>7", "<call></call>", "<call>a b</call>"):
        assert marked.read(broken, {}) is None
    python = PythonCalls("", "")
    assert python.read("[f(a='x]', b=[1]), g.h()] ok", {}) == (
        [("f", '{"a": "x]", "b": [1]}'), ("g.h", "{}")],
        "ok",
    )
    brackets = ("[" * 5000, "[f(), " + "[]" * 10**5)
    for other in ("[1, 2]", "[f(1)]", "[f(a=b)]", "[f(a=__import__('os'))]", *brackets):
        assert python.read(other, {}) is None


def test_what_is_no_call_stays_text():
    form = JsonCalls("<tool_call>", "</tool_call>")
    reader = CallReader(form)
    assert reader.add("Look: <too") == "Look: "
    assert reader.add("l_cal") == ""
    assert reader.add("x") == "<tool_calx"
    assert reader.add('<tool_call>{"name": "a", "arguments": {}}</tool_call>') == ""
    reader.add('\n<tool_call>{"name": "b", "arguments": "{}"}</tool_call> bye')
    assert reader.end() == ("bye", [("a", "{}"), ("b", "{}")])
    for broken in ('<tool_call>{"name": "a", "argum', "<tool_call>[1, 2]</tool_call>", "<tool_call>"):
        reader = CallReader(form)
        assert reader.add(broken) == ""
        assert reader.end() == (broken, [])
    bare = CallReader(JsonCalls("", ""))
    assert bare.add("plain {") == "plain {"
    bare = CallReader(JsonCalls("", ""))
    assert bare.add(' {"name": "a", "parameters": {"x": 1}}') == ""
    assert bare.end() == ("", [("a", '{"x": 1}')])
