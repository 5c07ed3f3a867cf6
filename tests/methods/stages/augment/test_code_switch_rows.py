"""code_switch_rows: code switching exchanges its share and only known words."""

from __future__ import annotations

import pytest

from helpers.objectives import text_roles
from luthier.registry import build


def test_code_switching_exchanges_its_share_and_only_known_words():
    words = [f"w{i}" for i in range(40)]
    stage = build("stage", {"name": "code_switch", "dictionary": {w: [w.upper(), w + "X"] for w in words}})
    rows = [{"id": i, "prompt": "", "completions": [" ".join(words)]} for i in range(100)]
    changed = 0
    for row in stage(rows, text_roles()):
        for was, now in zip(words, row["prompt"].split(" "), strict=True):
            assert now in (was, was.upper(), was + "X")
            changed += was != now
    assert changed / 4000 == pytest.approx(0.35, abs=0.02)
    same = build("stage", {"name": "code_switch", "dictionary": {"w1": "W1"}, "share": 0.0})
    assert [r["prompt"] for r in same(rows, text_roles())] == [r["completions"][0] for r in rows]
