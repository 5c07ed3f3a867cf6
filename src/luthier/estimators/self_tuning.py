"""Self-tuning: dropout and weight decay of tuner `self_tuning` learned while it trains, by validation rows.

In turn: `train_steps` on training rows, where the adapter learns the best response to hyperparameters drawn around the current
ones; `valid_steps` on rows of source `validation`, where the hyperparameters and the spread of these draws move along the
gradient that goes through that response, less tau times the entropy of the draws. Use it with objective `by_source`.

Departs from the paper: a draw is shared by the rows of a step, where the paper draws for each row (rows are packed together
here, and share their weights); dropout and weight decay are what is learned.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field

from luthier.estimators._estimator import Estimator, gradients
from luthier.method import RecipeError, build, estimator
from luthier.transforms._chain import through
from luthier.tuners._tuner import Site


@estimator(paper="arXiv:1903.03088", row="self-tuning-networks", wants="hyper source", gives="grad")
class SelfTuning(Estimator):
    """Online hyperparameters through a learned best response."""

    validation: str = "validation"  # the source (term) that decides; all others train
    train_steps: Annotated[int, Field(ge=1)] = 2  # in a row
    valid_steps: Annotated[int, Field(ge=1)] = 1  # in a row
    warmup: Annotated[int, Field(ge=0)] = 50  # steps at the start that only train
    hyper_learning_rate: Annotated[float, Field(ge=0)] = 3e-3  # of the hyperparameters (Adam)
    sigma_learning_rate: Annotated[float, Field(ge=0)] = 3e-3  # of the logs of the spreads (Adam)
    tau: Annotated[float, Field(ge=0)] = 1e-3  # weight of the entropy of the draws

    def suits(self, objective):
        names = [o.name for _, o in objective.terms()]
        if self.validation not in names or len(names) < 2:
            raise RecipeError(
                f"estimator 'self_tuning' learns by '{self.validation}' and trains on the rest: give it e.g. `objective: {{name: by_source, "
                f"sources: [train, {self.validation}]}}`, not {', '.join(names)}"
            )

    def step(self, closure, chain, clock):
        attached: Any = chain.attached
        for p in (attached.hyper, attached.log_sigma):
            p.requires_grad_(True)
        turn = (clock.step - self.warmup) % (self.train_steps + self.valid_steps)
        validates = clock.step >= self.warmup and turn >= self.train_steps
        noise = torch.randn(attached.hyper.shape, generator=clock.rng("self_tuning")).to(attached.hyper.device)
        stands = attached.hyper.data
        attached.hyper.data = stands + attached.log_sigma.data.exp() * noise
        try:
            with attached.answering(dropping=not validates):
                if validates:
                    loss = closure(only=lambda place, name: name == self.validation)
                else:
                    loss = closure(only=lambda place, name: name != self.validation)
                    from luthier.tuners.self_tuning import decay

                    with torch.enable_grad():
                        (decay(attached.settings, attached.hyper.detach()) / 2 * attached.size()).backward()
        finally:
            attached.hyper.data = stands
        if validates:
            self.move(chain, attached, noise)
        else:
            chain.step({name: slots for name, slots in gradients(chain).items() if name != "hyper"})
        attached.settle()
        if note := getattr(closure, "note", None):
            note(attached.values())
        return loss

    @torch.no_grad()
    def move(self, chain: Any, attached: Any, noise: torch.Tensor) -> None:
        """One step of Adam on hyperparameters and spreads."""
        state = chain.state.setdefault("hyper", {})
        state["step"] = state.get("step", 0) + 1
        up = attached.hyper.grad if attached.hyper.grad is not None else torch.zeros_like(attached.hyper)
        grads = {"moved": up, "log_sigma": up * noise * attached.log_sigma.exp() - self.tau}
        site = Site("hyper", {"moved": attached.hyper, "log_sigma": attached.log_sigma}, None)
        update = through((build("transform", "adam"),), grads, state.setdefault("adam", {}), site, state["step"])
        attached.hyper.sub_(self.hyper_learning_rate * update["moved"])
        attached.log_sigma.sub_(self.sigma_learning_rate * update["log_sigma"])
