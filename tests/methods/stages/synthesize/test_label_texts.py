"""label_texts: as many texts of each label, from its prefix alone; rows are not read."""

from __future__ import annotations

from collections import Counter

from helpers.synthesis import Scripted, nobody
from luthier.registry import build

ROWS = [{"id": str(k), "prompt": f"secret {k}\n", "completions": ["ab"[k % 2]]} for k in range(6)]


def test_labels_are_balanced_and_rows_are_not_read():
    writer = Scripted(lambda prompt, seed: "" if seed % 7 == 0 else f"text {prompt.strip()} {seed}")
    roles = nobody()
    stage = build(
        "stage", {"name": "label_texts", "writer": writer, "n": 20, "domain": "d", "licence": "mit"}
    )
    out = list(stage(ROWS, roles))
    counts = Counter(row["label"] for row in out)
    assert counts.keys() == {"a", "b"} and min(counts.values()) >= 12
    assert all(row["completions"] == [row["label"]] for row in out)
    assert all(f"[{row['label']}]" in row["prompt"] and row["prompt"].endswith("\n") for row in out)
    assert {*writer.prompts} == {"[d][a]\n", "[d][b]\n"} and "secret" not in str(out)
    assert all(row["provenance"]["sources"] == [] and row["provenance"]["licence"] == "mit" for row in out)
    assert len(roles.dropped) == len(ROWS)
    named = build("stage", {"name": "label_texts", "writer": writer, "n": 3, "labels": ["c"]})
    assert {row["label"] for row in named(ROWS, nobody())} == {"c"}
