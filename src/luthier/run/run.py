"""From a recipe to a run folder: rows, roles, fit, evaluation, and what a user takes away. And plans: several
of them.

A run that was stopped, however roughly, goes on when the same recipe is run again; a finished one answers at
once.
"""

from __future__ import annotations

import atexit
import json
import math
import resource
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from luthier import __version__, compat
from luthier import report as page
from luthier.data import rows as reading
from luthier.data.load import Data, beside, load_data, sample_rows, touching
from luthier.errors import OutOfMemory, RecipeError, Refused
from luthier.methods.evaluators._base import run_all
from luthier.methods.quantizers._base import told
from luthier.methods.roles.frozen.initial import Start
from luthier.model.load import assemble, take_parts, tensors_of
from luthier.model.policy import Policy, Roles
from luthier.recipe.recipe import Recipe
from luthier.recipe.schedule import schedule
from luthier.recipe.validate import Methods, dry_run, validate
from luthier.registry import build, spec
from luthier.report import rendered
from luthier.report.console import Callback
from luthier.run.folder import FAILED, clear, default_folder, note_down, note_failure, on_disk, open_run, trim
from luthier.storage import checkpoints, files
from luthier.train import checks as guards
from luthier.train import hidden_cache, logprob_cache, memory
from luthier.train.batched_forward import share_weights
from luthier.train.optimizer import Chain
from luthier.train.trainer import BatchSchedule, Totals, Trainer


@dataclass
class Report:
    """What a run found. Also lies in its folder as report.json."""

    folder: str
    before: dict[str, float] = field(default_factory=dict)  # metrics of the untuned start
    after: dict[str, float] = field(default_factory=dict)  # metrics at the end
    losses: list[float] = field(default_factory=list)  # of each logged step
    stats: dict[str, Any] = field(default_factory=dict)  # rows, tokens, seconds, memory, parameters
    notes: list[str] = field(default_factory=list)  # what was told on the way
    acts: list[str] = field(default_factory=list)  # of a plan: the folders of its runs

    @staticmethod
    def read(folder: str | Path) -> Report:
        return Report(**json.loads((Path(folder) / "report.json").read_text(encoding="utf-8")))


# ---------------------------------------------------------------------------------------------- one run


def run(
    recipe: Recipe, folder: Path, watch: Any = None, anew: bool = False, until: float | None = None
) -> Report:
    """One recipe without a plan, to its end. anew: even where it is finished. until: pause at this step
    (below 1: share of the run).
    """
    with opened(recipe, folder, watch, anew, until) as it:
        return it if isinstance(it, Report) else it.go()


@contextmanager
def opened(
    recipe: Recipe, folder: Path, watch: Any, anew: bool = False, until: float | None = None
) -> Iterator[_Run | Report]:
    """A run in its folder, for as long as it lasts; of a finished one its report."""
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    watch = watch or Callback()
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), log_with=[*recipe.report_to] or None, project_dir=str(folder)
    )
    atexit.unregister(_part)
    atexit.register(_part)
    main = accelerator.is_main_process
    watch = watch if main else Callback()
    for sentence in recipe.warnings:
        watch.warn(sentence)
    quarantine = folder / "quarantine.jsonl"
    with files.disk_errors(folder):
        # what lies there is of an earlier attempt, which was refused
        if new := main and not (folder / "run.json").exists():
            quarantine.unlink(missing_ok=True)
        data = load_data(recipe, quarantine if new else None)
    if sentence := beside(data):
        watch.warn(sentence)
    parts = dry_run(recipe, data.rows[:100])
    with open_run(folder, recipe, data.mark, main, anew) as (finished, begun_by):
        if _alike(finished, accelerator):
            watch.warn(f"{folder} holds this run, finished: nothing to do (overwrite=true starts anew)")
            yield Report.read(folder)
            return
        if begun_by != __version__:
            watch.warn(
                f"this run was begun by luthier {begun_by} and goes on under {__version__}: its end may be"
                " neither's"
            )
        if main:
            with files.disk_errors(folder):
                quarantine.unlink(missing_ok=True)
                reading.write_quarantine(data.bad, quarantine)
        if data.bad:
            seen = len(data.bad) + len(data.rows) + len(data.held_out)
            watch.warn(f"{len(data.bad):,} unusable rows of {seen:,} set aside, with reasons: {quarantine}")
        set_seed(recipe.seed)
        if recipe.report_to:
            accelerator.init_trackers(
                "luthier",
                {k: v if isinstance(v, (int, float, str)) else json.dumps(v) for k, v in _told(recipe)},
            )
        try:
            yield _Run(recipe, parts, data, folder, watch, accelerator, until)
        except Exception as error:
            outcome = OutOfMemory(guards.TOO_BIG) if guards.out_of_memory(error) else error
            if main:
                note_failure(folder, outcome)
            if outcome is error:
                raise
            raise outcome from None
        finally:
            for tracker in accelerator.trackers:
                tracker.finish()


def _part() -> None:
    """At the end of this process, not of a run: a plan's next act needs the others again. Who leaves first,
    or leaves threads waiting, makes the others abort; after an error there is nobody to wait for."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if not hasattr(sys, "last_value"):
            torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _told(recipe: Recipe) -> list[tuple[str, Any]]:
    """What a tracker is told about a run: the whole recipe but for rows given from Python."""
    return [
        (k, v)
        for k, v in yaml.safe_load(recipe.yaml()).items()
        if not isinstance(v, list) or k not in ("data", "eval_data")
    ]


def _alike(value: Any, accelerator: Any) -> Any:
    """The main process's value, in every process: they must not part ways over it."""
    if accelerator.num_processes == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


@dataclass
class Shared:
    """What runs in one process have in common."""

    model: Any  # the base, with nothing on it
    tokenizer: Any
    renderer: Any = None  # and with it rows as tokens
    logprob_caches: dict[str, logprob_cache.LogprobCache] = field(default_factory=dict)  # by role

    def network(self) -> tuple[Any, Any]:
        return share_weights(self.model), self.tokenizer


@dataclass
class _Run:
    """One run in progress, part by part in the order of `go`."""

    recipe: Recipe
    parts: Methods
    data: Data
    folder: Path
    watch: Any
    accelerator: Any
    until: float | None = None
    shared: Shared | None = None  # with runs beside it in one process
    need: memory.Need | None = None  # what a step is predicted to take

    def go(self) -> Report:
        self.ready()
        if self.fit.roles.clock.total:
            with self.watch.training(self.fit.roles.clock.total, self.fit.roles.clock.step):
                self.fit.run(self.every(self.until) or None)
        return self.ended()

    def ready(self) -> None:
        """All that comes before the first step."""
        self.main = self.accelerator.is_main_process
        self.latest = (checkpoints.paths(self.folder) or [None])[-1]
        self.watch.stage("loading the model")
        self.take_roles()
        rows, stats = self.take_rows()
        self.tell_rows(rows, stats)
        stats |= self.check(rows)
        if self.recipe.init_from is None:
            self.roles.tuner.initialize(rows, self.roles)
        self.roles.tuner.ready(rows, self.roles)
        self.fit, self.stats = self.training(rows), stats
        self.check_memory(self.fit, stats)
        self.keep_frozen(self.fit, stats.get("row_tokens", 0))
        self.keep_reference(self.fit, stats)
        self.before = self.begin(self.fit)
        self.fit.hooks = [self.after_step]

    def ended(self) -> Report:
        """All that comes after the last step."""
        # they hold this run, which holds the fit: a circle would keep the model until somebody collects it
        self.fit.hooks.clear()
        if self.fit.roles.clock.step < self.fit.roles.clock.total:
            return self.pause(self.fit, self.before, self.stats)
        self.watch.stage("measuring the end")
        report = Report(str(self.folder), self.before, self.measure("after"))
        self.finish(report, self.fit, self.stats)
        return report

    # --- before training

    def take_roles(self) -> None:
        """Model, tuner, tokenizer; an earlier run's tensors; whoever else plays."""
        network = self.parts.architecture.fit_to(self.data.rows)
        if self.main:
            note_down(self.folder, network=network)
        loaded = self.shared.network() if self.shared else None
        self.roles = assemble(self.recipe, self.parts, network, self.folder, self.data.rows, loaded)
        if self.shared:
            self.roles.renderer = self.shared.renderer = self.shared.renderer or self.roles.renderer
        self.roles.warn = self.watch.warn
        for sentence in told(self.roles.policy.model):
            self.watch.warn(sentence)
        if self.recipe.init_from is not None:
            self.roles.tuner.load(tensors_of(self.recipe.init_from, self.roles.tuner))
        take_parts(self.roles, self.parts)
        for name, role in self.parts.roles.items():
            role.reads(name, self.roles.renderer.tokenizer)
        for name, role in self.parts.roles.items():
            setattr(self.roles, name, role.play(name, self.roles.policy))

    def take_rows(self) -> tuple[list[dict], dict]:
        """Rows through the stages, which see the starting policy (on resume their result is read back), and
        as tokens.
        """
        rows, kept = self.data.rows, self.folder / "rows.jsonl"
        if self.parts.stages:
            if self.latest is None or not kept.is_file():
                for stage in self.parts.stages:
                    self.watch.stage(f"stage {stage.name}")
                    rows = list(stage(rows, self.roles))
                if not rows:
                    raise RecipeError(f"the stages {[s.name for s in self.parts.stages]} left no row")
                if self.main:
                    files.write_rows(kept, rows)
                self.accelerator.wait_for_everyone()
            rows = files.read_rows(kept)
        rows, stats = _encode(self.roles, rows, self.folder, self.watch, self.main, self.recipe.max_bad_rows)
        self.held_out, self.held_out_stats = _encode(
            self.roles, self.data.held_out, self.folder, Callback(), self.main, 1.0
        )
        self.measured = self.held_out or rows[:256]
        return rows, stats

    def tell_rows(self, rows: list[dict], stats: dict) -> None:
        """What a person should see of the rows before they are learned."""
        roles, renderer, tell = self.roles, self.roles.renderer, self.watch.warn
        if "generate" in self.parts.architecture.provides:
            some = [self.parts.architecture.encode(r, renderer) for r in rows[:64] if r.get("completions")]
            guards.check_stop_token(some, set(renderer.stop_ids), tell)
        turns = any(not isinstance(r["prompt"], str) for r in rows)
        for sentence in (renderer.note if turns or self.recipe.chat_template else None, *renderer.warnings):
            if sentence:
                tell(sentence)
        if fresh := roles.policy.model.fresh:
            starts = "these start random and are" if len(fresh) > 1 else "it starts random and is"
            tell(f"the checkpoint has no weights for {', '.join(fresh)}: {starts} trained along")
        shown = rows
        if any(
            "samples" in s.provides for s in self.parts.online_stages
        ):  # what is learned is yet to be written
            shown = [{k: v for k, v in r.items() if k not in ("completions", "scores")} for r in rows]
            asked = self.parts.architecture.encode_all(shown, renderer).stats
            stats |= {
                "row_tokens": asked["tokens"],
                "longest": asked["longest"],
                "supervised_share": 0.0,
                "cut": 0,
            }
        if stats["cut"]:
            whose = "texts" if renderer.encoder else "completions"
            tell(
                f"the {whose} of {stats['cut']:,} of {len(rows):,} rows are cut at {renderer.max_length:,}"
                " tokens (max_length)"
            )
        if not renderer.encoder and 2 * len(touching(shown)) > len(shown):
            tell(
                "the completion follows the prompt's last word without a space or a line break:"
                f" '{touching(shown)[0]}'"
            )
        self.watch.rows(roles, shown, stats)
        if self.main:
            files.write_json(self.folder / "shown.json", rendered(roles, shown))
        for sentence in roles.tuner.told:
            tell(sentence)

    def check(self, rows: list[dict]) -> dict[str, int]:
        """The guards of a start; counts of what moves and of all."""
        roles, tell = self.roles, self.watch.warn
        moving = guards.check_trainable(roles.tuner)
        for player in roles.policies():  # each by itself: a teacher may be another kind of network
            guards.check_forward(player, roles.batch([_answered(r, roles) for r in rows[:2]]), tell)
        return moving

    def training(self, rows: list[dict]) -> Trainer:
        """The training to be, and how long it is."""
        recipe, parts, clock = self.recipe, self.parts, self.roles.clock
        per_step = (
            recipe.per_device_train_batch_size
            * recipe.gradient_accumulation_steps
            * self.accelerator.num_processes
        )
        stop_at = None if recipe.max_steps is not None else max(1, round(len(rows) * recipe.num_train_epochs))
        clock.total = (
            0 if parts.objective is None else recipe.max_steps if stop_at is None else -(-stop_at // per_step)
        )
        if stop_at is not None:
            clock.total *= recipe.num_iterations
        if self.main:
            note_down(self.folder, steps=clock.total)
        factor = schedule(recipe.lr_scheduler_type, recipe.warmup_steps, clock.total)
        chain = Chain(parts.chain, self.roles.tuner, clock, recipe.learning_rate, factor)
        batches = BatchSchedule(
            per_step, recipe.per_device_train_batch_size, stop_at, parts.online_stages, recipe.num_iterations
        )
        return Trainer(
            self.roles,
            rows,
            parts.objective,
            chain,
            parts.estimator,
            batches,
            self.accelerator,
            warn=self.watch.warn,
        )

    def check_memory(self, fit: Trainer, stats: dict) -> None:
        """Memory predicted against what there is, before anything is trained. What is yet to be written is of
        unknown length.
        """
        roles, rows = fit.roles, fit.rows
        if not rows or not roles.clock.total or any("samples" in s.provides for s in fit.batches.live):
            return
        short = sorted(rows[:16], key=lambda row: len(str(row)))[:2]  # what may not fit is not tried out
        some = [roles.batch([_answered(r, roles) for r in short[:n]]) for n in (1, len(short))]
        longest, micro = int(stats["longest"]), min(fit.batches.micro, len(rows))
        tokens = longest + round((micro - 1) * stats["row_tokens"] / len(rows))
        try:
            self.need, told = memory.choose(
                roles, fit.chain, fit.estimator, some, tokens, longest, self.recipe.gradient_checkpointing
            )
        except (RuntimeError, MemoryError) as error:
            if not guards.out_of_memory(error):
                raise
            told = [
                "memory ran out on two short rows, read to see what a step would take: expect it not to fit"
            ]
        for sentence in told:
            self.watch.warn(sentence)

    def keep_frozen(self, fit: Trainer, tokens: int) -> None:
        """Lower layers that never move: their answers are computed once, where rows are read again."""
        asked, roles = self.recipe.cache_frozen, fit.roles
        shared = sum(p.model is roles.policy.model for p in roles.policies()) > 1
        if asked is False or not fit.rows or not roles.clock.total:
            return
        made: Any = fit.no_reuse()
        if made is None or (shared and not fit.batches.live):
            some = roles.batch([_answered(r, roles) for r in fit.rows[:2]])
            made = hidden_cache.open_cache(
                roles.policy, some, self.folder / f"hidden_cache-{self.accelerator.process_index}.bin", tokens
            )
        if isinstance(made, str):
            if asked is True:
                self.watch.warn(f"cache_frozen: nothing is kept, as {made}")
            return
        roles.policy.attached.hidden_cache = made
        atexit.register(made.close)
        self.watch.warn(
            f"the {made.first} lowest of {len(made.layers)} layers never move: what they say of a row is"
            f" computed once and kept ({made.table.nbytes / 2**20:,.0f} MB beside the run, until it ends)"
        )

    def keep_reference(self, fit: Trainer, stats: dict) -> None:
        """What never changes of the roles: their log-probabilities are computed once, where rows are read
        again.
        """
        asked, roles = self.recipe.cache_reference, fit.roles
        constant = [
            n for n, r in self.parts.roles.items() if r.constant and isinstance(getattr(roles, n), Policy)
        ]
        if asked is False or not fit.rows or not roles.clock.total or (asked == "auto" and not constant):
            return
        why = fit.no_reuse() or (None if constant else "no role that never changes is played by a network")
        room = sum(
            logprob_cache.words_needed(rows, s["row_tokens"] * s["supervised_share"])
            for rows, s in ((len(fit.rows), stats), (len(self.held_out), self.held_out_stats))
            if s
        )
        held = self.shared.logprob_caches if self.shared else {}
        for name in constant if why is None else ():
            if name in held:
                setattr(roles, name, logprob_cache.CachedPolicy(getattr(roles, name), held[name]))
                continue
            path = self.folder / f"logprob_cache-{name}-{self.accelerator.process_index}.bin"
            made = logprob_cache.open_cache(
                getattr(roles, name), path, room, json.dumps(spec(self.parts.roles[name]), default=str)
            )
            if isinstance(made, str):
                why = made
                continue
            if not isinstance(self.parts.roles[name], Start):  # it is the same for all
                held[name] = made.cache
            setattr(roles, name, made)
            self.watch.warn(
                f"what '{name}' says of a row never changes: it is computed once and kept beside the run,"
                " until it ends"
            )
        if why and asked is True:
            self.watch.warn(f"cache_reference: nothing is kept, as {why}")

    def begin(self, fit: Trainer) -> dict[str, float]:
        """Measure the start, once; then go on from the last checkpoint, if there is one."""
        path = self.folder / "before.json"
        if self.latest is None or not path.is_file():
            self.watch.stage("measuring the start")
            before = self.measure("before")
            if self.main:
                files.write_json(path, before)
        else:
            before = json.loads(path.read_text(encoding="utf-8"))
        clock = self.roles.clock
        if self.latest is not None:
            was = checkpoints.load(self.latest)
            self.roles.tuner.load(was.tensors)
            fit.chain.load(was.state)
            clock.step, clock.first, fit.drawn_rows, fit.totals = (
                was.step,
                was.step,
                was.draw,
                Totals(**was.totals),
            )
            self.watch.warn(f"going on from {self.latest.name} of {clock.total} steps")
        if self.main:
            trim(self.folder / "metrics.jsonl", clock.step)
        return before

    # --- during and after

    @torch.no_grad()
    def measure(self, when: str) -> dict[str, float]:
        """Every process measures all rows, so none waits long for another; what the main one found counts."""
        self.roles.policy.eval()
        out = _alike(
            run_all(self.parts.evaluate, self.roles, self.measured, self.folder, when), self.accelerator
        )
        self.accelerator.log({f"eval_{k}": v for k, v in out.items()}, step=self.roles.clock.step)
        return out

    def every(self, steps: float | None) -> int:
        """A setting such as save_steps as a number of steps; below 1 it is a share of the run, 0 is never."""
        if not steps:
            return 0
        return max(1, round(steps * self.roles.clock.total) if steps < 1 else int(steps))

    def after_step(self, fit: Trainer, log: dict) -> None:
        recipe, clock, last = self.recipe, self.roles.clock, self.roles.clock.step == self.roles.clock.total
        eval_every, save_every = self.every(recipe.eval_steps), self.every(recipe.save_steps)
        # between draws, where no process holds rows that the others do not know
        if self.accelerator.num_processes > 1:
            save_every = math.lcm(save_every, recipe.num_iterations)
        if eval_every and clock.step % eval_every == 0 and not last:
            log |= {f"eval_{k}": v for k, v in self.measure("during").items()}
        if self.main and (clock.step % recipe.logging_steps == 0 or last):
            numbers = {k: v for k, v in log.items() if k != "step" and not k.startswith("eval_")}
            self.accelerator.log(numbers, step=clock.step)
            with (
                files.disk_errors(self.folder),
                open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file,
            ):
                file.write(json.dumps(log) + "\n")
        self.watch.step(log)
        if self.main and (clock.step % save_every == 0 or last):
            self.save(fit)

    def save(self, fit: Trainer) -> None:
        held = fit.drawn_rows if self.roles.clock.step % fit.batches.num_iterations else None
        made = checkpoints.Checkpoint(
            self.roles.tuner.held(), fit.chain.state, self.roles.clock.step, held, asdict(fit.totals)
        )
        checkpoints.save(self.folder, made, self.recipe.save_total_limit)

    def pause(self, fit: Trainer, before: dict[str, float], stats: dict) -> Report:
        """Stop here for now: measured, and saved so that the same command goes on."""
        clock, now = self.roles.clock, self.measure("during")
        cost = {
            "moving": stats["moving"],
            "seconds": fit.totals.seconds,
            "tokens": fit.totals.tokens,
            "peak_memory_mb": _peak_memory(),
        }
        if self.main:
            self.save(fit)
            files.write_json(
                self.folder / "paused.json",
                {"step": clock.step, "steps": clock.total, "metrics": now, "stats": cost},
            )
        self.watch.warn(
            f"paused at step {clock.step} of {clock.total}; the same command without --until goes on from"
            " here"
        )
        return Report(str(self.folder), before, now, stats={"paused_at": clock.step, "steps": clock.total})

    def finish(self, report: Report, fit: Trainer, stats: dict) -> None:
        """The report, what a user takes away, and the page."""
        roles, folder, rows = self.roles, self.folder, fit.rows
        logged = files.read_rows(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else []
        report.losses = [line["loss"] for line in logged if "loss" in line]
        prompts = [r["prompt"] for r in rows]
        report.stats = {
            **stats,
            **asdict(fit.totals),
            "steps": roles.clock.total,
            "data_rows": len(rows),
            "bad_rows": len(self.data.bad),
            "held_out_rows": len(self.held_out),
            "measured_on": "held-out rows" if self.held_out else "training rows",
            "turns": bool(rows) and isinstance(prompts[0], list),
            "ends": "\n" if rows and all(isinstance(p, str) and p.endswith("\n") for p in prompts) else "",
            "writes": "generate" in roles.policy.architecture.provides,
            "auto_class": roles.policy.architecture.auto_class().__name__,
            "tokens_per_second": fit.totals.tokens / max(fit.totals.seconds, 1e-9),
            "peak_memory_mb": None if self.shared else _peak_memory(),  # side by side it is nobody's own
            "device": str(roles.device),
            "dtype": str(next(roles.policy.model.parameters()).dtype).removeprefix("torch."),
        }
        if roles.tuner.hidden_cache:
            roles.tuner.hidden_cache.close()
        for role in roles.policies():
            if isinstance(role, logprob_cache.CachedPolicy) and not (
                self.shared and role.cache in self.shared.logprob_caches.values()
            ):
                role.cache.close()
        report.notes = list(self.watch.notes)
        if self.main:
            saved = checkpoints.paths(folder)
            moved = roles.clock.total or self.recipe.init_from is not None
            if moved and (not saved or checkpoints.read_meta(saved[-1])["step"] != roles.clock.total):
                self.save(fit)
            self.watch.stage("saving")
            with files.disk_errors(folder):
                roles.tuner.save(folder)
                roles.renderer.tokenizer.save_pretrained(folder)
                if self.parts.quantizer is not None:
                    files.write_json(folder / files.QUANTIZATION, spec(self.parts.quantizer))
            page.write_report(self.recipe, report, logged, folder)
            files.write_json(folder / "report.json", asdict(report))
            note_down(folder, finished=True)
        self.accelerator.wait_for_everyone()


def _encode(
    roles: Roles, rows: list[dict], folder: Path, watch: Any, main: bool, allowed: float
) -> tuple[list[dict], dict]:
    """Every row once through the tokenizer, so that what cannot be learned from is known before anything is
    computed.

    allowed: the share of rows that may turn out to be unusable.
    """
    if not rows:
        return [], {}
    kept, bad, stats = roles.policy.architecture.encode_all(rows, roles.renderer)
    if bad and main:
        with files.disk_errors(folder):
            reading.write_quarantine(bad, folder / "quarantine.jsonl")
    if not kept:
        raise Refused(f"none of {len(rows):,} rows can be used; the first: {bad[0]['reason']}")
    if len(bad) > allowed * len(rows):
        raise Refused(reading.refusal(bad, len(rows), "the data", allowed, folder / "quarantine.jsonl"))
    if bad:
        watch.warn(
            f"{len(bad):,} of {len(rows):,} rows set aside, with reasons, in quarantine.jsonl; the first:"
            f" {bad[0]['reason']}"
        )
    if any(r.get("completions") for r in rows):
        guards.check_supervised(len(kept), stats["supervised"], stats["tokens"])
    return kept, {
        "rows": len(kept),
        "row_tokens": stats["tokens"],
        "supervised_share": stats["supervised"] / max(1, stats["tokens"]),
        "longest": stats["longest"],
        "cut": stats["cut"],
    }


def _answered(row: dict, roles: Roles) -> dict:
    """A row to try the layout on: where the policy is yet to answer, the end of the prompt stands for its
    answer.
    """
    return row if row.get("completions") else {**row, "completions": [roles.renderer.prompt(row)[-8:]]}


def _peak_memory() -> float:
    """Megabytes at most so far: of the accelerator where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


# ---------------------------------------------------------------------------------------------- plans


@compat.session()
def perform(
    recipe: Recipe,
    folder: Path | None = None,
    watch: Any = None,
    anew: bool | None = None,
    until: float | None = None,
) -> Report:
    """A recipe, or the plan it carries. A plan is a generator: its state is the reports of the runs it asked
    for.

    anew: do again what is finished; if not said, where the recipe overwrites. A plan that was stopped goes on
    all the same.
    """
    folder = Path(folder or recipe.output_dir or default_folder(recipe))
    recipe, anew = on_disk(recipe, folder), recipe.overwrite if anew is None else anew
    if recipe.plan is None:
        return run(recipe, folder, watch, anew, until)
    if until is not None:
        raise RecipeError("until: a plan has several runs and no step of its own to pause at")
    watch = watch or Callback()
    if (folder / "run.json").is_file():
        if not recipe.overwrite:
            raise RecipeError(
                f"{folder} holds a single run; give this plan another output_dir, or overwrite=true to start"
                " anew there"
            )
        clear(folder)
    if anew and (folder / "report.json").is_file():
        for act in folder.glob("act-*"):
            shutil.rmtree(act)
        (folder / "report.json").unlink()
    validate(recipe, sample_rows(recipe), sample_rows)
    plan = build("plan", recipe.plan_spec())
    play = plan.recipes(replace(recipe, plan=None))
    (folder / FAILED).unlink(missing_ok=True)
    acts: list[str] = []
    last: Any = None
    asked = next(play)
    try:
        while True:
            several = isinstance(asked, list)
            reports = []
            for r in asked if several else [asked]:
                act = folder / f"act-{len(acts)}"
                watch.stage(f"act {len(acts)}")
                reports.append(perform(replace(r, output_dir=None), act, watch, anew=False))
                acts.append(str(act))
            last = reports if several else reports[0]
            asked = play.send(last)
    except StopIteration as end:
        final = end.value or (last[-1] if isinstance(last, list) else last)
    except Exception as error:
        note_failure(folder, error)
        raise
    report = replace(final, acts=acts, folder=final.folder)
    if drawn := plan.page(report):
        files.write_text(folder / "report.html", drawn)
    files.write_json(folder / "report.json", asdict(report))
    return report


def tune(
    recipe: Any = None, *, watch: Any = None, folder: str | Path | None = None, **settings: Any
) -> Report:
    """Tune a model. recipe: a YAML file, text or mapping; settings: keys of a recipe.

    >>> luthier.tune(model="toy:lm", data="rows.jsonl", tuner="lora", objective="sft")
    """
    made = Recipe.load(recipe, settings)
    return perform(made, Path(folder) if folder else None, watch)
