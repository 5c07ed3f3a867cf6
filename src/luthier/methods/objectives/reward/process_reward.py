"""A process reward model: predicts at the end of each step of a solution whether it is correct so far.

The stage `mark_steps` marks where steps end. The value there is the logit of the probability that the step is
correct.
"""

import torch.nn.functional as F

from luthier.methods.architectures._base import VALUES
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.objectives._base import Objective
from luthier.methods.stages.curate.mark_steps import STEP_TARGETS
from luthier.registry import objective


@objective(
    paper="arXiv:2305.20050",
    requires=[COMPLETIONS, STEP_TARGETS, VALUES],
    use_when="you have solutions with a right or wrong mark for each step and want a model that scores"
    " steps.",
    costs="a forward and backward pass over each solution, on a network with a scalar head.",
    starting_rate="that of `reward`.",
    rate_factor=0.5,
)
class ProcessReward(Objective):
    """Cross-entropy of each step's value with its label."""

    def targets(self, batch):
        """[T] 1 or 0 where a step ends, below 0 elsewhere."""
        return batch.per_token("step_targets")

    def count(self, batch):
        return int((self.targets(batch) >= 0).sum())

    def rows_of_units(self, batch):
        return batch.group[batch.owner][self.targets(batch) >= 0]

    def loss(self, roles, batch):
        targets, values = self.targets(batch), roles.policy.outputs(batch).values
        ends = targets >= 0
        batch.note(accuracy=((values > 0) == (targets > 0.5))[ends].float())
        return F.binary_cross_entropy_with_logits(values[ends], targets[ends], reduction="none")
