"""Brain alignment: how well each layer's states predict responses to the same texts, as of voxels or
regions of people who read them.

A ridge regression from the state of a prompt's last token to the responses is fitted on four of five folds,
its penalty chosen there by the error of leaving one row out; of each response, Pearson's correlation of
predictions and truth on the fold left out, averaged over folds and divided by `ceiling`. A layer's score is
the median over responses, the model's that of its best layer (Aw et al., 2024, after Brain-Score). Beside it
stands the same search with shuffled rows.

Rows with a column of reading times also give the correlation of these with surprisal, -log p of the row's
completion: a row is then a word behind its context.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from luthier.errors import RecipeError
from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.evaluators._base import Evaluator, liked, read
from luthier.methods.evaluators.representation._prompt_states import prompt_states
from luthier.registry import Metric, evaluator

FOLDS = 5
PENALTIES = [10.0**k for k in range(-3, 7)]


@evaluator(
    metrics=[
        Metric("brain_score", "brain alignment of the best layer", better="higher"),
        Metric("brain_shuffled", "the same with shuffled rows"),
        Metric("surprisal_correlation", "correlation of surprisal with reading times", better="higher"),
    ],
    paper="arXiv:2312.00575",
    row="brain-alignment",
    requires=[LOGPROBS],
    use_when="rows hold what people's brains, or other sensors, answered to their texts, and you ask whether"
    " tuning brought the model's states nearer to it.",
    costs="one forward pass over `n` prompts, and a singular value decomposition for each layer and fold.",
    covers="cross-validated ridge regression of each layer, Pearson's correlation by the noise ceiling,"
    " median over responses, best layer; surprisal against reading times.",
    omits="the recordings themselves and a ceiling for each response and person; medians over people; the"
    " study over 25 models with size and knowledge.",
    tests=[
        "methods/evaluators/representation/test_brain_alignment.py::test_the_penalty_is_that_of_leave_one_out",
        "methods/evaluators/representation/test_brain_alignment.py::test_planted_and_shuffled_responses",
        "methods/evaluators/representation/test_brain_alignment.py"
        "::test_the_layer_that_made_the_responses_and_surprisal",
    ],
)
class BrainAlignment(Evaluator):
    """`brain_score/N` of layer N counted from the input; of the best `brain_score`; `brain_shuffled`, and
    `surprisal_correlation` where there are reading times.
    """

    column: str = "responses"  # of rows, with a list of numbers, as many in each
    reading_times: str = "reading_time"  # of rows, with a number for the completion
    # correlation that a perfect model would reach, by which scores are divided
    ceiling: Annotated[float, Field(gt=0, le=1)] = 1.0
    n: Annotated[int, Field(ge=20)] = 512  # prompts
    batch_size: int | None = None  # rows read at once; by default 16, and more where they are short

    def run(self, roles, rows, folder, when):
        return {**self.neural(roles, rows), **self.behavioural(roles, rows)}

    def neural(self, roles, rows: Sequence[dict]) -> dict[str, float]:
        """Scores of layers; nothing where fewer than 20 rows have responses."""
        rows = [row for row in rows if row["prompt"] and row.get(self.column) is not None][: self.n]
        if len(rows) < 20:
            return {}
        if len({len(row[self.column]) for row in rows}) > 1:
            raise RecipeError(f"evaluator 'brain_alignment': rows have {self.column} of different lengths")
        responses = {str(row["id"]): row[self.column] for row in rows}
        names, layers = prompt_states(roles, rows, self.batch_size)
        y = torch.tensor([responses[name] for name in names], dtype=torch.float64)
        rng = roles.clock.rng("brain_alignment", at=0)
        folds = torch.randperm(len(y), generator=rng) % FOLDS
        shuffled = y[torch.randperm(len(y), generator=rng)]
        scores = [self.score(states, y, folds) for states in layers]
        return {
            **{f"brain_score/{k}": score for k, score in enumerate(scores)},
            "brain_score": max(scores),
            "brain_shuffled": max(self.score(states, shuffled, folds) for states in layers),
        }

    def score(self, x: Tensor, y: Tensor, folds: Tensor) -> float:
        """States [N, d], responses [N, m], folds [N] -> median over responses, by the ceiling."""
        totals = torch.zeros(y.shape[1], dtype=y.dtype)
        for fold in range(FOLDS):
            inside = folds != fold
            mean, deviation = x[inside].mean(0), x[inside].std(0).clamp(min=1e-9)
            z = (x - mean) / deviation
            totals += correlations(ridge(z[inside], y[inside], z[~inside]), y[~inside])
        return float((totals / FOLDS).quantile(0.5)) / self.ceiling

    def behavioural(self, roles, rows: Sequence[dict]) -> dict[str, float]:
        """The correlation with reading times; nothing where fewer than 3 rows have some."""
        timed = [row for row in rows if row.get(self.reading_times) is not None]
        timed = [row for row in liked(timed) if len(row["completions"]) == 1]
        if len(timed) < 3:
            return {}
        stats = read(roles, timed, self.batch_size, {"loss"})
        surprisal = torch.tensor([[stats[str(row["id"])].loss] for row in timed], dtype=torch.float64)
        times = torch.tensor([[row[self.reading_times]] for row in timed], dtype=torch.float64)
        return {"surprisal_correlation": float(correlations(surprisal, times))}


def ridge(x: Tensor, y: Tensor, new: Tensor) -> Tensor:
    """States [N, d], responses [N, m], further states [M, d] -> [M, m] predictions, each response with the
    penalty of the least squared error of leaving one row out.
    """
    shift, mean = x.mean(0), y.mean(0)
    u, s, vh = torch.linalg.svd(x - shift, full_matrices=False)
    targets = u.T @ (y - mean)
    errors, weights = [], []
    for penalty in PENALTIES:
        shrink = s.square() / (s.square() + penalty)
        leverage = (u.square() * shrink).sum(1) + 1 / len(x)
        residual = (y - mean) - u @ (shrink[:, None] * targets)
        errors.append((residual / (1 - leverage).clamp(min=1e-9)[:, None]).square().mean(0))
        weights.append(vh.T @ ((s / (s.square() + penalty))[:, None] * targets))
    best = torch.stack(errors).argmin(0)
    chosen = torch.stack(weights)[best, :, torch.arange(y.shape[1])].T
    return (new - shift) @ chosen + mean


def correlations(a: Tensor, b: Tensor) -> Tensor:
    """[N, m] twice -> [m] Pearson's correlations; 0 where one side does not vary."""
    a, b = a - a.mean(0), b - b.mean(0)
    return (a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0)).clamp(min=1e-12)
