"""A recipe is played through before anything is computed: what each part wants must be given by another part.

Words flow in the order of a run: rows -> stages -> live stages -> roles -> estimator, chain, objective,
evaluators. Stages that ask no model are also tried on two rows: what their rows show counts more than what
they declare. A plan is played with empty reports, so that the mistake of its third act is refused before the
first begins.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.kernels import compiled
from luthier.recipe import model_names
from luthier.recipe.recipe import Recipe
from luthier.recipe.schedule import schedule
from luthier.registry import build, cards, did_you_mean, find, provides_of, requires_of

WORDS = {  # how a word reads in a sentence
    "completions": "rows with completions",
    "pairs": "rows with at least two completions of different score (prompt/chosen/rejected)",
    "scores": "a score for each completion",
    "rewards": "several rewards of each completion, by name (column `rewards`)",
    "contexts": "rows with two `contexts`, one for each of two completions",
    "contrasts": "answers read with the right context, with none and with the wrong one (column `contrasts`)",
    "samples": "completions that the policy itself has just written",
    "old": "the sampler's own log-probabilities",
    "answer": "rows with a known `answer`",
    "tests": "rows with `tests`",
    "label": "rows with a `label`",
    "world": "rows of a practice world",
    "remembered": "remembered log-probabilities",
    "teacher_ids": "a teacher's likeliest tokens, kept with the rows",
    "teacher_logprobs": "a teacher's log-probabilities of them",
    "teacher_spans": "a teacher's log-probabilities of spans of text (stage teacher_spans)",
    "reference": "a reference model",
    "teacher": "a teacher model",
    "critic": "a critic",
    "bucket": "rows with a `bucket` (stage buckets)",
    "memory": "a memory of features",
    "paired": "features of the reference and of the policy, side by side (role `paired`)",
    "generator": "a generator of features for classes that no row has",
    "parts": "heads that put parts together and take wholes apart",
    "off": "a tuner that can be switched off",
    "codes": "a quantized base whose scales or code books can be trained",
    "merge": "a tuner that can be merged",
    "low-rank": "a tuner made of A and B",
    "grad": "a true gradient",
    "logprobs": "token probabilities",
    "entropy": "a distribution over tokens",
    "top": "a vocabulary to compare",
    "hidden": "hidden states",
    "generate": "a network that writes text",
    "embeddings": "a network whose tokens can be read mixed (a causal one)",
    "line_mask": "marks of the lines in which a right and a wrong program differ (column `line_mask`)",
    "token_mask": "marks of the tokens in which a right and a wrong program differ (column `token_mask`)",
    "rationale": "rows with a `rationale`",
    "tasks": "completions told apart by task (column `tasks`)",
    "tools": "rows with `tools`",
    "source": "rows with a `source`",
    "elastic": "a tuner with sub-networks (`elastic`)",
    "hyper": "a tuner that answers to hyperparameters (`self_tuning`)",
    "steps": "rows with `steps` of a solution and a label for each",
    "step_targets": (
        "marks of the tokens at which a step ends, and whether it was right (column `step_targets`)"
    ),
    "sampler": "somebody who writes in the policy's place",
    "values": "a network that gives numbers, not words (architecture `reward_model`)",
}
ADVICE = {
    "codes": "e.g. `quantization: {name: rtn, bits_per_weight: 2}`",
    "reference": "say who plays it, e.g. `roles: {reference: start}`",
    "teacher": "say who plays it, e.g. `roles: {teacher: {name: model, model: FOLDER}}`",
    "memory": (
        "say `roles: {memory: memory}`; with it goes a running average of the policy, `teacher: mean_teacher`"
    ),
    "generator": "say `roles: {generator: {name: generator, known: [...], unknown: [...]}, teacher: recent}`",
    "parts": "say `roles: {parts: part_whole, teacher: mean_teacher}`",
    "off": "or let another play: `roles: {reference: start}` keeps a copy of what moves",
    "sampler": (
        "say who plays it, e.g. `roles: {sampler: {name: vllm, base_url: http://localhost:8000/v1, model:"
        " MODEL}}`"
    ),
    "samples": "e.g. `live: [{name: rollout, n: 8}, {name: score, reward: exact_match}]`",
    "pairs": "give prompt/chosen/rejected rows, or make pairs with the stages rollout, score, pairs",
}


@dataclass
class Parts:
    """Every method of a recipe, built and checked."""

    architecture: Any
    tuner: Any
    objective: Any  # None where nothing is trained
    estimator: Any
    chain: tuple
    roles: dict[str, Any]
    stages: list
    live: list
    evaluate: list  # where the recipe names none: whatever of the usual the rows allow, decided by `checked`
    quantizer: Any = None  # what the base's linear weights are kept in


def parts(recipe: Recipe) -> Parts:
    """Build every method; decide what the recipe left open (architecture, who plays the reference)."""
    made = recipe.methods()
    aim = recipe.aim()
    roles = dict(made["roles"])
    asks = [x for x in (aim, *made["stages"], *made["live"], *(made["evaluate"] or ())) if x is not None]
    if "reference" not in roles and any("reference" in wants(x) for x in asks):
        roles["reference"] = build("role", "off" if "off" in provides_of(made["tuner"]) else "start")
    return Parts(
        architecture=made["architecture"] or detect(recipe.model),
        tuner=made["tuner"],
        objective=aim,
        estimator=made["estimator"],
        chain=recipe.chain(),
        roles=roles,
        stages=made["stages"],
        live=made["live"],
        evaluate=made["evaluate"] or [],
        quantizer=made["quantization"],
    )


USUAL = ("loss", "accuracy", "generate", "forgetting")  # evaluators, where a recipe names none


def wants(x: Any) -> frozenset[str]:
    return x.requires if not hasattr(x, "kind") else requires_of(x)


def detect(model: str):
    """The architecture of a checkpoint, by its config."""
    config = model_names.model_config(model)
    suited = [a for a in (build("architecture", c.name) for c in cards("architecture")) if a.suits(config)]
    if len(suited) == 1:
        return suited[0]
    raise RecipeError(
        f"{model}: its config names {', '.join(config.architectures or ['no architecture'])}, which is not"
        f" plainly one of {', '.join(c.name for c in cards('architecture'))}; say which with `architecture:`"
    )


def words(rows: Sequence[dict]) -> set[str]:
    """What every one of these rows offers."""
    have = set.intersection(*(set(r) for r in rows)) if rows else set()
    if not all(r.get("completions") for r in rows):
        have.discard("completions")
    if rows and all(len(r.get("completions", ())) > 1 and len(set(r.get("scores", ()))) > 1 for r in rows):
        have.add("pairs")
    return have


def validate(recipe: Recipe, rows: Sequence[dict] = ()) -> Parts | None:
    """Refuse what cannot work, in a sentence. rows: a sample of the data in canonical form. Plans are played
    through.
    """
    if recipe.plan is not None:
        _play(recipe, rows)
        return None
    return checked(recipe, rows)


def checked(recipe: Recipe, rows: Sequence[dict] = ()) -> Parts:
    """The parts of a recipe without a plan, each given what it wants."""
    p = parts(recipe)
    model_names.resolve_model(recipe.model)
    if p.quantizer is not None:
        sits_on_codes(p.tuner, p.quantizer)
    schedule(recipe.lr_scheduler_type, recipe.warmup_steps, 1)
    if recipe.torch_compile:
        compiled.possible()
    if isinstance(recipe.start, dict):
        build("merger", recipe.start.get("merge"))
    have = (
        words(rows)
        | p.architecture.provides
        | p.estimator.provides
        | provides_of(p.tuner)
        | set(p.roles)
        | (provides_of(p.quantizer) if p.quantizer else set())
    )
    measured = frozenset(have)  # held-out rows go through no stage
    if recipe.evaluate is None:
        p.evaluate = [e for e in (build("evaluator", name) for name in USUAL) if wants(e) <= measured]
    for e in p.evaluate:
        _need(e, measured, recipe)
    watched(recipe.report_to)
    tried = list(rows[:2])
    for s in (*p.stages, *p.live):
        _need(s, have, recipe)
        have = (have - s.removes) | provides_of(s)
        before, tried = words(tried), _try(s, tried)
        if tried:
            have = (have - (before - words(tried))) | (words(tried) - before)
    for x in (p.tuner, *p.roles.values(), p.estimator, *p.chain, *([p.objective] if p.objective else [])):
        _need(x, have, recipe)
    if p.objective is not None:
        p.estimator.suits(p.objective)
        learns_by_value(p, have, recipe)
    if (
        p.objective is not None
        and "samples" in wants(p.objective)
        and not any("samples" in s.provides for s in p.live)
    ):
        raise RecipeError(
            f"{_name(p.objective, recipe)} learns from fresh samples; write the rollout under `live`, not"
            " under `stages`"
        )
    if p.objective is not None and recipe.num_iterations > 1:
        if "samples" not in wants(p.objective):
            raise RecipeError(
                f"num_iterations: {recipe.num_iterations} learns from each draw of samples several times, and"
                f" {_name(p.objective, recipe)} learns from none"
            )
        if "old" not in have:
            raise RecipeError(
                f"num_iterations: {recipe.num_iterations} needs the sampler's own log-probabilities: `live:"
                " [{name: rollout, old: true}, ...]`"
            )
    return p


def learns_by_value(p: Parts, have: Set[str], recipe: Recipe) -> None:
    """Refuses an estimator that compares values of a loss whose value never changes."""
    if (
        "grad" in provides_of(p.estimator)
        or "old" in have
        or not any(term.flat for _, term in p.objective.terms())
    ):
        return
    raise RecipeError(
        f"estimator '{p.estimator.name}' compares values of the loss, and that of"
        f" {_name(p.objective, recipe)} is the same wherever the policy goes, unless rows say how likely"
        " their sampler found them: `live: [{name: rollout, old: true}, ...]`"
    )


def sits_on_codes(tuner: Any, quantizer: Any) -> None:
    """Refuses a tuner that moves the very weights that a quantized base keeps as codes."""
    if not tuner.on_quantized:
        able = [f"'{c.name}'" for c in cards("tuner") if find("tuner", c.name).on_quantized]
        raise RecipeError(
            f"tuner '{tuner.name}' moves the model's own weights, and under quantization: {quantizer.name}"
            f" they are codes that do not move; take one of {', '.join(able)}, or leave quantization out"
        )


class DryRunRoles:
    """Whom a stage may ask while it is tried: nobody; what it has to tell, it will tell in the run."""

    def __init__(self):
        self.clock = Clock()

    def warn(self, sentence: str) -> None:
        pass


def _try(stage: Any, rows: list[dict]) -> list[dict]:
    """What a stage makes of rows, without a model; none where it needs one, or where none is left to go on
    with.
    """
    if stage.asks_model or not rows:
        return []
    try:
        return list(stage(rows, DryRunRoles()))
    except RecipeError:
        raise
    except Exception as error:
        raise RecipeError(
            f"stage '{stage.name}' fails on the first rows: {type(error).__name__}: {error}"
        ) from error


def watched(trackers: Sequence[str]) -> None:
    """Refuses trackers that are not there: accelerate would leave them out with no word."""
    if not trackers:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    known, own = [str(t) for t in LOGGER_TYPE_TO_CLASS], {str(t) for t in get_available_trackers()}
    for name in trackers:
        if name not in known:
            raise RecipeError(f"report_to: accelerate has no tracker '{name}'{did_you_mean(name, known)}")
        if name in LoggerType.list() and name not in own:
            raise RecipeError(
                f"report_to: '{name}' is not installed: pip install {name.replace('comet_ml', 'comet-ml')}"
            )


def _need(x: Any, have: Set[str], recipe: Recipe) -> None:
    for word in sorted(wants(x) - have):
        givers = [f"{c.kind} '{c.name}'" for c in cards() if word in c.provides]
        raise RecipeError(
            f"{_name(x, recipe)} wants {WORDS.get(word, f'rows with a column `{word}`')}, and nothing in this"
            " recipe gives it"
            + (f"; given by: {', '.join(givers)}" if givers else "")
            + (f"; {ADVICE[word]}" if word in ADVICE else "")
        )


def _name(x: Any, recipe: Recipe) -> str:
    return f"{x.kind} '{x.name}'" if hasattr(x, "kind") else f"objective '{recipe.objective}'"


class DryRunReport:
    """A report of a run that has not happened."""

    folder = "rehearsal"

    def __init__(self):
        self.before, self.after, self.stats, self.notes = defaultdict(float), defaultdict(float), {}, []


def _sample(recipe: Recipe) -> Sequence[dict]:
    """Rows of an act that has data of its own."""
    from luthier.data.load import load_data

    return load_data(recipe).rows[:100] if recipe.data is not None else ()


def opening(recipe: Recipe) -> Recipe:
    """The first run of a recipe: itself, or what its plan asks for first, which may add what the recipe alone
    lacks. An act with rows of its own says nothing of the recipe's: then the recipe without its plan."""
    if recipe.plan is None:
        return recipe
    alone = recipe.but(plan=None)
    asked = next(build("plan", recipe.plan_spec()).recipes(alone), alone)
    first = opening(asked[0] if isinstance(asked, list) else asked)
    return first if first.data == recipe.data else alone


def _play(recipe: Recipe, rows: Sequence[dict]) -> None:
    play = build("plan", recipe.plan_spec()).recipes(recipe.but(plan=None))
    try:
        asked = next(play)
        while True:
            several = isinstance(asked, list)
            for r in asked if several else [asked]:
                validate(
                    r, rows if r.data == recipe.data or DryRunReport.folder in str(r.data) else _sample(r)
                )
            asked = play.send([DryRunReport() for _ in asked] if several else DryRunReport())
    except StopIteration:
        return
