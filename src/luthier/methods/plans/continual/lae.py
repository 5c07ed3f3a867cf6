"""LAE: learning, accumulation, ensemble. A stream of tasks under any tuner, with a slow copy of what it
trains.

The online module learns task after task as in plan `continual`. From the second task on an offline module
follows it, offline <- momentum * offline + (1 - momentum) * online after each step, through the whole stream.
Both answer together: the token with the largest probability in either (Gao et al., 2023). With `momentum: 0`
both are the same and this is plan `continual`; with 1 the offline module stays what the first task made of
it.

Departs: of a network without a head of classes all tokens compete, not the classes of the new task alone.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.plans.continual.continual import Continual
from luthier.recipe.recipe import key_of
from luthier.registry import plan


@plan(
    paper="arXiv:2303.10070",
    row="lae",
    use_when="tasks come one after the other, no row of earlier ones can be kept, and what the tuner trains"
    " is small enough to be there twice.",
    costs="the stream, a copy of what the tuner trains, and a second pass over the held-out rows.",
    covers="online and offline module under any tuner, the slow accumulation over the whole stream from the"
    " second task on, the ensemble by the larger probability, the transfer matrix of the ensemble.",
    omits="warm-up epochs of a new head with the module frozen, the scales that make LoRA, adapters and"
    " prefixes learn equally fast, a loss over the new classes alone, vision streams.",
    tests=[
        "methods/plans/continual/test_lae.py::test_the_offline_module_goes_through_the_stream",
        "methods/plans/continual/test_lae.py::test_it_is_made_for_every_tuner",
        "methods/plans/continual/test_lae.py::test_it_forgets_less_than_the_online_module_alone",
    ],
)
class LAE(Continual):
    """Runs of plan `continual`, whose matrix is that of online and offline module together."""

    metric: str = "joint_accuracy"  # the score, by source; higher is better
    momentum: Annotated[float, Field(ge=0, le=1)] = 0.9999  # share of the offline module that stays at a step

    def run_of(self, recipe, place, reports):
        if "offline" in recipe.roles or "roles" in {key_of(key) for key in self.later}:
            raise RecipeError("plan 'lae' sets the role 'offline' by itself; name other roles in the recipe")
        # in the first run both modules are the same: the offline one is a copy from the second task on
        offline = {"name": "offline", "momentum": self.momentum if place else 0.0}
        if place:
            offline["goes_on_from"] = str(reports[-1].folder)
        run = super().run_of(recipe, place, reports)
        measure = {"name": "online_offline", "column": self.column}
        return run.but(roles={**run.roles, "offline": offline}, evaluate=[*(run.evaluate or ()), measure])
