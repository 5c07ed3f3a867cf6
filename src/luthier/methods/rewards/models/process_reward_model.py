"""A process reward model: how likely each step of a text is right, from a run of objective `process_reward`.

A step ends with the separator, as stage `mark_steps` trained it; the model's value there is the logit of the
probability.
"""

from __future__ import annotations

import torch

from luthier.methods.rewards.models._models import StepReward, loaded
from luthier.registry import reward


@reward(
    paper="arXiv:2305.20050",
    use_when="solutions come in steps, and a model that was tuned on marked steps is there.",
    costs="the model in memory and a forward pass over each completion.",
)
class ProcessRewardModel(StepReward):
    """The probability of each step, aggregated: the smallest by default."""

    def steps(self, row, texts):
        roles, out = loaded(self.model, self.dtype, "reward_model"), []
        marked = []
        for text in texts:
            if text and not text.endswith(self.separator):
                text += self.separator  # the last step ends like the others
            marked.append(self.step_tokens(roles, text))
        usable = [ids for ids, _ in marked if ids]
        values = iter(self.read(row, usable, roles, lambda batch: roles.policy.outputs(batch).values))
        for ids, sizes in marked:
            at = torch.tensor(sizes).cumsum(0) - 1
            out.append(torch.tensor(next(values))[at].sigmoid().tolist() if ids else [])
        return out
