"""An outcome reward as a log-ratio: beta * log(p / p_reference) is the logit of the probability that an
answer is right.

Trained on whole answers with a label each, it gives rewards of steps for nothing (reward `implicit_prm`). A
score above 0.5 counts as right, so rewards of 0 and 1 and labels of -1 and 1 both serve.
"""

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import COMPLETIONS, SCORES
from luthier.methods.objectives._base import Objective
from luthier.methods.roles._base import REFERENCE
from luthier.registry import Range, objective


@objective(
    paper="arXiv:2412.01981",
    row="implicit-prm",
    requires=[COMPLETIONS, SCORES, REFERENCE, LOGPROBS],
    use_when="answers are marked right or wrong as a whole and a model is to score their steps.",
    costs="a forward and backward pass over each answer, and a pass of the reference.",
    starting_rate="5e-7 for full fine-tuning of large models (the paper's).",
    rate_factor=0.1,
    covers="the cross-entropy of the outcome; `dpo`, `nca_pair` and `kto` are objectives of their own.",
    tests=["methods/rewards/models/test_implicit_prm.py::test_outcomes_teach_which_step_is_wrong"],
)
class ImplicitPRM(Objective):
    """Cross-entropy of each answer's label with sigmoid(beta * log-ratio)."""

    unit = "sequence"

    beta: Annotated[float, Field(gt=0), Range(0.01, 0.5, log=True)] = 0.05  # scale of the log-ratio

    def loss(self, roles, batch):
        gap = roles.policy.logprobs(batch) - roles.reference.logprobs(batch)
        logit, right = self.beta * batch.sums(gap), (batch.column("scores") > 0.5).float()
        batch.note(accuracy=((logit > 0) == (right > 0.5)).float())
        return F.binary_cross_entropy_with_logits(logit, right, reduction="none")
