"""table_auc: the area under the ROC curve is scikit-learn's, by the likelihood of labels."""

from __future__ import annotations

import pytest
import torch

from luthier.data.load import load_rows
from luthier.methods.evaluators.quality.table_auc import area
from luthier.registry import build


def test_it_is_sklearns_by_the_likelihood_of_labels(roles):
    metrics = pytest.importorskip("sklearn.metrics")
    rng = torch.Generator().manual_seed(0)
    for values in (2, 3):
        likely = torch.randn(40, values, generator=rng).softmax(-1)
        labels = torch.arange(40) % values
        expected = metrics.roc_auc_score(labels, likely[:, 1] if values == 2 else likely, multi_class="ovr")
        assert area(likely, labels) == pytest.approx(expected)

    table = [{"features": {"a": k * k, "b": ["no", "yes"][k % 3 > 0]}, "target": "b"} for k in range(9)]
    rows = load_rows(table).rows
    scores = []
    with torch.no_grad():
        for row in rows:
            sums = []
            for value in (" no", " yes"):
                batch = roles.batch([{**row, "completions": [value]}])
                sums.append(roles.policy.logprobs(batch).sum())
            scores.append(torch.stack(sums).softmax(0)[1].item())
        measured = build("evaluator", "table_auc").run(roles, rows, None, "before")
    truth = [row["features"]["b"] == "yes" for row in rows]
    assert measured["table_auc"] == pytest.approx(metrics.roc_auc_score(truth, scores))
    right = [(score > 0.5) == label for score, label in zip(scores, truth)]
    assert measured["table_accuracy"] == pytest.approx(sum(right) / 9)


def test_a_column_of_many_values_is_left_out(roles):
    rows = load_rows([{"features": {"a": k % 2, "b": k}, "target": "b"} for k in range(12)]).rows
    assert build("evaluator", "table_auc").run(roles, rows, None, "before") == {}
