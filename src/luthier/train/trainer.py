"""fit(): the one training loop. A step is a function of (tensors, optimizer state, step number) and of
nothing else.

The loss of a step is, for each term of the objective, the average over all its units in the global batch,
however the batch is split into micro-batches and over processes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

from luthier.clock import Clock
from luthier.methods.objectives._base import Objective
from luthier.model.batch import Batch
from luthier.train import checks as guards
from luthier.train.optimizer import Chain


@dataclass
class Totals:
    """What a run has done so far; kept in checkpoints."""

    tokens: int = 0  # read in training, prompts included
    supervised: int = 0  # asked about
    seconds: float = 0.0  # in steps, without evaluation and saving
    rows_seen: int = 0


@dataclass
class BatchSchedule:
    """How rows become steps."""

    per_step: int  # rows of the global batch
    micro: int  # rows of a micro-batch, per process
    # rows of the whole run: the last draw takes what is left; None = as many as steps need
    stop_at: int | None = None
    live: Sequence[Any] = ()  # stages on the rows of a step
    num_iterations: int = 1  # steps for each draw of live rows


def every_term(place: int, name: str) -> bool:
    """Which terms of an objective a closure is asked about, if nothing else is said."""
    return True


class TooLarge(MemoryError):
    """Memory ran out while a micro-batch was read: smaller ones may do."""


@lru_cache(maxsize=4)
def _order(fold: int, n: int) -> tuple[int, ...]:
    return tuple(torch.randperm(n, generator=torch.Generator().manual_seed(fold)).tolist())


def draw(
    rows: Sequence[dict], clock: Clock, per_step: int, stop_at: int | None = None, num_iterations: int = 1
) -> list[dict]:
    """The rows of this step. Epoch e is one permutation made of (seed, e): there is no sampler state to
    restore.
    """
    first = clock.step // num_iterations * per_step
    last = first + per_step if stop_at is None else min(first + per_step, stop_at)
    places = (divmod(i, len(rows)) for i in range(first, last))
    return [rows[_order(clock.derive_seed("order", at=epoch), len(rows))[k]] for epoch, k in places]


@dataclass
class Trainer:
    """One training run in progress."""

    roles: Any
    rows: Sequence[dict]
    objective: Objective | None  # None: nothing is trained, and no step made
    chain: Chain
    estimator: Any
    batches: BatchSchedule
    accelerator: Any
    hooks: Sequence[Callable[[Trainer, dict], None]] = ()  # called after every step with its numbers
    warn: Callable[[str], None] = print
    held: list[dict] | None = None  # this process's rows of the current draw
    totals: Totals = field(default_factory=Totals)

    def run(self, until: int | None = None) -> None:
        """Step until the clock's total, or stop before at `until`."""
        clock = self.roles.clock
        while clock.step < min(clock.total, clock.total if until is None else until):
            log = self.step()
            clock.step += 1
            for hook in self.hooks:
                hook(self, log)

    def once(self) -> str | None:
        """Why nothing that is said of a row could be said again; None where rows are read more than once."""
        if self.batches.live:
            return "rows are made anew at each step"
        draws = -(-self.roles.clock.total // self.batches.num_iterations)
        return "each row is read once" if draws * self.batches.per_step <= len(self.rows) else None

    def step(self) -> dict:
        """One optimizer step; its numbers."""
        began = time.perf_counter()
        self.prepare()
        while True:
            try:
                asked = self.ask()
                loss = self.estimator.step(asked, self.chain, self.roles.clock)
                break
            except TooLarge:  # nothing has been stepped: the estimator was still asking for losses
                # the others wait for this process's part
                if self.batches.micro == 1 or self.accelerator.num_processes > 1:
                    raise
                self.batches.micro = (self.batches.micro + 1) // 2
            self.forget()
            bound = [
                o.contract["accumulation"] for _, o in self.objective.terms() if "accumulation" in o.contract
            ]
            self.warn(
                f"out of memory: micro-batches of {self.batches.micro} rows from here on; "
                + (f"this changes results: {bound[0]}" if bound else "results do not change")
            )
        return self.done(asked, loss, time.perf_counter() - began)

    def prepare(self) -> None:
        """Before a step: what moves in it, and its rows."""
        self.roles.tuner.before_step(self.roles.clock)
        if self.held is None or self.roles.clock.step % self.batches.num_iterations == 0:
            self.held = self._draw()

    def ask(self) -> Asked:
        """What the estimator of this step may ask."""
        self.roles.policy.train()
        micro, rows = self.batches.micro, self.held or []
        return Asked(
            self, [self.roles.batch(rows[i : i + micro], training=True) for i in range(0, len(rows), micro)]
        )

    def done(self, asked: Asked, loss: float, seconds: float) -> dict:
        """After a step of so many seconds: its numbers."""
        clock, counts = self.roles.clock, asked.counts
        self.roles.tuner.after_step(clock)
        self.totals.tokens += counts["tokens"]
        self.totals.supervised += counts["supervised"]
        self.totals.rows_seen += counts["rows"]
        self.totals.seconds += seconds
        rate, tokens = self.chain.rate, counts["tokens"]
        return {
            "step": clock.step + 1,
            "loss": loss,
            "learning_rate": rate,
            **asked.metrics,
            "tokens": tokens,
            "seconds": seconds,
        }

    def _draw(self) -> list[dict]:
        acc, b = self.accelerator, self.batches
        mine = draw(self.rows, self.roles.clock, b.per_step, b.stop_at, b.num_iterations)[
            acc.process_index :: acc.num_processes
        ]
        for stage in b.live:
            mine = list(stage(mine, self.roles))
        return mine

    def forget(self) -> None:
        """Let go of gradients, and of memory that nobody uses."""
        for p in self.roles.tuner.parameters().values():
            p.grad = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def share(self, params: Sequence[torch.nn.Parameter]) -> None:
        """Sum gradients over processes. A tensor that no process reached keeps none, as in one process."""
        reached = self.sum(torch.tensor([float(p.grad is not None) for p in params]))
        for p, somewhere in zip(params, reached.tolist(), strict=True):
            if somewhere:
                p.grad = self.sum(torch.zeros_like(p) if p.grad is None else p.grad)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Over processes."""
        acc = self.accelerator
        return acc.reduce(x.to(acc.device), "sum").to(x.device) if acc.num_processes > 1 else x


class Asked:
    """What an estimator calls: the loss of a step's global batch, and with grad its gradient in p.grad of
    what moves.

    `begin`, `part` for each micro-batch and `end` do in turn what a call does.
    """

    def __init__(self, fit: Trainer, batches: list[Batch]):
        self.fit, self.batches = fit, batches
        self.metrics: dict[str, float] = {}
        objectives = fit.objective.terms()
        counts = [
            [float(o.divisor(b)) for _, o in objectives]
            + [float(len(b.ids)), float(len(b.owner)), float(len(b.rows))]
            for b in batches
        ]
        total = (
            torch.tensor(counts, dtype=torch.float64).sum(0)
            if counts
            else torch.zeros(len(objectives) + 3, dtype=torch.float64)
        )
        *self.units, tokens, supervised, rows = fit.sum(total).tolist()
        self.counts = {"tokens": int(tokens), "supervised": int(supervised), "rows": int(rows)}
        self.terms, self.names = len(objectives), [o.name for _, o in objectives]
        self.values: dict[str, float] = {}  # each term's own average, by name, when it was last asked

    def note(self, metrics: Mapping[str, float]) -> None:
        """Further numbers for the log."""
        self.metrics.update(metrics)

    def __call__(self, grad: bool = True, only: Callable[[int, str], float] = every_term) -> float:
        """only: of these terms (place, name), or how much each counts."""
        try:
            self.begin(grad)
            for m in range(len(self.batches)):
                self.part(m, grad, only)
            return self.end(grad, only)
        except (RuntimeError, MemoryError) as error:
            if guards.out_of_memory(error):
                raise TooLarge(str(error)) from None
            raise

    def begin(self, grad: bool) -> None:
        self.value, self.seen, self.each, self.alone = 0.0, {}, {}, [0.0] * self.terms
        if grad:
            for p in self.fit.roles.tuner.parameters().values():
                p.grad = None

    def part(
        self,
        m: int,
        grad: bool = True,
        only: Callable[[int, str], float] = every_term,
        read: Mapping[str, Any] | None = None,
    ) -> None:
        """One micro-batch. read: what roles have said of it already."""
        fit, seen = self.fit, self.seen
        batch = self.batches[m].view(metrics={})
        batch.read.update(read or {})
        # dropout: alike in every call of a step
        torch.manual_seed(fit.roles.clock.derive_seed("noise", m, fit.accelerator.process_index))
        with torch.set_grad_enabled(grad):
            loss = 0.0
            for i, ((weight, objective), n) in enumerate(zip(fit.objective.terms(), self.units, strict=True)):
                share = only(i, objective.name)
                if not share:
                    continue
                values = objective.loss(fit.roles, batch)
                guards.right_count(values, objective, batch)
                guards.finite(values.detach(), objective.name, fit.roles.clock.step, batch)
                term = values.sum() / (n or 1.0)
                loss = loss + float(share) * weight * term
                self.alone[i] += float(term.detach())
                if self.terms > 1:
                    self.each[objective.name] = self.each.get(objective.name, 0.0) + float(term.detach())
            if grad and loss.requires_grad:
                loss.backward()
        self.value += float(loss.detach() if torch.is_tensor(loss) else loss)
        for name, (s, k) in batch.metrics.items():
            seen[name] = (seen.get(name, (0.0, 0))[0] + s, seen.get(name, (0.0, 0))[1] + k)

    def end(self, grad: bool = True, only: Callable[[int, str], float] = every_term) -> float:
        fit, tuner = self.fit, self.fit.roles.tuner
        # the averages are global already: gradients only add up
        if grad and fit.accelerator.num_processes > 1:
            fit.share([p for s in tuner.param_groups() for p in s.params.values() if p.requires_grad])
        if (
            grad
            and only is every_term
            and fit.roles.clock.step == fit.roles.clock.first
            and self.counts["rows"]
        ):
            guards.gradient_arrives(tuner, may_be_zero="samples" in fit.objective.requires)
        self.metrics.update({k: s / max(n, 1) for k, (s, n) in self.seen.items()})
        self.metrics.update({f"loss/{k}": v for k, v in self.each.items()})
        whole, *alone = fit.sum(torch.tensor([self.value, *self.alone], dtype=torch.float64)).tolist()
        self.values = dict(zip(self.names, alone, strict=True))
        return whole
