"""open_instruct: rows are new, scored and traced; poor answers are written again; no closed models."""

from __future__ import annotations

import itertools

import pytest

from helpers.synthesis import Scripted, nobody
from luthier.errors import RecipeError
from luthier.methods.evaluators.quality._overlap import rouge_l
from luthier.registry import build

SEEDS = [
    {"id": "0", "prompt": "Name three rivers of Europe"},
    {"id": "1", "prompt": "Explain why the sky is blue"},
]
WORDS = (
    ("Describe", "Compare", "List", "Translate", "Sort"),
    ("cats", "winds", "sums", "songs"),
    ("now", "well"),
)
TEXTS = [" ".join(words) for words in itertools.product(*WORDS)]
BAD = ["Name three rivers of Europe", "Go", "Draw a picture of two cats", "- of all"]


def made(**settings):
    texts = iter([text for pair in zip(TEXTS, itertools.cycle(BAD), strict=False) for text in pair])
    base = Scripted(lambda prompt, seed: f" {next(texts)}\n9. and more")

    def answer(prompt: str, seed: int) -> str:
        if "earlier answer" in prompt:
            return "good" if "well" in prompt else "still poor"
        return "good" if "sums" in prompt else "poor"

    judge = Scripted(lambda prompt, seed: "Score: 5" if prompt.endswith("good") else "Score: 2")
    settings = {"n": 9, "attempts": 9, "writer": Scripted(answer), "base": base, "judge": judge, **settings}
    return build("stage", {"name": "open_instruct", **settings})


def test_rows_are_new_scored_and_traced():
    roles = nobody()
    out = list(made()(SEEDS, roles))
    assert len(out) == 9
    texts = [row["prompt"] for row in out]
    for k, row in enumerate(out):
        others = [seed["prompt"] for seed in SEEDS] + texts[:k]
        assert max(rouge_l(row["prompt"], other) for other in others) <= row["overlap"] + 1e-9 < 0.7 + 1e-9
        provenance = row["provenance"]
        assert provenance["score"] == row["score"] == 5 and {*provenance["sources"]} <= {"0", "1"}
        assert provenance["instruction"] == provenance["judge"] == provenance["writer"] == "scripted"
    assert not {*texts} & {*BAD} and "is no news" in roles.sentences[-1]
    assert "malformed" in roles.sentences[-1] and "too long or short" in roles.sentences[-1]


def test_poor_answers_are_written_again():
    out = list(made()(SEEDS, nobody()))
    assert all("well" in row["prompt"] or "sums" in row["prompt"] for row in out)
    assert any("sums" not in row["prompt"] for row in out) and {row["completions"][0] for row in out} == {
        "good"
    }


def test_closed_models_are_refused():
    for who in ("https://api.openai.com/v1#x", {"base_url": "https://api.anthropic.com/v1", "model": "x"}):
        with pytest.raises(RecipeError, match="open models alone"):
            made(writer=who)
    assert made(writer="http://localhost:8000/v1#open")
