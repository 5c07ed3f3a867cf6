"""What a preference likes: weights of properties of answers, by Bayesian logistic regression.

Of each pair, whether the better answer has more of a property than the worse: longer, a list, numbers, doubt,
an apology, a question back. P(one is preferred) = sigmoid(sum of w * difference), with a normal prior and
Laplace's posterior (Li et al., 2024). Fitted for the rows' own preferences and for the policy's, by its mean
log p per token, it says what tuning taught the model to like and how alike both are. Departs: properties are
read by rules unless rows bring them in `column`; the policy compares by likelihood, not by choosing A or B.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from luthier.errors import RecipeError
from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.evaluators._base import Evaluator, batches, paired
from luthier.methods.formats._base import PAIRS
from luthier.methods.objectives.preference._pairs import best_and_worst
from luthier.methods.stages._base import text_of
from luthier.registry import Artifact, Metric, evaluator
from luthier.storage import files


def count(pattern: str) -> Callable[[str], float]:
    """text -> how often it has this, in any case."""
    return lambda text: float(len(re.findall(pattern, text, re.IGNORECASE | re.MULTILINE)))


PROPERTIES: dict[str, Callable[[str], float]] = {
    "words": lambda text: float(len(text.split())),
    "list": count(r"^\s*([-*•]|\d+[.)])\s"),
    "numbers": count(r"\d+"),
    "doubt": count(r"\b(maybe|perhaps|might|could be|i think|not sure|it depends)\b"),
    "apology": count(r"\b(sorry|apologi[sz]e|i can('|no)t|unable)\b"),
    "question": count(r"\?"),
    "code": count(r"```|\bdef |\breturn "),
    "emphasis": count(r"!|\*\*"),
}


@evaluator(
    metrics=[
        Metric("preference_weight", "weight of a property in the model's preferences"),
        Metric("preference_similarity", "likeness of preferences, model and rows", better="higher"),
    ],
    artifacts=[Artifact("preference-weights-*.json")],
    paper="arXiv:2402.11296",
    row="preference-dissection",
    requires=[PAIRS, LOGPROBS],
    use_when="you ask what preference tuning taught: whether it is length, lists or caution that the model"
    " likes.",
    costs="a forward pass over the held-out pairs.",
    covers="Bayesian logistic regression of a judge's choices on differences of properties, with"
    " intervals, for"
    " the rows and the policy, and how alike both are.",
    omits="the 29 properties of a model's annotation (bring them as a column); judges that choose A or B"
    " in both"
    " orders; steering by the properties.",
    tests=[
        "methods/evaluators/quality/test_preference_weights.py::test_weights_of_simulated_judges",
        "methods/evaluators/quality/test_preference_weights.py::test_swapping_the_answers",
        "methods/evaluators/quality/test_preference_weights.py::test_rows_that_like_length",
    ],
)
class PreferenceWeights(Evaluator):
    """`preference_weight/NAME` of the policy for each property that varies, and `preference_similarity`.
    Writes preference-weights-<when>.json: weight, low and high (90 %) of each, of the policy and of the
    rows.
    """

    column: str | None = None  # of rows, with {property: number} of each completion; rules if not given
    prior: Annotated[float, Field(gt=0)] = 1.0  # deviation of a weight before any pair is seen
    batch_size: int | None = None  # rows read at once; by default 16, and more where they are short

    @torch.no_grad()
    def run(self, roles, rows, folder, when):
        pairs, choices = [], []
        for batch in batches(roles, paired(rows), self.batch_size):
            means = batch.means(roles.policy.logprobs(batch).double())
            best, worst = best_and_worst(batch)
            choices += (means[best] > means[worst]).tolist()
            pairs += batch.rows
        if len(pairs) < 2:
            return {}
        differences = [self.difference(roles, row) for row in pairs]
        names = [name for name in differences[0] if any(line.get(name, 0.0) for line in differences)]
        if not names:
            return {}
        x = torch.tensor([[line.get(name, 0.0) for name in names] for line in differences])
        x = x.double().sign()
        fits = {"policy": fit(x, torch.tensor(choices).double(), self.prior)}
        fits["rows"] = fit(x, torch.ones(len(x), dtype=torch.float64), self.prior)
        tables = {who: table(names, weights, covariance) for who, (weights, covariance) in fits.items()}
        if when != "during":
            files.write_json(folder / f"preference-weights-{when}.json", tables)
        metrics = {f"preference_weight/{name}": line["weight"] for name, line in tables["policy"].items()}
        return {**metrics, "preference_similarity": similarity(fits["policy"][0], fits["rows"][0])}

    def difference(self, roles: Any, row: dict) -> dict[str, float]:
        """Properties of the best completion minus those of the worst."""
        order = sorted(range(len(row["scores"])), key=row["scores"].__getitem__)
        values = [self.properties(roles, row, place) for place in (order[-1], order[0])]
        return {name: value - values[1].get(name, 0.0) for name, value in values[0].items()}

    def properties(self, roles: Any, row: dict, place: int) -> Mapping[str, float]:
        if self.column is None:
            text = text_of(roles, row["completions"][place])
            return {name: rule(text) for name, rule in PROPERTIES.items()}
        several = row.get(self.column)
        if not isinstance(several, Sequence) or len(several) != len(row["completions"]):
            raise RecipeError(
                f"evaluator 'preference_weights': column {self.column} needs properties of each completion"
            )
        return {str(name): float(value) for name, value in several[place].items()}


def fit(x: Tensor, y: Tensor, prior: float = 1.0) -> tuple[Tensor, Tensor]:
    """Differences [N, K] and whether the first was preferred [N] -> the weights' posterior mode [K] and its
    covariance [K, K], by Newton's method.
    """
    precision = torch.eye(x.shape[1], dtype=x.dtype) / prior**2
    weights = torch.zeros(x.shape[1], dtype=x.dtype)
    hessian = precision
    for _ in range(50):
        p = torch.sigmoid(x @ weights)
        gradient = x.T @ (y - p) - precision @ weights
        hessian = (x.T * (p * (1 - p))) @ x + precision
        step = torch.linalg.solve(hessian, gradient)
        weights = weights + step
        if float(step.abs().max()) < 1e-10:
            break
    return weights, torch.linalg.inv(hessian)


def table(names: Sequence[str], weights: Tensor, covariance: Tensor) -> dict[str, dict[str, float]]:
    """Name -> weight with its 90 % interval, and the chance that the answer with more of it is preferred."""
    lines = {}
    for name, weight, deviation in zip(
        names, weights.tolist(), covariance.diagonal().sqrt().tolist(), strict=True
    ):
        half = 1.6449 * deviation
        chance = float(torch.sigmoid(torch.tensor(weight)))
        lines[name] = {"weight": weight, "low": weight - half, "high": weight + half, "preferred": chance}
    return lines


def similarity(one: Tensor, other: Tensor) -> float:
    """1 minus the mean distance of two judges' chances sigmoid(w) [K]: 1 where they are the same."""
    return 1.0 - float((torch.sigmoid(one) - torch.sigmoid(other)).abs().mean())
