"""Process rewards without process labels: beta times the log-ratio of two language models, step by step.

A model trained on whole answers by objective `implicit_prm` (or `dpo`, `kto`) with a reference is an
outcome reward, beta * log(p / p_reference); its partial sums are values of beginnings, and a step's reward
is what it adds. Nothing is trained on steps.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from luthier.methods.rewards.models._models import StepReward, loaded
from luthier.registry import reward


@reward(
    paper="arXiv:2412.01981",
    row="implicit-prm",
    use_when="steps are to be scored and only whole answers have labels.",
    costs="both models in memory, and a forward pass of each over each completion.",
    covers="step rewards of any segmentation from a pair of models, aggregated; trained by cross-entropy,"
    " DPO or KTO.",
    omits="weighted voting; scoring without the reference.",
    tests=[
        "methods/rewards/models/test_implicit_prm.py::test_steps_add_up_to_the_log_ratio",
        "methods/rewards/models/test_implicit_prm.py::test_at_the_reference_all_steps_are_worth_nothing",
        "methods/rewards/models/test_implicit_prm.py::test_outcomes_teach_which_step_is_wrong",
    ],
)
class ImplicitPRM(StepReward):
    """beta * (log p - log p_reference) of each step, aggregated: the smallest by default."""

    reference: str = "toy:lm"  # the model that it was trained against, with the same tokenizer
    beta: Annotated[float, Field(gt=0)] = 0.05  # the beta that it was trained with

    def steps(self, row, texts):
        roles, reference = loaded(self.model, self.dtype), loaded(self.reference, self.dtype)
        marked = [self.step_tokens(roles, text) for text in texts]
        usable = [ids for ids, _ in marked if ids]
        logs = [self.read(row, usable, who, who.policy.logprobs) for who in (roles, reference)]
        gaps, out = iter(zip(*logs, strict=True)), []
        for _, sizes in marked:
            steps: list[float] = []
            own, other = next(gaps) if sizes else ([], [])
            place = 0
            for size in sizes:
                gap = sum(own[place : place + size]) - sum(other[place : place + size])
                steps.append(self.beta * gap)
                place += size
            out.append(steps)
        return out
