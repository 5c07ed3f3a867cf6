"""The kind's protocol: steps from a gradient to an update. A transform turns the gradients of a parameter
group into its update; a chain applies several in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from luthier.registry import family

if TYPE_CHECKING:
    from luthier.methods.tuners._base import ParamGroup, TunedModel

Params = dict[str, Tensor]  # parameter of a group -> tensor


@dataclass(frozen=True)
class GradientMoments:
    """What is known of the gradients of entries that begin to train, one number for each of them."""

    mean: Tensor  # [n]
    square: Tensor  # [n] mean of the squares
    steps: int  # over which they were gathered


@family
class Transform:
    """Family: gets all tensors of a group at once. Most transforms are per tensor (`Each`)."""

    # does `apply` treat each number by itself, its state changed in place? Then tensors may go in pieces
    pointwise: ClassVar[bool] = False

    # does an update have a size of its own, whatever that of the gradient?
    rescales: ClassVar[bool] = False

    def apply(self, grads: Params, state: dict, group: ParamGroup, step: int) -> Params:
        """Gradients of a group become updates. `state` is this group's own and may be filled; step counts
        from 1.
        """
        raise NotImplementedError

    def bind(self, attached: TunedModel) -> Transform:
        """This transform, knowing what it will be applied to."""
        return self

    def begin(self, rate: float, last: bool) -> None:
        """Before a group is stepped: the learning rate that its updates are multiplied by, and whether the
        run ends with this step.
        """

    # has it `update_together`? On a GPU a chain of such transforms steps all tensors in a few launches
    together: ClassVar[bool] = False

    def update_together(
        self, grads: list[Tensor], states: list[dict], params: list[Tensor], step: int
    ) -> list[Tensor]:
        """`apply` for many tensors of many groups at once, each with its own state; whether `grads` are
        written over is up to it.
        """
        raise NotImplementedError

    def gather(self, every: Mapping[str, Params]) -> Mapping[str, Params]:
        """Before any group is stepped: for transforms that look at all gradients together (clipping by global
        norm).
        """
        return every


@family
class Each(Transform):
    """Family: a transform of one tensor."""

    def init(self, like: Tensor) -> dict[str, Tensor]:
        """The state of one tensor."""
        return {}

    def update(self, grad: Tensor, state: dict, param: Tensor, step: int) -> Tensor:
        raise NotImplementedError

    def seed(self, state: dict, entries: Tensor, gradients: GradientMoments) -> int:
        """Some entries (a mask) of a tensor begin anew, and what their gradients were before is known: put it
        into the state, which is zero there. Returns as how many steps that counts.
        """
        return 0

    def apply(self, grads, state, group, step):
        updates = {}
        for name, grad in grads.items():
            if name not in state:
                state[name] = self.init(grad)
            updates[name] = self.update(grad, state[name], group.params[name], step)
        return updates


class MeasuredGradients(dict):
    """Group -> its gradients, whose joint norm is known."""

    def __init__(self, grads: Mapping[str, Params], norm: float):
        super().__init__(grads)
        self.norm = norm


def global_norm(grads: Mapping[str, Params]) -> float:
    """The norm of all gradients together, before anything is done to them; 0 where there are none."""
    if isinstance(grads, MeasuredGradients):
        return grads.norm
    norms: list[Tensor] = []
    for params in grads.values():  # a lazy gradient lives only here
        norms += _norms(list(params.values()))
    return float(_joined(norms))


def joint_norm(grads: Sequence[Tensor]) -> Tensor | float:
    """The norm of all these tensors together, where they are; 0 where there are none."""
    return _joined(_norms(list(grads)))


def _norms(grads: list[Tensor]) -> list[Tensor]:
    """Of each, in fp32 at least."""
    if grads and all(g.is_cuda and g.dtype.itemsize <= 4 for g in grads):
        return list(torch._foreach_norm(grads, 2, dtype=torch.float32))
    norms = []
    for grad in grads:
        precision = torch.promote_types(grad.dtype, torch.float32)
        norms.append(torch.linalg.vector_norm(grad, dtype=precision))
    return norms


def _joined(norms: list[Tensor]) -> Tensor | float:
    if not norms:
        return 0.0
    device = norms[0].device
    if any(norm.device != device for norm in norms):
        norms = [norm.to(device) for norm in norms]
    return torch.linalg.vector_norm(torch.stack(norms))


class LazyGradients(Mapping):
    """Group -> its gradients, computed each time they are read: the gradients of a whole model never exist at
    the same time.
    """

    def __init__(self, groups: Iterable[str], make: Callable[[str], Params]):
        self.groups, self.make = tuple(groups), make

    def __getitem__(self, group: str) -> Params:
        return self.make(group)

    def __iter__(self) -> Iterator[str]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)


class ScaledGradients(LazyGradients):
    """Group -> its gradients times one factor."""

    def __init__(self, every: Mapping[str, Params], factor: float):
        super().__init__(every, lambda name: {k: g * factor for k, g in every[name].items()})
        self.every, self.factor = every, factor


def apply_chain(
    chain: Sequence[Transform], grads: Params, state: dict, group: ParamGroup, step: int
) -> Params:
    """One group through a chain; each transform's state is kept under its index in the chain."""
    for i, transform in enumerate(chain):
        grads = transform.apply(grads, state.setdefault(str(i), {}), group, step)
    return grads
