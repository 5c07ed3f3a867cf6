"""The optimizer of a recipe: an estimator says where the gradient comes from, a chain of transforms what
becomes of it, as in optax.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from luthier.clock import Clock
from luthier.methods.transforms._base import (
    Each,
    LazyGradients,
    MeasuredGradients,
    Params,
    ScaledGradients,
    Transform,
    apply_chain,
    global_norm,
)
from luthier.methods.tuners._base import ParamGroup, TunedModel

# numbers that go through a chain at a time on a CPU: intermediate tensors stay small, and in its cache
PIECE = 2**18


TOGETHER = 2**26  # numbers that are stepped in the same launches on a GPU


@dataclass
class _Tensor:
    """A parameter that is stepped together with others."""

    name: str
    param: Tensor
    master: Tensor  # the parameter itself, or what is stepped in its place
    grad: Tensor
    extra: Tensor | None  # of a tuner's own penalty
    states: list[dict]  # of each transform


class Chain:
    """The optimizer: state by parameter group, made when a group first moves and dropped when it freezes.

    Low-precision weights are stepped through an fp32 master that lives in the state. A weight is its master,
    rounded; where somebody else has written another value since (a tuner that projects or resets), that value
    becomes the master's.
    """

    def __init__(
        self,
        transforms: Sequence[Transform],
        attached: TunedModel,
        clock: Clock,
        learning_rate: float,
        factor: Callable[[int], float] = lambda step: 1.0,
    ):
        """factor: step -> what the learning rate is multiplied by."""
        self.transforms = tuple(t.bind(attached) for t in transforms)
        self.attached, self.clock = attached, clock
        self.learning_rate, self.factor = learning_rate, factor
        self.state: dict[str, dict] = {}
        self.gradient_norm: float | None = None  # of the last step, before clipping; None where not computed
        self._known_norm: float | None = None  # of the gradients that are stepped next
        # param -> its version and address, as the last step together left it
        self._written: dict[str, tuple[int, int]] = {}

    @property
    def rate(self) -> float:
        """The learning rate of this step."""
        return self.learning_rate * self.factor(self.attached.schedule_step(self.clock))

    def param_groups(self) -> list[ParamGroup]:
        """The groups that move now; the state of all others is dropped."""
        moving = self.attached.param_groups()
        self.state = {g.name: self.state[g.name] for g in moving if g.name in self.state}
        return moving

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from saved state, on the devices of the parameters it belongs to."""
        self.state = {}
        for component in self.attached.components:
            for group in component.all_param_groups():
                if group.name in state:
                    device = next(iter(group.params.values())).device
                    self.state[group.name] = _to(state[group.name], device)

    def step(self, grads: Mapping[str, Params]) -> None:
        """Group -> parameter -> gradient of the global batch: update every group."""
        groups = {g.name: g for g in self.param_groups()}
        norm, self._known_norm = self._known_norm, None
        # a gradient that is computed anew each time it is read is not read for its norm alone
        if isinstance(grads, LazyGradients):
            norm = None
        else:
            norm = global_norm(grads) if norm is None else norm
            grads = MeasuredGradients(grads, norm)
        self.gradient_norm = norm
        for transform in self.transforms:
            grads = transform.gather(grads)
        if self._steps_together(grads):
            self._step_together(groups, grads)
            return
        for name, group_grads in grads.items():
            self.step_group(groups[name], group_grads)

    def note_norm(self, norm: float) -> None:
        """The joint norm of the gradients that are stepped next, where it is known already."""
        self._known_norm = norm

    # ------------------------------------------------------------------------------------------ on a GPU

    def _steps_together(self, grads: Mapping[str, Params]) -> bool:
        """Can all be stepped in a few launches? Where entries were reset, they are not of one age."""
        every = grads
        if isinstance(grads, ScaledGradients):
            every = grads.every
        if isinstance(every, LazyGradients):
            return False
        if not all(g.is_cuda for params in every.values() for g in params.values()):
            return False
        if self.attached.resets or self.attached.moments:
            return False
        if any("born" in state for state in self.state.values()):
            return False
        return all(t.together for t in self.transforms)

    @torch.no_grad()
    def _step_together(self, groups: Mapping[str, ParamGroup], grads: Mapping[str, Params]) -> None:
        """Tensors of the same age and about so many numbers at a time."""
        factor = 1.0
        if isinstance(grads, ScaledGradients):
            grads, factor = grads.every, grads.factor
        waiting: dict[int, list[_Tensor]] = {}  # age -> tensors
        for name, group_grads in grads.items():
            group = groups[name]
            state = self.state.setdefault(name, {})
            state["step"] = state.get("step", 0) + 1
            masters = self._masters(group, state)
            extra: dict[str, Tensor] = {}
            for component in self.attached.components:
                extra |= component.extra_grads(name)
            for key, grad in group_grads.items():
                self._init_state(key, masters[key], state)
                states = [state[str(i)].get(key, {}) for i in range(len(self.transforms))]
                param, master, full = group.params[key], masters[key], f"{name}.{key}"
                alike = waiting.setdefault(state["step"], [])
                alike.append(_Tensor(full, param, master, grad, extra.get(key), states))
                if sum(t.grad.numel() for t in alike) >= TOGETHER:
                    self._update_together(waiting.pop(state["step"]), state["step"], factor)
        for step, alike in waiting.items():
            self._update_together(alike, step, factor)

    def _update_together(self, tensors: list[_Tensor], step: int, factor: float) -> None:
        for t in tensors:
            if t.param is not t.master and self._written.get(t.name) != _version(t.param):
                _follow(t.master, t.param)
        grads = [t.grad.to(t.master.dtype) for t in tensors]
        if factor != 1.0:
            grads = list(torch._foreach_mul(grads, factor))
        for i, t in enumerate(tensors):
            if t.extra is not None:
                grads[i] = grads[i] + t.extra
        masters = [t.master for t in tensors]
        for i, transform in enumerate(self.transforms):
            grads = transform.update_together(grads, [t.states[i] for t in tensors], masters, step)
        torch._foreach_add_(masters, grads, alpha=-self.rate)
        rounded = [t for t in tensors if t.param is not t.master]
        if rounded:
            torch._foreach_copy_([t.param for t in rounded], [t.master for t in rounded])
            self._written.update((t.name, _version(t.param)) for t in rounded)

    # ------------------------------------------------------------------------------------------ one by one

    @torch.no_grad()
    def step_group(self, group: ParamGroup, grads: Params) -> None:
        """Update one group, large tensors piece by piece where every transform allows it."""
        state = self.state.setdefault(group.name, {})
        state["step"] = state.get("step", 0) + 1
        self._reset_entries(group, state)
        masters = self._masters(group, state)
        extra_grads: dict[str, Tensor] = {}
        for component in self.attached.components:
            extra_grads |= component.extra_grads(group.name)
        large = any(g.numel() > PIECE for g in grads.values())
        if not large or not all(t.pointwise for t in self.transforms):
            self._update(group, masters, grads, extra_grads, state)
            return
        for name, grad in grads.items():
            self._init_state(name, masters[name], state)
            for piece in pieces(masters[name]):
                extra = {}
                if name in extra_grads:
                    extra[name] = extra_grads[name][piece]
                self._update(
                    _with_params(group, {name: group.params[name][piece]}),
                    {name: masters[name][piece]},
                    {name: grad[piece]},
                    extra,
                    _state_of_piece(state, name, piece, grad.shape),
                )

    def _init_state(self, name: str, master: Tensor, state: dict) -> None:
        """The state of a whole tensor, before its pieces are stepped."""
        for i, transform in enumerate(self.transforms):
            of_transform = state.setdefault(str(i), {})
            if isinstance(transform, Each) and name not in of_transform:
                of_transform[name] = transform.init(master)

    def _update(
        self,
        group: ParamGroup,
        masters: Params,
        grads: Params,
        extra_grads: Mapping[str, Tensor],
        state: dict,
    ) -> None:
        """Step a group, or part of one, and its masters."""
        for name, master in masters.items():
            if group.params[name].dtype != master.dtype:
                _follow(master, group.params[name])
        total = {}
        for name, grad in grads.items():
            total[name] = grad.to(masters[name].dtype)
            if name in extra_grads:
                total[name] = total[name] + extra_grads[name]
        for name, update in self._updates(total, state, _with_params(group, masters)).items():
            master, param = masters[name], group.params[name]
            master.add_(update, alpha=-self.rate)
            if param.dtype != master.dtype:
                param.copy_(master)

    def _reset_entries(self, group: ParamGroup, state: dict) -> None:
        """Forget the state of entries that the tuner has reset, and count their steps from here."""
        for name in group.params:
            mask = self.attached.resets.pop(f"{group.name}.{name}", None)
            moments = self.attached.moments.pop(f"{group.name}.{name}", None)
            if mask is None:
                continue
            born = state.setdefault("born", {})
            if name not in born:
                born[name] = torch.zeros(mask.shape, dtype=torch.int32, device=mask.device)
            born[name][mask] = state["step"] - 1
            steps = 0
            for i, transform in enumerate(self.transforms):
                of_tensor = state.get(str(i), {}).get(name, {})
                for tensor in of_tensor.values():
                    if torch.is_tensor(tensor) and tensor.shape == mask.shape:
                        tensor[mask] = 0
                if moments is not None and of_tensor and isinstance(transform, Each):
                    steps = max(steps, transform.seed(of_tensor, mask, moments))
            born[name][mask] -= steps

    def _updates(self, grads: Params, state: dict, group: ParamGroup) -> Params:
        born, step = state.get("born", {}), state["step"]
        last = self.clock.step + 1 >= self.clock.total
        for transform in self.transforms:
            transform.begin(self.rate, last)
        if not born:
            return apply_chain(self.transforms, grads, state, group, step)
        updates: Params = {}
        for name, grad in grads.items():
            age = step - born[name] if name in born else step
            updates |= apply_chain(self.transforms, {name: grad}, state, group, age)
        return updates

    def _masters(self, group: ParamGroup, state: dict) -> Params:
        """What is stepped: fp32 masters of low-precision weights, all others themselves."""
        masters: Params = dict(group.params)
        for name, param in group.params.items():
            if param.dtype in (torch.bfloat16, torch.float16):
                stored = state.setdefault("master", {})
                if name not in stored:
                    stored[name] = param.detach().float()
                masters[name] = stored[name]
        return masters


def piece_size(device: torch.device) -> int:
    """Numbers of a piece; on an accelerator more, as each costs some launches."""
    return PIECE if device.type == "cpu" else 64 * PIECE


def pieces(like: Tensor) -> Iterator[Any]:
    """Indices of parts of a tensor, along its first dimension."""
    if like.ndim == 0 or like.numel() <= PIECE:
        yield ...
        return
    rows = max(1, piece_size(like.device) * like.shape[0] // like.numel())
    for start in range(0, like.shape[0], rows):
        yield slice(start, start + rows)


def _with_params(group: ParamGroup, params: Any) -> ParamGroup:
    return ParamGroup(group.name, params, group.by)


def _state_of_piece(state: dict, name: str, piece: Any, shape: torch.Size) -> dict:
    """The state of part of a tensor, as views."""

    def cut(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {k: cut(v) for k, v in tree.items()}
        if torch.is_tensor(tree) and tree.shape == shape:
            return tree[piece]
        return tree

    part: dict[str, Any] = {"step": state["step"]}
    for key, by_name in state.items():
        if isinstance(by_name, dict) and name in by_name:
            part[key] = {name: cut(by_name[name])}
    return part


def _follow(master: Tensor, param: Tensor) -> None:
    """Where somebody else has written into a low-precision weight, its value becomes the master's."""
    rounded = master.to(param.dtype)
    # most often nobody has, and to look takes a fraction of what it takes to write
    if param.is_cpu and param.numel():
        low, high = (param.view(torch.int16) ^ rounded.view(torch.int16)).aminmax()
        if not (low or high):
            return
    master.copy_(torch.where(param == rounded, master, param.to(master.dtype)))


def _version(param: Tensor) -> tuple[int, int]:
    """Changes when somebody writes into a parameter, or gives it other memory."""
    return param._version, param.data_ptr()


def _to(tree: Any, device: torch.device) -> Any:
    if isinstance(tree, Mapping):
        return {k: _to(v, device) for k, v in tree.items()}
    return tree.to(device) if torch.is_tensor(tree) else tree
