"""Statistics of each weight from a few calibration rows: what its module reads, and how the loss depends on
it.

For tuners that start from data, pruning, and quantizers that read rows. Where a statistic is per token, rows
are read singly, so no padding is counted. `statistics` gathers as many modules as fit `BUDGET` in one pass
and reads the rows again for the others; `gather` gathers all of them at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from luthier.errors import RecipeError
from luthier.model.batch import Batch
from luthier.model.layout import rows_apart
from luthier.model.linear import base_layer, is_transposed, oriented
from luthier.model.quantized_linear import Quantized

BUDGET = 2**28  # numbers gathered at once, in fp32: a gigabyte
MICRO = 4  # rows read at once where padding does not count

Modules = Mapping[str, Any]  # name -> module, or the layer of an adapter around it


@dataclass(frozen=True)
class Statistic:
    """How a statistic is gathered, and how many numbers one module of [out, in] takes meanwhile."""

    gather: Callable[[Modules, list[dict], Any], dict[str, Any]]
    size: Callable[[int, int], int]


def statistics(kind: str, modules: Modules, rows: list[dict], roles: Any) -> Iterator[tuple[str, Any]]:
    """Yields (name, what was gathered of that module), in the order of `modules`; see `STATISTICS` for kinds.
    What was yielded is kept no longer. Raises RecipeError where there are no rows, or none reaches a module.
    """
    if not rows:
        raise RecipeError("a data-driven initialization needs rows")
    with torch.no_grad():  # what is measured of a network at its first reading is not counted
        _answers(roles, roles.batch(rows[:1]))
    groups: list[dict[str, Any]] = [{}]
    total = 0  # numbers of the last group
    for name, module in modules.items():
        numbers = STATISTICS[kind].size(*oriented(base_layer(module)).shape)
        if groups[-1] and total + numbers > BUDGET:
            groups.append({})
            total = 0
        groups[-1][name] = module
        total += numbers
    for group in groups:
        gathered = gather(kind, group, rows, roles)
        for name in list(gathered):
            yield name, gathered.pop(name)


def gather(kind: str, modules: Modules, rows: list[dict], roles: Any) -> dict[str, Any]:
    """name -> what was gathered of each module, all in one pass over the rows."""
    return STATISTICS[kind].gather(modules, rows, roles)


# ---------------------------------------------------------------------- passes


def _batches(rows: list[dict], roles: Any, size: int) -> Iterator[Batch]:
    for start in range(0, len(rows), size):
        yield roles.batch(rows[start : start + size])


@contextmanager
def _watch_inputs(modules: Modules, see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """`see(name, x)` is called with what each module reads: x [n, in] in fp32, token by token. Without
    gradients.
    """

    def hook(name: str, module: Any, inputs: Any, output: Any) -> None:
        see(name, inputs[0].detach().flatten(0, -2).float())

    handles = []
    for name, module in modules.items():
        handles.append(module.register_forward_hook(partial(hook, name)))
    try:
        with torch.no_grad(), rows_apart():
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _watch_gradients(modules: Modules, see: Callable[[str, Tensor], Any]) -> Iterator[None]:
    """`see(name, gradient)` is called with each gradient of each weight, as the module lays it out; of a
    quantized one with that of the weight [out, in] which its codes stand for. None is kept.
    """

    def hook(name: str, weight: Tensor) -> None:
        if weight.grad is not None:
            see(name, weight.grad)
        weight.grad = None

    bases = {name: base_layer(module) for name, module in modules.items()}
    weights, handles = [], []
    for name, base in bases.items():
        if isinstance(base, Quantized):
            base.watch = partial(see, name)
        else:
            weight = base.weight.requires_grad_(True)
            weights.append(weight)
            handles.append(weight.register_post_accumulate_grad_hook(partial(hook, name)))
    try:
        with torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for weight in weights:
            weight.requires_grad_(False)
        for base in bases.values():
            if isinstance(base, Quantized):
                base.watch = None


def _zeros(modules: Modules) -> dict[str, Tensor]:
    """name -> zeros in fp32, laid out as the gradients of `_watch_gradients`."""
    zeros = {}
    for name, module in modules.items():
        base = base_layer(module)
        if isinstance(base, Quantized):
            shape, device = base.size, next(iter(base.codes.values())).device
        else:
            shape, device = base.weight.shape, base.weight.device
        zeros[name] = torch.zeros(shape, dtype=torch.float32, device=device)
    return zeros


def _oriented(module: Any, gradient: Tensor) -> Tensor:
    """A gradient from `_watch_gradients` as [out, in]."""
    base = base_layer(module)
    if is_transposed(base) and not isinstance(base, Quantized):
        return gradient.T
    return gradient


def _refuse_unread(unread: list[str], rows: list[dict]) -> None:
    """Raises RecipeError where no row reaches some modules."""
    if unread:
        raise RecipeError(
            f"none of the {len(rows)} rows reaches {unread[0]}; use more rows (init_rows), or"
            " leave this module out"
        )


def _answers(roles: Any, batch: Any) -> Tensor:
    """[T] log-probabilities of a batch's supervised tokens; of a reward model its values."""
    return roles.policy.outputs(batch).checked_values


# ---------------------------------------------------------------------- what modules read


def _inputs(modules: Modules, rows: list[dict], roles: Any) -> dict[str, Tensor]:
    parts: dict[str, list[Tensor]] = {name: [] for name in modules}
    inputs = {}
    with _watch_inputs(modules, lambda name, x: parts[name].append(x)):
        for batch in _batches(rows, roles, 1):
            _answers(roles, batch)
    _refuse_unread([name for name, x in parts.items() if not x], rows)
    for name, x in parts.items():
        inputs[name] = torch.cat(x)
    return inputs


def _covariance(modules: Modules, rows: list[dict], roles: Any) -> dict[str, Tensor]:
    total, largest = {}, dict.fromkeys(modules, 0.0)
    for name, module in modules.items():
        W = oriented(base_layer(module))
        total[name] = torch.zeros(W.shape[1], W.shape[1], dtype=torch.float32, device=W.device)

    def see(name: str, x: Tensor) -> None:
        total[name].addmm_(x.T, x)
        largest[name] = max(largest[name], float(x.abs().max()))

    with _watch_inputs(modules, see):
        for batch in _batches(rows, roles, 1):
            _answers(roles, batch)
    _refuse_unread([name for name, size in largest.items() if not size], rows)
    for name, C in total.items():
        C.div_(len(rows) * largest[name] ** 2)
    return total


def _hessian(modules: Modules, rows: list[dict], roles: Any) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        total[name] = total[name].addmm_(x.T, x) if name in total else x.T @ x

    with _watch_inputs(modules, see):
        for batch in _batches(rows, roles, MICRO):
            _answers(roles, batch)
    return total


def _input_norms(modules: Modules, rows: list[dict], roles: Any) -> dict[str, Tensor]:
    squares: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        square = x.square().sum(0)
        squares[name] = squares[name] + square if name in squares else square

    with _watch_inputs(modules, see):
        for batch in _batches(rows, roles, 1):
            _answers(roles, batch)
    for square in squares.values():
        square.sqrt_()
    return squares


def _input_maxima(modules: Modules, rows: list[dict], roles: Any) -> dict[str, Tensor]:
    maxima: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        largest = x.abs().amax(0)
        maxima[name] = torch.maximum(maxima[name], largest) if name in maxima else largest

    with _watch_inputs(modules, see):
        for batch in _batches(rows, roles, MICRO):
            _answers(roles, batch)
    return maxima


# ---------------------------------------------------------------------- how the loss depends on them


def _gradients(modules: Modules, rows: list[dict], roles: Any) -> dict[str, Tensor]:
    total, tokens = _zeros(modules), 0
    with _watch_gradients(modules, lambda name, gradient: total[name].add_(gradient)):
        for batch in _batches(rows, roles, MICRO):
            tokens += batch.count("token")
            _answers(roles, batch).sum().neg().backward()
    means = {}
    for name, gradient in total.items():
        means[name] = _oriented(modules[name], gradient) / max(tokens, 1)
    return means


def _squared_gradients(modules: Modules, rows: list[dict], roles: Any) -> dict[str, Tensor]:
    total = _zeros(modules)
    with _watch_gradients(modules, lambda name, gradient: total[name].add_(gradient.float().square())):
        for batch in _batches(rows, roles, MICRO):
            _answers(roles, batch).mean().neg().backward()
    for name, square in total.items():
        total[name] = _oriented(modules[name], square)
    return total


def _fisher(modules: Modules, rows: list[dict], roles: Any) -> dict[str, tuple[Tensor, Tensor]]:
    total: dict[str, tuple[Tensor, Tensor]] = {}

    def see(name: str, gradient: Tensor) -> None:
        square = _oriented(modules[name], gradient).float().square()
        before = total.get(name, (0.0, 0.0))
        total[name] = (before[0] + square.mean(1), before[1] + square.mean(0))

    trained = [p for p in roles.policy.model.parameters() if p.requires_grad]
    roles.policy.model.requires_grad_(False)
    try:
        with _watch_gradients(modules, see):
            for batch in _batches(rows, roles, 1):
                _answers(roles, batch).sum().neg().backward()
    finally:
        for p in trained:
            p.requires_grad_(True)
    return total


STATISTICS = {
    # [n, in] what the module reads, token by token
    "inputs": Statistic(_inputs, lambda out, width: 4096 * width),
    # [in, in] the sum over tokens of x x', x over the largest |x|, divided by rows
    "covariance": Statistic(_covariance, lambda out, width: width * width),
    # [in, in] the sum over tokens of x x'
    "hessian": Statistic(_hessian, lambda out, width: width * width),
    # [in] the 2-norm of each input over all tokens; modules that no row reaches are left out
    "input_norms": Statistic(_input_norms, lambda out, width: width),
    # [in] the largest magnitude of each input; modules that no row reaches are left out
    "input_maxima": Statistic(_input_maxima, lambda out, width: width),
    # [out, in] of the mean -log p of the supervised tokens
    "gradients": Statistic(_gradients, lambda out, width: out * width),
    # [out, in] squared gradients of the mean -log p, summed over batches
    "squared_gradients": Statistic(_squared_gradients, lambda out, width: out * width),
    # [out] and [in]: squared gradients of -log p of single rows, summed: their means by row and by column
    "fisher": Statistic(_fisher, lambda out, width: out + width),
}
