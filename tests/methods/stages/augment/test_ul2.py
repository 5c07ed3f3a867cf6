"""ul2: a denoiser hides its share in spans of its length and can be undone; draws modes by their shares from
seed and row.
"""

from __future__ import annotations

import pytest
import torch

from helpers.objectives import text_roles
from luthier.errors import RecipeError
from luthier.methods.stages.augment.ul2 import DENOISERS, corrupt, restored, spans
from luthier.registry import build

TEXT = (
    "the quick brown fox jumps over the lazy dog and runs away into the deep dark wood where nobody lives"
    " at all"
)


@pytest.mark.parametrize(("mean", "rate"), [kind for kinds in DENOISERS.values() for kind in kinds])
def test_a_denoiser_hides_its_share_in_spans_of_its_length_and_can_be_undone(mean, rate):
    rng, parts = torch.Generator().manual_seed(0), [f"w{i} " for i in range(256)]
    hidden, count = 0, 0
    for _ in range(200):
        cut = spans(256, mean, rate, rng)
        hidden += sum(len(b) for _, b in cut)
        count += len(cut)
        read, said = corrupt(parts, mean, rate, "<extra_id_{}>", rng)
        assert restored(read, said) == "".join(parts)
    assert hidden / (200 * 256) == pytest.approx(rate, rel=0.05)
    assert hidden / count == pytest.approx(min(mean, 256 * rate), rel=0.1)


@pytest.mark.long
def test_ul2_draws_modes_by_their_shares_from_seed_and_row():
    stage = build("stage", {"name": "ul2", "shares": {"R": 0.5, "X": 0.3, "S": 0.2}})
    rows = [{"id": i, "prompt": "", "completions": [TEXT]} for i in range(400)]
    made = list(stage(rows, text_roles()))
    seen = {m: sum(r["mode"] == m for r in made) / len(made) for m in "RXS"}
    assert seen["R"] == pytest.approx(0.5, abs=0.08) and seen["S"] == pytest.approx(0.2, abs=0.06)
    assert made == list(stage(rows, text_roles()))
    for row in made:
        read = row["prompt"].removeprefix(f"[{row['mode']}] ")
        assert row["prompt"] != read
        assert (
            read + row["completions"][0] if row["mode"] == "S" else restored(read, row["completions"][0])
        ) == TEXT
    target = [len(r["completions"][0]) / len(TEXT) for r in made if r["mode"] == "S"]
    assert sum(target) / len(target) == pytest.approx(0.25, abs=0.06)
    with pytest.raises(RecipeError, match="R, X and S"):
        build("stage", {"name": "ul2", "shares": {"Q": 1.0}})
