"""From a recipe to a run folder: rows, roles, fit, evaluation, and what a user takes away. And plans: several of them.

A run that was stopped, however roughly, goes on when the same recipe is run again; a finished one answers at once.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from luthier import guards, store
from luthier.clock import Clock
from luthier.loop import Batches, Fit, Totals
from luthier.method import RecipeError, build
from luthier.recipe import Recipe
from luthier.rehearsal import Parts, rehearse
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


def load_data(recipe: Recipe, quarantine: Path | None = None) -> Data:
    """The recipe's rows in canonical form, split, with the bad ones apart (and written to `quarantine`)."""
    from luthier import rows as reading

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
    return Data(rows, held, bad, mark)


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def pick_dtype(name: str, where: torch.device) -> torch.dtype:
    """auto: bfloat16 where the chip multiplies in it, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if where.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if where.type == "cpu" and torch.cpu._is_amx_tile_supported() else torch.float32


def load_model(recipe: Recipe, parts: Parts, network: Mapping[str, Any]) -> tuple[torch.nn.Module, Any]:
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
    limit = (
        recipe.max_length or min(2048, getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048) - attached.virtual
    )
    renderer = parts.architecture.renderer(tokenizer, model.config, max_length=limit, chat_template=recipe.chat_template)
    return Roles(Policy(parts.architecture, model, attached), clock, renderer)


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


def run(recipe: Recipe, folder: Path, watch: Any = None) -> Report:
    """One recipe without a plan, to its end."""
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    watch = watch or Quiet()
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), log_with=recipe.report_to or None, project_dir=str(folder))
    main = accelerator.is_main_process
    watch = watch if main else Quiet()
    for sentence in recipe.told:
        watch.tell(sentence)
    with store.told_on_disk(folder):
        data = load_data(recipe, folder / "quarantine.jsonl" if main else None)
    parts = rehearse(recipe, data.rows[:100])
    with _open(folder, recipe, data.mark, main) as finished:
        if finished:
            watch.tell(f"{folder} holds this run, finished: nothing to do (overwrite=true starts anew)")
            return Report.read(folder)
        accelerator.wait_for_everyone()
        if data.bad:
            watch.tell(
                f"{len(data.bad)} unusable rows of {len(data.bad) + len(data.rows) + len(data.held_out)} set aside, with reasons: {folder / 'quarantine.jsonl'}"
            )
        set_seed(recipe.seed)
        report = _run(recipe, parts, data, folder, watch, accelerator)
    return report


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
    turns = any(not isinstance(r["prompt"], str) for r in rows)
    for sentence in (roles.renderer.note if turns or recipe.chat_template else None, *roles.renderer.warnings):
        if sentence:
            watch.tell(sentence)
    if roles.policy.model.fresh:
        watch.tell(f"the checkpoint has no weights for {', '.join(roles.policy.model.fresh)}: it starts random and is trained along")
    watch.rows(roles, rows, stats)
    if main:
        store.write_json(folder / "shown.json", rendered(roles, rows))

    for sentence in roles.tuner.told:
        watch.tell(sentence)
    moving = guards.something_moves(roles.tuner)
    guards.fits_in_memory(roles.tuner, watch.tell, roles.device)
    if rows and rows[0].get("completions"):
        for player in roles.policies():  # each by itself: a teacher may be another kind of network
            guards.same_as_plain(player, roles.batch(rows[:2]), watch.tell)
    if recipe.start is None:
        roles.tuner.initialize(rows, roles)

    per_step = recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps * accelerator.num_processes
    stop_at = None if recipe.max_steps is not None else max(1, round(len(rows) * recipe.num_train_epochs))
    clock.total = 0 if parts.objective is None else recipe.max_steps if stop_at is None else -(-stop_at // per_step)
    if stop_at is not None:
        clock.total *= recipe.num_iterations
        stop_at = stop_at if recipe.num_iterations == 1 else None
    chain = Chain(
        parts.chain, roles.tuner, clock, recipe.learning_rate, schedule(recipe.lr_scheduler_type, recipe.warmup_steps, clock.total)
    )
    batches = Batches(per_step, recipe.per_device_train_batch_size, stop_at, parts.live, recipe.num_iterations)
    fit = Fit(roles, rows, parts.objective, chain, parts.estimator, batches, accelerator, tell=watch.tell)

    before_path = folder / "before.json"
    measure = held_out or rows[: min(len(rows), 256)]
    if latest is None or not before_path.is_file():
        watch.stage("measuring the start")
        before = _evaluate(parts.evaluate, roles, measure, folder, "before")
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
        fit.hooks = _hooks(recipe, parts, fit, roles, measure, folder, watch, main)
        with watch.training(clock.total, clock.step):
            fit.run()
    watch.stage("measuring the end")
    after = _evaluate(parts.evaluate, roles, measure, folder, "after")
    report = Report(str(folder), before, after)
    logged = store.read_rows(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else []
    report.losses = [line["loss"] for line in logged if "loss" in line]
    report.stats = {
        **stats, **moving, **asdict(fit.totals), "steps": clock.total, "data_rows": len(rows), "bad_rows": len(data.bad),
        "held_out_rows": len(held_out), "turns": bool(rows) and isinstance(rows[0]["prompt"], list),
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
        from luthier.rows import write_quarantine

        with store.told_on_disk(folder):
            write_quarantine(bad, folder / "quarantine.jsonl")
        watch.tell(f"{len(bad):,} of {len(rows):,} rows set aside, with reasons, in quarantine.jsonl; the first: {bad[0]['reason']}")
    if not kept:
        raise guards.Refused(f"none of {len(rows):,} rows can be used; the first: {bad[0]['reason']}")
    if len(bad) > allowed * len(rows):
        from luthier.rows import refusal

        raise guards.Refused(refusal(bad, len(rows), "those read", allowed, folder / "quarantine.jsonl"))
    if stats["cut"]:
        whose = "texts" if roles.renderer.encoder else "completions"
        watch.tell(f"{stats['cut']:,} of {len(kept):,} rows are over {roles.renderer.max_length:,} tokens: their {whose} are cut there (max_length)")
    if any(r.get("completions") for r in rows):
        guards.something_to_learn(len(kept), stats["supervised"], stats["tokens"])
    return kept, {
        "rows": len(kept),
        "row_tokens": stats["tokens"],
        "supervised_share": stats["supervised"] / max(1, stats["tokens"]),
        "longest": stats["longest"],
        "cut": stats["cut"],
    }


@torch.no_grad()
def _evaluate(evaluators: Sequence[Any], roles: Roles, rows: list[dict], folder: Path, when: str) -> dict[str, float]:
    roles.policy.eval()
    out: dict[str, float] = {}
    for e in evaluators:
        out |= e.run(roles, rows, folder, when)
    return out


def _hooks(recipe, parts, fit, roles, measure, folder, watch, main) -> list:
    clock = roles.clock

    def every(steps: float) -> int:
        return max(1, round(steps * clock.total) if steps < 1 else int(steps))

    save_every, eval_every = every(recipe.save_steps), every(recipe.eval_steps) if recipe.eval_steps else 0

    def hook(fit: Fit, log: dict) -> None:
        if eval_every and clock.step % eval_every == 0 and clock.step < clock.total:
            log |= {f"eval_{k}": v for k, v in _evaluate(parts.evaluate, roles, measure, folder, "during").items()}
        if main and (clock.step % recipe.logging_steps == 0 or clock.step == clock.total):
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
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


# ---------------------------------------------------------------------------------------------- run folders


@contextmanager
def _open(folder: Path, recipe: Recipe, mark: str, main: bool) -> Iterator[bool]:
    """Take a run folder for oneself. Yields whether the run in it is finished; refuses another recipe's."""
    if not main:
        yield False
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
            if not recipe.overwrite:
                raise RecipeError(
                    f"{folder} holds another run ({_difference(folder, recipe, known, mark)}); give another output_dir, or overwrite=true to start anew there"
                )
            known = _clear(folder)
        if known and recipe.overwrite and known["finished"]:
            known = _clear(folder)
        if known is None:
            store.write_text(folder / "recipe.yaml", recipe.yaml())
            store.write_json(state, {"fingerprint": recipe.fingerprint(), "data": mark, "finished": False})
        yield bool(known and known["finished"] and (folder / "report.json").is_file())
    finally:
        lock.close()


def _clear(folder: Path) -> None:
    import shutil

    for path in store.checkpoints(folder):
        shutil.rmtree(path)
    for name in ("run.json", "report.json", "before.json", "rows.jsonl", "metrics.jsonl", "quarantine.jsonl", "forgetting.jsonl",
                 "shown.json", "samples-before.jsonl", "samples-after.jsonl", "report.html"):  # fmt: skip
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
    import re

    def word(x: Any) -> str:
        x = x.get("name", "") if isinstance(x, dict) else x if isinstance(x, str) else "mix"
        return re.sub(r"[^A-Za-z0-9]+", "-", x).strip("-")

    model = word(Path(recipe.model).name if "/" in recipe.model else recipe.model)
    mark = hashlib.sha256(f"{recipe.fingerprint()} {recipe.data} {recipe.eval_data}".encode()).hexdigest()[:6]
    return Path("runs") / "-".join(w for w in (model, word(recipe.tuner), word(recipe.objective), mark) if w)


def on_disk(recipe: Recipe, folder: Path) -> Recipe:
    """Rows given from Python are written beside the run, so that its recipe can be repeated from a shell."""
    from luthier.rows import looks_like_row

    for key in ("data", "eval_data"):
        rows = getattr(recipe, key)
        if isinstance(rows, (list, tuple)) and rows and all(looks_like_row(r) for r in rows):
            text = "".join(json.dumps(r, ensure_ascii=False, default=str) + "\n" for r in rows)
            path = folder.resolve() / f"{key}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.jsonl"
            store.write_text(path, text)
            recipe = replace(recipe, **{key: str(path)})
    return recipe


def perform(recipe: Recipe, folder: Path | None = None, watch: Any = None) -> Report:
    """A recipe, or the plan it carries. A plan is a generator: its state is the reports of the runs it asked for."""
    folder = Path(folder or recipe.output_dir or default_folder(recipe))
    recipe = on_disk(recipe, folder)
    if recipe.plan is None:
        return run(recipe, folder, watch)
    watch = watch or Quiet()
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
                reports.append(perform(replace(r, output_dir=None), act, watch))
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
