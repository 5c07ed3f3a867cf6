"""verifier_rows: labels of crafted rows."""

from __future__ import annotations

from types import SimpleNamespace

from luthier.clock import Clock
from luthier.methods.rewards.judges.knowledge_verifier import WORDINGS
from luthier.registry import build


def test_labels_of_crafted_rows():
    row = {
        "id": "a",
        "prompt": "capital?",
        "answer": ["Paris", "city of light"],
        "knowledge": "Paris is big.",
    }
    row["completions"] = ["It is the City of Light!", "Lyon", "Parisian food", "paris"]
    lost = {**row, "id": "b", "knowledge": "Berlin is big."}
    roles = SimpleNamespace(clock=Clock())
    stage = build("stage", "verifier_rows")
    out = list(stage([row, lost], roles))
    assert [r["completions"][0] for r in out] == [" C", " B", " B", " C", " C", " A", " A", " C"]
    assert out == list(stage([row, lost], roles)) and len({r["id"] for r in out}) == 8
    assert all("Question: capital?" in r["prompt"] and "knowledge" not in r for r in out)
    many = list(stage([{**row, "id": str(k)} for k in range(30)], roles))
    assert {r["prompt"].splitlines()[0] for r in many} == set(WORDINGS)
