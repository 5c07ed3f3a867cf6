"""Several LoRA runs on one frozen base, stepped together.

Steps are made in one pass over the base for all runs (train/batched_forward.py) or one after the other,
whichever a short measurement on the first steps finds faster: both do the same work, so nothing is lost by
measuring. Every run has its own seed, rows and optimizer, and ends as it would alone, up to rounding.
run/batched.py makes whole runs of it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from luthier.errors import out_of_memory
from luthier.model.outputs import Outputs
from luthier.train.batched_forward import joint_outputs, why_not_joined
from luthier.train.closure import LossClosure
from luthier.train.trainer import Trainer

MEASURED = 3  # steps each way before one is chosen; the first of each only warms up


@dataclass
class BatchedTrainer:
    """Trainers of runs that share a base."""

    trainers: Sequence[Trainer]
    warn: Callable[[str], None] = print
    why_not_joint: str | None = None  # why their steps are made one after the other
    # joint or not -> seconds a token of each step
    seconds: dict[bool, list[float]] = field(default_factory=lambda: {True: [], False: []})

    def __post_init__(self):
        for trainer in self.trainers:
            if not trainer.estimator.single_backward:
                self.why_not_joint = "the estimator needs more than one backward pass"
            elif trainer.processes.count > 1:
                self.why_not_joint = "more than one process is running"
        if self.why_not_joint is None:
            self.why_not_joint = why_not_joined([t.roles.policy for t in self.trainers])

    def run(self, until: Sequence[int | None] | None = None) -> None:
        """Step every run to its end, or to its `until`. Those that are behind (after a stop) go first."""
        ends = []
        for trainer, last in zip(self.trainers, until or [None] * len(self.trainers), strict=True):
            total = trainer.roles.clock.total
            ends.append(min(total, last or total))
        while True:
            by_step: dict[int, list[Trainer]] = {}
            for trainer, end in zip(self.trainers, ends, strict=True):
                if trainer.roles.clock.step < end:
                    by_step.setdefault(trainer.roles.clock.step, []).append(trainer)
            if not by_step:
                return
            self.step(by_step[min(by_step)])

    def step(self, trainers: Sequence[Trainer]) -> None:
        """One step of each."""
        joint = self.why_not_joint is None and len(trainers) > 1 and self.prefers_joint()
        start = time.perf_counter()
        if joint:
            logs = self._try_joint_step(trainers)
        else:
            logs = [t.step() for t in trainers]
        if self.why_not_joint is None and len(trainers) == len(self.trainers):
            tokens = sum(log["tokens"] for log in logs)
            self.seconds[joint].append((time.perf_counter() - start) / max(1, tokens))
            self._report_choice()
        for trainer, log in zip(trainers, logs, strict=True):
            trainer.roles.clock.step += 1
            for hook in trainer.hooks:
                hook(trainer, log)

    def prefers_joint(self) -> bool:
        """In one pass? By turns until both ways are measured."""
        if min(map(len, self.seconds.values())) < MEASURED:
            return len(self.seconds[True]) <= len(self.seconds[False])
        return self._median(joint=True) < self._median(joint=False)

    def _median(self, joint: bool) -> float:
        """Seconds a token of the measured steps."""
        return statistics.median(self.seconds[joint][1:MEASURED])

    def _report_choice(self) -> None:
        if any(len(seconds) != MEASURED for seconds in self.seconds.values()):
            return
        joint, separate = 1e6 * self._median(joint=True), 1e6 * self._median(joint=False)
        way = "in one joint pass" if joint < separate else "one after the other"
        self.warn(
            f"{len(self.trainers)} runs train {way}: {joint:.0f} µs per token in one joint"
            f" pass, {separate:.0f} one after the other"
        )

    def _try_joint_step(self, trainers: Sequence[Trainer]) -> list[dict]:
        """In one pass, or, where memory runs out, one after the other from here on."""
        try:
            return self.joint_step(trainers)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        self.why_not_joint = "out of memory"
        for trainer in trainers:
            trainer.release_memory()
        self.warn("out of memory: the runs train one after the other from now on; results do not change")
        return [t.step() for t in trainers]

    def joint_step(self, trainers: Sequence[Trainer]) -> list[dict]:
        """The step of all in one pass: each run's loss starts from its own hidden states, and one backward
        takes all of them down.
        """
        start = time.perf_counter()
        closures = []
        for trainer in trainers:
            trainer.prepare_step()
            closures.append(trainer.closure())
            closures[-1].begin(grad=True)
        for index in range(max(len(c.batches) for c in closures)):
            _joint_backward([c for c in closures if index < len(c.batches)], index)
        losses, tokens = [], 0
        for closure in closures:
            losses.append(closure.end())
            tokens += closure.counts["tokens"]
        for trainer, loss in zip(trainers, losses, strict=True):
            trainer.estimator.step(lambda loss=loss, **options: loss, trainer.chain, trainer.roles.clock)
        per_token = (time.perf_counter() - start) / max(1, tokens)
        logs = []
        for trainer, closure, loss in zip(trainers, closures, losses, strict=True):
            logs.append(trainer.finish_step(closure, loss, per_token * closure.counts["tokens"]))
        return logs


def _joint_backward(closures: Sequence[LossClosure], index: int) -> None:
    """Forward and backward of one micro-batch of each."""
    policies = [c.trainer.roles.policy for c in closures]
    with torch.enable_grad():
        outputs = joint_outputs(policies, [c.batches[index] for c in closures])
    reached, grads = [], []
    for closure, policy, own in zip(closures, policies, outputs, strict=True):
        states = own.states.detach().requires_grad_()
        detached = Outputs(states, own.head, own.labels, which=own.which)
        closure.micro_batch(index, outputs={policy.role: detached})
        if states.grad is not None:
            reached.append(own.states)
            grads.append(states.grad)
    if reached:
        torch.autograd.backward(reached, grads)


def share_hidden_cache(trainers: Sequence[Trainer]) -> None:
    """One file of hidden states, where all runs leave the same lower layers alone."""
    caches: list[Any] = [t.roles.policy.attached.hidden_cache for t in trainers]
    first = caches[0]
    for cache in caches:
        if cache is None or (cache.first, cache.table.dtype) != (first.first, first.table.dtype):
            return
    for trainer, cache in zip(trainers[1:], caches[1:], strict=True):
        cache.close()
        trainer.roles.policy.attached.hidden_cache = replace(first, layers=cache.layers)
