"""The kind's protocol: how the gradient is computed. An estimator calls `closure` as often as it needs and
steps the optimizer chain once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from luthier.clock import Clock
from luthier.errors import Refused
from luthier.methods.transforms._base import Params
from luthier.methods.tuners._base import ParamGroup
from luthier.registry import Capability, family

if TYPE_CHECKING:
    from luthier.train.optimizer import Chain

GRADIENT = Capability("grad", says="an estimator that computes a true gradient")

FORWARD_ONLY = Capability(
    "forward_only",
    says="an estimator that compares values of the loss, since this one has no gradient",
    advice="set `estimator: mezo`",
)

Closure = Callable[..., float]


@family
class Estimator:
    """Family: one optimizer step."""

    # is a step one call of the closure, with gradients, and one step of the chain?
    single_backward: ClassVar[bool] = False
    # does it keep a copy of what trains, so that the same tensors must train at every step?
    fixed_tensors: ClassVar[bool] = False
    # entry of each group's optimizer state that a run which starts from this one (`init_from`) goes on with
    persistent: ClassVar[str] = ""
    # does it promise privacy to each row? Then micro-batches are of one row, and only its steps read rows
    private: ClassVar[bool] = False

    def step(self, closure: Closure, chain: Chain, clock: Clock) -> float:
        """closure(grad=True, only=all terms) -> loss of the global batch; with grad, p.grad holds its
        gradient. Returns the loss.
        """
        raise NotImplementedError

    def displaced_bytes(self, chain: Chain) -> int:
        """Of the copies of moving tensors that exist at once where it displaces them instead of computing
        gradients.
        """
        total = 0
        for group in chain.param_groups():
            for p in group.params.values():
                if p.requires_grad:
                    total += p.nbytes
        return total

    def chain_warnings(self, chain: Sequence[Any]) -> list[str]:
        """What a person should know of the optimizer that follows: sentences, none where all is well."""
        return []

    def suits(self, objective: Any) -> None:
        """Raises RecipeError, before anything is computed, where this estimator cannot serve an objective."""

    def suits_recipe(self, recipe: Any, methods: Any) -> None:
        """Raises RecipeError, before anything is computed, where the rest of a recipe voids what this
        estimator promises.
        """

    def draw(self, count: int, per_step: int, clock: Clock) -> list[int] | None:
        """Which of `count` rows this step reads, where it draws them itself; per_step: how many on average.
        None: those that come next.
        """
        return None


def gradients(chain: Chain) -> dict[str, Params]:
    """site -> slot -> gradient, as the last closure left them."""
    grads: dict[str, Any] = {
        s.name: {k: p.grad for k, p in s.params.items() if p.grad is not None} for s in chain.param_groups()
    }
    return {name: slots for name, slots in grads.items() if slots}


def length(grads: Mapping[str, Params]) -> float:
    """Of all these gradients together, summed in fp64, by one reading from a device."""
    squares = []
    for slots in grads.values():
        squares += [g.float().square().sum() for g in slots.values()]
    if not squares:
        return 0.0
    return sum(torch.stack(squares).tolist()) ** 0.5


@dataclass
class Rounding:
    """How much of a perturbation weights of low precision take up."""

    dtype: torch.dtype | None = None
    intended: float = 0.0  # squared lengths
    achieved: float = 0.0

    def add(self, was: Tensor, now: Tensor, d: Tensor) -> None:
        self.dtype = was.dtype
        self.intended += float(d.square().sum())
        self.achieved += float(((now.float() - was.float()) * d).sum())

    def check(self) -> None:
        """Raises Refused where hardly anything is left of what was intended."""
        if self.achieved < self.intended / 10:
            raise Refused(
                f"{self.dtype} rounds off {1 - self.achieved / self.intended:.0%} of this"
                " estimator's perturbation, so its measurement would be meaningless; use a"
                " larger eps or rho, dtype: float32, or a tuner with few parameters"
            )


def displaced(was: Tensor, d: Tensor, rounding: Rounding | None = None) -> Tensor:
    """was + d in the precision of `was`. d is given away: where it is as precise, it becomes the displaced
    tensor. rounding: gathers what is lost.
    """
    if rounding is not None and was.dtype.itemsize < 4:
        now, d = (was + d).to(was.dtype), d.float()
        rounding.add(was, now, d)
        return now
    if was.dtype.itemsize <= d.dtype.itemsize:
        return d.add_(was).to(was.dtype)
    return was + d


@contextmanager
def perturbed(
    chain: Chain,
    aside: Callable[[ParamGroup, str, Tensor], Tensor | None],
    rounding: Rounding | None = None,
) -> Iterator[Callable[[], None]]:
    """The network with every moving tensor p at p + aside(site, slot, p), for a while (None: where it is).
    What is yielded, called once, brings it to the point opposite: p - (what p + aside was rounded to - p).

    Tensors are exchanged, not written: p + d - d is not p in floating point, and memory may run out in
    between. So they come back bit for bit however the block ends, for one more copy of what moves; what is
    frozen is never copied. aside gives its tensor away: where it is as precise as what moves, it becomes the
    displaced one. rounding: for a caller that checks it together with what it displaces itself.
    """
    originals: list[tuple[Any, Tensor]] = []
    watched = None
    if chain.clock.step == chain.clock.first:
        watched = Rounding() if rounding is None else rounding

    def flip() -> None:
        with torch.no_grad():
            for p, was in originals:
                p.data.lerp_(was, 2.0)

    try:
        with torch.no_grad():
            for group in chain.param_groups():
                for slot, p in group.params.items():
                    d = aside(group, slot, p) if p.requires_grad else None
                    if d is None:
                        continue
                    was = p.data
                    originals.append((p, was))
                    p.data = displaced(was, d, watched)
        if watched is not None and rounding is None:
            watched.check()
        yield flip
    finally:
        for p, was in originals:
            p.data = was
