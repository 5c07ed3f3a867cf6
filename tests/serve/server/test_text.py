"""Text as it is written: whole characters, stop sequences, calls."""

from __future__ import annotations

import json

import pytest

from helpers.chat_templates import FAMILIES, TRL, family_tokenizer
from helpers.models import make_tokenizer
from luthier.serve.server.text_stream import TextStream
from luthier.text.encode import Renderer
from luthier.text.structured_outputs import Vocabulary
from luthier.text.tool_calls import CallFormat, CallReader, call_format, forced_call


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


@pytest.mark.skipif(not TRL.is_dir(), reason="TRL's chat templates are not here")
@pytest.mark.parametrize("family", ["Qwen3", "Qwen2.5", "Llama 3.1", "Llama 3"])
def test_calls_are_read_as_the_template_writes_them(family):
    assert family in FAMILIES
    chat = Renderer(family_tokenizer(family)).chat
    form = call_format(chat)
    if family == "Llama 3":  # knows no tools
        assert form is None
        return
    arguments = {"city": "Oslo", "days": [1, {"a": "}"}]}
    call = {"type": "function", "id": "call00001", "function": {"name": "weather", "arguments": arguments}}
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    row = {"prompt": turns[:1], "tools": [{"type": "function", "function": {"name": "weather"}}]}
    opening = chat.render(row, turns[:1], add_generation_prompt=True)
    reply = chat.render(row, turns)[len(opening) :].rpartition("</think>")[2]
    reader = CallReader(form)
    text = "".join(map(reader.add, reply))
    rest, calls = reader.end()
    ((name, read),) = calls
    assert name == "weather" and json.loads(read) == arguments
    assert chat.special.sub("", text + rest).strip() == ""


@pytest.mark.skipif(not TRL.is_dir(), reason="TRL's chat templates are not here")
@pytest.mark.parametrize("family", ["Qwen3", "Qwen2.5", "Llama 3.1"])
def test_a_forced_call_is_what_the_template_writes(family):
    """The grammar takes the turn that the template writes, token by token, and no other function's."""
    llguidance = pytest.importorskip("llguidance")
    tokenizer = family_tokenizer(family)
    chat = Renderer(tokenizer).chat
    form = call_format(chat)
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tool = {"type": "function", "function": {"name": "weather", "parameters": parameters}}
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
        opening = chat.render(row, turns[:1], add_generation_prompt=True)
        reply = chat.render(row, turns)[len(opening) :].rpartition("</think>")[2]
        written = reply[: len(reply) - len(reply.partition(form.after)[2])] if form.after else reply
        if not form.after:
            written = written[: written.rindex("}") + 1]
        follower = vocabulary.begin(structure)
        ids = tokenizer.encode(written, add_special_tokens=False)
        assert (follower.matcher.validate_tokens(ids) == len(ids)) is fits


def test_what_is_no_call_stays_text():
    form = CallFormat("<tool_call>", "</tool_call>")
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
    bare = CallReader(CallFormat("", ""))
    assert bare.add("plain {") == "plain {"
    bare = CallReader(CallFormat("", ""))
    assert bare.add(' {"name": "a", "parameters": {"x": 1}}') == ""
    assert bare.end() == ("", [("a", '{"x": 1}')])
