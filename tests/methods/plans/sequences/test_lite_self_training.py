"""lite_self_training, meta_weights: the order of runs, weights in closed form, what noisy rows weigh."""

from __future__ import annotations

import pytest
import torch

from helpers.plans import played, report
from helpers.stages import make_roles
from luthier.data.load import load_rows
from luthier.errors import RecipeError
from luthier.methods.stages.curate.meta_weights import gradient
from luthier.registry import build

PLAN = {"name": "lite_self_training", "unlabelled": [{"prompt": "x"}], "rounds": 2}


def test_students_become_teachers(recipe):
    requests, last = played(PLAN, recipe, [report(f"run-{k}") for k in range(3)])
    first, *students = requests
    assert first is recipe and last.folder == "run-2"
    for run, teacher in zip(students, ("run-0", "run-1"), strict=True):
        assert run.init_from == "run-0" and run.roles["reference"] == {"name": "model", "model": teacher}
        assert run.stages[0]["soft"] and run.online_stages[0]["labelled"] == recipe.data
    assert played({**PLAN, "unlabelled": None}, recipe, [report("run-0")])[0] == [recipe]


WORDS = ("rain", "sun")
LABELLED = [{"prompt": f"{k} {WORDS[k % 2]}", "completion": "yes" if k % 2 else "no"} for k in range(8)]


def noisy(flipped: bool) -> list[dict]:
    rows = []
    for k in range(6):
        label = "yes" if bool(k % 2) != flipped else "no"
        rows.append({"id": f"{k}{flipped}", "prompt": f"{k} {WORDS[k % 2]}", "completions": [label]})
    return rows


def weights_of(roles, rows) -> list[float]:
    stage = build("stage", {"name": "meta_weights", "labelled": LABELLED, "batch": 8})
    return [row["token_weights"][0][0] for row in stage(rows, roles)]


def test_weights_are_clipped_products_of_gradients(roles):
    rows = noisy(False) + noisy(True)
    target = gradient(roles, load_rows(LABELLED).rows)
    products = torch.stack([gradient(roles, [row]) @ target for row in rows]).clamp(min=0)
    torch.testing.assert_close(
        torch.tensor(weights_of(roles, rows)), products / products.mean(), atol=1e-5, rtol=1e-4
    )
    with pytest.raises(RecipeError, match="labelled rows"):
        list(build("stage", "meta_weights")(rows, roles))


@pytest.mark.long
def test_flipped_labels_weigh_less(tiny):
    """Of a teacher that was warmed up on the labelled rows."""
    roles = make_roles(tiny)
    adam = torch.optim.Adam(roles.policy.model.parameters(), lr=3e-3)
    for _ in range(40):
        adam.zero_grad()
        loss = -roles.policy.logprobs(roles.batch(load_rows(LABELLED).rows)).mean()
        loss.backward()
        adam.step()
    weights = weights_of(roles, noisy(False) + noisy(True))
    ahead = [float(a > b) + 0.5 * float(a == b) for a in weights[:6] for b in weights[6:]]
    assert sum(ahead) / len(ahead) > 0.7


def test_soft_labels_are_their_cross_entropy(roles):
    """All labels weighted by their probabilities cost what the distribution over them does."""
    label = {"name": "pseudo_labels", "of": "policy", "labels": ["yes", "no"], "soft": True}
    (row,) = build("stage", label)([{"id": "a", "prompt": "what is 1?"}], roles)
    share = torch.tensor([own[0] for own in row["token_weights"]])
    batch = roles.batch([row])
    cost = build("objective", "sft").loss(roles, batch)
    sums = batch.sums(roles.policy.logprobs(batch))
    torch.testing.assert_close(share, sums.softmax(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(cost.sum(), -(share * sums).sum(), atol=1e-5, rtol=1e-4)
