"""What must never fail in silence. Every guard raises, or tells, one sentence; docs/troubleshooting.md
explains each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from luthier.errors import NotFinite, NothingMoves, Refused
from luthier.kernels import elementwise
from luthier.methods.quantizers._base import numbers
from luthier.model.batch import Batch
from luthier.model.policy import eval_mode

TOO_BIG = (
    "out of memory: what was saved before is intact. Lower per_device_train_batch_size (raise"
    " gradient_accumulation_steps for the same result) or max_length, set gradient_checkpointing, or take a"
    " tuner that moves less"
)


def something_moves(attached: Any) -> dict[str, int]:
    """Counts of moving and of all parameters; refuses a tuner that moves nothing."""
    moving = sum(p.numel() for s in attached.param_groups() for p in s.params.values() if p.requires_grad)
    every = {id(p): p.numel() for p in (*attached.model.parameters(), *attached.parameters().values())}
    total = sum(every.values()) + numbers(attached.model)
    if not moving:
        raise NothingMoves(f"tuner '{attached.settings.name}' moves nothing: 0 of {total} parameters")
    return {"moving": moving, "all": total}


def something_to_learn(batches: int, supervised: float, tokens: float) -> None:
    """Refuses data in which no token is supervised."""
    if not batches:
        raise Refused("there are no rows left to train on", "no_rows")
    if not supervised:
        raise Refused(
            f"no token of {tokens:.0f} is supervised: nothing would be learned (are all completions masked or"
            " cut off?)",
            "nothing_supervised",
        )


def finite(values: torch.Tensor, name: str, step: int, batch: Batch) -> None:
    """Refuses a loss that is not a number, naming the rows it came from."""
    if bool(values.isfinite().all()):
        return
    raise NotFinite(
        f"the loss of '{name}' is not finite at step {step}, on rows"
        f" {', '.join(str(r['id']) for r in batch.rows[:8])}; nothing of this step was applied. Look at these"
        " rows, or lower learning_rate"
    )


def right_count(values: torch.Tensor, objective: Any, batch: Batch) -> None:
    """An objective must give one number per unit."""
    if values.shape != (objective.count(batch),):
        raise RuntimeError(
            f"objective '{objective.name}' gave {tuple(values.shape)} for {objective.count(batch)}"
            f" {objective.unit}s"
        )


def gradient_arrives(attached: Any, may_be_zero: bool) -> None:
    """After the first backward: a gradient must have reached what moves. Samples of equal reward may give
    zeros.
    """
    param_groups = attached.param_groups()
    reached = [
        p.grad is not None and (may_be_zero or bool(p.grad.any()))
        for s in param_groups
        for p in s.params.values()
    ]
    if not any(reached):
        raise Refused(
            f"no gradient reaches any of the {len(reached)} tensors that tuner '{attached.settings.name}'"
            " moves: nothing would be learned",
            "no_gradient",
        )


def tolerance(model: nn.Module) -> float:
    """How far log-probabilities of two right ways of reading lie apart on average, by rounding: in the
    network's precision.
    """
    return {torch.float32: 2e-4, torch.float16: 0.02}.get(next(model.parameters()).dtype, 0.1)


def same_as_plain(policy: Any, batch: Batch, tell: Callable[[str], None]) -> None:
    """Compare the fast layout and kernels with the model's own forward on a few rows; fall back loudly where
    they differ.

    The layout is tried crowded: all sequences side by side, as they come to stand in a large batch.
    """
    usual = tolerance(policy.model)
    failed: list[tuple[str, str]] = []  # a reading and why it will not do
    with torch.no_grad(), eval_mode(policy.model), policy.playing():
        with elementwise.plainly():
            want = policy.architecture.plain(policy.model, policy.attached, batch).float()
        _elementwise(policy, batch, want, usual, tell)
        while True:
            arch = policy.architecture
            try:
                gaps = (
                    arch.crowded().forward(policy.model, policy.attached, batch).said.float() - want
                ).abs()
                mean, most = float(gaps.mean()), float(gaps.max())
                if mean <= usual and most <= 20 * usual:  # a number that is not finite fails too
                    break
                reason = f"differs from the model's own forward by {mean:.1e} on average, {most:.1e} at most"
            except (
                TypeError,
                ValueError,
                RuntimeError,
                KeyError,
                IndexError,
                AttributeError,
                NotImplementedError,
            ) as error:
                reason = (
                    f"does not work ({type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]})"
                )
            simpler = arch.simpler()
            if simpler is None:
                raise Refused(
                    f"architecture '{arch.name}' cannot read this model: reading {arch.reading} {reason}",
                    "unreadable",
                )
            if failed and failed[-1][1] == reason:
                failed.pop()
            failed.append((arch.reading, reason))
            policy.architecture = simpler
    taken = [*(reading for reading, _ in failed), policy.architecture.reading]
    for (reading, reason), instead in zip(failed, taken[1:], strict=True):
        tell(f"reading {reading} {reason}: rows are read {instead} instead, which is slower and right")


def _elementwise(
    policy: Any, batch: Batch, want: torch.Tensor, usual: float, tell: Callable[[str], None]
) -> None:
    """The element-wise kernels by themselves, in the network's own forward. want: [T] what it says without
    them.
    """
    if not elementwise.taken(policy.model):
        return
    with elementwise.always():
        gaps = (policy.architecture.plain(policy.model, policy.attached, batch).float() - want).abs()
    mean, most = float(gaps.mean()), float(gaps.max())
    if not (mean <= usual and most <= 20 * usual):
        elementwise.leave(policy.model)
        tell(
            f"norms and rotary positions in fewer passes differ from the model's own by {mean:.1e} on"
            f" average, {most:.1e} at most: its own are taken instead, which are slower and right"
        )


def out_of_memory(error: BaseException) -> bool:
    """Is this the way torch says that memory has run out?"""
    return isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(
        error
    )


def ends_are_learned(rows: Sequence[Any], stop: set[int], tell: Callable[[str], None]) -> None:
    """Of encoded rows: does the end of a turn stand among the supervised tokens? Else the model will never
    stop.
    """
    asked = [
        [t for t, s in zip(ids, marks, strict=True) if s]
        for e in rows
        for ids, marks in zip(e.completions, e.supervised, strict=True)
    ]
    if asked and stop and not any(stop & set(a) for a in asked):
        tell("no completion teaches the model to stop: the end of a turn is not among the supervised tokens")
