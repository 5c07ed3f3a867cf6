"""Bilevel optimisation by a penalty: learns the weights of the training sources, and the weight decay, for
which the validation loss is lowest.

With f the validation term and g(x, y) = sum_i w_i(x) L_i(y) + decay(x) |y|^2 / 2 of the others, two copies of
the trainable parameters are trained: y on g + s f, z on g. Then d/dx = (g_x(x, y) - g_x(x, z)) / s, within
O(s) of the true hypergradient; there is no second derivative, and the mixture needs loss values only. y is
the tuned model. Each step takes two gradients, with one more copy of the trainable parameters and their
optimizer state; with `momentum`, twice that.

Departs: the weights are a softmax of x instead of the paper's projection, and y and z use the recipe's
optimizer chain (the paper: gradient steps). Double loop: x is updated every `inner_steps` steps, and both
copies continue from where they are. Single loop: `momentum` (the paper's eta) corrects all three gradients by
what they would have been one step ago on the same rows. Weights are logged as `mix/SOURCE` at each step.
Validation rows should be a sizeable part of every batch: where they were one in eleven of 16 rows, the
weights moved in the wrong direction with one seed of three (claim penalty_bilevel_mixture).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.estimators._base import GRADIENT, Estimator, gradients
from luthier.methods.formats._base import SOURCE
from luthier.methods.transforms._base import Params
from luthier.registry import estimator
from luthier.train.optimizer import Chain

Tree = dict[str, Params]  # site -> slot -> tensor


@estimator(
    example={"weight_decay": 0.01},
    paper="arXiv:2309.01753",
    row="penalty-bilevel",
    requires=[SOURCE],
    provides=[GRADIENT],
    use_when="rows come from several sources of unknown value and you have trusted validation rows: it"
    " learns the sources' weights, and the weight decay.",
    costs="two gradients a step and one more copy of the trainable parameters with its optimizer"
    " state; with `momentum` twice that.",
    starting_rate="that of the tuner.",
    covers="the penalty method for mixtures of sources and weight decay.",
    omits="problems other than these two.",
    tests=[
        "methods/estimators/bilevel/test_penalty_bilevel.py"
        "::test_the_gradient_of_weights_and_decay_is_the_implicit_one_up_to_the_penalty",
        "methods/estimators/bilevel/test_penalty_bilevel.py::test_the_clean_source_is_found",
    ],
)
class PenaltyBilevel(Estimator):
    """Learned source weights and weight decay; use it with objective `by_source`."""

    fixed_tensors: ClassVar[bool] = True

    validation: str = "validation"  # the validation source (term); the weights of the others are learned
    # s: smaller values give a more accurate but noisier gradient of the weights
    penalty: Annotated[float, Field(gt=0)] = 0.1
    # s at the end, reached geometrically; not given: as at the start
    final_penalty: Annotated[float, Field(gt=0)] | None = None
    # learning rate of the weights (their logits) and of the log of the decay
    upper_learning_rate: Annotated[float, Field(ge=0)] = 0.5
    inner_steps: Annotated[int, Field(ge=1)] = 1  # steps of both copies per step of the weights
    # eta of the single loop; 1, the same as not given, corrects nothing
    momentum: Annotated[float, Field(gt=0, le=1)] | None = None
    # initial value of the learned decay; not given: none is learned
    weight_decay: Annotated[float, Field(gt=0)] | None = None

    def suits(self, objective):
        names = [o.name for _, o in objective.terms()]
        if self.validation not in names or len(names) < 2 or (len(names) == 2 and self.weight_decay is None):
            raise RecipeError(
                "estimator 'penalty_bilevel' weights sources by their effect on source"
                f" '{self.validation}'; it needs this source and at least two others (one with"
                " weight_decay learned), e.g. `objective: {name: by_source, sources: [a, b,"
                f" {self.validation}]}}`, not {', '.join(names)}"
            )

    def step(self, closure, chain, clock):
        sources = [n for n in closure.names if n != self.validation]
        upper = self.upper_state(chain, clock, sources)
        s = self.penalty * ((self.final_penalty or self.penalty) / self.penalty) ** clock.progress
        loss, *gradient = self.directions(closure, chain, upper["x"], s, None, lower(chain))
        now: list[Any] = gradient
        if self.momentum is not None and self.momentum < 1:
            was = upper["was"] if "was" in upper else None
            before = parts(chain, "before")
            if was is not None and before:
                _, *then = self.directions(closure, chain, was, s, before["y"], before["z"])
                old = [parts(chain, "direction")["y"], parts(chain, "direction")["z"], upper["direction"]]
                now = [corrected(n, o, t, 1 - self.momentum) for n, o, t in zip(now, old, then, strict=True)]
            keep(chain, "before", {"y": copied(chain), "z": clone(lower(chain))})
            keep(chain, "direction", {"y": clone(now[0]), "z": clone(now[1])})
            upper["was"], upper["direction"] = dict(upper["x"]), dict(now[2])
        ahead_y, ahead_z, ahead_x = now
        chain.step(ahead_y)
        with as_lower(chain):
            chain.step(ahead_z)
        upper["hypergradient"] = ahead_x
        if (clock.step + 1) % self.inner_steps == 0:
            upper["x"] = {k: v - self.upper_learning_rate * ahead_x[k] for k, v in upper["x"].items()}
        if note := getattr(closure, "note", None):
            weights = self.weights(upper["x"])
            note(
                {f"mix/{n}": w for n, w in weights.items()}
                | ({"weight_decay": math.exp(upper["x"]["|decay"])} if self.weight_decay else {})
            )
        return loss

    # --- the upper level

    def upper_state(self, chain: Chain, clock: Any, sources: Sequence[str]) -> dict[str, Any]:
        """x and what belongs to it; the second copies are made where there are none yet. All of it lies in
        the chain's state.
        """
        param_groups = chain.param_groups()
        have = [s.name for s in param_groups if "bilevel" in chain.state.get(s.name, {})]
        if have and len(have) < len(param_groups) or not have and clock.step:
            raise RecipeError(
                "estimator 'penalty_bilevel' keeps a second copy of the trainable parameters,"
                " and this tuner changes which ones are trainable during training; use another"
                " tuner"
            )
        if not have:
            for group in param_groups:
                tensors = {k: p.detach().clone() for k, p in group.params.items() if p.requires_grad}
                chain.state.setdefault(group.name, {})["bilevel"] = {"z": tensors, "chain": {}}
            x = dict.fromkeys(sources, 0.0) | (
                {"|decay": math.log(self.weight_decay)} if self.weight_decay else {}
            )
            chain.state[param_groups[0].name]["bilevel"]["upper"] = {"x": x}
        return chain.state[param_groups[0].name]["bilevel"]["upper"]

    def weights(self, x: Mapping[str, float]) -> dict[str, float]:
        """Softmax of the sources' logits."""
        named = {n: math.exp(v) for n, v in x.items() if n != "|decay"}
        return {n: v / sum(named.values()) for n, v in named.items()}

    def directions(
        self, closure, chain: Chain, x: Mapping[str, float], s: float, y: Tree | None, z: Tree
    ) -> tuple[float, Tree, Tree, dict]:
        """The loss, and the gradients of y, z and x at these tensors (y None: where the network stands)."""
        weights, decay = self.weights(x), math.exp(x["|decay"]) if "|decay" in x else 0.0

        def at(tensors: Tree | None, share: float) -> tuple[float, Tree, dict[str, float], float]:
            with at_tensors(chain, tensors):
                loss = closure(only=lambda place, name: share if name == self.validation else weights[name])
                grads, values, square = (
                    {n: {k: g.clone() for k, g in g.items()} for n, g in gradients(chain).items()},
                    dict(closure.values),
                    0.0,
                )
                with torch.no_grad():
                    for group in chain.param_groups() if decay else ():
                        for k, g in grads.get(group.name, {}).items():
                            g.add_(group.params[k], alpha=decay)
                            square += float(group.params[k].double().square().sum())
            return loss, grads, values, square / 2

        loss, grad_y, at_y, size_y = at(y, s)
        _, grad_z, at_z, size_z = at(z, 0.0)
        rise = {n: (at_y[n] - at_z[n]) / s for n in weights}
        mean = sum(w * rise[n] for n, w in weights.items())
        upper = {n: w * (rise[n] - mean) for n, w in weights.items()}
        if decay:
            upper["|decay"] = decay * (size_y - size_z) / s
        return loss, grad_y, grad_z, upper


# --- two copies in one network


def parts(chain: Chain, name: str) -> dict[str, Tree]:
    """What is kept under a name beside each site, turned around: y or z -> site -> slot."""
    out: dict[str, Tree] = {}
    for group in chain.param_groups():
        for who, slots in chain.state[group.name]["bilevel"].get(name, {}).items():
            out.setdefault(who, {})[group.name] = slots
    return out


def keep(chain: Chain, name: str, trees: Mapping[str, Tree]) -> None:
    for group in chain.param_groups():
        chain.state[group.name]["bilevel"][name] = {
            who: tree[group.name] for who, tree in trees.items() if group.name in tree
        }


def lower(chain: Chain) -> Tree:
    """z, itself."""
    return {s.name: chain.state[s.name]["bilevel"]["z"] for s in chain.param_groups()}


def copied(chain: Chain) -> Tree:
    return {
        s.name: {k: p.detach().clone() for k, p in s.params.items() if p.requires_grad}
        for s in chain.param_groups()
    }


def clone(tree: Tree) -> Tree:
    return {n: {k: t.clone() for k, t in slots.items()} for n, slots in tree.items()}


def corrected(now: Any, old: Any, then: Any, share: float) -> Any:
    """now + share (old - then), leaf by leaf: the estimate that a step ago was `old`, carried over to where
    one stands.
    """
    if isinstance(now, Mapping):
        return {
            k: corrected(v, old[k], then[k], share) if k in old and k in then else v for k, v in now.items()
        }
    return now + share * (old - then)


@contextmanager
def at_tensors(chain: Chain, tensors: Tree | None) -> Iterator[None]:
    """The network at other tensors, for a while; nothing is copied."""
    originals = [
        (p, p.data, tensors[s.name][k])
        for s in chain.param_groups()
        for k, p in s.params.items()
        if tensors and k in tensors.get(s.name, {})
    ]
    try:
        for p, _, other in originals:
            p.data = other
        yield
    finally:
        for p, own, _ in originals:
            p.data = own


@contextmanager
def as_lower(chain: Chain) -> Iterator[None]:
    """The network as z, and the optimizer as that of z: a step in here moves z."""
    outer = chain.state
    with at_tensors(chain, lower(chain)):
        chain.state = {n: state["bilevel"]["chain"] for n, state in outer.items()}
        try:
            yield
        finally:
            for n, state in chain.state.items():
                outer[n]["bilevel"]["chain"] = state
            chain.state = outer
