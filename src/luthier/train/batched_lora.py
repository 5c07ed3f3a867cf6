"""Several LoRA runs on one frozen base in one process: the base is loaded once, rows are tokens once, a
reference answers once.

Steps are made in one pass over the base for all members (kernels/fleet.py) or one after the other, whichever
a short measurement on the first steps finds faster: both do the same work, so nothing is lost by trying.
Every member keeps its own seed, rows, optimizer, checkpoints and folder, and ends as its own run would, up to
rounding.

python -m luthier.train.batched_lora RUNS.json: a list of [recipe, folder], as `luthier compare` starts it.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from luthier.methods.estimators.first_order.backprop import Backprop
from luthier.model.outputs import Outputs
from luthier.recipe.recipe import Recipe
from luthier.run.folder import on_disk
from luthier.train import batched_forward as fleet
from luthier.train import checks as guards
from luthier.train import memory
from luthier.train.trainer import Trainer

# may differ
OWN = (
    "seed",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "tuner",
    "output_dir",
    "save_steps",
    "logging_steps",
)
TRIED = 3  # steps each way before one is chosen; the first of each only warms up


def alike(recipe: Recipe) -> str | None:
    """What recipes must have in common to run side by side; None where a recipe must run alone."""
    said = recipe.public()
    tuner = said["tuner"] if isinstance(said["tuner"], dict) else {"name": said["tuner"]}
    if (
        tuner.get("name") != "lora"
        or recipe.plan is not None
        or recipe.online_stages
        or recipe.stages
        or recipe.init_from is not None
    ):
        return None
    if recipe.quantization is not None or recipe.objective is None:
        return None
    return json.dumps({k: v for k, v in said.items() if k not in OWN}, sort_keys=True, default=str)


@dataclass
class Fleet:
    """Fits side by side."""

    fits: Sequence[Trainer]
    warn: Callable[[str], None] = print
    why: str | None = None  # why their steps are made one after the other
    # a token, in one pass or not
    seconds: dict[bool, list[float]] = field(default_factory=lambda: {True: [], False: []})

    def __post_init__(self):
        if any(type(f.estimator) is not Backprop for f in self.fits):
            self.why = "the estimator is not backprop"
        elif any(f.accelerator.num_processes > 1 for f in self.fits):
            self.why = "there are several processes"
        self.why = self.why or fleet.apart([f.roles.policy for f in self.fits])

    def run(self, until: Sequence[int | None] | None = None) -> None:
        """Step every member to its end, or to its `until`. Those that are behind (after a stop) go first."""
        ends = [
            min(f.roles.clock.total, u or f.roles.clock.total)
            for f, u in zip(self.fits, until or [None] * len(self.fits), strict=True)
        ]
        while live := [f for f, end in zip(self.fits, ends, strict=True) if f.roles.clock.step < end]:
            now = min(f.roles.clock.step for f in live)
            self.step([f for f in live if f.roles.clock.step == now])

    def step(self, fits: Sequence[Trainer]) -> None:
        """One step of each."""
        whole = self.why is None and len(fits) > 1
        if whole and (tried := self.tried()) is not None:
            whole = tried
        began = time.perf_counter()
        try:
            logs = self.together(fits) if whole else [f.step() for f in fits]
        except (RuntimeError, MemoryError) as error:
            if not whole or not guards.out_of_memory(error):
                raise
            self.why = "memory ran out"
            for f in fits:
                f.forget()
            self.warn("out of memory: steps are made one after the other from here on; results do not change")
            logs = [f.step() for f in fits]
        if self.why is None and len(fits) == len(self.fits):
            self.seconds[whole].append(
                (time.perf_counter() - began) / max(1, sum(log["tokens"] for log in logs))
            )
            self.told()
        for f, log in zip(fits, logs, strict=True):
            f.roles.clock.step += 1
            for hook in f.hooks:
                hook(f, log)

    def tried(self) -> bool | None:
        """In one pass? By turns until enough is known."""
        if min(map(len, self.seconds.values())) < TRIED:
            return len(self.seconds[True]) <= len(self.seconds[False])
        one, each = (statistics.median(self.seconds[way][1:TRIED]) for way in (True, False))
        return one < each

    def told(self) -> None:
        done = [len(s) for s in self.seconds.values()]
        if sorted(done) == [TRIED, TRIED]:
            one, each = (1e6 * statistics.median(self.seconds[way][1:]) for way in (True, False))
            way = "in one pass" if one < each else "one after the other"
            self.warn(
                f"{len(self.fits)} runs step {way}: {one:.0f} µs a token in one pass, {each:.0f} one after"
                " the other"
            )

    def together(self, fits: Sequence[Trainer]) -> list[dict]:
        """The step of all in one pass: each member's loss starts from its own states, and one backward takes
        all of them down.
        """
        began = time.perf_counter()
        for f in fits:
            f.prepare()
        asked = [f.ask() for f in fits]
        for a in asked:
            a.begin(True)
        for m in range(max(len(a.batches) for a in asked)):
            some = [(f, a) for f, a in zip(fits, asked, strict=True) if m < len(a.batches)]
            with torch.enable_grad():
                said = fleet.read([f.roles.policy for f, _ in some], [a.batches[m] for _, a in some])
            states = [o.hidden.detach().requires_grad_() for o in said]
            for (f, a), o, hidden in zip(some, said, states, strict=True):
                a.part(m, read={f.roles.policy.role: Outputs(hidden, o.head, o.labels)})
            reached = [(o.hidden, h.grad) for o, h in zip(said, states, strict=True) if h.grad is not None]
            if reached:
                torch.autograd.backward([h for h, _ in reached], [g for _, g in reached])
        losses = [a.end() for a in asked]
        for f, loss in zip(fits, losses, strict=True):
            f.estimator.step(lambda loss=loss, **how: loss, f.chain, f.roles.clock)
        seconds, tokens = time.perf_counter() - began, sum(a.counts["tokens"] for a in asked)
        shares = [seconds * a.counts["tokens"] / max(1, tokens) for a in asked]
        return [f.done(a, loss, s) for f, a, loss, s in zip(fits, asked, losses, shares, strict=True)]


def perform(runs: Sequence[tuple[Recipe, Path]], watch: Any = None, until: float | None = None) -> list[Any]:
    """Runs that are `alike`, to their ends or paused at `until`: their reports, in order."""
    from luthier.model.load import load_model
    from luthier.report.console import Callback
    from luthier.run.run import Report, Shared, opened

    watch = watch or Callback()
    with ExitStack() as stack:
        every = [
            stack.enter_context(opened(on_disk(r, folder), folder, Callback(), until=until))
            for r, folder in runs
        ]
        live = [r for r in every if not isinstance(r, Report)]
        if live:
            first = live[0]
            shared = Shared(
                *load_model(
                    first.recipe, first.parts, first.parts.architecture.fit_to(first.data.rows), first.folder
                )
            )
            for r in live:
                r.shared = shared
                r.ready()
            _share_frozen([r.fit for r in live])

            def tell(sentence: str) -> None:
                for listener in (watch, *(r.watch for r in live)):
                    listener.warn(sentence)

            crew = Fleet([r.fit for r in live], tell)
            needs, have = [r.need.total if r.need else 0 for r in live], memory.free(first.roles.device)
            if have and sum(needs) > memory.SURE * have:
                crew.why = (
                    crew.why or f"one pass would take {memory.gb(sum(needs))} and {memory.gb(have)} are free"
                )
            if crew.why:
                crew.warn(f"{len(live)} runs share one base and step one after the other: {crew.why}")
            crew.run([r.every(until) or None for r in live])
            ended = {id(r): r.ended() for r in live}
            if all(r.fit.roles.clock.step == r.fit.roles.clock.total for r in live):
                for said in shared.said.values():
                    said.close()
            every = [ended.get(id(r), r) for r in every]
    return every


def _share_frozen(fits: Sequence[Trainer]) -> None:
    """One file for what the lower layers say, where all members leave the same ones alone."""
    kept = [f.roles.policy.attached.frozen for f in fits]
    if kept[0] is None or any(
        k is None or (k.first, k.table.dtype) != (kept[0].first, kept[0].table.dtype) for k in kept
    ):
        return
    for f, own in zip(fits[1:], kept[1:], strict=True):
        own.close()
        f.roles.policy.attached.frozen = replace(kept[0], layers=own.layers)


if __name__ == "__main__":
    from luthier.errors import RecipeError

    given = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    try:
        perform([(Recipe.load(keys), Path(folder)) for keys, folder in given["runs"]], until=given["until"])
    except RecipeError as error:
        sys.exit(f"luthier: {error}")
