"""pseudo_labels: the order of runs, labels by likelihood, and what unlabelled rows are worth."""

from __future__ import annotations

import json
from statistics import fmean

import pytest
import torch

import luthier
from helpers.plans import played, report
from helpers.rounds import Table, roles_of
from luthier.errors import RecipeError
from luthier.registry import build
from luthier.run.report import Report
from luthier.toy.tasks import sentiment

NAMES = ["good", "bad"]


def test_four_steps(recipe):
    plan = {"name": "pseudo_labels", "unlabelled": [{"prompt": "x"}], "rounds": 2, "least": 0.6}
    recipe = recipe.but(stages=[{"name": "random_rows", "n": 9}])
    requests, last = played(plan, recipe, [report(f"run-{k}") for k in range(5)])
    first, labels, second, again, third = requests
    assert first is recipe and last.folder == "run-4"
    for run, teacher in ((labels, "run-0"), (again, "run-2")):
        assert run.data == [{"prompt": "x"}] and run.init_from is None  # a fresh copy each time
        assert run.roles["reference"] == {"name": "model", "model": teacher}
        assert run.stages == [
            {"name": "pseudo_labels", "labels_of": recipe.data, "least": 0.6, "balance": False}
        ]
    assert (second.init_from, third.init_from) == ("run-1", "run-3")
    assert second.but(init_from=None) == recipe  # gold rows alone, as in the first


def test_no_rows_is_plain_fine_tuning(recipe):
    requests, last = played({"name": "pseudo_labels"}, recipe, [report("run-0")])
    assert requests == [recipe] and last.folder == "run-0"


def roles_with(logits):
    table = Table(torch.tensor(logits))
    roles = roles_of(table, NAMES)
    table.architecture = type("Texts", (), {"encode_all": staticmethod(lambda rows, _: (list(rows), [], {}))})
    by_batch = roles.batch
    texts = lambda row: {**row, "completions": [[NAMES.index(one)] for one in row["completions"]]}
    roles.batch = lambda rows: by_batch([texts(row) for row in rows])
    return roles


ROWS = [{"id": str(k), "prompt": [k]} for k in range(4)]
LOGITS = [[2.0, 0.0], [0.0, 0.5], [3.0, 0.0], [0.1, 0.0]]


def labelled(**settings):
    stage = build("stage", {"name": "pseudo_labels", "of": "policy", **settings})
    return list(stage(ROWS, roles_with(LOGITS)))


def test_the_likeliest_label_is_taken():
    labels = [{"prompt": "x", "completion": name} for name in [*NAMES, "good"]]
    rows = labelled(labels_of=labels)
    assert [row["completions"] for row in rows] == [["good"], ["bad"], ["good"], ["good"]]
    sure = torch.tensor(LOGITS).softmax(-1).amax(-1).tolist()
    assert [row["confidence"] for row in rows] == pytest.approx(sure, rel=1e-5)
    with pytest.raises(RecipeError, match="name the `labels`"):
        labelled()


def test_unsure_rows_leave_and_classes_are_equal():
    assert [row["id"] for row in labelled(labels=NAMES, least=0.6)] == ["0", "1", "2"]
    assert [row["id"] for row in labelled(labels=NAMES, balance=True)] == ["1", "2"]


@pytest.mark.long
def test_accuracy_rises_over_the_first_step():
    """A linear model on 50 labelled rows of two far clusters in 40 dimensions, and 2000 unlabelled ones."""
    gains = []
    for seed in range(5):
        rng = torch.Generator().manual_seed(seed)
        centre = 0.35 * torch.ones(40)

        def draw(n, rng=rng, centre=centre):
            y = torch.randint(0, 2, (n,), generator=rng)
            return torch.randn(n, 40, generator=rng) + (2 * y - 1)[:, None] * centre, y

        def fit(weight, x, y, steps=60):
            weight = weight.clone().requires_grad_()
            for _ in range(steps):
                (grad,) = torch.autograd.grad(torch.nn.functional.cross_entropy(x @ weight, y), weight)
                weight = (weight - 0.1 * grad).detach().requires_grad_()
            return weight.detach()

        (x, y), (far, _), (test, true) = draw(50), draw(2000), draw(2000)
        fresh = torch.zeros(40, 2)
        teacher = fit(fresh, x, y)
        logits = (far @ teacher).log_softmax(-1)
        rows = [{"id": str(k), "prompt": [k]} for k in range(2000)]
        stage = build("stage", {"name": "pseudo_labels", "of": "policy", "labels": NAMES, "batch_size": 500})
        labels = stage(rows, roles_with(logits.tolist()))
        pseudo = torch.tensor([NAMES.index(row["completions"][0]) for row in labels])
        student = fit(fit(fresh, far, pseudo), x, y)
        accuracy = lambda w, test=test, true=true: float(((test @ w).argmax(1) == true).float().mean())
        gains.append(accuracy(student) - accuracy(teacher))
    assert sum(gains) / 5 >= 0


@pytest.mark.long
def test_a_classifier_labels_by_its_classes(tmp_path):
    """The rows of the second run carry the true classes of texts that came without one; each run's notes are
    its own.
    """
    texts = []
    for row in sentiment.rows("test", 40):
        texts.append({"prompt": row["prompt"], "truth": row["answer"]})
    recipe = {
        "model": "toy:lm",
        "architecture": "classifier",
        "data": {"path": "toy:sentiment", "n": 64},
        "eval_data": {"path": "toy:sentiment/test", "n": 16},
        "plan": {"name": "pseudo_labels", "unlabelled": texts},
        "learning_rate": 1e-3,
        "max_steps": 30,
    }
    whole = luthier.tune(recipe, folder=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "run-1" / "rows.jsonl").read_text().splitlines()]
    assert fmean(row["completions"][0].strip() == row["truth"] for row in rows) > 0.9
    single = [Report.read(tmp_path / f"run-{k}").notes for k in range(3)]
    alone = [any("no rows are held out" in note for note in notes) for notes in single]
    assert alone == [False, True, False]
    assert set(whole.notes) == {note for notes in single for note in notes}
