"""quotas: caps, the share of general rows, nested draws, every dropped row with its reason."""

from __future__ import annotations

from collections import Counter

from helpers.synthesis import nobody
from luthier.registry import build


def rows_of(**sizes: int) -> list[dict]:
    return [
        {"id": f"{name}{k}", "prompt": "p", "source": name} for name, n in sizes.items() for k in range(n)
    ]


def counts_of(rows: list[dict], roles=None, **settings) -> Counter:
    out = build("stage", {"name": "quotas", **settings})(rows, roles or nobody())
    return Counter(row["source"] for row in out)


def test_caps_and_the_share_of_general_rows():
    rows, roles = rows_of(a=50, b=8, general=90), nobody()
    counts = counts_of(rows, roles, cap=20, general="general")
    assert counts == {"a": 20, "b": 8, "general": 28} and len(roles.dropped) == len(rows) - 56
    assert counts_of(rows, cap=20, general="general", share=0.2)["general"] == 7
    assert counts_of(rows, cap=0, counts={"b": 5}) == {"b": 5}
    assert counts_of(rows, cap=1000) == {"a": 50, "b": 8, "general": 90}


def test_smaller_quotas_are_part_of_larger_ones():
    rows, smaller = rows_of(a=40, b=40), set()
    for n in (0, 1, 4, 16, 40):
        out = build("stage", {"name": "quotas", "counts": {"a": n}, "cap": 3})(rows, nobody())
        ids = {row["id"] for row in out}
        assert smaller <= ids and len(ids) == n + 3
        smaller = ids
