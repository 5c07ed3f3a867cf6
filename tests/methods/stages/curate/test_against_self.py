"""against_self: pairs against oneself."""

from __future__ import annotations

import pytest

from helpers.stages import rollout
from luthier.errors import RecipeError
from luthier.methods.rewards._base import Reward
from luthier.registry import build


class Length(Reward):
    """The longer the better."""

    name = "length"

    def scores(self, row, texts):
        return [float(len(t)) for t in texts]


def test_pairs_against_oneself(roles, sentences, tmp_path):
    from luthier.storage.files import write_rows

    rows = [{"id": "a", "prompt": "1+1=", "completions": ["3", "2"], "scores": [0.0, 1.0]}]
    rows += [{"id": "b", "prompt": "1+2=", "completions": ["3"]}]
    stage = {"name": "against_self", "max_new_tokens": 4}
    first = list(build("stage", stage)(rows, roles))
    assert (
        [r["completions"][0] for r in first] == ["2", "3"]
        and all(r["scores"] == [1.0, 0.0] for r in first)
        and "from" not in first[0]
    )
    own = rollout(n=1, max_new_tokens=4)(rows, roles)
    assert [r["completions"][1] for r in first] == [r["completions"][0] for r in own]
    write_rows(tmp_path / "rows.jsonl", [*first, {**first[0], "id": "z@before"}])
    mixed = list(build("stage", {**stage, "draw": 1, "earlier": str(tmp_path)})(rows, roles))
    assert [r["id"] for r in mixed] == ["a", "b", "a@before", "b@before"] and mixed[2][
        "completions"
    ] == first[0]["completions"]
    with pytest.raises(RecipeError, match="has no rows.jsonl"):
        list(build("stage", {**stage, "earlier": str(tmp_path / "none")})(rows, roles))
    same = [{**r, "completions": [o["completions"][0]]} for r, o in zip(rows, own, strict=True)]
    same = [{k: v for k, v in r.items() if k != "scores"} for r in same]
    sentences.clear()
    list(build("stage", stage)(same, roles))
    assert (
        "stage 'against_self': 2 of 2 samples equal the given answer; these pairs do not train anything"
        in sentences
    )
