"""cache_logprobs: a remembered reference is the start; long texts are remembered in the pieces that are
learned.
"""

from __future__ import annotations

import math

import pytest

import luthier


@pytest.mark.long
def test_a_remembered_reference_is_the_start(base, tmp_path):
    from helpers.rows import PAIRS

    base |= {"objective": "dpo", "data": PAIRS, "max_steps": 4}
    start = luthier.tune(base | {"roles": {"reference": "start"}}, folder=tmp_path / "a")
    column = luthier.tune(
        base | {"roles": {"reference": "column"}, "stages": ["remember"]}, folder=tmp_path / "b"
    )
    assert column.losses == pytest.approx(start.losses, abs=1e-5) and start.losses[0] == pytest.approx(
        math.log(2), abs=1e-5
    )


def test_long_texts_are_remembered_in_the_pieces_that_are_learned(base, tmp_path):
    rows = [{"text": "abc " * 40}] * 8
    change = {"data": rows, "max_length": 64, "stages": ["remember"], "max_steps": 2}
    luthier.tune(base | change, folder=tmp_path)
    from luthier.storage.files import read_rows

    kept = read_rows(tmp_path / "rows.jsonl")
    assert len(kept) > 8 and all(len(r["cached_logprobs"]) == 1 for r in kept)
