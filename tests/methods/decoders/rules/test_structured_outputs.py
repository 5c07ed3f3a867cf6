"""structured_outputs: only what fits is written, and there the model decides; wrong settings are told."""

from __future__ import annotations

import json
import re

import pytest
import torch

import luthier
from helpers.models import make_tokenizer
from luthier.errors import RecipeError
from luthier.registry import build

pytest.importorskip("llguidance")
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Rome", "Oslo"]},
        "days": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}


class Texts:
    """What a decoder needs of a renderer."""

    tokenizer = make_tokenizer()
    stop_ids = (tokenizer.eos_token_id,)


def adjusted(response: str, **settings) -> tuple[torch.Tensor, torch.Tensor]:
    """([V] logits, the same when the decoder has forbidden what does not fit after a response)."""
    logits = torch.randn(1, 262, generator=torch.Generator().manual_seed(0))
    adjust = build("decoder", {"name": "structured_outputs", **settings}).begin(Texts)
    ids = Texts.tokenizer.encode(response)
    for size in range(len(ids)):
        adjust(logits.clone(), [[5]], [ids[:size]])
    return logits[0], adjust(logits.clone(), [[5]], [ids])[0]


def test_what_fits_is_as_likely_as_before():
    """Tokens that fit have the model's logits, all others -inf; the end comes where the form is complete."""
    choice = ["yes", "no", "nothing"]
    for response, letters in (("", "yn"), ("n", "o"), ("noth", "i")):
        logits, after = adjusted(response, choice=choice)
        ids = torch.tensor([Texts.tokenizer.encode(letter)[0] for letter in letters])
        assert torch.isfinite(after).nonzero().flatten().tolist() == sorted(ids.tolist())
        assert torch.equal(after[ids], logits[ids])
    end, t = Texts.tokenizer.eos_token_id, Texts.tokenizer.encode("t")[0]
    assert torch.isfinite(adjusted("no", choice=choice)[1]).nonzero().flatten().tolist() == sorted([end, t])
    assert torch.isfinite(adjusted("yes", choice=choice)[1]).nonzero().flatten().tolist() == [end]


@pytest.fixture(scope="module")
def loaded():
    return luthier.load("toy:lm", dtype="float32")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_whatever_a_model_writes_fits(loaded, temperature):
    """A model that knows nothing of JSON writes what its schema allows, several prompts at once."""
    how = {"max_new_tokens": 100, "temperature": temperature, "seed": 1}

    def write(**settings):
        return loaded.generate(["The cat", "A"], decoder={"name": "structured_outputs", **settings}, **how)

    for answer in write(json=SCHEMA):
        row = json.loads(answer)
        assert row.keys() == {"city", "days"} and row["city"] in ("Rome", "Oslo") and row["days"] >= 0
    assert all(re.fullmatch(r"\d{4}-\d{2}", answer) for answer in write(regex=r"\d{4}-\d{2}"))
    assert {*write(choice=["red", "green"])} <= {"red", "green"}
    assert all(re.fullmatch("(ab){1,4}!", answer) for answer in write(grammar='start: "ab"{1,4} "!"'))


WRONG = [
    ({}, "say one of json, regex, choice and grammar, not none"),
    ({"regex": "a", "choice": ["a"]}, "not regex and choice"),
    ({"json": "{"}, "not a JSON schema"),
    ({"json": [1]}, "expected a JSON schema"),
    ({"choice": []}, "expected a list of texts"),
    ({"regex": "(a"}, "cannot be read.*unclosed group"),
    ({"grammar": "start: nothing"}, "cannot be read.*unknown name"),
    ({"json": {"type": "strange"}}, "cannot be read.*strange"),
]


@pytest.mark.parametrize(("settings", "sentence"), WRONG)
def test_wrong_settings_are_told(settings, sentence):
    with pytest.raises(RecipeError, match=sentence):
        adjusted("", **settings)
