"""Quadratic penalties of continual learning: parameters that earlier tasks need are pulled back to where
these left them.

The penalty is strength * sum_i importance_i (p_i - anchor_i)^2, times a factor of the method. Importances and
anchors are found at the end of a run, lie in the optimizer's state and so in checkpoints, and go on to a run
that starts from this one (`init_from`). The first run has none and is plain backprop.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

from luthier.methods.estimators._base import Estimator, gradients
from luthier.methods.transforms._base import Params
from luthier.registry import Range, family

Grads = Mapping[str, Params]


@family
class Consolidation(Estimator):
    """Family: a method says what is important at the end of a task, and may follow the path to there."""

    fixed_tensors: ClassVar[bool] = True
    persistent: ClassVar[str] = "consolidation"
    factor: ClassVar[float] = 1.0  # of the penalty, beside `strength`

    strength: Annotated[float, Field(ge=0), Range(0.1, 1000.0, log=True)] = 1.0  # weight of the penalty

    def follow(self, chain: Any, clock: Any, grads: Grads, before: Grads) -> None:
        """After a step. grads: group -> parameter -> gradient of the loss without the penalty; before: the
        parameters before the step. What is gathered lies in `memory`.
        """

    def finish_task(self, closure: Any, chain: Any, clock: Any) -> None:
        """After the last step: writes `importance` and `anchor` of every tensor into `memory`."""
        raise NotImplementedError

    follows_path: ClassVar[bool] = True  # is `follow` there?

    def step(self, closure, chain, clock):
        loss = closure()
        own = gradients(chain)
        before: dict[str, Params] = {}
        if self.follows_path:
            own = {name: {k: g.clone() for k, g in params.items()} for name, params in own.items()}
            before = {
                g.name: {k: p.detach().clone() for k, p in g.params.items()} for g in chain.param_groups()
            }
        total, penalty = self.penalized(chain, own)
        if note := getattr(closure, "note", None):
            note({f"{self.name}_penalty": penalty})
        chain.step(total)
        with torch.no_grad():
            self.follow(chain, clock, own, before)
        if clock.step + 1 >= clock.total:
            self.finish_task(closure, chain, clock)
        return loss

    def memory(self, chain: Any, group: str, entry: str) -> Params:
        """Parameter -> tensor, of what is gathered for a group."""
        return chain.state.setdefault(group, {}).setdefault(self.persistent, {}).setdefault(entry, {})

    @torch.no_grad()
    def penalized(self, chain: Any, grads: Grads) -> tuple[dict[str, Params], float]:
        """The gradients with that of the penalty added, and the penalty itself."""
        penalty, total = 0.0, {name: dict(params) for name, params in grads.items()}
        for group in chain.param_groups():
            importance = self.memory(chain, group.name, "importance")
            anchors = self.memory(chain, group.name, "anchor")
            for key, p in group.params.items():
                if key not in importance or not p.requires_grad:
                    continue
                distance = p.float() - anchors[key]
                weight = self.strength * self.factor
                penalty += weight * float((importance[key] * distance.square()).sum())
                pull = (2 * weight * importance[key] * distance).to(p.dtype)
                params = total.setdefault(group.name, {})
                params[key] = params[key] + pull if key in params else pull
        return total, penalty
