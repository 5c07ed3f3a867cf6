"""How well a reward model ranks held-out pairs."""

import torch

from luthier.methods.architectures._base import VALUES
from luthier.methods.evaluators._base import Evaluator, batches, paired
from luthier.methods.evaluators.quality.preference import REWARD_ACCURACY, REWARD_MARGIN
from luthier.methods.formats._base import PAIRS
from luthier.methods.objectives.preference._pairs import best_and_worst
from luthier.registry import evaluator


@evaluator(
    metrics=[REWARD_ACCURACY, REWARD_MARGIN],
    requires=[PAIRS, VALUES],
    use_when="you train a reward model.",
    costs="one forward pass over the held-out pairs.",
)
class Reward(Evaluator):
    """`reward_accuracy`: share of rows whose best completion has a higher value than their worst;
    `reward_margin`: by how much.
    """

    batch_size: int | None = None  # rows read at once; by default 16, and more where they are short

    def run(self, roles, rows, folder, when):
        gaps = []
        for batch in batches(roles, paired(rows), self.batch_size):
            rewards, (best, worst) = batch.last(roles.policy.outputs(batch).values), best_and_worst(batch)
            gaps.append(rewards[best] - rewards[worst])
        if not gaps:
            return {}
        gap = torch.cat(gaps)
        return {"reward_accuracy": float((gap > 0).float().mean()), "reward_margin": float(gap.mean())}
