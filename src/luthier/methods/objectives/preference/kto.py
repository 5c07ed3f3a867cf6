"""Kahneman-Tversky optimization: learns from single completions that are good (score above 0) or bad; no
pairs needed.

The reference point z0, the policy's average drift from the reference, is estimated as in the authors' code
and TRL: each completion under the prompt of the next row of the micro-batch, without gradient. It is a
statistic of the micro-batch, so results depend on the micro-batch size; with one row per micro-batch z0 is 0.
"""

import torch

from luthier.errors import RecipeError
from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import COMPLETIONS, SCORES
from luthier.methods.objectives._base import Objective
from luthier.methods.objectives.preference._pairs import Beta, Positive, log_ratios, one_sided
from luthier.methods.roles._base import REFERENCE, REFERENCE_OUTPUTS
from luthier.model.policy import Policy
from luthier.registry import objective

NEIGHBOURS = "z0 is estimated on one micro-batch, each completion under the next row's prompt"


@objective(
    paper="arXiv:2402.01306",
    requires=[COMPLETIONS, SCORES, REFERENCE, REFERENCE_OUTPUTS, LOGPROBS],
    contract={"accumulation": NEIGHBOURS, "order": NEIGHBOURS},
    use_when="feedback is a thumbs up or down for single completions and there are no pairs.",
    costs="a forward and backward pass over each completion, and a forward pass under another row's prompt.",
    starting_rate="1e-6 for full fine-tuning (TRL's default); with LoRA about ten times as much.",
    rate_factor=0.05,
)
class KTO(Objective):
    """weight * (1 - sigmoid(beta * (log-ratio - z0))) for a good completion, with the sign flipped for a bad
    one.
    """

    unit = "sequence"

    beta: Beta = 0.1  # strength of the regularisation towards the reference
    desirable_weight: Positive = 1.0  # weight of good completions
    undesirable_weight: Positive = 1.0  # weight of bad completions

    def row_warnings(self, rows):
        return one_sided(self.name, rows)

    @torch.no_grad()
    def drift(self, roles, batch):
        """z0: the mean log-ratio of mismatched completions, not below zero."""
        if not isinstance(roles.reference, Policy):
            raise RecipeError(
                "kto needs reference log-probabilities of completions under other prompts,"
                " which a column cannot provide; use a model for the role, e.g. `roles:"
                " {reference: initial}`"
            )
        if len(batch.rows) < 2:
            return torch.zeros((), device=batch.ids.device)
        prompts = torch.empty_like(batch.parent[: len(batch.rows)])
        prompts[batch.group] = batch.parent[batch.completion]
        parent = batch.parent.clone()
        parent[batch.completion] = prompts.roll(-1)[batch.group]
        other = batch.view(parent=parent)
        return other.sums(log_ratios(roles, other)).mean().clamp(min=0)

    def loss(self, roles, batch):
        ratio, z0 = batch.sums(log_ratios(roles, batch)), self.drift(roles, batch)
        good = batch.column("scores") > 0
        batch.note(
            **{
                "kl": z0,
                "rewards/chosen": self.beta * ratio[good],
                "rewards/rejected": self.beta * ratio[~good],
            }
        )
        weight = torch.where(good, self.desirable_weight, self.undesirable_weight)
        return weight * (1 - torch.sigmoid(self.beta * torch.where(good, ratio - z0, z0 - ratio)))
