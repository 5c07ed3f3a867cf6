"""MEET: trains control vectors for good and for bad answers alone, then together with the network.

First run: the network is frozen, and each bin's vectors are trained to make its answers likely. Second run:
they and the network, by the recipe's tuner, are trained further on all bins, so that the network learns to
use vectors that already carry information. Generation uses the last bin. Any scored rows work: pairs,
ratings, good and bad. Departs: vectors only, where the paper also tries a LoRA for each kind of answer in the
first run; both runs have the same number of steps unless set.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from luthier.methods.plans._base import Plan
from luthier.registry import plan, spec


@plan(
    paper="arXiv:2310.00819",
    row="meet",
    use_when="rows have ratings or good and bad answers and you use tuner `control`.",
    costs="two runs.",
    covers="control prefixes by quality, trained together with the policy and then alone.",
    omits="the paper's data.",
    tests=[
        "methods/plans/sequences/test_meet.py::test_meet",
        "methods/plans/sequences/test_meet.py::test_each_row_is_read_under_its_own_vectors_in_every_layout",
    ],
)
class MEET(Plan):
    """Tuner `control`, alone and then with the recipe's tuner, on rows sorted by stage `buckets`."""

    buckets: Annotated[int, Field(ge=2)] = 2  # number of kinds of answers, by score
    num_virtual_tokens: Annotated[int, Field(ge=1)] = 20  # vectors per kind
    # control texts to start from, the worst kind first, e.g. ["A bad answer:", "A good answer:"]
    texts: tuple[str, ...] = ()
    # learning rate of the first run; soft prompts need a high one
    control_learning_rate: Annotated[float, Field(gt=0)] = 1e-2
    # steps of the first run; null: those of the recipe; 0: the second run only, the baseline
    control_steps: Annotated[int, Field(ge=0)] | None = None

    def recipes(self, recipe):
        control = {
            "name": "control",
            "buckets": self.buckets,
            "num_virtual_tokens": self.num_virtual_tokens,
            "texts": list(self.texts),
        }
        inner = recipe.tuner if isinstance(recipe.tuner, (str, dict)) else spec(recipe.tuner)
        sorted_rows = recipe.but(
            stages=[*recipe.stages, {"name": "buckets", "buckets": self.buckets}],
            objective=recipe.objective or "sft",
        )
        start = recipe.init_from
        if self.control_steps != 0:
            steps = {} if self.control_steps is None else {"max_steps": self.control_steps}
            report = yield sorted_rows.but(tuner=control, learning_rate=self.control_learning_rate, **steps)
            start = report.folder
        yield sorted_rows.but(tuner={**control, "tuner": inner}, init_from=start)
