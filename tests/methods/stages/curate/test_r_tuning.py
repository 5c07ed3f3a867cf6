"""r_tuning: labels are those of asking the model; targets say it."""

from __future__ import annotations

import pytest
import torch

from helpers.models import make_llama, make_tokenizer
from helpers.stages import make_roles
from luthier.methods.stages.curate.r_tuning import ASK, REFUSALS, SURE, UNSURE
from luthier.registry import build

FACTS, OTHERS = "abcd", "wxyz"


def facts() -> list[dict]:
    rows = []
    for i, letter in enumerate(FACTS + OTHERS):
        rows.append({"id": letter, "prompt": f"{letter}=", "completions": [str(i)]})
    return rows


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """Roles of a model that has learned one half of the facts by heart, and says 9 to all others."""
    model, tokenizer = make_llama(num_hidden_layers=2), make_tokenizer()
    texts = [row["prompt"] + row["completions"][0] for row in facts()[:4]]
    texts += [f"{letter}=9" for letter in OTHERS]
    ids = torch.tensor([[*tokenizer.encode(text), 1] for text in texts])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        logits = model(input_ids=ids).logits[:, 1:-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 2:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("half")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return make_roles(str(folder))


def tuned_rows(roles, **settings):
    return list(build("stage", {"name": "r_tuning", "max_new_tokens": 2, **settings})(facts(), roles))


def test_a_model_that_knows_half_says_which(half):
    for row in tuned_rows(half):
        sure = row["id"] in FACTS
        assert row["certain"] == sure
        assert row["completions"][0].endswith(f"{ASK} {SURE if sure else UNSURE}")
    for row, before in zip(tuned_rows(half, mode="replace"), facts(), strict=True):
        assert (row["completions"] == before["completions"]) == (row["id"] in FACTS)
        assert row["id"] in FACTS or row["completions"][0] in REFUSALS


def test_labels_are_those_of_asking_the_model(half):
    rows = tuned_rows(half)
    prompts = [half.renderer.prompt(row) for row in facts()]
    how = {"seeds": [0] * len(rows), "max_new_tokens": 2, "temperature": 0.0, "stop": half.renderer.stop_ids}
    written = half.policy.generate(prompts, **how)
    again = []
    for (ids,), row in zip(written, facts(), strict=True):
        again.append(half.renderer.answer(ids) == row["completions"][0])
    assert [row["certain"] for row in rows] == again


def test_without_references_the_steadier_half_is_certain(half):
    rows = tuned_rows(half, unsupervised=True, temperature=1.0)
    assert sum(row["certain"] for row in rows) >= 4


def test_a_conversation_gets_two_more_turns(half):
    row = {
        "id": "a",
        "prompt": [{"role": "user", "content": "a="}],
        "completions": [[{"role": "assistant", "content": "0"}]],
    }
    (out,) = build("stage", {"name": "r_tuning", "max_new_tokens": 2})([row], half)
    assert [turn["role"] for turn in out["completions"][0]] == ["assistant", "user", "assistant"]
    assert out["completions"][0][1]["content"] == ASK
