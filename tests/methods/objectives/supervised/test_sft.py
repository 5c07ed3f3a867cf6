"""Supervised objectives, the stages that make their rows, and the evaluators that tell what came of them."""

from __future__ import annotations

import pytest
import torch

from helpers.models import make_tokenizer
from helpers.objectives import average, batch_of, cast, loss_of, make_rows
from luthier.data.load import load_rows as load
from luthier.errors import RecipeError
from luthier.methods.formats._base import BadRow
from luthier.registry import build
from luthier.text.encode import Renderer


def test_token_weights_count_and_divide():
    rows = make_rows(3, k=1)
    rng = torch.Generator().manual_seed(0)
    weighted = [
        {**r, "token_weights": [torch.rand(len(r["completions"][0]), generator=rng).tolist()]}
        for r in rows[:2]
    ] + rows[2:]
    roles, batch = cast(), batch_of(weighted)
    nll, w = -roles.policy.logprobs(batch).detach(), batch.weights()
    assert w[-len(rows[2]["completions"][0]) :].eq(1).all(), "a row without weights counts whole"
    for normalize, by in (("tokens", len(nll)), ("weights", float(w.sum()))):
        made = build("objective", {"name": "sft", "normalize": normalize})
        assert float(average(made, roles, batch_of(weighted)).detach()) == pytest.approx(
            float((w * nll).sum()) / by, rel=1e-5
        )
    ones = [{**r, "token_weights": [[1.0] * len(r["completions"][0])]} for r in rows]
    torch.testing.assert_close(loss_of("sft", rows=ones), loss_of("sft", rows=rows))
    with pytest.raises(RecipeError, match="supervised tokens"):
        batch_of([{**rows[0], "token_weights": [[1.0]]}]).weights()


TURNS = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "sum"},
    {"role": "assistant", "content": "four"},
]


def told(turns, **settings) -> tuple[str, dict]:
    """What is learned of a conversation, marked, and the row as training gets it."""
    renderer = Renderer(make_tokenizer())
    (row,) = load([{"messages": turns}], format={"name": "messages", **settings}, max_bad_rows=0.9).rows
    kept, bad, _ = renderer.encode_all([row])
    assert not bad
    return renderer.decode_marked(kept[0]), kept[0]


def test_each_message_can_be_learned_or_not():
    assert told(TURNS)[0].endswith("<|assistant|>⟦hello<|end|>⟧<|user|>sum<|end|><|assistant|>⟦four<|end|>⟧")
    first_off = [{**t, "loss": False} if t["content"] == "hello" else t for t in TURNS]
    assert told(first_off)[0].endswith(
        "<|assistant|>hello<|end|><|user|>sum<|end|><|assistant|>⟦four<|end|>⟧"
    )
    assert (
        told([{**t, "train": False} if t["content"] == "hello" else t for t in TURNS])[0]
        == told(first_off)[0]
    )
    assert (
        told([{**t, "weight": 0} if t["content"] == "hello" else t for t in TURNS])[0] == told(first_off)[0]
    )
    asked = told([{**t, "loss": True} if t["content"] == "sum" else t for t in TURNS])[0]
    assert "⟦hello<|end|><|user|>sum<|end|>⟧" in asked and "⟦<|user|>hi" not in asked
    with pytest.raises(RecipeError, match="not true or false"):
        load([{"messages": [*TURNS[:-1], {**TURNS[-1], "loss": "perhaps"}]}], max_bad_rows=0)


def test_the_whole_conversation_where_it_is_asked_for():
    marked, row = told(TURNS, assistant_only_loss=False)
    assert row["prompt"] == [] and marked.replace("⟦", "").replace("⟧", "").count("<|end|>") == 5
    assert all(
        f"{word}" in "".join(p.split("⟧")[0] for p in marked.split("⟦")[1:])
        for word in ("be kind", "hi", "hello", "sum", "four")
    )
    kept_out = told([{**TURNS[0], "loss": False}, *TURNS[1:]], assistant_only_loss=False)[0]
    assert "⟦" in kept_out and "be kind" not in "".join(p.split("⟧")[0] for p in kept_out.split("⟦")[1:])


def test_a_message_may_count_half():
    marked, row = told([{**t, "loss_scale": 0.5} if t["content"] == "hello" else t for t in TURNS])
    assert row["token_weights"] == [[0.5] * 6 + [1.0] * 5]
    assert "token_weights" not in told(TURNS)[1]
    renderer = Renderer(make_tokenizer())
    again = renderer.encode_all([row, row])  # from the cache
    assert [r["token_weights"] for r in again.rows] == [row["token_weights"]] * 2
    cut = Renderer(make_tokenizer(), max_length=len(renderer.encode(row)) - 2).encode_all(
        [{k: v for k, v in row.items() if k != "token_weights"}]
    )
    assert cut.rows[0]["token_weights"] == [[0.5] * 6 + [1.0] * 3]


def test_completions_may_share_a_beginning_that_is_not_learned():
    renderer = Renderer(make_tokenizer())
    text = {"id": "a", "prompt": "2+2*3=", "prefix": "2*3=6\n", "completions": ["2+6=8", "2+6=9"]}
    assert renderer.decode_marked(text) == "2+2*3=2*3=6\n⟦2+6=8<|end|>⟧\n---\n⟦2+6=9<|end|>⟧"
    chat = {**text, "prompt": [{"role": "user", "content": "2+2*3="}]}
    assert (
        renderer.decode_marked(chat)
        == "<|user|>2+2*3=<|end|><|assistant|>2*3=6\n⟦2+6=8<|end|>⟧\n---\n⟦2+6=9<|end|>⟧"
    )
    assert renderer.prompt(chat) == renderer.encode(chat).prompt, "writing goes on from the prefix"
    with pytest.raises(BadRow, match="prefix"):
        Renderer(make_tokenizer(), encoder=True).encode(text)
