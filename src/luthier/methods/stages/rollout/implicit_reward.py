"""Scores completions by the log-ratio of a DPO-tuned model to the reference, stored with the rows.

For `modpo`: a policy trained for another goal scores the pairs of this one, and its model is then freed.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.roles._base import REFERENCE
from luthier.methods.stages._base import REWARDS, Stage, completion_logprobs
from luthier.registry import stage


@stage(
    paper="arXiv:2310.03708",
    row="modpo",
    requires=[COMPLETIONS, REFERENCE, LOGPROBS],
    provides=[REWARDS],
    use_when="several goals are traded against each other by `modpo` and one goal has a policy tuned"
    " by DPO but no reward model.",
    costs="a forward pass of that policy and of the reference over all completions, once.",
)
class ImplicitReward(Stage):
    """Column `rewards`, beside those already there: {role: beta * (log p_role - log p_reference)} of each
    completion.
    """

    # the role that scores, e.g. `roles: {judge: {name: model, model: FOLDER}}`; also the reward's name
    role: str = "judge"
    beta: Annotated[float, Field(gt=0)] = 0.1  # the beta that the scoring model was trained with
    batch_size: Annotated[int, Field(ge=1)] = 8  # rows per forward pass

    @property
    def active_requires(self):
        return self.requires | {self.role}

    def __call__(self, rows, roles):
        rows = self.usable(rows, roles)
        own, other = (
            completion_logprobs(who, roles, rows, self.batch_size)
            for who in (getattr(roles, self.role), roles.reference)
        )
        for row, mine, theirs in zip(rows, own, other, strict=True):
            reward = [self.beta * (sum(a) - sum(b)) for a, b in zip(mine, theirs, strict=True)]
            yield {**row, "rewards": {**row.get("rewards", {}), self.role: reward}}
