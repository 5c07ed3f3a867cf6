"""fit(): the one training loop. A step is a function of (tensors, optimizer state, step number) and of nothing else.

The loss of a step is, for each term of the objective, the average over all its units in the global batch, however
the batch is split into micro-batches and over processes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

from luthier import guards
from luthier.clock import Clock
from luthier.objectives._objective import Objective
from luthier.transforms._chain import Chain


@dataclass
class Totals:
    """What a run has done so far; kept in checkpoints."""

    tokens: int = 0  # read in training, prompts included
    supervised: int = 0  # asked about
    seconds: float = 0.0  # in steps, without evaluation and saving
    rows_seen: int = 0


@dataclass
class Batches:
    """How rows become steps."""

    per_step: int  # rows of the global batch
    micro: int  # rows of a micro-batch, per process
    stop_at: int | None = None  # rows of the whole run: the last draw takes what is left; None = as many as steps need
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


def draw(rows: Sequence[dict], clock: Clock, per_step: int, stop_at: int | None = None, num_iterations: int = 1) -> list[dict]:
    """The rows of this step. Epoch e is one permutation made of (seed, e): there is no sampler state to restore."""
    first = clock.step // num_iterations * per_step
    last = first + per_step if stop_at is None else min(first + per_step, stop_at)
    places = (divmod(i, len(rows)) for i in range(first, last))
    return [rows[_order(clock.fold("order", at=epoch), len(rows))[k]] for epoch, k in places]


@dataclass
class Fit:
    """One training run in progress."""

    roles: Any
    rows: Sequence[dict]
    objective: Objective | None  # None: nothing is trained, and no step made
    chain: Chain
    estimator: Any
    batches: Batches
    accelerator: Any
    hooks: Sequence[Callable[[Fit, dict], None]] = ()  # called after every step with its numbers
    tell: Callable[[str], None] = print
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
        roles, clock, began = self.roles, self.roles.clock, time.perf_counter()
        roles.tuner.before_step(clock)
        if self.held is None or clock.step % self.batches.num_iterations == 0:
            self.held = self._draw()
        while True:
            try:
                metrics: dict[str, float] = {}
                closure, counts = self._closure(self.held, metrics)
                roles.policy.train()
                loss = self.estimator.step(closure, self.chain, clock)
                break
            except TooLarge:  # nothing has been stepped: the estimator was still asking for losses
                if self.batches.micro == 1 or self.accelerator.num_processes > 1:  # the others wait for this process's part
                    raise
                self.batches.micro = (self.batches.micro + 1) // 2
            self._forget()
            bound = [o.contract["accumulation"] for _, o in self.objective.terms() if "accumulation" in o.contract]
            self.tell(
                f"out of memory: micro-batches of {self.batches.micro} rows from here on; "
                + (f"this changes results: {bound[0]}" if bound else "results do not change")
            )
        roles.tuner.after_step(clock)
        seconds = time.perf_counter() - began
        self.totals.tokens += counts["tokens"]
        self.totals.supervised += counts["supervised"]
        self.totals.rows_seen += counts["rows"]
        self.totals.seconds += seconds
        rate = self.chain.rate
        return {"step": clock.step + 1, "loss": loss, "learning_rate": rate, **metrics, "tokens": counts["tokens"], "seconds": seconds}

    def _draw(self) -> list[dict]:
        acc, b = self.accelerator, self.batches
        mine = draw(self.rows, self.roles.clock, b.per_step, b.stop_at, b.num_iterations)[acc.process_index :: acc.num_processes]
        for stage in b.live:
            mine = list(stage(mine, self.roles))
        return mine

    def _forget(self) -> None:
        for p in self.roles.tuner.parameters().values():
            p.grad = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _closure(self, rows: list[dict], metrics: dict) -> tuple[Callable[..., float], dict[str, int]]:
        roles, clock, acc, tuner = self.roles, self.roles.clock, self.accelerator, self.roles.tuner
        micro = self.batches.micro
        batches = [roles.batch(rows[i : i + micro], training=True) for i in range(0, len(rows), micro)]
        terms = self.objective.terms()
        counts = [[float(o.divisor(b)) for _, o in terms] + [float(len(b.ids)), float(len(b.owner)), float(len(b.rows))] for b in batches]
        total = torch.tensor(counts, dtype=torch.float64).sum(0) if counts else torch.zeros(len(terms) + 3, dtype=torch.float64)
        *units, tokens, supervised, n_rows = self._sum(total).tolist()
        samples = "samples" in self.objective.wants

        def closure(grad: bool = True, only: Callable[[int, str], float] = every_term) -> float:
            """The loss of the global batch; with grad, its gradient into p.grad of what moves.

            only: of these terms (place, name), or how much each counts. `values` then holds each term's own average, by name.
            """
            try:
                return measure(grad, only)
            except (RuntimeError, MemoryError) as error:
                if guards.out_of_memory(error):
                    raise TooLarge(str(error)) from None
                raise

        def measure(grad: bool, only: Callable[[int, str], float]) -> float:
            value, seen, each, alone = 0.0, {}, {}, [0.0] * len(terms)
            if grad:
                for p in tuner.parameters().values():
                    p.grad = None
            for m, fixed in enumerate(batches):
                batch = fixed.view(metrics={})
                torch.manual_seed(clock.fold("noise", m, acc.process_index))  # dropout: alike in every call of a step
                with torch.set_grad_enabled(grad):
                    loss = 0.0
                    for i, ((weight, objective), n) in enumerate(zip(terms, units, strict=True)):
                        share = only(i, objective.name)
                        if not share:
                            continue
                        values = objective.loss(roles, batch)
                        guards.right_count(values, objective, batch)
                        guards.finite(values.detach(), objective.name, clock.step, batch)
                        term = values.sum() / (n or 1.0)
                        loss = loss + float(share) * weight * term
                        alone[i] += float(term.detach())
                        if len(terms) > 1:
                            each[objective.name] = each.get(objective.name, 0.0) + float(term.detach())
                    if grad and loss.requires_grad:
                        loss.backward()
                value += float(loss.detach() if torch.is_tensor(loss) else loss)
                for name, (s, k) in batch.metrics.items():
                    seen[name] = (seen.get(name, (0.0, 0))[0] + s, seen.get(name, (0.0, 0))[1] + k)
            if grad and acc.num_processes > 1:  # the averages are global already: gradients only add up
                self._share([p for s in tuner.sites() for p in s.slots.values() if p.requires_grad])
            if grad and only is every_term and clock.step == clock.first and n_rows:
                guards.gradient_arrives(tuner, may_be_zero=samples)
            metrics.update({k: s / max(n, 1) for k, (s, n) in seen.items()})
            metrics.update({f"loss/{k}": v for k, v in each.items()})
            whole, *alone = self._sum(torch.tensor([value, *alone], dtype=torch.float64)).tolist()
            closure.values = {o.name: v for (_, o), v in zip(terms, alone, strict=True)}
            return whole

        closure.terms, closure.names, closure.note = len(terms), [o.name for _, o in terms], metrics.update
        return closure, {"tokens": int(tokens), "supervised": int(supervised), "rows": int(n_rows)}

    def _share(self, params: Sequence[torch.nn.Parameter]) -> None:
        """Sum gradients over processes. A tensor that no process reached keeps none, as in one process."""
        reached = self._sum(torch.tensor([float(p.grad is not None) for p in params]))
        for p, somewhere in zip(params, reached.tolist(), strict=True):
            if somewhere:
                p.grad = self._sum(torch.zeros_like(p) if p.grad is None else p.grad)

    def _sum(self, x: torch.Tensor) -> torch.Tensor:
        """Over processes."""
        acc = self.accelerator
        return acc.reduce(x.to(acc.device), "sum").to(x.device) if acc.num_processes > 1 else x
