"""A recipe is checked before anything is computed: what each method requires must be provided by another.

Capabilities flow in the order of a run: rows -> stages -> online stages -> roles -> tuner, estimator,
optimizer, objective, evaluators. Stages that ask no model are also tried on two rows: what their rows show
counts more than what they declare. A plan is gone through with empty reports, so that the mistake of its
third run is refused before the first begins.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Any

from luthier.clock import Clock
from luthier.compat.compiler import check_compiler
from luthier.errors import RecipeError
from luthier.recipe import model_names
from luthier.recipe.capabilities import columns_of, require, requirements
from luthier.recipe.new_tokens import read_new_tokens
from luthier.recipe.recipe import Recipe
from luthier.recipe.schedule import schedule
from luthier.registry import build, cards, classes, did_you_mean, provides_of, submethods

DEFAULT_EVALUATORS = ("loss", "accuracy", "labels", "preference", "generate", "forgetting")
# what roles have besides players
FIXED = frozenset(
    "policy tuner clock renderer device warn folder dropped players policies batch text".split()
)
NETWORK_ROLES = {"reference": ("outputs", "logprobs"), "teacher": ("outputs",)}  # what each is asked
DRY_RUN = "dry-run"  # folder of a run that has not happened


@dataclass
class Methods:
    """Every method of a recipe, built and checked."""

    architecture: Any
    tuner: Any
    objective: Any  # None where nothing is trained
    estimator: Any
    chain: tuple  # the transforms of the optimizer
    roles: dict[str, Any]
    stages: list
    online_stages: list
    evaluate: list  # where the recipe names none: those of the default ones that the rows allow
    quantizer: Any = None  # what the base's linear weights are kept in

    def fit_to(self, rows: Sequence[dict]) -> dict[str, Any]:
        """What these rows, and labels that stages will give them, make of the network's config."""
        labels = [label for stage in self.stages for label in stage.labels_ahead()]
        return self.architecture.fit_to([*rows, *({"completions": [label]} for label in labels)])

    def provide(self) -> set[str]:
        """What the methods provide before any stage has seen a row."""
        out = set(self.roles)
        for name, role in self.roles.items():
            if role.answers == "outputs":
                out.add(f"{name}_outputs")
        out |= self.architecture.provides | self.estimator.provides | provides_of(self.tuner)
        if self.quantizer is not None:
            out |= provides_of(self.quantizer)
        return out

    def parts(self) -> list:
        """The methods of which a recipe has one each."""
        out = [self.architecture, self.tuner, self.estimator]
        if self.quantizer is not None:
            out.append(self.quantizer)
        return out

    def require(self) -> frozenset[str]:
        """What the methods require, roles among it."""
        users = [self.tuner, self.estimator, *self.chain, *self.roles.values(), *self.stages]
        users += [*self.online_stages, *self.evaluate]
        if self.objective is not None:
            users.append(self.objective)
        return frozenset().union(*(requirements(user) for user in users))


def no_rows(recipe: Recipe) -> Sequence[dict]:
    """Where the rows of a plan's runs cannot be read."""
    return ()


def validate(
    recipe: Recipe, rows: Sequence[dict] = (), load_rows: Callable[[Recipe], Sequence[dict]] = no_rows
) -> Methods | None:
    """Refuse what cannot work, in a sentence. rows: a sample of the data in canonical form.

    Plans are gone through; load_rows gives a sample for runs that have data of their own.
    """
    if recipe.plan is not None:
        check_roles(recipe, dry_run_plan(recipe, rows, load_rows))
        return None
    methods = dry_run(recipe, rows)
    check_roles(recipe, methods.require())
    return methods


def check_players(methods: Methods, recipe: Recipe) -> None:
    """Refuse a role under a name that it cannot play: a memory as a reference, a column as a teacher."""
    own_names = {word for card in cards("role") for word in card.provides}
    for name, role in methods.roles.items():
        plays = " or ".join(sorted(role.provides)) or "a model"
        if name not in role.provides and (role.provides or name in own_names):
            raise RecipeError(f"roles: role '{role.name}' cannot be used as '{name}', only as {plays}")
        able = NETWORK_ROLES.get(name)
        if able and role.answers not in able:
            raise RecipeError(
                f"roles: role '{role.name}' cannot be used as '{name}': it gives only {role.answers}, not a"
                " model's outputs"
            )
        if role.answers != "outputs" and f"{name}_outputs" in methods.require():
            raise RecipeError(
                f"{label(methods.objective, recipe)} needs whole distributions or hidden states"
                f" from the {name}, but role '{role.name}' gives only {role.answers}; e.g."
                f" `roles: {{{name}: initial}}`"
            )


def check_roles(recipe: Recipe, required: Set[str]) -> None:
    """Refuse a role that no method of the recipe requires: nobody would ask it, as with a misspelt name.

    required: by all methods of the recipe, in every run of its plan if it has one.
    """
    for name in recipe.roles:
        if name in FIXED:
            raise RecipeError(f"roles: '{name}' cannot be set: every recipe has this role built in")
        if name not in required:
            provided: set[str] = set()
            others: set[str] = set()
            for card in cards():
                if card.kind != "role":
                    provided |= card.provides
                others |= card.requires
            hint = ""
            if name not in others:
                hint = did_you_mean(name, required - provided or others - provided)
            raise RecipeError(f"roles: no method of this recipe requires '{name}'{hint}")


def build_methods(recipe: Recipe) -> Methods:
    """Build every method; decide what the recipe left open (architecture, who is the reference)."""
    built, objective = recipe.methods(), recipe.aim()
    users = [objective, *built["stages"], *built["online_stages"], *(built["evaluate"] or ())]
    roles = dict(built["roles"])
    needed = any("reference" in requirements(user) for user in users if user is not None)
    removable = "disable_adapter" in provides_of(built["tuner"])
    if recipe.evaluate is None and objective is not None and removable:
        # the default evaluators compare held-out pairs with the base, which takes no memory here
        needed = needed or {"pairs", "logprobs"} <= requirements(objective)
    if needed and "reference" not in roles:
        roles["reference"] = build("role", "base" if removable else "initial")
    return Methods(
        architecture=built["architecture"] or detect(recipe.model),
        tuner=built["tuner"],
        objective=objective,
        estimator=built["estimator"],
        chain=recipe.chain(),
        roles=roles,
        stages=built["stages"],
        online_stages=built["online_stages"],
        evaluate=list(built["evaluate"] or []),
        quantizer=built["quantization"],
    )


def detect(model: str) -> Any:
    """The architecture of a checkpoint, by its config."""
    config = model_names.model_config(model)
    every, suited = [], []
    for cls in classes("architecture"):
        try:
            architecture = build("architecture", cls.name)
        except RecipeError:  # it has settings that must be given, so it is only chosen by name
            continue
        every.append(architecture)
        if architecture.suits(config):
            suited.append(architecture)
    if len(suited) == 1:
        return suited[0]
    named = ", ".join(config.architectures or ["no architecture"])
    choices = ", ".join(architecture.name for architecture in every)
    raise RecipeError(
        f"{model}: the architecture is not clear from its config ({named}); set"
        f" `architecture:` to one of {choices}"
    )


# ------------------------------------------------------------------------------------------------ one run


def dry_run(recipe: Recipe, rows: Sequence[dict] = ()) -> Methods:
    """The methods of a recipe without a plan, each provided with what it requires."""
    methods = build_methods(recipe)
    model_names.resolve_model(recipe.model)
    check_settings(recipe, methods)
    check_players(methods, recipe)
    available = columns_of(rows) | methods.provide()
    choose_evaluators(recipe, methods, frozenset(available))
    check_best(recipe, methods)
    available = run_stages(recipe, methods, available, rows)
    users = [methods.tuner, *methods.roles.values(), methods.estimator, *methods.chain]
    if methods.objective is not None:
        users.append(methods.objective)
    for user in users:
        require(user, available, label(user, recipe), methods.parts())
    if methods.objective is not None:
        methods.estimator.suits(methods.objective)
        methods.estimator.suits_recipe(recipe, methods)
        for _, term in methods.objective.terms():
            term.suits_recipe(recipe, methods)
        check_phases(methods)
        check_values(methods, available, recipe)
        check_samples(methods, available, recipe)
    return methods


def check_settings(recipe: Recipe, methods: Methods) -> None:
    """Refuse settings of the recipe itself that cannot work."""
    if methods.quantizer is not None:
        check_quantized(methods.tuner, methods.quantizer)
    schedule(
        recipe.lr_scheduler_type,
        recipe.warmup_steps,
        1,
        recipe.lr_scheduler_kwargs,
        recipe.learning_rate,
    )
    read_new_tokens(recipe.add_tokens)
    if recipe.torch_compile:
        check_compiler()
    if isinstance(recipe.init_from, dict) and "modules_of" not in recipe.init_from:
        build("merger", recipe.init_from.get("merge"))
    check_trackers(recipe.report_to)


def choose_evaluators(recipe: Recipe, methods: Methods, available: frozenset[str]) -> None:
    """The default evaluators where the recipe names none; held-out rows go through no stage."""
    if recipe.evaluate is None:
        methods.evaluate = []
        for name in DEFAULT_EVALUATORS:
            evaluator = build("evaluator", name)
            if requirements(evaluator) <= available:
                methods.evaluate.append(evaluator)
    for evaluator in methods.evaluate:
        require(evaluator, available, label(evaluator, recipe), methods.parts())


def check_best(recipe: Recipe, methods: Methods) -> None:
    """Refuse a metric for the best weights that no evaluator measures, or of which neither way is better."""
    if not recipe.compares_evaluations:
        return
    name = recipe.best_metric
    declared = {}
    names = {evaluator.name for evaluator in methods.evaluate}
    for card in cards("evaluator"):
        if card.name in names:
            declared |= {metric.name: metric for metric in card.metrics}
    metric = declared.get(name.partition("/")[0])
    if metric is None:
        raise RecipeError(
            f"metric_for_best_model: '{name}' is measured by none of the evaluators of this run"
            f"{did_you_mean(name, declared)} (measured: {', '.join(declared) or 'nothing'})"
        )
    if metric.higher_is_better is None:
        raise RecipeError(f"metric_for_best_model: neither more nor less of '{name}' is better")


def run_stages(recipe: Recipe, methods: Methods, available: set[str], rows: Sequence[dict]) -> set[str]:
    """What is available behind the stages; those that ask no model are tried on two rows."""
    sample = list(rows[:2])
    for stage in (*methods.stages, *methods.online_stages):
        require(stage, available, label(stage, recipe), methods.parts())
        available = (available - stage.removes) | provides_of(stage)
        before, sample = columns_of(sample), try_stage(stage, sample)
        if sample:
            after = columns_of(sample)
            available = (available - (before - after)) | (after - before)
    return available


def try_stage(stage: Any, rows: list[dict]) -> list[dict]:
    """What a stage makes of rows, without a model; none where it needs one, or where none is left."""
    if stage.asks_model or not rows:
        return []
    try:
        return list(stage(rows, DryRunRoles()))
    except RecipeError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise RecipeError(f"stage '{stage.name}' fails on the first rows: {reason}") from error


class DryRunRoles:
    """The roles of a stage that is tried: no model, and its warnings wait for the run."""

    def __init__(self) -> None:
        self.clock = Clock()

    def warn(self, sentence: str) -> None:
        pass


def check_values(methods: Methods, available: Set[str], recipe: Recipe) -> None:
    """Refuse an estimator that compares values of a loss whose value never changes."""
    if "grad" in provides_of(methods.estimator) or "old_logprobs" in available:
        return
    if any(term.flat for _, term in methods.objective.terms()):
        raise RecipeError(
            f"estimator '{methods.estimator.name}' compares loss values, but the value of"
            f" {label(methods.objective, recipe)} is the same for every policy unless the rows"
            " hold the sampler's log-probabilities; add them with `online_stages: [{name:"
            " rollout, old: true}]`"
        )


def check_samples(methods: Methods, available: Set[str], recipe: Recipe) -> None:
    """Refuse an objective of fresh samples without a rollout in each step, and reuse of samples without
    them.
    """
    name = label(methods.objective, recipe)
    on_policy = "samples" in requirements(methods.objective)
    if on_policy and not any("samples" in stage.provides for stage in methods.online_stages):
        raise RecipeError(
            f"{name} trains on fresh samples; move the rollout from `stages` to `online_stages`"
        )
    if recipe.num_iterations == 1:
        return
    if not on_policy:
        raise RecipeError(
            f"num_iterations: {recipe.num_iterations} reuses each batch of samples, but {name}"
            " does not train on samples; leave num_iterations out"
        )
    if "old_logprobs" not in available:
        raise RecipeError(
            f"num_iterations: {recipe.num_iterations} needs the sampler's log-probabilities;"
            " add them with `online_stages: [{name: rollout, old: true}, ...]`"
        )


def check_phases(methods: Methods) -> None:
    """Refuse an estimator that keeps a copy of what trains, where the tuner changes what that is."""
    for tuner in (methods.tuner, *submethods(methods.tuner)):
        if methods.estimator.fixed_tensors and getattr(tuner, "changes_phase", False):
            raise RecipeError(
                f"estimator '{methods.estimator.name}' keeps a second copy of the trainable"
                f" parameters, but tuner '{tuner.name}' changes which ones are trainable during"
                " training; use another tuner"
            )


def check_quantized(tuner: Any, quantizer: Any) -> None:
    """Refuse a tuner that trains the very weights that a quantized base keeps as codes."""
    if tuner.on_quantized:
        return
    able = [f"'{cls.name}'" for cls in classes("tuner") if cls.on_quantized]
    raise RecipeError(
        f"tuner '{tuner.name}' trains the base model's weights, which `quantization:"
        f" {quantizer.name}` makes untrainable; use one of {', '.join(able)}, or leave"
        " quantization out"
    )


def check_trackers(trackers: Sequence[str]) -> None:
    """Refuse trackers that are not installed: accelerate would leave them out without a word."""
    if not trackers:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    every = [str(t) for t in LOGGER_TYPE_TO_CLASS]
    installed = {str(t) for t in get_available_trackers()}
    for name in trackers:
        if name not in every:
            raise RecipeError(
                f"report_to: accelerate has no tracker named '{name}'{did_you_mean(name, every)}"
            )
        if name in LoggerType.list() and name not in installed:
            package = name.replace("comet_ml", "comet-ml")
            raise RecipeError(f"report_to: '{name}' is not installed; run: pip install {package}")


def label(method: Any, recipe: Recipe) -> str:
    """What a method is called in a sentence."""
    if hasattr(method, "kind"):
        return f"{method.kind} '{method.name}'"
    return f"objective '{recipe.objective}'"


# ------------------------------------------------------------------------------------------------ plans


class DryRunReport:
    """A report of a run that has not happened."""

    folder = DRY_RUN

    def __init__(self) -> None:
        self.before: dict[str, float] = defaultdict(float)
        self.after: dict[str, float] = defaultdict(float)
        self.stats: dict[str, Any] = {}
        self.notes: list[str] = []


def first_run(recipe: Recipe) -> Recipe:
    """The first run of a recipe: itself, or what its plan asks for first, which may add what the recipe alone
    lacks. A run with rows of its own says nothing of the recipe's: then the recipe without its plan.
    """
    if recipe.plan is None:
        return recipe
    alone = recipe.but(plan=None)
    request = next(build("plan", recipe.plan_spec()).recipes(alone), alone)
    if isinstance(request, list):
        request = request[0]
    first = first_run(request)
    if first.data != recipe.data:
        return alone
    return first


def dry_run_plan(
    recipe: Recipe, rows: Sequence[dict], load_rows: Callable[[Recipe], Sequence[dict]]
) -> frozenset[str]:
    """Go through the runs of a plan with empty reports, and validate each. Returns what their methods
    require: a run may leave a role unused that another one requires.
    """
    runs = build("plan", recipe.plan_spec()).recipes(recipe.but(plan=None))
    required: frozenset[str] = frozenset()
    try:
        request = next(runs)
        while True:
            several = isinstance(request, list)
            reports = []
            for run in request if several else [request]:
                sample = rows
                if run.data != recipe.data and DRY_RUN not in str(run.data):
                    sample = load_rows(run)
                if run.plan is None:
                    required |= dry_run(run, sample).require()
                else:
                    required |= dry_run_plan(run, sample, load_rows)
                reports.append(DryRunReport())
            request = runs.send(reports if several else reports[0])
    except StopIteration:
        return required
