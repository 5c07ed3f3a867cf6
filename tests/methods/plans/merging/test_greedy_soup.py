"""greedy_soup: a greedy soup takes what helps; a greedy soup is never worse than its best ingredient; a soup
is the mean; a soup of heads is the mean of logits.
"""

from __future__ import annotations

import pytest
import torch

import luthier
from helpers.plans import ROWS, played, report, tensors
from luthier.errors import RecipeError
from luthier.recipe.validate import validate
from luthier.registry import build


def test_a_greedy_soup_takes_what_helps(recipe):
    """From the best downwards; a run that makes the average worse stays out; the answer is the best
    average.
    """
    of = [{"learning_rate": v} for v in (1e-4, 2e-4, 3e-4, 4e-4)]
    singles = [report(f"s{k}", loss=v) for k, v in enumerate((0.5, 0.3, 0.4, 0.6))]
    answers = [singles, report("m1", loss=0.35), report("m2", loss=0.25), report("m3", loss=0.25)]
    asked, end = played({"name": "greedy_soup", "of": of}, recipe, answers)
    assert [r.init_from["of"] for r in asked[1:]] == [
        ["s1", "s2"],
        ["s1", "s0"],
        ["s1", "s0", "s3"],
    ] and end.folder == "m3"
    assert all(r.objective is None for r in asked[1:]) and [r.learning_rate for r in asked[0]] == [
        1e-4,
        2e-4,
        3e-4,
        4e-4,
    ]
    _, end = played(
        {"name": "greedy_soup", "of": of, "metric": "accuracy", "greater_is_better": True},
        recipe,
        [
            [report(f"s{k}", accuracy=v) for k, v in enumerate((0.5, 0.9, 0.4, 0.6))],
            *[report(f"m{k}", accuracy=0.7) for k in range(3)],
        ],
    )
    assert end.folder == "s1"
    with pytest.raises(RecipeError, match="selects by 'loss', but the run in s0 measured accuracy"):
        played({"name": "greedy_soup", "of": of[:2]}, recipe, [[report("s0", accuracy=1.0), report("s1")]])
    with pytest.raises(RecipeError, match="set eval_data to a file"):
        validate(recipe.but(plan={"name": "greedy_soup", "of": [{"seed": 1}, {"seed": 2}]}), ROWS)


@pytest.mark.long
def test_a_greedy_soup_is_never_worse_than_its_best_ingredient(base, tmp_path):
    of = [{"learning_rate": 1e-3}, {"learning_rate": 3e-3}, {"learning_rate": 3e-2}]
    done = luthier.tune(
        base | {"plan": {"name": "greedy_soup", "of": of}, "evaluate": ["loss"], "eval_data": 0.2},
        folder=tmp_path,
    )
    singles = [luthier.Report.read(a).after["loss"] for a in done.runs[:3]]
    assert len(done.runs) == 5 and done.after["loss"] <= min(singles)


def test_a_soup_is_the_mean():
    several = [tensors(k) for k in range(3)]
    plain = build("merger", "average").merge(several)
    weighted = build("merger", {"name": "average", "weights": [1, 0, 3]}).merge(several)
    for k in plain:
        assert torch.allclose(plain[k], sum(s[k] for s in several) / 3, atol=1e-6)
        assert torch.allclose(weighted[k], (several[0][k] + 3 * several[2][k]) / 4, atol=1e-6)
    only = build("merger", {"name": "average", "weights": [0, 0.3, 0]}).merge(several)
    assert all(torch.equal(only[k], several[1][k]) for k in only)


def test_a_soup_of_heads_is_the_mean_of_logits():
    heads, x = (
        [tensors(k)["a"] for k in range(2)],
        torch.randn(6, 3, generator=torch.Generator().manual_seed(9)),
    )
    soup = build("merger", "average").merge([{"a": h} for h in heads])["a"]
    assert torch.allclose(x @ soup.T, (x @ heads[0].T + x @ heads[1].T) / 2, atol=1e-6)
