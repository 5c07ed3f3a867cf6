"""From a recipe to a run folder: rows, roles, fit, evaluation, and what a user takes away. And plans: several of them.

A run that was stopped, however roughly, goes on when the same recipe is run again; a finished one answers at once.
"""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import json
import math
import re
import resource
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from luthier import __version__, guards, store
from luthier import rows as reading
from luthier.clock import Clock
from luthier.loop import Batches, Fit, Totals
from luthier.method import RecipeError, build
from luthier.recipe import Recipe
from luthier.rehearsal import Parts, checked, rehearse
from luthier.report import rendered
from luthier.report.console import Quiet
from luthier.roles import Policy, Roles
from luthier.transforms._chain import Chain, schedule

if TYPE_CHECKING:
    from luthier.architectures._network import Network


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

    @property
    def metrics(self) -> dict[str, float]:
        return self.after

    @staticmethod
    def read(folder: str | Path) -> Report:
        return Report(**json.loads((Path(folder) / "report.json").read_text(encoding="utf-8")))


# ---------------------------------------------------------------------------------------------- pieces of a run


@dataclass
class Data:
    """Rows of a run, before and beside training."""

    rows: list[dict]
    held_out: list[dict]
    bad: list[dict]
    mark: str  # what these rows are; a resumed run must find the same
    shape: str = ""  # the format they were read as


def load_data(recipe: Recipe, quarantine: Path | None = None) -> Data:
    """The recipe's rows in canonical form, split, with the bad ones apart (and written to `quarantine`)."""
    if recipe.data is None:
        raise RecipeError("a recipe needs `data`: a file, a folder, a hub name, rows, or practice:WORLD")
    loaded = reading.load(recipe.data, max_bad_rows=recipe.max_bad_rows, quarantine=quarantine)
    rows, bad, held = loaded.rows, loaded.bad, []
    if isinstance(recipe.eval_data, (int, float)) and not isinstance(recipe.eval_data, bool):
        if not 0 <= recipe.eval_data < 1:
            raise RecipeError(f"eval_data: {recipe.eval_data} is not a share below 1 (nor a file)")
        if recipe.eval_data and len(rows) * recipe.eval_data >= 4:
            rows, held = reading.split(rows, recipe.eval_data)  # whatever the seed: runs with other seeds are measured on the same rows
    elif recipe.eval_data:
        other = reading.load(recipe.eval_data, max_bad_rows=recipe.max_bad_rows, quarantine=quarantine)
        held, bad = other.rows, [*bad, *other.bad]
    mark = hashlib.sha256(json.dumps([rows, held], sort_keys=True, default=str).encode()).hexdigest()[:16]
    return Data(rows, held, bad, mark, loaded.format)


def touching(rows: Sequence[dict]) -> list[str]:
    """Where a prompt's last word and the completion's first run into each other: "...said Annaworld"."""
    plain = ((r["prompt"], c) for r in rows for c in r.get("completions", ())[:1] if isinstance(r["prompt"], str) and isinstance(c, str))
    ends, goes_on = re.compile(r"""[A-Za-z0-9.!?"']\Z"""), re.compile(r"[^\s.,;:!?)]")
    return [f"…{p[-20:]}{c[:20]}…" for p, c in plain if ends.search(p) and goes_on.match(c)]


READ = {"id", "prompt", "answer", "label", "kind", "item", "skill"}  # columns of text that are no news beside a row


def beside(data: Data) -> str | None:
    """The columns of text that are kept but not learned from, in a sentence: what a user meant may be one of them."""
    seen = {k: None for row in data.rows[:100] for k, v in row.items() if isinstance(v, str) and k not in READ}
    if not seen or " + " in data.shape:
        return None
    return f"rows are read as '{data.shape}'; what else they hold is kept and not learned from: {', '.join([*seen][:12])}"


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def pick_dtype(name: str, where: torch.device) -> torch.dtype:
    """auto: bfloat16 where the chip multiplies in it, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if where.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if where.type == "cpu" and torch.cpu._is_amx_tile_supported() else torch.float32


def load_model(recipe: Recipe, parts: Parts, network: Mapping[str, Any]) -> tuple[Network, Any]:
    """The base network and its tokenizer. network: what the data said about it (a classifier's classes)."""
    from transformers import AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # what it warns of when loading is told by us, or refused
    path, where = store.resolve_model(recipe.model), device()
    how = {"dtype": pick_dtype(recipe.dtype, where), **network}
    if recipe.attn_implementation:
        how["attn_implementation"] = recipe.attn_implementation
    try:
        model = parts.architecture.load(path, **how)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise RecipeError(f"model {recipe.model} cannot be loaded: {str(error).strip().splitlines()[0]}") from None
    model.config.use_cache = False
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.to(where).eval(), tokenizer


def assemble(recipe: Recipe, parts: Parts, network: Mapping[str, Any] | None = None) -> Roles:
    """Model, tuner and tokenizer as the training policy; seeded before weights are drawn."""
    clock = Clock(seed=recipe.seed)
    torch.manual_seed(clock.fold("model"))
    model, tokenizer = load_model(recipe, parts, network or {})
    torch.manual_seed(clock.fold("tuner"))
    attached = attach(parts.tuner, model)
    most = places(model) - attached.virtual
    if recipe.max_length and recipe.max_length > most:
        raise RecipeError(f"max_length: {recipe.max_length} tokens, and {recipe.model} reads {most} at most under this tuner")
    limit = recipe.max_length or min(2048, most)
    renderer = parts.architecture.renderer(tokenizer, model.config, max_length=limit, chat_template=recipe.chat_template)
    return Roles(Policy(parts.architecture, model, attached), clock, renderer)


def places(model: Network) -> float:
    """How many tokens the network has positions for."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    skipped = [p for n, m in model.named_modules() if n.endswith("position_embeddings") and (p := getattr(m, "padding_idx", None))]
    return (most or math.inf) - (max(skipped) + 1 if skipped else 0)  # RoBERTa counts from behind its padding


def attach(tuner: Any, model: Network) -> Any:
    """The tuner on the model. Modules that no checkpoint held (a new classifier's head) are trained along and saved with it."""
    if model.fresh and any(f.name == "modules_to_save" for f in fields(tuner)):
        tuner = replace(tuner, modules_to_save=sorted({*(tuner.modules_to_save or ()), *model.fresh}))
    new = {id(p): name for name in model.fresh for p in model.get_submodule(name).parameters()}
    attached = tuner.attach(model)
    moving = {id(p) for p in attached.parameters().values()}
    left = sorted({name for i, name in new.items() if i not in moving}) if not hasattr(tuner, "modules_to_save") else []
    if left and tuner.gives:
        raise RecipeError(
            f"tuner '{tuner.name}' would leave {', '.join(left)} as random as it was made, since the checkpoint has none; "
            "take one that trains it along: lora, full, or any with modules_to_save"
        )
    return attached


def tensors_of(start: Any, attached: Any) -> dict[str, torch.Tensor]:
    """What a finished run moved, or a merge of several runs."""
    if isinstance(start, dict):
        if set(start) != {"merge", "of"} or not start["of"]:
            raise RecipeError("start: give a run's folder, or {merge: average, of: [folder, folder]}")
        return build("merger", start["merge"]).merge([tensors_of(s, attached) for s in start["of"]])
    folder = Path(start)
    if not folder.is_dir():
        raise RecipeError(f"start: there is no folder {folder}")
    return attached.read(folder)


def take_parts(roles: Roles, parts: Parts) -> None:
    """Let the other roles play; trained parts they bring (a critic's head) move along with the tuner."""
    from luthier.tuners._also import Also

    brought = {f"{k}.{n}": m for k, r in parts.roles.items() for n, m in r.parts(roles.policy.model).items()}
    if brought:
        roles.policy.attached = roles.tuner = Also(roles.tuner, brought)


# ---------------------------------------------------------------------------------------------- one run


def run(recipe: Recipe, folder: Path, watch: Any = None, anew: bool = False) -> Report:
    """One recipe without a plan, to its end. anew: even where it is finished."""
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    watch = watch or Quiet()
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), log_with=[*recipe.report_to] or None, project_dir=str(folder))
    atexit.unregister(_part)
    atexit.register(_part)
    main = accelerator.is_main_process
    watch = watch if main else Quiet()
    for sentence in recipe.told:
        watch.tell(sentence)
    quarantine = folder / "quarantine.jsonl"
    with store.told_on_disk(folder):
        if new := main and not (folder / "run.json").exists():  # what lies there is of an earlier attempt, which was refused
            quarantine.unlink(missing_ok=True)
        data = load_data(recipe, quarantine if new else None)
    if sentence := beside(data):
        watch.tell(sentence)
    parts = checked(recipe, data.rows[:100])
    with _open(folder, recipe, data.mark, main, anew) as (finished, begun_by):
        if _alike(finished, accelerator):
            watch.tell(f"{folder} holds this run, finished: nothing to do (overwrite=true starts anew)")
            return Report.read(folder)
        if begun_by != __version__:
            watch.tell(f"this run was begun by luthier {begun_by} and goes on under {__version__}: its end may be neither's")
        if main:
            with store.told_on_disk(folder):
                quarantine.unlink(missing_ok=True)
                reading.write_quarantine(data.bad, quarantine)
        if data.bad:
            seen = len(data.bad) + len(data.rows) + len(data.held_out)
            watch.tell(f"{len(data.bad):,} unusable rows of {seen:,} set aside, with reasons: {quarantine}")
        set_seed(recipe.seed)
        if recipe.report_to:
            accelerator.init_trackers("luthier", {k: v if isinstance(v, (int, float, str)) else json.dumps(v) for k, v in _told(recipe)})
        try:
            return _run(recipe, parts, data, folder, watch, accelerator)
        except (RuntimeError, MemoryError) as error:
            if guards.out_of_memory(error):
                raise guards.Refused(guards.TOO_BIG) from None
            raise
        finally:
            for tracker in accelerator.trackers:
                tracker.finish()


def _part() -> None:
    """At the end of this process, not of a run: a plan's next act needs the others again. Who leaves first, or leaves
    threads waiting, makes the others abort; after an error there is nobody to wait for."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if not hasattr(sys, "last_value"):
            torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _told(recipe: Recipe) -> list[tuple[str, Any]]:
    """What a tracker is told about a run: the whole recipe but for rows given from Python."""
    return [(k, v) for k, v in yaml.safe_load(recipe.yaml()).items() if not isinstance(v, list) or k not in ("data", "eval_data")]


def _alike(value: Any, accelerator: Any) -> Any:
    """The main process's value, in every process: they must not part ways over it."""
    if accelerator.num_processes == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def _run(recipe: Recipe, parts: Parts, data: Data, folder: Path, watch: Any, accelerator: Any) -> Report:
    main = accelerator.is_main_process
    latest = (store.checkpoints(folder) or [None])[-1]
    watch.stage("loading the model")
    network = parts.architecture.fit_to(data.rows)
    if main:
        _mark(folder, network=network)
    roles = assemble(recipe, parts, network)
    clock, roles.tell = roles.clock, watch.tell
    if recipe.start is not None:
        roles.tuner.load(tensors_of(recipe.start, roles.tuner))
    take_parts(roles, parts)
    for name, role in parts.roles.items():
        setattr(roles, name, role.play(name, roles.policy))

    # rows: stages see the starting policy; on resume their result is read back
    rows = data.rows
    if parts.stages:
        kept = folder / "rows.jsonl"
        if latest is None or not kept.is_file():
            for stage in parts.stages:
                watch.stage(f"stage {stage.name}")
                rows = list(stage(rows, roles))
            if not rows:
                raise RecipeError(f"the stages {[s.name for s in parts.stages]} left no row")
            if main:
                store.write_rows(kept, rows)
            accelerator.wait_for_everyone()
        rows = store.read_rows(kept)
    rows, stats = _encode(roles, rows, folder, watch, main, recipe.max_bad_rows)
    held_out, _ = _encode(roles, data.held_out, folder, Quiet(), main, 1.0)
    if "generate" in parts.architecture.gives:
        some = [parts.architecture.encode(r, roles.renderer) for r in rows[:64] if r.get("completions")]
        guards.ends_are_learned(some, set(roles.renderer.stop_ids), watch.tell)
    turns = any(not isinstance(r["prompt"], str) for r in rows)
    for sentence in (roles.renderer.note if turns or recipe.chat_template else None, *roles.renderer.warnings):
        if sentence:
            watch.tell(sentence)
    if roles.policy.model.fresh:
        fresh = roles.policy.model.fresh
        starts = "these start random and are" if len(fresh) > 1 else "it starts random and is"
        watch.tell(f"the checkpoint has no weights for {', '.join(fresh)}: {starts} trained along")
    shown = rows
    if any("samples" in s.gives for s in parts.live):  # what is learned is yet to be written
        shown = [{k: v for k, v in r.items() if k not in ("completions", "scores")} for r in rows]
        asked = parts.architecture.encode_all(shown, roles.renderer).stats
        stats |= {"row_tokens": asked["tokens"], "longest": asked["longest"], "supervised_share": 0.0, "cut": 0}
    if stats["cut"]:
        whose = "texts" if roles.renderer.encoder else "completions"
        watch.tell(f"the {whose} of {stats['cut']:,} of {len(rows):,} rows are cut at {roles.renderer.max_length:,} tokens (max_length)")
    if not roles.renderer.encoder and 2 * len(touching(shown)) > len(shown):
        watch.tell(f"the completion follows the prompt's last word without a space or a line break: '{touching(shown)[0]}'")
    watch.rows(roles, shown, stats)
    if main:
        store.write_json(folder / "shown.json", rendered(roles, shown))

    for sentence in roles.tuner.told:
        watch.tell(sentence)
    moving = guards.something_moves(roles.tuner)
    guards.fits_in_memory(roles.tuner, watch.tell, roles.device)
    for player in roles.policies():  # each by itself: a teacher may be another kind of network
        guards.same_as_plain(player, roles.batch([_answered(r, roles) for r in rows[:2]]), watch.tell)
    if recipe.start is None:
        roles.tuner.initialize(rows, roles)

    per_step = recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps * accelerator.num_processes
    stop_at = None if recipe.max_steps is not None else max(1, round(len(rows) * recipe.num_train_epochs))
    clock.total = 0 if parts.objective is None else recipe.max_steps if stop_at is None else -(-stop_at // per_step)
    if stop_at is not None:
        clock.total *= recipe.num_iterations
    chain = Chain(
        parts.chain, roles.tuner, clock, recipe.learning_rate, schedule(recipe.lr_scheduler_type, recipe.warmup_steps, clock.total)
    )
    batches = Batches(per_step, recipe.per_device_train_batch_size, stop_at, parts.live, recipe.num_iterations)
    fit = Fit(roles, rows, parts.objective, chain, parts.estimator, batches, accelerator, tell=watch.tell)

    before_path = folder / "before.json"
    measure = held_out or rows[: min(len(rows), 256)]
    if latest is None or not before_path.is_file():
        watch.stage("measuring the start")
        before = _evaluate(parts.evaluate, roles, measure, folder, "before", accelerator)
        if main:
            store.write_json(before_path, before)
    else:
        before = json.loads(before_path.read_text(encoding="utf-8"))
    if latest is not None:
        was = store.load_checkpoint(latest)
        roles.tuner.load(was.tensors)
        chain.load(was.state)
        clock.step, clock.first, fit.held, fit.totals = was.step, was.step, was.held, Totals(**was.totals)
        watch.tell(f"going on from {latest.name} of {clock.total} steps")
    if main:
        _trim(folder / "metrics.jsonl", clock.step)

    if clock.total:
        fit.hooks = _hooks(recipe, parts, fit, roles, measure, folder, watch)
        with watch.training(clock.total, clock.step):
            fit.run()
    watch.stage("measuring the end")
    after = _evaluate(parts.evaluate, roles, measure, folder, "after", accelerator)
    report = Report(str(folder), before, after)
    logged = store.read_rows(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else []
    report.losses = [line["loss"] for line in logged if "loss" in line]
    report.stats = {
        **stats, **moving, **asdict(fit.totals), "steps": clock.total, "data_rows": len(rows), "bad_rows": len(data.bad),
        "held_out_rows": len(held_out), "turns": bool(rows) and isinstance(rows[0]["prompt"], list),
        "ends": "\n" if rows and all(isinstance(r["prompt"], str) and r["prompt"].endswith("\n") for r in rows) else "",
        "writes": "generate" in roles.policy.architecture.gives, "auto_class": roles.policy.architecture.auto_class().__name__,
        "measured_on": "held-out rows" if held_out else "training rows", "tokens_per_second": fit.totals.tokens / max(fit.totals.seconds, 1e-9),
        "peak_memory_mb": _peak_memory(), "device": str(roles.device), "dtype": str(next(roles.policy.model.parameters()).dtype).removeprefix("torch."),
    }  # fmt: skip
    report.notes = list(watch.notes)
    if main:
        if (clock.total or recipe.start is not None) and (
            not store.checkpoints(folder) or store.load_meta(store.checkpoints(folder)[-1])["step"] != clock.total
        ):
            _save(fit, chain, folder, recipe.save_total_limit)
        watch.stage("saving")
        with store.told_on_disk(folder):
            roles.tuner.save(folder)
            roles.renderer.tokenizer.save_pretrained(folder)
        from luthier.report import write_report

        write_report(recipe, report, logged, folder)
        store.write_json(folder / "report.json", asdict(report))
        _mark(folder, finished=True)
    accelerator.wait_for_everyone()
    return report


def _encode(roles: Roles, rows: list[dict], folder: Path, watch: Any, main: bool, allowed: float) -> tuple[list[dict], dict]:
    """Every row once through the tokenizer, so that what cannot be learned from is known before anything is computed.

    allowed: the share of rows that may turn out to be unusable.
    """
    if not rows:
        return [], {}
    kept, bad, stats = roles.policy.architecture.encode_all(rows, roles.renderer)
    if bad and main:
        with store.told_on_disk(folder):
            reading.write_quarantine(bad, folder / "quarantine.jsonl")
    if not kept:
        raise guards.Refused(f"none of {len(rows):,} rows can be used; the first: {bad[0]['reason']}")
    if len(bad) > allowed * len(rows):
        raise guards.Refused(reading.refusal(bad, len(rows), "the data", allowed, folder / "quarantine.jsonl"))
    if bad:
        watch.tell(f"{len(bad):,} of {len(rows):,} rows set aside, with reasons, in quarantine.jsonl; the first: {bad[0]['reason']}")
    if any(r.get("completions") for r in rows):
        guards.something_to_learn(len(kept), stats["supervised"], stats["tokens"])
    return kept, {
        "rows": len(kept),
        "row_tokens": stats["tokens"],
        "supervised_share": stats["supervised"] / max(1, stats["tokens"]),
        "longest": stats["longest"],
        "cut": stats["cut"],
    }


def _answered(row: dict, roles: Roles) -> dict:
    """A row to try the layout on: where the policy is yet to answer, the end of the prompt stands for its answer."""
    return row if row.get("completions") else {**row, "completions": [roles.renderer.prompt(row)[-8:]]}


@torch.no_grad()
def _evaluate(evaluators: Sequence[Any], roles: Roles, rows: list[dict], folder: Path, when: str, accelerator: Any) -> dict[str, float]:
    """Every process measures all rows, so none waits long for another; what the main one found counts."""
    roles.policy.eval()
    out: dict[str, float] = {}
    for e in evaluators:
        out |= e.run(roles, rows, folder, when)
    out = _alike(out, accelerator)
    accelerator.log({f"eval_{k}": v for k, v in out.items()}, step=roles.clock.step)
    return out


def _hooks(recipe, parts, fit, roles, measure, folder, watch) -> list:
    clock, accelerator = roles.clock, fit.accelerator
    main = accelerator.is_main_process

    def every(steps: float) -> int:
        return max(1, round(steps * clock.total) if steps < 1 else int(steps))

    save_every, eval_every = every(recipe.save_steps), every(recipe.eval_steps) if recipe.eval_steps else 0
    if accelerator.num_processes > 1:  # between draws, where no process holds rows that the others do not know
        save_every = math.lcm(save_every, recipe.num_iterations)

    def hook(fit: Fit, log: dict) -> None:
        if eval_every and clock.step % eval_every == 0 and clock.step < clock.total:
            log |= {f"eval_{k}": v for k, v in _evaluate(parts.evaluate, roles, measure, folder, "during", accelerator).items()}
        if main and (clock.step % recipe.logging_steps == 0 or clock.step == clock.total):
            accelerator.log({k: v for k, v in log.items() if k != "step" and not k.startswith("eval_")}, step=clock.step)
            with store.told_on_disk(folder), open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(log) + "\n")
        watch.step(log)
        if main and (clock.step % save_every == 0 or clock.step == clock.total):
            _save(fit, fit.chain, folder, recipe.save_total_limit)

    return [hook]


def _save(fit: Fit, chain: Chain, folder: Path, keep: int) -> None:
    held = fit.held if fit.roles.clock.step % fit.batches.num_iterations else None
    store.save_checkpoint(
        folder, store.Checkpoint(fit.roles.tuner.tensors(), chain.state, fit.roles.clock.step, held, asdict(fit.totals)), keep
    )


def _peak_memory() -> float:
    """Megabytes at most so far: of the accelerator where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


# ---------------------------------------------------------------------------------------------- run folders


@contextmanager
def _open(folder: Path, recipe: Recipe, mark: str, main: bool, anew: bool) -> Iterator[tuple[bool, str]]:
    """Take a run folder for oneself. Yields whether the run in it is finished and which luthier began it; refuses another's."""
    if not main:
        yield False, __version__
        return
    with store.told_on_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RecipeError(f"another process is running in {folder}") from None
        state = folder / "run.json"
        known = json.loads(state.read_text(encoding="utf-8")) if state.is_file() else None
        if known and (known["fingerprint"], known["data"]) != (recipe.fingerprint(), mark):
            if not recipe.overwrite and (folder / "before.json").is_file():  # else it was refused before it computed anything
                raise RecipeError(
                    f"{folder} holds another run ({_difference(folder, recipe, known, mark)}); give another output_dir, or overwrite=true to start anew there"
                )
            known = _clear(folder)
        if known and anew and known["finished"]:
            known = _clear(folder)
        if known is None:
            known = {"fingerprint": recipe.fingerprint(), "data": mark, "finished": False, "version": __version__}
            store.write_text(folder / "recipe.yaml", recipe.yaml())
            store.write_json(state, known)
        yield bool(known["finished"] and (folder / "report.json").is_file()), known.get("version", "(unknown)")
    finally:
        lock.close()


def _clear(folder: Path) -> None:
    """Leave nothing of a run. run.json goes last: while it stands, a folder that is half cleared is still the old run's."""
    for path in store.checkpoints(folder):
        shutil.rmtree(path)
    for name in ("report.json", "before.json", "rows.jsonl", "metrics.jsonl", "quarantine.jsonl", "forgetting.jsonl", "shown.json",
                 "samples-before.jsonl", "samples-after.jsonl", "report.html", "run.json"):  # fmt: skip
        (folder / name).unlink(missing_ok=True)


def _mark(folder: Path, **facts: Any) -> None:
    state = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    store.write_json(folder / "run.json", {**state, **facts})


def network_of(folder: Path) -> dict[str, Any]:
    """What the data of a finished run said about its network; class numbers are numbers again."""
    known = json.loads((folder / "run.json").read_text(encoding="utf-8")).get("network", {})
    return known | {"id2label": {int(k): v for k, v in known["id2label"].items()}} if "id2label" in known else known


def _difference(folder: Path, recipe: Recipe, known: dict, mark: str) -> str:
    was, now = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8")), yaml.safe_load(recipe.yaml())
    shy = ("data", "eval_data", "output_dir", "overwrite")
    keys = [k for k in now if was.get(k) != now[k] and k not in shy]
    if not keys:
        return "its rows were others" if known["data"] != mark else "made by another version"
    return "it differs in " + ", ".join(f"{k}: {str(was.get(k))[:40]} there, {str(now[k])[:40]} here" for k in keys[:2])


def _trim(path: Path, step: int) -> None:
    """Lines of steps that a kill has undone leave."""
    if path.is_file():
        lines = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    lines.append(line)
            except (json.JSONDecodeError, KeyError):
                break  # the line that was being written when the process died
        store.write_text(path, "".join(f"{line}\n" for line in lines))


# ---------------------------------------------------------------------------------------------- plans


def default_folder(recipe: Recipe) -> Path:
    """runs/<model>-<tuner>-<objective>-<fingerprint>: the same recipe finds its run again."""

    def word(x: Any) -> str:
        x = x.get("name", "") if isinstance(x, dict) else x if isinstance(x, str) else "mix"
        return re.sub(r"[^A-Za-z0-9]+", "-", x).strip("-")

    model = word(Path(recipe.model).name if "/" in recipe.model else recipe.model)
    mark = hashlib.sha256(f"{recipe.fingerprint()} {recipe.data} {recipe.eval_data}".encode()).hexdigest()[:6]
    return Path("runs") / "-".join(w for w in (model, word(recipe.tuner), word(recipe.objective), mark) if w)


def on_disk(recipe: Recipe, folder: Path) -> Recipe:
    """Rows given from Python are written beside the run, so that its recipe can be repeated from a shell."""
    for key in ("data", "eval_data"):
        rows = getattr(recipe, key)
        if isinstance(rows, (list, tuple)) and rows and all(reading.looks_like_row(r) for r in rows):
            text = "".join(json.dumps(r, ensure_ascii=False, default=str) + "\n" for r in rows)
            path = folder.resolve() / f"{key}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.jsonl"
            store.write_text(path, text)
            recipe = replace(recipe, **{key: str(path)})
    return recipe


def perform(recipe: Recipe, folder: Path | None = None, watch: Any = None, anew: bool | None = None) -> Report:
    """A recipe, or the plan it carries. A plan is a generator: its state is the reports of the runs it asked for.

    anew: do again what is finished; if not said, where the recipe overwrites. A plan that was stopped goes on all the same.
    """
    folder = Path(folder or recipe.output_dir or default_folder(recipe))
    recipe, anew = on_disk(recipe, folder), recipe.overwrite if anew is None else anew
    if recipe.plan is None:
        return run(recipe, folder, watch, anew)
    watch = watch or Quiet()
    if (folder / "run.json").is_file():
        if not recipe.overwrite:
            raise RecipeError(f"{folder} holds a single run; give this plan another output_dir, or overwrite=true to start anew there")
        _clear(folder)
    if anew and (folder / "report.json").is_file():
        for act in folder.glob("act-*"):
            shutil.rmtree(act)
        (folder / "report.json").unlink()
    rehearse(recipe, load_data(recipe).rows[:100] if recipe.data is not None else ())
    play = build("plan", recipe.plan_spec()).recipes(replace(recipe, plan=None))
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
    report = replace(final, acts=acts, folder=final.folder)
    store.write_json(folder / "report.json", asdict(report))
    return report


def tune(recipe: Any = None, *, watch: Any = None, folder: str | Path | None = None, **settings: Any) -> Report:
    """Tune a model. recipe: a YAML file, text or mapping; settings: keys of a recipe.

    >>> luthier.tune(model="practice:lm", data="rows.jsonl", tuner="lora", objective="sft")
    """
    made = Recipe.load(recipe, settings)
    return perform(made, Path(folder) if folder else None, watch)
