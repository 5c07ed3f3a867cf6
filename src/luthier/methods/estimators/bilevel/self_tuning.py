"""Self-tuning: learns the dropout and weight decay of tuner `self_tuning` during training, by the loss on
validation rows.

It alternates between `train_steps` on training rows, where the adapter learns the best response to
hyperparameters drawn around the current ones, and `valid_steps` on rows of source `validation`, where the
hyperparameters and the spread of the draws are updated along the gradient through that response, minus tau
times the entropy of the draws. Every row has its own draw, independent of the batch it is in. Use it with
objective `by_source`.

Departs from the paper: only dropout and weight decay are learned; the weight-decay term, which does not
depend on rows, uses the expectation over draws in closed form.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.estimators._base import GRADIENT, Estimator, gradients
from luthier.methods.formats._base import SOURCE
from luthier.methods.transforms._base import apply_chain
from luthier.methods.tuners._base import ParamGroup
from luthier.methods.tuners.low_rank.self_tuning import HYPERPARAMETERS
from luthier.registry import build, estimator


@estimator(
    paper="arXiv:1903.03088",
    row="self-tuning-networks",
    requires=[HYPERPARAMETERS, SOURCE],
    provides=[GRADIENT],
    use_when="dropout and weight decay are to be learned within one run, with tuner `self_tuning` and"
    " validation rows.",
    costs="one forward and backward pass; `valid_steps` of every `train_steps + valid_steps` steps go"
    " to the hyperparameters.",
    starting_rate="that of `lora`.",
    covers="dropout and weight decay of an adapter from validation rows, within one run.",
    omits="whole networks whose layers are gated.",
    tests=[
        "methods/estimators/bilevel/test_self_tuning.py::test_the_response_is_the_ridge_path",
        "methods/estimators/bilevel/test_self_tuning.py"
        "::test_dropout_rises_where_labels_are_noisy_and_validation_gets_better",
    ],
)
class SelfTuning(Estimator):
    """Online hyperparameters through a learned best response."""

    validation: str = "validation"  # the validation source (term); all others are trained on
    train_steps: Annotated[int, Field(ge=1)] = 2  # consecutive training steps
    valid_steps: Annotated[int, Field(ge=1)] = 1  # consecutive steps on validation rows
    warmup: Annotated[int, Field(ge=0)] = 50  # initial steps that only train
    hyper_learning_rate: Annotated[float, Field(ge=0)] = 3e-3  # learning rate of the hyperparameters (Adam)
    # learning rate of the logs of the spreads (Adam)
    sigma_learning_rate: Annotated[float, Field(ge=0)] = 3e-3
    tau: Annotated[float, Field(ge=0)] = 1e-3  # weight of the entropy of the draws

    def suits(self, objective):
        names = [o.name for _, o in objective.terms()]
        if self.validation not in names or len(names) < 2:
            raise RecipeError(
                f"estimator 'self_tuning' tunes hyperparameters on source '{self.validation}'"
                " and trains on the others; it needs e.g. `objective: {name: by_source,"
                f" sources: [train, {self.validation}]}}`, not {', '.join(names)}"
            )

    def step(self, closure, chain, clock):
        attached: Any = chain.attached
        for p in (attached.hyper, attached.log_sigma):
            p.requires_grad_(True)
        turn = (clock.step - self.warmup) % (self.train_steps + self.valid_steps)
        validates = clock.step >= self.warmup and turn >= self.train_steps
        with attached.answering(clock, dropping=not validates):
            if validates:
                loss = closure(only=lambda place, name: name == self.validation)
            else:
                loss = closure(only=lambda place, name: name != self.validation)
                with torch.enable_grad():
                    attached.decaying().backward()
        if validates:
            self.move(chain, attached)
        else:
            chain.step({name: slots for name, slots in gradients(chain).items() if name != "hyper"})
        attached.settle()
        if note := getattr(closure, "note", None):
            note(attached.values())
        return loss

    @torch.no_grad()
    def move(self, chain: Any, attached: Any) -> None:
        """One step of Adam on hyperparameters and spreads."""
        state = chain.state.setdefault("hyper", {})
        state["step"] = state.get("step", 0) + 1
        moving = {"moved": attached.hyper, "log_sigma": attached.log_sigma}
        grads = {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in moving.items()}
        grads["log_sigma"] = grads["log_sigma"] - self.tau
        update = apply_chain(
            (build("transform", "adam"),),
            grads,
            state.setdefault("adam", {}),
            ParamGroup("hyper", moving, None),
            state["step"],
        )
        attached.hyper.sub_(self.hyper_learning_rate * update["moved"])
        attached.log_sigma.sub_(self.sigma_learning_rate * update["log_sigma"])
