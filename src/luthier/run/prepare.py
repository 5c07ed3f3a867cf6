"""All that comes before the first step: model and roles, rows, checks, the trainer, memory, caches, and the
evaluation before training.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.data.split import sample
from luthier.errors import RecipeError, out_of_memory
from luthier.model import base_mark
from luthier.model.dropout import has_dropout
from luthier.model.load import assemble, take_parts, tensors_of
from luthier.model.policy import Roles
from luthier.model.quantized_linear import describe
from luthier.recipe.defaults import AUTO, default_epochs
from luthier.recipe.model_names import resolve_model
from luthier.recipe.recipe import Recipe
from luthier.recipe.schedule import schedule
from luthier.recipe.validate import Methods
from luthier.report.numbers import HELD_OUT, TRAINING_ROWS, format_megabytes
from luthier.run import resume
from luthier.run.batches import check_batches, exceptions
from luthier.run.caches import SharedBase, cache_hidden_states, cache_logprobs
from luthier.run.folder import update_state
from luthier.run.rows import (
    EncodedRows,
    common_share,
    describe_rows,
    keep_rendering,
    load_rows,
    sample_batch,
    short_batches,
    stage_metrics,
    writes_samples,
)
from luthier.run.session import Session
from luthier.storage.layout import read_state
from luthier.train import arrange, checks, memory
from luthier.train.optimizer import Chain
from luthier.train.trainer import BatchSchedule, Trainer

SOLVED = 0.02  # nats a token, below which a task counts as known
EVALUATED_ROWS = 256  # of the training rows at most, where none are held out


@dataclass(frozen=True)
class RunLength:
    """How long a run is."""

    per_step: int  # rows of a step, over all processes
    last_row: int | None  # where the epochs end; None where the steps are counted
    steps: int
    epochs: float | None = None  # None where the steps are counted


class PrivateRows(list):
    """Rows that only steps may read: whatever a tuner or role takes from them at the start is not private."""

    def _refuse(self, *args: Any) -> Any:
        raise RecipeError(
            "a private estimator promises that rows are read by its steps alone, but a method of this recipe"
            " starts from them; choose a start that reads no rows, or other, public ones"
        )

    __iter__ = __getitem__ = _refuse


@dataclass(frozen=True)
class Prepared:
    """A run before its first step, or before the first that this process makes."""

    session: Session
    trainer: Trainer
    held_out: list[dict]
    eval_rows: list[dict]  # what metrics are measured on
    before: dict[str, float]  # metrics before training
    stats: dict[str, Any]  # of the rows and the parameters
    memory_need: memory.Need | None  # what a step is predicted to take
    length: RunLength
    shared: SharedBase | None = None  # with runs beside it in this process


def prepare(session: Session, shared: SharedBase | None = None) -> Prepared:
    """A run made ready, at the step where it goes on. Raises RecipeError where it cannot work."""
    checkpoint = resume.starting_point(session)
    with session.callback.working(f"loading the model{_size_of(session.recipe)}"):
        roles = _load_roles(session, shared)
    batches = check_batches(session, roles, checkpoint)
    training, held_out = load_rows(session, roles, checkpoint)
    training = describe_rows(session, roles, training)
    rows = training.rows
    _warn_of_settings(session, rows)
    parameters = _check_model(session, roles, rows)
    start_rows = rows
    if session.methods.estimator.private:
        start_rows = PrivateRows(rows)
    if session.recipe.init_from is None:
        _initialize(session, roles, start_rows)
    for component in roles.tuner.components:
        component.ready(start_rows, roles)
    length = run_length(session.recipe, session.methods, len(rows), batches.per_step)
    trainer = _build_trainer(session, roles, rows, length)
    memory_need = _check_memory(session, trainer, training)
    cache_hidden_states(session, trainer, training.stats.get("row_tokens", 0))
    cache_logprobs(session, trainer, training, held_out, shared)
    eval_rows = _eval_rows(session, held_out.rows) or rows[:EVALUATED_ROWS]
    if session.main:
        update_state(session.folder, measured_on=HELD_OUT if held_out.rows else TRAINING_ROWS)
    before = resume.evaluate_start(session, trainer, eval_rows, checkpoint)
    _warn_if_solved(session, before)
    if checkpoint is None:
        resume.take_over(session, trainer)
    resume.resume(session, trainer, checkpoint)
    unusable = training.unusable + held_out.unusable
    stats = {**training.stats, **stage_metrics(session.folder), **parameters, "unusable": unusable}
    return Prepared(session, trainer, held_out.rows, eval_rows, before, stats, memory_need, length, shared)


def _eval_rows(session: Session, held_out: list[dict]) -> list[dict]:
    """The held-out rows that metrics are measured on."""
    count = session.recipe.max_eval_samples
    if count == "all" or len(held_out) <= count:
        return held_out
    if session.methods.evaluate:
        session.warn(
            f"metrics are measured on {count:,} of {len(held_out):,} held-out rows; max_eval_samples: all"
            " measures on every one"
        )
    return sample(held_out, count)


def _size_of(recipe: Recipe) -> str:
    """' (257 MB)' of a model that lies in a folder; empty of others."""
    folder = Path(resolve_model(recipe.model))
    if not folder.is_dir():
        return ""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return f" ({format_megabytes(size / 2**20)})" if size else ""


def _load_roles(session: Session, shared: SharedBase | None) -> Roles:
    """Model, tuner and tokenizer; what an earlier run trained; whoever else plays."""
    recipe, methods, rows = session.recipe, session.methods, session.data.rows
    network = methods.fit_to(rows)
    if session.main:
        _mark_base(session)
        update_state(session.folder, network=network)
    loaded = shared.network() if shared else None
    roles = assemble(recipe, methods, network, session.folder, rows, loaded)
    keep_rendering(session, roles.renderer)
    if shared:
        shared.renderer = shared.renderer or roles.renderer
        roles.renderer = shared.renderer
    roles.warn, roles.folder = session.warn, session.folder
    for sentence in describe(roles.policy.model):
        session.warn(sentence)
    if recipe.init_from is not None:
        roles.tuner.load(tensors_of(recipe.init_from, roles.tuner))
    take_parts(roles, methods)
    for name, role in methods.roles.items():
        role.reads(name, roles.renderer.tokenizer)
    for name, role in methods.roles.items():
        roles.players[name] = role.play(name, roles.policy)
    return roles


def _mark_base(session: Session) -> None:
    """What the base is, into run.json; of a run that goes on, whether it still is. Raises RecipeError."""
    model, former = session.recipe.model, read_state(session.folder).get("base")
    if former:
        base_mark.check(model, former, session.folder)
    else:
        update_state(session.folder, base=session.base.begin(model))


def _initialize(session: Session, roles: Roles, rows: list[dict]) -> None:
    """Starts from data. Where rows decide which tensors there are, roles that keep what the run began with
    (`initial`) keep these.
    """
    tuner = roles.tuner
    before = {name: tensor.shape for name, tensor in tuner.state(parts=False).items()}
    for component in tuner.components:
        component.initialize(rows, roles)
    after = {name: tensor.shape for name, tensor in tuner.state(parts=False).items()}
    for name, role in session.methods.roles.items():
        if role.per_run and after != before:
            roles.players[name] = role.play(name, roles.policy)


def _warn_of_settings(session: Session, rows: list[dict]) -> None:
    """Combinations that run and yet learn little or nothing."""
    methods = session.methods
    objective = methods.objective
    if objective is None:
        return
    chained = isinstance(session.recipe.optim, list)
    if chained and not any(transform.rescales for transform in methods.chain):
        session.warn(
            "optim: no transform of this chain (adam, lion) gives updates a size of their own: they are the"
            " gradients times learning_rate"
        )
    sentences = methods.estimator.chain_warnings(methods.chain)
    if not writes_samples(session):
        for _, term in objective.terms():
            sentences = [*sentences, *term.row_warnings(rows)]
    for sentence in sentences:
        session.warn(sentence)


def _warn_if_solved(session: Session, before: dict[str, float]) -> None:
    """A task that the model knows already shows nothing."""
    objective = session.methods.objective
    if objective is None or [term.name for _, term in objective.terms()] != ["sft"]:
        return
    loss = before.get("loss")
    if loss is not None and loss < SOLVED:
        session.warn(
            f"the loss before training is {loss:.2g} nats a token: the model knows these answers already, and"
            " there is little to learn"
        )


def _check_model(session: Session, roles: Roles, rows: list[dict]) -> dict[str, int]:
    """The checks of a start; counts of trainable and of all parameters."""
    parameters = checks.check_trainable(roles.tuner)
    session.callback.stage("comparing fast kernels with the model's own forward pass on a few tokens")
    for policy in roles.policies():  # each by itself: a teacher may be another kind of network
        checks.check_forward(policy, sample_batch(roles, rows[:2]), session.warn)
    return parameters


def run_length(recipe: Recipe, methods: Methods, rows: int, per_step: int | None = None) -> RunLength:
    """From the recipe and the number of rows that can be used; no step where there is no objective.

    per_step: rows of a step; by default those of one process.
    """
    if per_step is None:
        per_step = recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps
    last_row, steps, epochs = None, recipe.max_steps, None
    if steps is None:
        epochs = recipe.num_train_epochs
        if epochs == AUTO:
            epochs = default_epochs(rows)
        last_row = max(1, round(rows * epochs))
        steps = -(-last_row // per_step) * recipe.num_iterations
    if methods.objective is None:
        steps = 0
    return RunLength(per_step, last_row, steps, epochs)


def describe_length(recipe: Recipe, length: RunLength, rows: int) -> str:
    """How long a run trains and at which rate, with the reason of each value that the recipe leaves open;
    empty where nothing is trained.
    """
    if not length.steps:
        return ""
    text = f"{length.steps:,} steps of {length.per_step:,} rows"
    if length.epochs is not None:
        text += f" ({length.epochs:g} epochs of {rows:,} rows"
        if recipe.num_train_epochs == AUTO:
            text += ", the default for so many"
        text += ")"
    text += f", learning rate {recipe.learning_rate:g}"
    if recipe.origins.get("learning_rate") == "default":
        text += f" (default: {recipe.default_rate().reason})"
    return text


def _build_trainer(session: Session, roles: Roles, rows: list[dict], length: RunLength) -> Trainer:
    """The training to be, and on its clock how long it is."""
    recipe, methods, clock = session.recipe, session.methods, roles.clock
    clock.total = length.steps
    if text := describe_length(recipe, length, len(rows)):
        session.callback.stage(text)
    if session.main:
        update_state(session.folder, steps=clock.total)
    factor = schedule(
        recipe.lr_scheduler_type,
        recipe.warmup_steps,
        clock.total,
        recipe.lr_scheduler_kwargs,
        recipe.learning_rate,
    )
    micro = recipe.per_device_train_batch_size
    if methods.estimator.private:
        micro = 1
    return Trainer(
        roles,
        rows,
        methods.objective,
        Chain(methods.chain, roles.tuner, clock, recipe.learning_rate, factor),
        methods.estimator,
        BatchSchedule(
            length.per_step,
            micro,
            length.last_row,
            methods.online_stages,
            recipe.num_iterations,
            _clusters(session, roles, rows, length),
            _groups_by_prefix(roles),
            methods.estimator.draw,
            max((stage.ahead for stage in methods.online_stages), default=0),
        ),
        session.processes,
        warn=session.warn,
    )


def _groups_by_prefix(roles: Roles) -> bool:
    """Whether the architecture asks for steps of rows that begin alike."""
    return getattr(roles.policy.architecture, "group_by_prefix", False)


def _clusters(session: Session, roles: Roles, rows: list[dict], length: RunLength) -> tuple[int, ...] | None:
    """Which rows begin alike, where they can meet in micro-batches and are then read together; it changes
    sums by rounding alone, unless the recipe asks for steps of such rows.
    """
    recipe, policy = session.recipe, roles.policy
    if session.methods.estimator.private or not rows or not length.steps:
        return None
    if not policy.architecture.shares_prefixes(policy.attached):
        return None
    whole = length.per_step == recipe.per_device_train_batch_size  # one micro-batch a step
    depends = any(True for _ in exceptions(session, "accumulation"))
    if not _groups_by_prefix(roles) and (whole or depends or has_dropout(policy.model)):
        return None
    return arrange.clusters(rows)


def _check_memory(session: Session, trainer: Trainer, training: EncodedRows) -> memory.Need | None:
    """Memory predicted against what there is, before anything is trained; None where it cannot be foreseen,
    as of completions that are yet to be written. Raises OutOfMemory where not even one row would fit.
    """
    roles, rows = trainer.roles, training.rows
    if not rows or not roles.clock.total or writes_samples(session):
        return None
    micro = min(trainer.batches.micro, len(rows))
    try:
        need, sentences = memory.choose(
            roles,
            trainer.chain,
            trainer.estimator,
            short_batches(roles, rows),
            training.micro_batch_tokens(micro),
            int(training.stats["longest"]),
            session.recipe.gradient_checkpointing,
            common_share(session, trainer),
        )
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        session.warn(
            "out of memory while measuring two short rows: a training step will probably not"
            " fit; reduce per_device_train_batch_size or max_length"
        )
        return None
    for sentence in sentences:
        session.warn(sentence)
    return need
