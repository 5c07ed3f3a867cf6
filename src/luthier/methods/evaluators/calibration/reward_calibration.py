"""How well a reward agrees with labels on held-out rows: does it rank right answers above wrong ones, and
does its number say how likely an answer is right?
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field

from luthier.methods.evaluators._base import Evaluator
from luthier.methods.evaluators.quality.yes_no_auc import auc
from luthier.methods.formats._base import COMPLETIONS, SCORES
from luthier.methods.stages._base import text_of
from luthier.registry import Artifact, Metric, build, evaluator, nested
from luthier.storage import files


@evaluator(
    metrics=[
        Metric("reward_agreement", "pairs that the reward ranks right", unit="%", better="higher"),
        Metric("reward_auc", "ROC AUC of the reward", better="higher"),
        Metric("reward_calibration_error", "calibration error of the reward", unit="%", better="lower"),
    ],
    artifacts=[Artifact("reward_calibration-*.json")],
    requires=[COMPLETIONS, SCORES],
    use_when="a reward model, a judge or a rule is to be trusted: rows are labelled completions, such as"
    " pairs.",
    costs="a score of every held-out completion.",
)
class RewardCalibration(Evaluator):
    """`reward_agreement`: of completions of a row with different labels, the share ranked right, ties as a
    half. `reward_auc`: over all completions, labels above 0.5 against the others.
    `reward_calibration_error`: expected calibration error where scores are probabilities (all between 0 and
    1). Writes reward_calibration-<when>.json: [completions, mean score, share right] of each bin.
    """

    reward: Annotated[Any, nested("reward")] = "exact_match"  # the reward that is judged
    n: Annotated[int, Field(ge=1)] | None = None  # rows that are scored; null: all
    bins: Annotated[int, Field(ge=2)] = 10  # bins of equal width

    def run(self, roles, rows, folder, when):
        scores: list[float] = []
        labels: list[float] = []
        right, pairs = 0.0, 0
        for row in list(rows)[: self.n]:
            own = [float(s) for s in self.reward.scores(row, [text_of(roles, c) for c in row["completions"]])]
            scores += own
            labels += map(float, row["scores"])
            for i, label in enumerate(row["scores"]):
                for j, other in enumerate(row["scores"]):
                    if label > other:
                        pairs += 1
                        right += 1.0 if own[i] > own[j] else 0.5 * (own[i] == own[j])
        out = {}
        if pairs:
            out["reward_agreement"] = right / pairs
        if not scores:
            return out
        sure, truth = torch.tensor(scores).double(), torch.tensor(labels) > 0.5
        area = auc(sure, truth)
        if area is not None:
            out["reward_auc"] = area
        if 0 <= float(sure.min()) and float(sure.max()) <= 1:
            table = build("evaluator", {"name": "calibration", "bins": self.bins}).table(sure, truth.double())
            if when != "during":
                files.write_json(folder / f"reward_calibration-{when}.json", table)
            out["reward_calibration_error"] = sum(n / len(sure) * abs(s - r) for n, s, r in table)
        return out
