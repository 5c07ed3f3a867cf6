"""What must never fail in silence. Every check raises, or warns with, one sentence; docs/troubleshooting.md
explains each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from luthier.errors import NO_ROWS, NotFinite, NothingMoves, Refused
from luthier.kernels import _switch, elementwise
from luthier.kernels.tolerance import logprob_tolerance
from luthier.model.batch import Batch
from luthier.model.policy import eval_mode
from luthier.model.quantized_linear import numbers

# of a check: sequences at most, and tokens that they have together as they are read one by one
SEQUENCES, TOKENS = 4, 400
# what a network that cannot be read in some way may raise; errors of memory and interrupts are none of these
UNREADABLE = (
    TypeError,
    ValueError,
    RuntimeError,
    KeyError,
    IndexError,
    AttributeError,
    NotImplementedError,
)


def check_trainable(attached: Any) -> dict[str, int]:
    """Numbers of trainable ("moving") and of all parameters. Raises NothingMoves where nothing is
    trainable.
    """
    moving = 0
    for group in attached.param_groups():
        moving += sum(p.numel() for p in group.params.values() if p.requires_grad)
    every = {id(p): p.numel() for p in (*attached.model.parameters(), *attached.parameters().values())}
    total = sum(every.values()) + numbers(attached.model)
    if not moving:
        raise NothingMoves(
            f"tuner '{attached.settings.name}' has no trainable parameters (0 of {total}); check"
            " target_modules and similar settings"
        )
    return {"moving": moving, "all": total}


def check_supervised(rows: int, supervised: float, tokens: float) -> None:
    """Raises Refused for data in which no token is supervised."""
    if not rows:
        raise Refused("no rows are left to train on", NO_ROWS)
    if not supervised:
        raise Refused(
            f"none of the {tokens:.0f} tokens is supervised, so nothing would be learned; check"
            " whether all completions are masked or truncated by max_length",
            "nothing_supervised",
        )


def check_finite(values: torch.Tensor, name: str, step: int, batch: Batch) -> None:
    """Raises NotFinite for a loss that is not a number, naming the rows it came from."""
    if bool(values.isfinite().all()):
        return
    rows = ", ".join(str(r["id"]) for r in batch.rows[:8])
    raise NotFinite(
        f"the loss of '{name}' is not finite at step {step}, on rows {rows}; this step was not"
        " applied. Check these rows, or lower learning_rate"
    )


def check_unit_count(values: torch.Tensor, objective: Any, batch: Batch) -> None:
    """An objective must give one number per unit. Raises RuntimeError."""
    count = objective.count(batch)
    if values.shape != (count,):
        raise RuntimeError(
            f"objective '{objective.name}' returned a tensor of shape {tuple(values.shape)} for"
            f" {count} {objective.unit}s"
        )


def check_gradient(attached: Any, may_be_zero: bool) -> bool:
    """After a backward: does a gradient reach what is trained? Raises Refused where none does, unless it may
    be zero, as on completions of equal score; what is in no graph is refused even then.
    """
    tensors, reached = 0, False
    for group in attached.param_groups():
        for p in group.params.values():
            tensors += 1
            if p.grad is not None and bool(p.grad.any()):
                return True
            reached |= p.grad is not None
    if reached and may_be_zero:
        return False
    raise Refused(
        f"none of the {tensors} trainable tensors of tuner '{attached.settings.name}' receives"
        " a gradient, so nothing would be learned",
        "no_gradient",
    )


def check_forward(policy: Any, batch: Batch, warn: Callable[[str], None]) -> None:
    """Compare the fast layout and kernels with the model's own forward on a few rows, and fall back, with a
    warning, where they differ. Raises Refused where no way of reading is right.

    The layout is tested crowded: all sequences beside each other, as in a large batch. Of long ones and of
    many a part is read, so that a check takes a second or two whatever the rows are.
    """
    batch = excerpt(batch)
    failed: list[tuple[str, str]] = []  # a way of reading, and what is wrong with it
    with torch.no_grad(), eval_mode(policy.model), policy.role_context():
        with _switch.plainly():
            expected = policy.architecture.plain(policy.model, policy.attached, batch).float()
        usual = logprob_tolerance(policy.model, expected)
        _check_elementwise(policy, batch, expected, usual, warn)
        while reason := _difference(policy, batch, expected, usual):
            arch = policy.architecture
            simpler = arch.simpler()
            if simpler is None:
                raise Refused(
                    f"architecture '{arch.name}' cannot run this model: the layout '{arch.reading}' {reason}",
                    "unreadable",
                )
            if failed and failed[-1][1] == reason:
                failed.pop()
            failed.append((arch.reading, reason))
            policy.architecture = simpler
    for i, (reading, reason) in enumerate(failed):
        instead = failed[i + 1][0] if i + 1 < len(failed) else policy.architecture.reading
        warn(f"the layout '{reading}' {reason}; using '{instead}' instead (slower, results are correct)")


def excerpt(batch: Batch, sequences: int = SEQUENCES, tokens: int = TOKENS) -> Batch:
    """A few sequences of a batch, of each row some: the ends of prompts, and of completions a stretch that is
    supervised. A batch that is small enough stays as it is.
    """
    parents, sizes = batch.parents, batch.sizes
    lines = []  # the segments of each sequence
    for segment in batch.completion.tolist():
        line = [segment]
        while parents[line[0]] >= 0:
            line.insert(0, parents[line[0]])
        lines.append(line)
    if sum(sizes[s] for line in lines for s in line) <= tokens:
        return batch
    groups = batch.group.tolist()
    turn = [groups[:i].count(group) for i, group in enumerate(groups)]  # of a sequence in its row
    order = sorted(range(len(lines)), key=turn.__getitem__)
    chosen = torch.tensor(sorted(order[:sequences]), device=batch.ids.device)
    lines = [lines[i] for i in chosen.tolist()]
    each = tokens // len(lines)
    parts = batch.segments()
    places: dict[int, torch.Tensor] = {}  # of the tokens of each segment that stay
    for line in lines:
        *above, last = line
        marks = batch.supervised[parts[last]]
        first = max(0, int(marks.int().argmax()) - 1)  # a text of its own: what its first token follows
        places[last] = parts[last][first : first + each // 2]
        for s in above:
            room = (each - each // 2) // len(above)
            places.setdefault(s, parts[s][-room:])
    return _cut(batch, chosen, places)


def _cut(batch: Batch, chosen: torch.Tensor, places: dict[int, torch.Tensor]) -> Batch:
    """A batch with these sequences, and of these segments these tokens."""
    segments = sorted(places)
    number = {s: i for i, s in enumerate(segments)}
    parents = batch.parents
    stay = torch.cat([places[s] for s in segments])
    counts = torch.tensor([len(places[s]) for s in segments])
    device = batch.ids.device

    def renumbered(some: list[int]) -> torch.Tensor:
        return torch.tensor([number.get(s, -1) for s in some], device=device)

    return replace(
        batch,
        ids=batch.ids[stay],
        labels=batch.labels[stay],
        supervised=batch.supervised[stay],
        segment=torch.repeat_interleave(torch.arange(len(segments)), counts).to(device),
        parent=renumbered([parents[s] for s in segments]),
        completion=renumbered(batch.completion[chosen].tolist()),
        group=batch.group[chosen],
        host=None,
        read={},
        metrics={},
    )


def scaled_gaps(values: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """How far log-probabilities lie apart. Rounding errors grow with the numbers rounded: beyond -4 a
    gap counts less, by the size of the log-probability.
    """
    return (values - expected).abs() / (expected.abs() / 4).clamp(min=1)


def _difference(policy: Any, batch: Batch, expected: torch.Tensor, usual: float) -> str | None:
    """What is wrong with the way in which an architecture reads; None where it is right."""
    crowded = policy.architecture.crowded()
    try:
        outputs = crowded.forward(policy.model, policy.attached, batch)
        gaps = scaled_gaps(outputs.checked_values.float(), expected)
        mean, largest = float(gaps.mean()), float(gaps.max())
    except UNREADABLE as error:
        message = (str(error).splitlines() or [""])[0]
        return f"fails ({type(error).__name__}: {message[:120]})"
    if mean <= usual and largest <= 20 * usual:  # a number that is not finite fails too
        return None
    return f"differs from the model's own forward by {mean:.1e} on average (maximum {largest:.1e})"


def _check_elementwise(
    policy: Any, batch: Batch, expected: torch.Tensor, usual: float, warn: Callable[[str], None]
) -> None:
    """The element-wise kernels by themselves, in the network's own forward. expected: [T] log-probabilities
    without them.
    """
    if not elementwise.is_installed(policy.model):
        return
    with _switch.always():
        values = policy.architecture.plain(policy.model, policy.attached, batch).float()
    gaps = scaled_gaps(values, expected)
    mean, largest = float(gaps.mean()), float(gaps.max())
    if not (mean <= usual and largest <= 20 * usual):
        elementwise.uninstall(policy.model)
        warn(
            f"fused norms and rotary embeddings differ from the model's own by {mean:.1e} on"
            f" average (maximum {largest:.1e}); using the model's own (slower, results are"
            " correct)"
        )


def check_stop_token(rows: Sequence[Any], stop: set[int], warn: Callable[[str], None]) -> None:
    """Of encoded rows: warns where no end of a turn stands among the supervised tokens, since the model will
    then never stop.
    """
    completions = 0
    for row in rows:
        for ids, supervised in zip(row.completions, row.supervised, strict=True):
            completions += 1
            if any(s and t in stop for t, s in zip(ids, supervised, strict=True)):
                return
    if completions and stop:
        warn(
            "no completion teaches the model to stop: the end-of-turn token is not supervised; end"
            " completions with it, or set another chat_template"
        )
