"""The offline module of LAE: a slow average of what trains, which goes on from one task of a stream to the
next.

offline <- momentum * offline + (1 - momentum) * online after every step (Gao et al., 2023). It begins as a
copy of the online parameters, or, with `goes_on_from`, with the average that an earlier run ended with, while
the online parameters are those of `init_from`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.roles._base import Role, brought
from luthier.methods.roles.averages._average import _flat
from luthier.methods.roles.averages.mean_teacher import Running
from luthier.registry import Capability, role
from luthier.storage import checkpoints

OFFLINE = Capability(
    "offline",
    says="a slow average of what trains, through all tasks of a stream",
    advice="use plan `lae`, or `roles: {offline: offline}`",
)


@role(
    provides=[OFFLINE],
    paper="arXiv:2303.10070",
    row="lae",
    use_when="evaluator `online_offline` needs it: what is learned fast is to be answered together with what"
    " moved slowly since earlier tasks.",
    costs="a copy of the trainable parameters, and a forward pass where it is used.",
    covers="the accumulation: an average of any tuner's parameters, begun as a copy, that goes through a"
    " stream.",
    omits="a head that both share: a classifier's head is averaged with the rest.",
    tests=[
        "methods/roles/averages/test_offline.py::test_the_average_is_the_geometric_sum",
        "methods/roles/averages/test_offline.py::test_it_goes_on_from_an_earlier_run",
    ],
)
class Offline(Role):
    """The average of the policy over all runs of a stream."""

    momentum: Annotated[float, Field(ge=0, le=1)] = 0.9999  # share of the average that stays at each step
    goes_on_from: str | None = None  # folder of the run whose average goes on; null: begins as a copy

    def parts(self, policy):
        return {"average": Accumulated(policy.attached, self)}

    def play(self, name, policy):
        average = brought(policy, name, "average")
        return policy.as_role(name, lambda: policy.attached.using(average.tensors()))


class Accumulated(Running):
    """A running average that may begin where another ended."""

    def __init__(self, tuned: Any, settings: Offline):
        super().__init__(tuned, settings.momentum)
        self.goes_on_from = settings.goes_on_from

    @torch.no_grad()
    def ready(self, rows, roles):
        super().ready(rows, roles)
        if self.goes_on_from is None:
            return
        moment = checkpoints.load_newest(Path(self.goes_on_from))
        former = {} if moment is None else moment.tensors
        for name, average in self.average.items():
            earlier = former.get(f"{self.name}.{_flat(name)}")
            if earlier is None or earlier.shape != average.shape:
                raise RecipeError(
                    f"role 'offline': the run in {self.goes_on_from} ended with no average of '{name}' that"
                    " fits; it must have had the same tuner and this role"
                )
            average.copy_(earlier)
