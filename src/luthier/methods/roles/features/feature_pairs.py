"""A memory bank of paired features: for the rows read last, the hidden states that predict the answer in the
reference and in the policy.

As in role `memory`, what is stored at a step is available from the next step on; the bank is filled before
the first step.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from luthier.methods.objectives.representation._features import features, of_rows
from luthier.methods.roles._base import Role, brought, width_of
from luthier.methods.roles.features.memory import Features
from luthier.model.policy import eval_mode
from luthier.registry import Capability, role

FEATURE_PAIRS = Capability(
    "feature_pairs",
    says="features of the reference and of the policy side by side (role `feature_pairs`)",
    advice="use `roles: {feature_pairs: feature_pairs}`",
)


@role(
    provides=[FEATURE_PAIRS],
    former="paired",
    paper="arXiv:2308.12058",
    row="dr-tune",
    use_when="objective `dr_tune` needs it.",
    costs="`size` pairs of feature vectors.",
)
class FeaturePairs(Role):
    """[size, 2 * width], and the first token of each answer."""

    starts_from_rows = True

    size: Annotated[int, Field(ge=2)] = 2048  # number of stored pairs

    def parts(self, policy):
        return {"pairs": Pairs(self.size, 2 * width_of(policy)).to(next(policy.model.parameters()).device)}

    def play(self, name, policy):
        return brought(policy, name, "pairs")


class Pairs(Features):
    @torch.no_grad()
    def ready(self, rows, roles):
        self.written.zero_()
        for i in range(0, min(len(rows), len(self.rows)), 16):
            batch = roles.batch(rows[i : min(i + 16, len(self.rows))])
            with eval_mode(roles.policy.model):
                both = [features(batch, who(batch)) for who in (roles.reference, roles.policy)]
            self.remember(of_rows(batch), batch.labels[batch.targets][batch.place == 0], torch.cat(both, 1))
        self.after_step(roles.clock)
