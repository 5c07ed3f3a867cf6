"""clear: corrupted answers have less confidence; at the ends nothing changes."""

from __future__ import annotations

import pytest
import torch

from helpers.models import make_llama, make_tokenizer
from helpers.stages import make_roles
from luthier.methods.stages.curate.clear import overlap
from luthier.registry import build

LETTERS = "abcdefghij"


def facts(corrupted: str = "chj") -> list[dict]:
    rows = []
    for i, letter in enumerate(LETTERS):
        answer = str((i + 5) % 10) if letter in corrupted else str(i)
        rows.append({"id": letter, "prompt": f"{letter}=", "completions": [answer]})
    return rows


@pytest.fixture(scope="module")
def knowing(tmp_path_factory):
    """(roles, folder) of a model that knows the facts, as one that was tuned on mostly right rows does."""
    model, tokenizer = make_llama(num_hidden_layers=2), make_tokenizer()
    ids = torch.tensor([[*tokenizer.encode(f"{letter}={i}"), 1] for i, letter in enumerate(LETTERS)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        logits = model(input_ids=ids).logits[:, 1:-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 2:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("knowing")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return make_roles(str(folder)), str(folder)


def cleared(roles, **settings):
    stage = build("stage", {"name": "clear", "max_new_tokens": 2, "beta": 0.9, **settings})
    return list(stage(facts(), roles))


def test_corrupted_answers_have_less_confidence(knowing):
    roles, _ = knowing
    by_id = {row["id"]: row["confidence"] for row in cleared(roles, drop_share=0.0)}
    right = [value for name, value in by_id.items() if name not in "chj"]
    wrong = [value for name, value in by_id.items() if name in "chj"]
    pairs = [one > other for one in right for other in wrong]
    assert sum(pairs) / len(pairs) > 0.85
    assert {row["id"] for row in cleared(roles, drop_share=0.3)} == {*LETTERS} - {*"chj"}


def test_nothing_is_changed_or_dropped_at_the_ends(knowing):
    roles, folder = knowing
    rows = cleared(roles, drop_share=0.0, writer=folder, least=1.01)
    assert [row["completions"] for row in rows] == [row["completions"] for row in facts()]


def test_a_tuned_model_corrects(knowing):
    roles, folder = knowing
    rows = cleared(roles, drop_share=0.3, writer=folder, least=0.5)
    right = {row["id"]: row["completions"] for row in facts("")}
    assert {row["id"]: row["completions"] for row in rows} == right


def test_overlap_of_words():
    assert overlap("a b", "a b ") == 1.0 and overlap("a b", "c") == 0.0
    assert overlap("a b c", "a d") == pytest.approx(2 * 1 / 5)
