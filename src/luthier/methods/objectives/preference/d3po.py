"""D3PO: a pair's preference holds for each of its steps, and DPO is applied to each step separately.

In text a step is `step` tokens of the completion; the k-th steps of both sides are compared, up to the
shorter side. The log-ratio of a step is clipped, so that a step that has moved far enough has no gradient. In
the paper a step is one denoising step of a diffusion model, with a Gaussian log-density: the same loss on a
policy that says these, as `luthier.toy.diffusion` does for two numbers. No architecture for images is there.
"""

from typing import Annotated

import torch
from pydantic import Field

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import PAIRS
from luthier.methods.objectives._base import Objective
from luthier.methods.objectives.preference._pairs import Beta, best_and_worst, log_ratios, logistic
from luthier.methods.roles._base import REFERENCE
from luthier.registry import objective


@objective(
    paper="arXiv:2311.13231",
    row="d3po",
    requires=[PAIRS, REFERENCE, LOGPROBS],
    use_when="pairs differ in many steps and you want each step of the completion to count as a"
    " comparison of its own, with clipped ratios.",
    covers="the loss on steps of text, and on Gaussian denoising steps of any policy that says their"
    " log-densities; shown on a diffusion of two numbers with DDIM sampling.",
    omits="an architecture for image diffusion (U-Net, scheduler, guidance), so no images are tuned.",
    tests=[
        "methods/objectives/preference/test_d3po.py::test_d3po_is_dpo_step_by_step",
        "methods/objectives/preference/test_d3po.py::test_on_gaussian_steps_it_is_dpo_of_their_densities",
        "methods/objectives/preference/test_d3po.py::test_a_preference_moves_the_samples_of_a_diffusion",
    ],
    rate_factor=0.05,
)
class D3PO(Objective):
    """-log sigmoid(beta * (clipped log-ratio of the best's step - clipped log-ratio of the worst's step)),
    one per step.
    """

    beta: Beta = 0.1  # strength of the regularisation towards the reference
    eps: Annotated[float, Field(gt=0, lt=1)] = 0.1  # a step's ratio is clipped to 1 - eps .. 1 + eps
    step: Annotated[int, Field(ge=1)] = 1  # tokens per step

    def steps(self, batch):
        """[G] how many steps both sides of a row have; none where its completions score alike."""
        best, worst = best_and_worst(batch)
        common = -(-torch.minimum(batch.lengths[best], batch.lengths[worst]).long() // self.step)
        return torch.where(best != worst, common, 0)

    def count(self, batch):
        return int(self.steps(batch).sum())

    def rows_of_units(self, batch):
        steps = self.steps(batch)
        return torch.arange(len(steps), device=steps.device).repeat_interleave(steps)

    def loss(self, roles, batch):
        longest = -(-int(batch.lengths.max()) // self.step)
        cell = batch.owner * longest + batch.place // self.step
        ratios = log_ratios(roles, batch)
        # [N, steps]
        table = ratios.new_zeros(len(batch.completion) * longest).index_add(0, cell, ratios).view(-1, longest)
        clipped = torch.clamp(table.exp(), 1 - self.eps, 1 + self.eps).log()
        best, worst = best_and_worst(batch)
        there = torch.arange(longest, device=table.device) < self.steps(batch)[:, None]
        margin = (clipped[best] - clipped[worst])[there]
        batch.note(margin=self.beta * margin, accuracy=(margin > 0).float())
        return logistic(self.beta * margin)
