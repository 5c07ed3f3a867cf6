"""What becomes of a gradient. A transform turns the gradients of a site into its update; a chain does so in
turn.

The optimizer of a recipe is an estimator (where the gradient comes from) and a chain (what becomes of it), as
in optax.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.methods.tuners._base import ParamGroup, TunedModel
from luthier.registry import did_you_mean, family

Params = dict[str, Tensor]


@family
class Transform:
    """Family: sees all tensors of a site at once. Most transforms are per tensor (`Each`)."""

    # does `apply` treat each number by itself, its state changed in place? Then tensors may go in pieces
    pointwise: ClassVar[bool] = False

    def apply(self, grads: Params, state: dict, group: ParamGroup, step: int) -> Params:
        """slot -> gradient becomes slot -> update; `state` is this site's own and may be filled. step counts
        from 1.
        """
        raise NotImplementedError

    def on(self, attached: TunedModel) -> Transform:
        """This transform, knowing what it will be applied to."""
        return self

    def gather(self, every: Mapping[str, Params]) -> Mapping[str, Params]:
        """Before any site is stepped: for transforms that look at all gradients together (clipping by global
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

    def apply(self, grads, state, group, step):
        out = {}
        for slot, grad in grads.items():
            if slot not in state:
                state[slot] = self.init(grad)
            out[slot] = self.update(grad, state[slot], group.params[slot], step)
        return out


# numbers that go through a chain at a time on a CPU: what is made on the way stays small, and in its cache
PIECE = 2**18


def most(device: torch.device) -> int:
    """Numbers of a piece; on an accelerator more, as each costs some launches."""
    return PIECE if device.type == "cpu" else 64 * PIECE


def pieces(like: Tensor) -> Iterator[Any]:
    """Indices of parts of a tensor, along its first dimension."""
    if like.ndim == 0 or like.numel() <= PIECE:
        yield ...
        return
    rows = max(1, most(like.device) * like.shape[0] // like.numel())
    yield from (slice(i, i + rows) for i in range(0, like.shape[0], rows))


class Lazily(Mapping):
    """site -> its tensors, made each time they are asked for: all gradients of a model never exist side by
    side.
    """

    def __init__(self, names: Iterable[str], make: Callable[[str], Params]):
        self.names, self.make = tuple(names), make

    def __getitem__(self, name: str) -> Params:
        return self.make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def through(chain: Sequence[Transform], grads: Params, state: dict, group: ParamGroup, step: int) -> Params:
    """One site through a chain; state is kept by the place in the chain."""
    for i, transform in enumerate(chain):
        grads = transform.apply(grads, state.setdefault(str(i), {}), group, step)
    return grads


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda x: 1.0,
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "warmup_stable_decay": lambda x: min(1.0, (1 - x) / 0.25),
}


def schedule(name: str, warmup_steps: float, total: int) -> Callable[[int], float]:
    """step -> factor of the learning rate. warmup_steps below 1 is a share of the run."""
    if name not in SCHEDULES:
        raise RecipeError(f"lr_scheduler_type: there is no '{name}'{did_you_mean(name, SCHEDULES)}")
    warm = round(warmup_steps * total) if warmup_steps < 1 else int(warmup_steps)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / (warm + 1)
        return SCHEDULES[name]((step - warm) / max(1, total - warm))

    return factor


class Chain:
    """The optimizer: state by site, made when a site first moves and dropped when it freezes.

    Low-precision weights are stepped through an fp32 master that lives in the state. A weight is its master,
    rounded; where somebody else has written another value since (a tuner that projects or begins anew), that
    value becomes the master's.
    """

    def __init__(
        self,
        transforms: Sequence[Transform],
        attached: TunedModel,
        clock: Clock,
        learning_rate: float,
        factor: Callable[[int], float] = lambda step: 1.0,
    ):
        self.transforms, self.attached, self.clock = (
            tuple(t.on(attached) for t in transforms),
            attached,
            clock,
        )
        self.learning_rate, self.factor = learning_rate, factor
        self.state: dict[str, dict] = {}

    @property
    def rate(self) -> float:
        """The learning rate of this step."""
        return self.learning_rate * self.factor(self.clock.step)

    def param_groups(self) -> list[ParamGroup]:
        """The sites that move now; the state of all others is dropped."""
        live = self.attached.param_groups()
        self.state = {s.name: self.state[s.name] for s in live if s.name in self.state}
        return live

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from saved state, on the devices of what it belongs to."""
        homes = {s.name: next(iter(s.params.values())).device for s in self.attached.all_param_groups()}
        self.state = {name: _to(kept, homes[name]) for name, kept in state.items() if name in homes}

    def step(self, grads: Mapping[str, Params]) -> None:
        """site -> slot -> gradient of the global batch: update every site."""
        param_groups = {s.name: s for s in self.param_groups()}
        for transform in self.transforms:
            grads = transform.gather(grads)
        for name, slots in grads.items():
            self.push(param_groups[name], slots)

    @torch.no_grad()
    def push(self, group: ParamGroup, grads: Params) -> None:
        """Update one site."""
        state = self.state.setdefault(group.name, {})
        state["step"] = state.get("step", 0) + 1
        self._renew(group, state)
        masters, extra_grads = self._masters(group, state), self.attached.extra_grads(group.name)
        small = all(g.numel() <= PIECE for g in grads.values())
        if small or not all(t.pointwise for t in self.transforms):
            self._update(group, masters, grads, extra_grads, state)
            return
        for slot, grad in grads.items():
            for i, transform in enumerate(self.transforms):
                kept = state.setdefault(str(i), {})
                if isinstance(transform, Each) and slot not in kept:
                    kept[slot] = transform.init(masters[slot])
            for part in pieces(masters[slot]):
                own = _with(group, {slot: group.params[slot][part]})
                pull = {slot: extra_grads[slot][part]} if slot in extra_grads else {}
                self._update(
                    own,
                    {slot: masters[slot][part]},
                    {slot: grad[part]},
                    pull,
                    _cut(state, slot, part, grad.shape),
                )

    def _update(
        self,
        group: ParamGroup,
        masters: Params,
        grads: Params,
        extra_grads: Mapping[str, Tensor],
        state: dict,
    ) -> None:
        """Step a site, or part of one, and its masters."""
        for slot, master in masters.items():
            p = group.params[slot]
            if p.dtype != master.dtype:
                _follow(master, p)
        grads = {k: g.to(masters[k].dtype) for k, g in grads.items()}
        grads |= {k: grads[k] + pull for k, pull in extra_grads.items() if k in grads}
        for slot, update in self._updates(grads, state, _with(group, masters)).items():
            masters[slot].add_(update, alpha=-self.rate)
            if group.params[slot].dtype != masters[slot].dtype:
                group.params[slot].copy_(masters[slot])

    def _renew(self, group: ParamGroup, state: dict) -> None:
        """Forget what was known of entries that the tuner has begun anew, and count their steps from here."""
        for slot, mask in self.attached.reset_masks(group.name).items():
            born = state.setdefault("born", {}).setdefault(
                slot, torch.zeros(mask.shape, dtype=torch.int32, device=mask.device)
            )
            born[mask] = state["step"] - 1
            for i in range(len(self.transforms)):
                for kept in state.get(str(i), {}).get(slot, {}).values():
                    if torch.is_tensor(kept) and kept.shape == mask.shape:
                        kept[mask] = 0

    def _updates(self, grads: Params, state: dict, group: ParamGroup) -> Params:
        born, step = state.get("born", {}), state["step"]
        if not born:
            return through(self.transforms, grads, state, group, step)
        ages = {slot: step - born[slot] if slot in born else step for slot in grads}
        return {
            k: u
            for slot, g in grads.items()
            for k, u in through(self.transforms, {slot: g}, state, group, ages[slot]).items()
        }

    def _masters(self, group: ParamGroup, state: dict) -> Params:
        """What is stepped: fp32 masters of low-precision weights, all others themselves."""
        low = {k: p for k, p in group.params.items() if p.dtype in (torch.bfloat16, torch.float16)}
        if not low:
            return dict(group.params)
        kept = state.setdefault("master", {})
        for k, p in low.items():
            if k not in kept:
                kept[k] = p.detach().float()
        return {**group.params, **kept}


def _with(group: ParamGroup, slots: Any) -> ParamGroup:
    """A site with other tensors in its slots."""
    return ParamGroup(group.name, slots, group.by)


def _cut(state: dict, slot: str, part: Any, shape: torch.Size) -> dict:
    """The state of part of a tensor, as views."""

    def cut(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {k: cut(v) for k, v in tree.items()}
        return tree[part] if torch.is_tensor(tree) and tree.shape == shape else tree

    own = {k: {slot: cut(v[slot])} for k, v in state.items() if isinstance(v, dict) and slot in v}
    return {**own, "step": state["step"]}


def _follow(master: Tensor, p: Tensor) -> None:
    """What somebody else has written into a low-precision weight counts: there the master becomes what stands
    in p.
    """
    low = master.to(p.dtype)
    # most often nobody has, and to look takes a fraction of what it takes to write
    if p.is_cpu and p.numel():
        least, most = (p.view(torch.int16) ^ low.view(torch.int16)).aminmax()
        if not (least or most):
            return
    master.copy_(torch.where(p == low, master, p.to(master.dtype)))


def _to(tree: Any, device: torch.device) -> Any:
    if isinstance(tree, Mapping):
        return {k: _to(v, device) for k, v in tree.items()}
    return tree.to(device) if torch.is_tensor(tree) else tree
