"""A reward model with one value: a run of objective `reward`, or any causal sequence classifier with one
label, as TRL and OpenRLHF write them.

It reads the prompt in its own chat template, and the text behind it. Its numbers have no scale of their
own: standardise them with reward `scaled` before rewards are added.
"""

from __future__ import annotations

from luthier.methods.rewards.models._models import ModelReward, loaded
from luthier.registry import reward


@reward(
    paper="arXiv:2203.02155",
    use_when="what is good cannot be written as a rule and you have a reward model.",
    costs="the reward model in memory and a forward pass over each completion.",
)
class RewardModelReward(ModelReward):
    """The value at the text's last token; 0 for a text without tokens."""

    def scores(self, row: dict, texts: list[str]) -> list[float]:
        roles = loaded(self.model, self.dtype, "reward_model")
        values = self.read(row, texts, roles, lambda batch: roles.policy.outputs(batch).values)
        return [tokens[-1] if tokens else 0.0 for tokens in values]
