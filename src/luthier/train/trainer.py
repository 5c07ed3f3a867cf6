"""The one training loop. A step is a function of (tensors, optimizer state, step number) and of nothing
else; where samples are drawn ahead of their step, also of those that wait.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch

from luthier.clock import Clock
from luthier.methods.objectives._base import Objective
from luthier.methods.stages._base import OCCURRENCE
from luthier.model.batch import Batch
from luthier.processes.group import ALONE, Processes
from luthier.train.arrange import adjacent, grouped
from luthier.train.closure import LossClosure, MicroBatchTooLarge
from luthier.train.optimizer import Chain
from luthier.train.samples import averages, sample_sums


@dataclass
class Totals:
    """What a run has done so far; saved in checkpoints."""

    tokens: int = 0  # read in training, prompts included
    supervised: int = 0  # of these, tokens that count in the loss
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
    num_iterations: int = 1  # steps for each draw of rows
    clusters: tuple[int, ...] | None = None  # which rows begin alike (train/arrange.py)
    group_by_prefix: bool = False  # are the rows of a step to be of one cluster?
    # (count, per_step, clock) -> which rows a step reads, where an estimator draws them itself
    sampler: Callable[[int, int, Clock], list[int] | None] | None = None
    ahead: int = 0  # draws whose live stages run before the current one is trained on

    def draw(self, rows: Sequence[dict], clock: Clock) -> list[dict]:
        """The rows of a step's global batch, those that begin alike behind each other."""
        numbers = self.clusters if self.group_by_prefix else None
        indices = None
        if self.sampler is not None:
            indices = self.sampler(len(rows), self.per_step, clock)
        if indices is None:
            indices = draw(len(rows), clock, self.per_step, self.stop_at, self.num_iterations, numbers)
        if self.clusters is not None:
            indices = adjacent(indices, self.clusters)
        drawn = [rows[i] for i in indices]
        if not self.live:
            return drawn
        counts: Counter = Counter()
        for place, i in enumerate(indices):
            if counts[i]:
                drawn[place] = {**drawn[place], OCCURRENCE: counts[i]}
            counts[i] += 1
        return drawn


@lru_cache(maxsize=4)
def _order(
    seed: int, n: int, per_step: int, begun: int, clusters: tuple[int, ...] | None = None
) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    order = tuple(torch.randperm(n, generator=generator).tolist())
    if clusters is not None:
        order = grouped(order, clusters, per_step, begun, seed)
    return order


def draw(
    count: int,
    clock: Clock,
    per_step: int,
    stop_at: int | None = None,
    num_iterations: int = 1,
    clusters: tuple[int, ...] | None = None,
) -> list[int]:
    """Which of `count` rows this step's global batch has. Epoch e is one permutation made of (seed, e): there
    is no sampler state to restore. clusters: of each row, where the rows of a step are to be of one.
    """
    first = clock.step // num_iterations * per_step
    last = first + per_step
    if stop_at is not None:
        last = min(last, stop_at)
    drawn = []
    for i in range(first, last):
        epoch, index = divmod(i, count)
        begun = -epoch * count % per_step
        order = _order(clock.derive_seed("order", at=epoch), count, per_step, begun, clusters)
        drawn.append(order[index])
    return drawn


def share(rows: Sequence[dict], micro: int, index: int, count: int) -> list[dict]:
    """The rows of process `index` of `count`. Micro-batches of `micro` rows are dealt out in turn, so that a
    run has the same ones on any number of processes.
    """
    own: list[dict] = []
    for first in range(index * micro, len(rows), count * micro):
        own += rows[first : first + micro]
    return own


def joined_shares(shares: Sequence[Sequence[dict]], micro: int) -> list[dict]:
    """What `share` has dealt out, in order again."""
    rows: list[dict] = []
    longest = max(map(len, shares))
    for first in range(0, longest, micro):
        for own in shares:
            rows += own[first : first + micro]
    return rows


@dataclass(frozen=True)
class Prefetched:
    """Micro-batches made ahead of their step."""

    rows: list[dict]
    step: int
    micro: int
    batches: list[Batch]

    def fits(self, rows: Sequence[dict], step: int, micro: int) -> bool:
        """Are these rows the same ones?"""
        if (step, micro, len(rows)) != (self.step, self.micro, len(self.rows)):
            return False
        return all(a is b for a, b in zip(rows, self.rows, strict=True))


@dataclass
class Trainer:
    """One training run in progress."""

    roles: Any
    rows: Sequence[dict]
    objective: Objective | None  # None: nothing is trained, and no step made
    chain: Chain
    estimator: Any
    batches: BatchSchedule
    processes: Processes = ALONE
    hooks: Sequence[Callable[[Trainer, dict], None]] = ()  # called after every step with its log
    warn: Callable[[str], None] = print
    drawn_rows: list[dict] | None = None  # this process's rows of the current draw
    # this process's rows of the draws behind it, which earlier weights have sampled
    waiting: list[list[dict]] = field(default_factory=list)
    totals: Totals = field(default_factory=Totals)
    gradient_checked: bool = False  # has a gradient reached what is trained?
    # of sums and metrics that all processes know, in one order
    names: list[str] = field(default_factory=list)
    sample_names: list[str] = field(default_factory=list)
    _prefetched: Prefetched | None = None

    def run(self, until: int | None = None) -> None:
        """Step until the clock's total, or stop before at `until`."""
        clock = self.roles.clock
        last = clock.total if until is None else min(clock.total, until)
        while clock.step < min(last, clock.total):  # a hook may end the run sooner
            log = self.step()
            clock.step += 1
            for hook in self.hooks:
                hook(self, log)

    def no_reuse(self) -> str | None:
        """Why caching what is computed of a row would be of no use; None where rows are read more than
        once.
        """
        if self.batches.live:
            return "rows are generated anew at every step"
        draws = -(-self.roles.clock.total // self.batches.num_iterations)
        if draws * self.batches.per_step <= len(self.rows):
            return "each row is read only once"
        return None

    def step(self) -> dict:
        """One optimizer step; its log."""
        start = time.perf_counter()
        self.prepare_step()
        while True:
            try:
                closure = self.closure()
                loss = self.estimator.step(closure, self.chain, self.roles.clock)
                break
            except MicroBatchTooLarge:  # no weight has moved: the estimator was still computing losses
                # other processes wait for this one's part
                if self.batches.micro == 1 or self.processes.count > 1:
                    raise
                self.batches.micro = (self.batches.micro + 1) // 2
            self.release_memory()
            self._warn_smaller_batches()
        return self.finish_step(closure, loss, time.perf_counter() - start)

    def _warn_smaller_batches(self) -> None:
        effect = "results do not change"
        for _, objective in self.objective.terms():
            if "accumulation" in objective.contract:
                effect = f"this changes results: {objective.contract['accumulation']}"
                break
        self.warn(f"out of memory: using micro-batches of {self.batches.micro} rows from now on; {effect}")

    def prepare_step(self) -> None:
        """Before a step: what moves in it, and its rows."""
        clock, batches = self.roles.clock, self.batches
        self.roles.tuner.begin_step(clock)
        if self.drawn_rows is None or clock.step % batches.num_iterations == 0:
            now = clock.step // batches.num_iterations
            last = min(now + batches.ahead, (max(clock.total, clock.step + 1) - 1) // batches.num_iterations)
            for number in range(now + len(self.waiting), last + 1):
                self.waiting.append(self._sampled_rows(number))
            self.drawn_rows = self.waiting.pop(0)

    def _sampled_rows(self, number: int) -> list[dict]:
        """This process's rows of a draw, behind the live stages: with the chance of the draw's own step, and
        the policy as it is now.
        """
        clock = self.roles.clock
        now, clock.step = clock.step, number * self.batches.num_iterations
        try:
            rows = self._own_rows(clock)
            for stage in self.batches.live:
                rows = list(stage(rows, self.roles))
        finally:
            clock.step = now
        return rows

    def closure(self) -> LossClosure:
        """The loss of this step, for the estimator."""
        self.roles.policy.train()
        rows, clock = self.drawn_rows or [], self.roles.clock
        prefetched, self._prefetched = self._prefetched, None
        if prefetched is not None and prefetched.fits(rows, clock.step, self.batches.micro):
            return LossClosure(self, prefetched.batches)
        return LossClosure(self, self._micro_batches(rows, clock))

    def rows_closure(self, rows: Sequence[dict]) -> LossClosure:
        """The loss of training rows as they are in evaluation (no dropout, nothing drawn), each in a
        micro-batch of its own; for an estimator that reads their single gradients. Of several processes each
        has its share.
        """
        self.roles.policy.eval()
        own = share(rows, 1, self.processes.index, self.processes.count)
        batches = [self.roles.batch([row], training=False, clock=self.roles.clock) for row in own]
        return LossClosure(self, batches)

    def _own_rows(self, clock: Clock) -> list[dict]:
        """This process's rows of the draw at a step."""
        batches, processes = self.batches, self.processes
        return share(batches.draw(self.rows, clock), batches.micro, processes.index, processes.count)

    def _micro_batches(self, rows: Sequence[dict], clock: Clock) -> list[Batch]:
        batches = []
        for i in range(0, len(rows), self.batches.micro):
            batches.append(self.roles.batch(rows[i : i + self.batches.micro], training=True, clock=clock))
        return batches

    def prefetch(self) -> None:
        """Make and send the next step's batches while a GPU works on this one. Where rows turn out to be
        others, they are made anew.
        """
        clock = replace(self.roles.clock, step=self.roles.clock.step + 1)
        if self.batches.live or self.batches.num_iterations > 1 or clock.step >= clock.total:
            return
        rows = self._own_rows(clock)
        self._prefetched = Prefetched(rows, clock.step, self.batches.micro, self._micro_batches(rows, clock))

    def finish_step(self, closure: LossClosure, loss: float, seconds: float) -> dict:
        """After a step that took so many seconds: its log."""
        clock, counts = self.roles.clock, closure.counts
        self.roles.tuner.end_step(clock)
        self.totals.tokens += counts["tokens"]
        self.totals.supervised += counts["supervised"]
        self.totals.rows_seen += counts["rows"]
        self.totals.seconds += seconds
        metrics = dict(closure.metrics)
        if self.chain.gradient_norm is not None:
            metrics = {"gradient_norm": self.chain.gradient_norm, **metrics}
        if self.batches.live:
            sums = sample_sums(self.drawn_rows or [])
            metrics |= averages(self.processes.sum_named(sums, self.sample_names))
            if self.batches.ahead:
                draws = clock.step // self.batches.num_iterations
                sampled_at = max(draws - self.batches.ahead, 0) * self.batches.num_iterations
                metrics["staleness"] = float(clock.step - sampled_at)
        return {
            "step": clock.step + 1,
            "loss": loss,
            "learning_rate": self.chain.rate,
            **metrics,
            "tokens": counts["tokens"],
            "seconds": seconds,
        }

    def release_memory(self) -> None:
        """Drop gradients, and memory that the allocator holds for nobody."""
        for p in self.roles.tuner.parameters().values():
            p.grad = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
