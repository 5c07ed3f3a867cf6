"""What the state behind a question says before anything is answered: linear probes of every layer.

A logistic regression on the state of the prompt's last token predicts a label of the row, or whether the
answer that the model will then give is right, which is how personas of truthfulness were read (Joshi et al.,
2024). A skill that tuning only covered up stays readable where the output fails (Jain et al., 2024).
Accuracy is that of rows which the probe was not fitted on (five folds); beside it stands the same search
with shuffled labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from luthier.methods.architectures._base import GENERATE
from luthier.methods.evaluators._base import Evaluator
from luthier.methods.evaluators.representation._prompt_states import prompt_states
from luthier.registry import Metric, build, evaluator

FOLDS = 5


@evaluator(
    metrics=[
        Metric("probe_accuracy", "accuracy of the best layer's probe", unit="%"),
        Metric("probe_f1", "F1 of the best layer's probe", unit="%"),
        Metric("probe_shuffled", "the same with shuffled labels", unit="%"),
        Metric("answers_right", "right answers to the probed rows", unit="%", better="higher"),
    ],
    paper="arXiv:2310.18168",
    row="truthful-persona-probe wrapper-hypothesis",
    requires=[GENERATE],
    use_when="an ability seems lost after tuning, or a model errs, and you ask whether its states still"
    " hold what"
    " its answers do not say.",
    costs="one forward pass over `n` prompts, as many greedy answers where no column is named, and a small"
    " regression for each layer and fold.",
    covers={
        "truthful-persona-probe": "probes of every layer that predict, before it is given, whether the answer"
        " is right, beside shuffled labels.",
        "wrapper-hypothesis": "probes of a label before and after tuning beside the accuracy of answers.",
    },
    omits={
        "truthful-persona-probe": "truthfulness on other topics after tuning; the arithmetic of agents.",
        "wrapper-hypothesis": "pruning and reverse tuning, and so the speed of revival; compiled"
        " transformers.",
    },
    tests={
        "truthful-persona-probe": "methods/evaluators/representation/test_answer_probe.py::"
        "test_planted_and_absent_labels"
        " methods/evaluators/representation/test_answer_probe.py::test_whether_the_answer_will_be_right",
        "wrapper-hypothesis": "methods/evaluators/representation/test_answer_probe.py::"
        "test_a_skill_that_is_not_in_the_output",
    },
)
class AnswerProbe(Evaluator):
    """`probe_accuracy/N` of layer N counted from the input; of the best `probe_accuracy` and `probe_f1`;
    `probe_shuffled`, the best layer's accuracy with shuffled labels; `answers_right`, where answers are
    given.
    """

    # of rows, with a label of two kinds; if not given, the label is whether the answer is right
    column: str | None = None
    reward: Any = "exact_match"  # the reward that says so: 0.5 or more
    n: Annotated[int, Field(ge=20)] = 128  # prompts
    max_new_tokens: Annotated[int, Field(ge=1)] = 32  # tokens per answer
    penalty: Annotated[float, Field(gt=0)] = 1.0  # of squared weights
    batch_size: int | None = None  # rows read at once; by default 16, and more where they are short

    @property
    def active_requires(self):
        return self.requires if self.column else self.requires | build("reward", self.reward).requires

    def run(self, roles, rows, folder, when):
        rows = [row for row in rows if row["prompt"]]
        rows = [row for row in rows if self.column is None or row.get(self.column) is not None][: self.n]
        if len(rows) < 20:
            return {}
        metrics = {}
        if self.column is None:
            labels = self.right(roles, rows)
            metrics["answers_right"] = sum(labels.values()) / len(labels)
        else:
            kinds = sorted({str(row[self.column]) for row in rows})
            labels = {str(row["id"]): float(str(row[self.column]) == kinds[-1]) for row in rows}
        names, layers = prompt_states(roles, rows, self.batch_size)
        y = torch.tensor([labels[name] for name in names], dtype=torch.float64)
        if min(float(y.sum()), float((1 - y).sum())) < FOLDS:
            return metrics  # too few of one kind to be told from the other
        rng = roles.clock.rng("answer_probe", at=0)
        folds = torch.randperm(len(y), generator=rng) % FOLDS
        shuffled = y[torch.randperm(len(y), generator=rng)]
        predictions = [predicted(states, y, folds, self.penalty) for states in layers]
        accuracies = [float((p == y.bool()).double().mean()) for p in predictions]
        best = max(range(len(layers)), key=accuracies.__getitem__)
        baseline = [predicted(states, shuffled, folds, self.penalty) for states in layers]
        metrics |= {f"probe_accuracy/{k}": value for k, value in enumerate(accuracies)}
        return {
            **metrics,
            "probe_accuracy": accuracies[best],
            "probe_f1": f1(predictions[best], y.bool()),
            "probe_shuffled": max(float((p == shuffled.bool()).double().mean()) for p in baseline),
        }

    def right(self, roles: Any, rows: Sequence[dict]) -> dict[str, float]:
        """Row id -> whether the greedy answer is right."""
        judge = build("reward", self.reward)
        written = roles.policy.generate(
            [roles.renderer.prompt(row) for row in rows],
            rows=rows,
            seeds=[0] * len(rows),
            temperature=0.0,
            max_new_tokens=self.max_new_tokens,
            stop=roles.renderer.stop_ids,
        )
        labels = {}
        for row, (ids,) in zip(rows, written, strict=True):
            labels[str(row["id"])] = float(judge.scores(row, [roles.renderer.answer(ids)])[0] >= 0.5)
        return labels


def predicted(x: Tensor, y: Tensor, folds: Tensor, penalty: float) -> Tensor:
    """States [N, d], labels [N] and folds [N] -> [N] labels predicted by probes of the other folds."""
    out = torch.zeros(len(y), dtype=torch.bool)
    for fold in range(FOLDS):
        inside = folds != fold
        mean, deviation = x[inside].mean(0), x[inside].std(0).clamp(min=1e-9)
        z = (x - mean) / deviation
        weights, bias = probe(z[inside], y[inside], penalty)
        out[~inside] = z[~inside] @ weights + bias > 0
    return out


def probe(x: Tensor, y: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """[N, d], [N] -> weights [d] and bias of a logistic regression with a penalty of squared weights."""
    parameters = torch.zeros(x.shape[1] + 1, dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([parameters], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = x @ parameters[:-1] + parameters[-1]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, y, reduction="sum")
        loss = loss + 0.5 * penalty * parameters[:-1].square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[arg-type]
    return parameters[:-1].detach(), parameters[-1].detach()


def f1(chosen: Tensor, present: Tensor) -> float:
    """Of the positive kind; 0 where it neither occurs nor is predicted."""
    total = int(chosen.sum() + present.sum())
    return 2 * int((chosen & present).sum()) / total if total else 0.0
