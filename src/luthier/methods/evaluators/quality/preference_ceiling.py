"""How far preference tuning is from what it could reach: idealized ranking accuracy, and which pairs flip.

The optimum of DPO and RLHF ranks pairs by the reference and by how many annotators agree, pi*(w) / pi*(l) =
pi_ref(w) / pi_ref(l) (a / (1 - a))^(1 / beta). The share of pairs for which this exceeds 1 is what perfect
training reaches on these rows with this beta; the gap to it is what training left undone. A pair with
c = log pi_ref(l) - log pi_ref(w) is ranked right exactly where its DPO loss is at most -log sigmoid(beta c):
pairs with a large c need a tiny loss before they flip (Chen et al., 2024). Departs: rows without a column
`agreement` count as agreed on by the share that `agreement` names.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.evaluators._base import Evaluator, batches, keep, paired
from luthier.methods.evaluators.quality.preference import ranked
from luthier.methods.formats._base import PAIRS
from luthier.methods.objectives.preference._pairs import best_and_worst
from luthier.methods.roles._base import REFERENCE
from luthier.registry import Metric, evaluator


@evaluator(
    metrics=[
        Metric("token_ranking_accuracy", "ranking accuracy per token", unit="%", better="higher"),
        Metric("idealized_accuracy", "ranking accuracy of the optimum", unit="%"),
        Metric("ranking_gap", "ranking accuracy below the optimum", unit="%", better="lower"),
        Metric("flipped_pairs", "pairs that tuning turned right", unit="%", better="higher"),
        Metric("unflipped_difficulty", "difficulty of pairs that stayed wrong (nats)"),
    ],
    paper="arXiv:2405.19534",
    row="preference-ranking-accuracy",
    requires=[PAIRS, REFERENCE, LOGPROBS],
    use_when="a preference-tuned model ranks few pairs right and you ask whether training, beta or the rows"
    " set the limit.",
    costs="a forward pass over the pairs by the policy and by the reference.",
    covers="ranking accuracy by sum and per token, the idealized one and the gap for a beta, and which pairs"
    " flip by how hard the reference makes them.",
    omits="the correlation of ranking accuracy with win rates.",
    tests=[
        "methods/evaluators/quality/test_preference_ceiling.py::test_ranked_right_is_a_bound_on_the_loss",
        "methods/evaluators/quality/test_preference_ceiling.py::test_the_optimum_in_its_limits",
        "methods/evaluators/quality/test_preference_ceiling.py::test_a_model_beside_itself",
        "methods/evaluators/quality/test_preference_ceiling.py::test_easy_pairs_flip_first",
    ],
)
class PreferenceCeiling(Evaluator):
    """`token_ranking_accuracy`, `idealized_accuracy`, `ranking_gap` (of the accuracy by summed log p),
    `flipped_pairs` and `unflipped_difficulty`: the mean c of pairs that both the reference and the policy
    rank wrong.
    """

    beta: Annotated[float, Field(gt=0)] = 0.1  # that of the preference tuning
    # share of annotators that prefer the chosen side, where rows do not say it in a column `agreement`
    agreement: Annotated[float, Field(ge=0, le=1)] = 0.75
    batch_size: int | None = None  # rows read at once; by default 16, and more where they are short

    @torch.no_grad()
    def run(self, roles, rows, folder, when):
        pairs, own, other = read_pairs(roles, paired(rows), self.batch_size)
        if not pairs:
            return {}
        shares = torch.tensor([float(row.get("agreement", self.agreement)) for row in pairs]).double()
        optimum = idealized(other[0] - other[1], shares, self.beta)
        right = own[0] > own[1]
        wrong_before = other[0] <= other[1]
        by_metric = {"flipped_pairs": right & wrong_before, "idealized_accuracy": optimum}
        keep(folder, when, **{name: by_row(pairs, values) for name, values in by_metric.items()})
        metrics = {
            "token_ranking_accuracy": ranked(own[0] / own[2], own[1] / own[3]),
            "idealized_accuracy": float(optimum.double().mean()),
            "ranking_gap": float(optimum.double().mean()) - ranked(own[0], own[1]),
            "flipped_pairs": float((right & wrong_before).double().mean()),
        }
        left = wrong_before & ~right
        if left.any():
            metrics["unflipped_difficulty"] = float((other[1] - other[0])[left].mean())
        return metrics


def read_pairs(roles: Any, rows: list[dict], size: int | None) -> tuple[list[dict], Tensor, Tensor]:
    """Rows with two sides -> the rows in the order in which they were read, and for the policy and the
    reference [4, N]: log p of the better and of the worse side, and the tokens of both.
    """
    order: list[dict] = []
    parts: dict[str, list[Tensor]] = {"policy": [], "reference": []}
    for batch in batches(roles, rows, size):
        order += batch.rows
        best, worst = best_and_worst(batch)
        tokens = batch.lengths.double()
        for role, some in parts.items():
            logp = batch.sums(getattr(roles, role).logprobs(batch).double())
            some.append(torch.stack([logp[best], logp[worst], tokens[best], tokens[worst]]).cpu())
    if not order:
        return [], torch.empty(4, 0), torch.empty(4, 0)
    return order, torch.cat(parts["policy"], 1), torch.cat(parts["reference"], 1)


def by_row(rows: list[dict], values: Tensor) -> dict[str, float]:
    return {str(row["id"]): float(value) for row, value in zip(rows, values.tolist(), strict=True)}


def idealized(margin: Tensor, agreement: Tensor, beta: float) -> Tensor:
    """log pi_ref(w) - log pi_ref(l) [N] and shares of annotators [N] -> whether the optimum ranks each pair
    right.
    """
    return margin + torch.logit(agreement) / beta > 0


def dpo_loss(own: Tensor, other: Tensor, beta: float) -> Tensor:
    """Margins log p(w) - log p(l) of the policy and of the reference [N] -> DPO's loss of each pair."""
    return -torch.nn.functional.logsigmoid(beta * (own - other))


def flip_loss(other: Tensor, beta: float) -> Tensor:
    """The loss at and below which a pair is ranked right, by the reference's margin [N]."""
    return -torch.nn.functional.logsigmoid(-beta * other)
