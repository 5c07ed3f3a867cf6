"""equal_length_pairs: the pair that a search over all pairs finds, and none that breaks the limits."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np

from luthier.clock import Clock
from luthier.registry import build


def test_it_is_the_pair_of_a_brute_force_search():
    rng, rows = np.random.default_rng(0), []
    for place in range(60):
        texts = ["x" * int(n) for n in rng.integers(0, 60, 12)]
        scores = rng.random(12).round(2).tolist()
        rows.append({"id": str(place), "prompt": "q", "completions": texts, "scores": scores})
    roles = SimpleNamespace(clock=Clock(), warn=lambda sentence: None)
    out = {row["id"]: row for row in build("stage", "equal_length_pairs")(rows, roles)}
    assert 20 < len(out)
    for row in rows:
        valid = []
        each = zip(row["completions"], row["scores"], strict=True)
        for (a, s), (b, t) in itertools.product(each, repeat=2):
            sizes = sorted((len(a), len(b)))
            if s - t > 0.1 and sizes[0] and (sizes[1] - sizes[0]) / sizes[0] < 0.1:
                valid.append(s + t)
        assert (row["id"] in out) == bool(valid)
        if valid:
            pair = out[row["id"]]
            assert sum(pair["scores"]) == max(valid) and pair["scores"][0] - pair["scores"][1] > 0.1
            short, long = sorted(map(len, pair["completions"]))
            assert (long - short) / short < 0.1
