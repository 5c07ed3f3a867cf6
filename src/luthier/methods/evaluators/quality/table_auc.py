"""Predictions of table columns by the likelihood of their values: the area under the ROC curve, with rows of
the same table in the context or without.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.evaluators._base import Evaluator, batches
from luthier.methods.evaluators.quality.yes_no_auc import auc
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.formats._tables import FEATURES, TARGET, cell, draw, question, same_question
from luthier.registry import Metric, evaluator


@evaluator(
    metrics=[
        Metric("table_auc", "ROC AUC of table columns", better="higher"),
        Metric("table_accuracy", "accuracy of table columns", unit="%", better="higher"),
    ],
    requires=[COMPLETIONS, LOGPROBS, FEATURES, TARGET],
    use_when="rows come in the format `table` and a column with few values is predicted.",
    costs="one forward pass over the held-out rows for each value of the target.",
)
class TableAUC(Evaluator):
    """`table_auc`: of each table and target the area under the ROC curve by the likelihood of its values,
    normalized over them (of more than two values one against the rest, their mean), then the mean of tables.
    """

    n: Annotated[int, Field(ge=0)] = 0  # held-out rows of the same table that come before the question
    most: Annotated[int, Field(ge=2)] = 10  # targets with more values than these are left out
    batch_size: int | None = None  # rows read at once; by default 16, and more where they are short

    def run(self, roles, rows, folder, when):
        tables = [row for row in rows if "features" in row]
        areas, right = [], []
        for places in same_question(tables):
            target = tables[places[0]]["target"]
            values = sorted({str(cell(tables[k]["features"][target], target)) for k in places})
            if not 2 <= len(values) <= self.most:
                continue
            questions = []
            for k in places:
                row = tables[k]
                before = [tables[j] for j in draw(places, k, self.n, roles.clock, self.name, str(row["id"]))]
                questions.append(self._candidates(row, before, values))
            shares, truth = [], []
            for batch in batches(roles, questions, self.batch_size):
                sums = batch.sums(roles.policy.logprobs(batch)).view(-1, len(values))
                shares.append(sums.float().softmax(-1).cpu())
                truth += [values.index(row["truth"]) for row in batch.rows]
            likely, labels = torch.cat(shares), torch.tensor(truth)
            areas.append(area(likely, labels))
            right += (likely.argmax(-1) == labels).tolist()
        if not areas:
            return {}
        return {"table_auc": sum(areas) / len(areas), "table_accuracy": sum(right) / len(right)}

    def _candidates(self, row: dict, before: list[dict], values: list[str]) -> dict:
        """A row with every value of its target as a completion."""
        truth = str(cell(row["features"][row["target"]], row["target"]))
        text = question(row, before)
        bare = {k: row[k] for k in ("id", "features", "target") if k in row}
        if isinstance(row["prompt"], str):
            return {**bare, "prompt": text, "completions": [f" {value}" for value in values], "truth": truth}
        turns = [*row["prompt"][:-1], {"role": "user", "content": text}]
        replies = [[{"role": "assistant", "content": value}] for value in values]
        return {**bare, "prompt": turns, "completions": replies, "truth": truth}


def area(likely: torch.Tensor, labels: torch.Tensor) -> float:
    """likely: [rows, values], labels: [rows] -> the area under the ROC curve; of more than two values the
    mean of each against the rest.
    """
    columns = [1] if likely.shape[1] == 2 else range(likely.shape[1])
    areas = [auc(likely[:, k], labels == k) for k in columns]
    defined = [value for value in areas if value is not None]
    return sum(defined) / len(defined)
