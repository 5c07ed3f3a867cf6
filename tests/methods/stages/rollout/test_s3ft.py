"""s3ft: own answers, paraphrases and references by a judge; what targets in one's own words cost."""

from __future__ import annotations

import pytest
import torch

from helpers.rounds import Table, roles_of, scripted
from luthier.methods.stages.rollout.s3ft import S3FT
from luthier.registry import build

JUDGE = {"name": "exact_match", "extract": "last_number"}


def reply(prompt: str, seed: int) -> str:
    """Right on even questions; its paraphrases of references below 7 are right."""
    number = int(prompt[1])
    if "again" in prompt:
        return f"so {number}" if number < 7 else "so 0"
    return f"i say {number}" if number % 2 == 0 else "i say 99"


def rows() -> list[dict]:
    return [{"id": str(k), "prompt": f"?{k}:", "completions": [f"#{k}"], "answer": k} for k in range(1, 10)]


def test_a_target_is_accepted_or_the_reference():
    roles = scripted(reply, lambda character: -5.0 if character == "#" else -1.0)
    stage = build("stage", {"name": "s3ft", "reward": JUDGE, "n": 2})
    out = stage(rows(), roles)
    sources = [row["target"] for row in out]
    own, paraphrase, reference = "own", "paraphrase", "reference"
    assert sources == [paraphrase, own, paraphrase, own, paraphrase, own, reference, own, reference]
    for row, first in zip(out, rows(), strict=True):
        target = row["completions"][0]
        if row["target"] == "reference":
            assert target == first["completions"][0]
        else:
            assert stage.reward.scores(row, [roles.text(target)]) == [1.0]
    measured = roles.stage_metrics
    assert sum(measured[name] for name in (own, paraphrase, reference)) == pytest.approx(1)
    assert measured["own"] == pytest.approx(4 / 9) and measured["reference"] == pytest.approx(2 / 9)
    assert measured["reference_logprob"] == -3.0  # of two characters
    assert measured["target_logprob"] == pytest.approx(-1 - 2 * 2 / 9)


def test_a_judge_that_rejects_everything_leaves_the_references():
    never = {"name": "regex", "pattern": "(?!)"}
    out = build("stage", {"name": "s3ft", "reward": never})(rows(), scripted(reply))
    assert [{k: v for k, v in row.items() if k != "target"} for row in out] == rows()


def test_the_likeliest_of_the_right_answers():
    roles = scripted(lambda prompt, seed: ["a 1", "b 1", "c 2"][seed % 3], lambda c: -float(ord(c)))
    stage = S3FT(reward=build("reward", JUDGE), n=3, temperature=1.0)
    (row,) = stage([{"id": "r", "prompt": "?1:", "completions": ["#1"], "answer": 1}], roles)
    assert roles.text(row["completions"][0]) == "a 1"


def test_own_words_cost_less_of_what_was_before():
    """Every question has two right answers, and references use the one that the model finds unlikely.
    Answers have one bias for all questions, so that what is learned of new ones moves old ones.
    """
    rng = torch.Generator().manual_seed(0)
    base = torch.randn(12, 6, generator=rng).double()
    base[:6, 0] += 2.0
    names = ["right", "right indeed", *(f"wrong {k}" for k in range(4))]
    data = [{"id": str(k), "prompt": [k], "completions": [[1]]} for k in range(6)]
    judge = {"name": "regex", "pattern": "right"}
    stage = build("stage", {"name": "s3ft", "reward": judge, "paraphrase": False})
    own = stage(data, roles_of(Table(base), names))
    assert sum(row["target"] == "own" for row in own) >= 4
    losses, accuracies = [], []
    for rows in (own, data):
        bias = torch.zeros(6, dtype=torch.double, requires_grad=True)
        adam = torch.optim.Adam([bias], lr=0.1)
        targets = torch.tensor([row["completions"][0][0] for row in rows])
        for _ in range(60):
            adam.zero_grad()
            torch.nn.functional.cross_entropy((base + bias)[:6], targets).backward()
            adam.step()
        new = (base + bias).detach().log_softmax(-1)
        accuracies.append(float((new[:6].argmax(-1) < 2).double().mean()))
        losses.append(float(-(base[6:].softmax(-1) * new[6:]).sum(-1).mean()))
    assert accuracies[0] >= accuracies[1] - 0.01 and losses[0] < losses[1] - 0.1
