"""Classification and regression, measured as they usually are: F1 of every label and their mean, or the error
and the correlation of numbers.

F1 is 2 tp / (2 tp + fp + fn), and 0 for a label that neither occurs nor is predicted; the means are those of
scikit-learn's `f1_score`. Of several labels one counts as predicted from a probability of 0.5 on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.methods.architectures._base import LABEL_HEAD, LOGPROBS
from luthier.methods.evaluators._base import Evaluator, batches, keep, liked
from luthier.methods.formats._base import COMPLETIONS
from luthier.registry import Metric, evaluator


@evaluator(
    metrics=[
        Metric("f1", "F1, mean of labels", unit="%", better="higher", rank=4),
        Metric("f1_micro", "F1, all labels together", unit="%", better="higher", rank=5),
        Metric("f1_weighted", "F1, mean of labels by their rows", unit="%", better="higher", rank=6),
        Metric("mse", "mean squared error", better="lower", rank=1),
        Metric("mae", "mean absolute error", better="lower", rank=2),
        Metric("pearson", "Pearson correlation", better="higher", rank=3),
        Metric("spearman", "Spearman correlation", better="higher", rank=4),
    ],
    requires=[COMPLETIONS, LOGPROBS, LABEL_HEAD],
    use_when="the architecture is `classifier`; it runs by default there.",
    costs="one forward pass over the held-out rows.",
)
class Labels(Evaluator):
    """Of classes and several labels `f1` (macro), `f1_micro`, `f1_weighted`, and `f1/NAME` of each label; of
    a regression `mse`, `mae`, `pearson` and `spearman` (of several numbers their means).
    """

    batch_size: int | None = None  # rows read at once; by default 16, and more where they are short

    def run(self, roles, rows, folder, when):
        predicted, true, places, names = [], [], [], []
        numbers = False
        for batch in batches(roles, liked(rows), self.batch_size):
            outputs = roles.policy.outputs(batch)
            numbers = hasattr(outputs, "targets")
            predicted.append(outputs.values if numbers else outputs.first())
            true.append(outputs.targets if numbers else batch.labels[batch.targets])
            places.append(batch.place)
            names += [str(row["id"]) for row in batch.rows]
        if not predicted:
            return {}
        tables = [torch.cat(parts).cpu() for parts in (predicted, true)]
        width = int(torch.cat(places).max()) + 1
        if numbers:
            values, targets = (table.double().view(-1, width) for table in tables)
            errors = values - targets
            keep(folder, when, mse=dict(zip(names, errors.square().mean(1).tolist(), strict=True)))
            return of_numbers(values, targets)
        label2id = roles.renderer.label2id
        if roles.renderer.problem == "single_label_classification":
            chosen, present = (torch.nn.functional.one_hot(table, len(label2id)).bool() for table in tables)
        else:
            chosen, present = (table.view(-1, width).bool() for table in tables)
        return of_labels(chosen, present, sorted(label2id, key=label2id.__getitem__))


def of_labels(chosen: Tensor, present: Tensor, names: list[str]) -> dict[str, float]:
    """[rows, labels] what was predicted and what is so -> F1 of all kinds."""
    right = (chosen & present).sum(0)
    total = chosen.sum(0) + present.sum(0)
    each = 2 * right / total.clamp(min=1)
    out = {"f1": float(each.mean()), "f1_micro": float(2 * right.sum() / total.sum().clamp(min=1))}
    of_rows = present.sum(0)
    out["f1_weighted"] = float((each * of_rows).sum() / of_rows.sum().clamp(min=1))
    return out | {f"f1/{name}": value for name, value in zip(names, each.tolist(), strict=True)}


def of_numbers(values: Tensor, targets: Tensor) -> dict[str, float]:
    """[rows, numbers] what was predicted and what is so -> errors, and correlations where there are any."""
    errors = values - targets
    out = {"mse": float(errors.square().mean()), "mae": float(errors.abs().mean())}
    correlations = {"pearson": (values, targets), "spearman": (ranks(values), ranks(targets))}
    for name, (x, y) in correlations.items():
        x, y = x - x.mean(0), y - y.mean(0)
        spread = x.norm(dim=0) * y.norm(dim=0)
        if bool((spread > 0).all()):
            out[name] = float(((x * y).sum(0) / spread).mean())
    return out


def ranks(values: Tensor) -> Tensor:
    """[rows, n] -> the rank of each in its column; equal ones share the mean of theirs."""
    columns = []
    for column in values.unbind(1):
        _, places, counts = column.unique(return_inverse=True, return_counts=True)
        last = counts.cumsum(0).double()
        columns.append((last - (counts.double() - 1) / 2)[places])
    return torch.stack(columns, 1)
