"""A recipe: plain data, read from YAML or Python, written back in full, refused in a sentence before any
compute.

recipe/read.py reads it: aliases of other tools, settings of methods written at the top, `a.b=c` changes;
recipe/validate.py matches what each part requires with what the others provide.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from luthier.errors import RecipeError, quoted, shortened
from luthier.recipe.aliases import ALIASES, FORMER_KEYS
from luthier.recipe.defaults import AUTO, RATE, TERM, DefaultRate, default_rate
from luthier.recipe.read import as_spec, read
from luthier.registry import Range, build, format_errors, spec

# fields that are no keys of their own
HIDDEN = ("learning_rates", "origins", "warnings", "_built")
# keys that may change without making it another run
NOT_THE_RUN = (
    "data",
    "eval_data",
    "output_dir",
    "overwrite",
    "logging_steps",
    "report_to",
    "save_steps",
    "save_total_limit",
    "stop_on_divergence",
)

# that the first editions did not have
LATER_KEYS = ("chat_template_kwargs", "split_special_tokens", "max_eval_samples")


def as_list(value: Any) -> Any:
    """A name as a list of one; 'none' and nothing as an empty list."""
    if value is None or value == "none":
        return []
    return [value] if isinstance(value, str) else value


Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Amount = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run; with `plan`, several. Every field is a key of the YAML file."""

    # the model

    model: str = "toy:lm"  # model to fine-tune: a folder, Hub name, or toy:NAME
    # kind of model: causal, seq2seq, masked_lm, classifier, ...; auto: from its config
    architecture: Any = "auto"
    # auto: bfloat16 if the hardware computes in it
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attn_implementation: str | None = None  # as in transformers: sdpa, eager, ...
    # built-in name, .jinja file or template text, instead of the tokenizer's own
    chat_template: str | None = None
    # variables for the chat template of every row and every prompt, e.g. {enable_thinking: false}
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    # new tokens of the tokenizer, each one id, whose rows of the embeddings are trained and saved with the
    # adapter: a list, or {tokens: [...], special: true, train: new | all}
    add_tokens: Any = None
    # special tokens typed in messages of users, systems and tools are read as text, not as control tokens
    split_special_tokens: bool = True
    # number format of the base's linear weights: nf4, int8, {name: nf4, block_size: 64}; load_in_4bit is
    # read as nf4
    quantization: Any = None
    # a finished run whose adapter training starts from, {merge: average, of: [run, run]}, or
    # {modules_of: run}: its adapter without its head, for other labels
    init_from: Any = None

    tuner: Any = "lora"  # which parameters are trained: lora, full, ...
    # the loss: a name, a sum such as "dpo + 0.1*sft", or a list of {name, weight, ...}
    objective: Any = "sft"
    # other models of the run: {reference: base | initial | {name: model, ...}}
    roles: dict[str, Any] = field(default_factory=dict)
    estimator: Any = "backprop"  # how the gradient is computed
    # the optimizer: a name, or a chain of transforms such as [clip, adam, weight_decay]
    optim: Any = "adamw"
    # learning rate of the optimizer; default: what the tuner declares, times what objective and optimizer do;
    # {default: 2e-4, lora_B: 2e-3} gives parameters and modules rates of their own by name
    learning_rate: Annotated[float, Field(ge=0, allow_inf_nan=False), Range(1e-5, 1e-2, log=True)] = RATE
    # rates of single parameters or modules by name, of a `learning_rate` that is a mapping
    learning_rates: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = field(
        default_factory=dict
    )
    # learning-rate schedule: constant, linear, cosine, cosine_with_restarts, cosine_with_min_lr, polynomial,
    # warmup_stable_decay
    lr_scheduler_type: str = "linear"
    # settings of the schedule: min_lr or min_lr_rate, num_cycles, power, decay_ratio, decay_type
    lr_scheduler_kwargs: dict[str, Any] = field(default_factory=dict)
    # steps of linear warm-up; below 1, a share of the run
    warmup_steps: Annotated[float, Field(ge=0, allow_inf_nan=False), Range(0, 0.3)] = 0.03

    # the data

    # training data: file, folder, Hub name, toy:TASK, {path, split, format, columns, limit}, rows, or a
    # list
    data: Any = None
    # held-out data in the same forms, or the share of `data` that is held out; auto: the validation or test
    # files that `data` brings, else 0.05, of few rows more and of many 2,000 rows
    eval_data: Any = "auto"
    max_length: Count | None = None  # maximum tokens per row; default: what the model can read, up to 2048
    max_bad_rows: Share = 0.05  # maximum share of unusable rows; with more, the run stops before training
    stages: list[Any] = field(default_factory=list)  # stages that process the rows once, before training
    # stages that process the rows of each step, with the current policy
    online_stages: list[Any] = field(default_factory=list)
    num_iterations: Count = 1  # optimizer steps per batch of online samples

    # passes over the training rows; auto: as many as it takes to read 3,000 rows, at least 1, at most 10
    num_train_epochs: Amount | Literal["auto"] = AUTO
    # optimizer steps, instead of epochs; 0 trains nothing
    max_steps: Annotated[int, Field(ge=0)] | None = None
    per_device_train_batch_size: Count = 8  # rows per micro-batch
    gradient_accumulation_steps: Count = 1  # micro-batches per optimizer step; changes memory, not the result
    # recompute activations in the backward pass; auto: if a step would not fit otherwise
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    # compile the model's layers; for long runs, as the first steps then take minutes
    torch_compile: bool = False
    # cache the outputs of the layers below the tuner on disk; auto: where rows are read more than once
    cache_frozen: bool | Literal["auto"] = "auto"
    # cache the outputs of roles that never change on disk; auto: where rows are read more than once
    cache_reference: bool | Literal["auto"] = "auto"
    seed: int = 0  # random seed of the whole run

    # the plan
    plan: Any = None  # rounds, continual, search; a list is a sequence of changes to this recipe

    # evaluation and output

    # evaluators to run before and after; default: loss, accuracy, generate, forgetting, and preference for
    # pairs, if the rows allow them
    evaluate: list[Any] | None = None
    # held-out rows that metrics are measured on, the same for every seed; all: every one
    max_eval_samples: Count | Literal["all"] = 300
    # steps between evaluations during training (below 1: a share of the run); default: none
    eval_steps: Amount | None = None
    # end with the weights of the evaluation that was best, not with the last ones
    load_best_model_at_end: bool = False
    metric_for_best_model: str = "loss"  # which of the metrics tells the best weights
    # stop after so many evaluations in turn without a better one; default: never
    early_stopping_patience: Annotated[int, Field(ge=1)] | None = None
    # a better evaluation is one that is better by more than this
    early_stopping_threshold: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    save_steps: Amount = 0.1  # steps between checkpoints (below 1: a share of the run)
    save_total_limit: Count = 2  # number of checkpoints to keep
    logging_steps: Count = 1  # steps between lines in metrics.jsonl
    # trackers of accelerate: tensorboard, wandb, mlflow, trackio, ...
    report_to: Annotated[list[str], BeforeValidator(as_list)] = field(default_factory=list)
    stop_on_divergence: bool = False  # stop where the loss has risen to more than twice its first values
    output_dir: str | None = None  # folder of the run; default: runs/<name made from the recipe>
    overwrite: bool = False  # start over in a folder that holds another recipe's run

    # key -> where its value came from
    origins: dict[str, str] = field(default_factory=dict, compare=False, repr=False)
    # what was understood differently from how it was written
    warnings: tuple[str, ...] = field(default=(), compare=False, repr=False)
    # the methods of this recipe, built when first used
    _built: dict[str, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    # ------------------------------------------------------------------------------------------ reading

    @staticmethod
    def load(
        source: str | Path | Mapping | Recipe | None = None, changes: Sequence[str] | Mapping | None = None
    ) -> Recipe:
        """Read a recipe.

        Args:
            source: a YAML file, YAML text, a mapping, a `Recipe`, toy:TASK, or recipe:NAME.
            changes: ["learning_rate=1e-4", "tuner.r=16"] or a mapping.

        Raises:
            RecipeError: a key, a method or a value is not understood.
        """
        if isinstance(source, Recipe):
            source = source.written()
        reading = read(source, changes, DEFAULTS)
        try:
            recipe = _ADAPTER.validate_python(reading.out)
        except ValidationError as error:
            raise RecipeError(f"recipe: {format_errors(error)}") from None
        recipe.check_paths()
        origins = {key: reading.origins.get(key, "default") for key in DEFAULTS}
        changed = {}
        if "learning_rate" not in reading.out:
            changed["learning_rate"] = recipe.default_rate().value
        return replace(recipe, origins=origins, warnings=tuple(reading.warnings), **changed)

    def but(self, **changes: Any) -> Recipe:
        """The same with changes; keys (aliases, a.b) and values as in YAML."""
        replaced = set()
        for key in changes:
            if key in ("bf16", "fp16"):
                key = "dtype"
            replaced.add(key_of(key))
        rest = {k: v for k, v in self.written().items() if k not in replaced}
        changed = Recipe.load(rest, changes)
        origins = {k: v for k, v in self.origins.items() if k in rest}
        return replace(changed, origins={**changed.origins, **origins})

    def check_paths(self) -> None:
        """Refuse a path that the system cannot even be asked about: too long, or behind a closed folder."""
        for key in ("output_dir", "init_from", "chat_template"):
            value = getattr(self, key)
            if not isinstance(value, (str, Path)) or "{" in str(value):  # text of a template
                continue
            try:
                Path(value).expanduser().exists()
            except (OSError, RuntimeError, ValueError) as error:  # also: ~nobody, a NUL byte
                reason = getattr(error, "strerror", None) or error
                raise RecipeError(f"{key}: {shortened(str(value))} cannot be read ({reason})") from None

    # ------------------------------------------------------------------------------------------ writing

    def public(self) -> dict[str, Any]:
        """Every key and value as plain data."""
        values = {f.name: spec(getattr(self, f.name)) for f in fields(self) if f.name not in HIDDEN}
        if self.learning_rates:
            values["learning_rate"] = {"default": self.learning_rate, **self.learning_rates}
        return values

    def written(self) -> dict[str, Any]:
        """`public` without a learning rate that is a default: another tuner or objective has another."""
        values = self.public()
        if self.origins.get("learning_rate") == "default":
            del values["learning_rate"]
            if self.learning_rates:
                values["learning_rate"] = dict(self.learning_rates)
        return values

    def default_rate(self) -> DefaultRate:
        """The learning rate that this recipe has where it names none."""
        return default_rate(self.tuner, self.objective, self.optim)

    @property
    def compares_evaluations(self) -> bool:
        """Whether evaluations during training are compared with each other, for the best one."""
        return self.load_best_model_at_end or self.early_stopping_patience is not None

    @property
    def best_metric(self) -> str:
        """The metric that tells the best weights; transformers writes `eval_` before it."""
        return self.metric_for_best_model.removeprefix("eval_")

    def yaml(self) -> str:
        """The whole recipe, defaults included, methods with all their settings."""
        resolved = {**self.public(), **self.specs()}
        return yaml.safe_dump(plain(resolved), sort_keys=False, allow_unicode=True, width=110)

    def fingerprint(self) -> str:
        """What makes two runs the same run: all but where it is written, how it is watched, and where its
        rows lie (the rows themselves are compared by what is in them). Of micro-batches only the product of
        their size and their number counts.
        """
        values = {**self.public(), **self.specs()}
        values["per_device_train_batch_size"] *= values["gradient_accumulation_steps"]
        values["gradient_accumulation_steps"] = 1
        for key in NOT_THE_RUN:
            values.pop(key, None)
        for key in LATER_KEYS:  # so that runs begun without the key are found again
            if values[key] == DEFAULTS[key]:
                del values[key]
        text = json.dumps(plain(values), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def specs(self) -> dict[str, Any]:
        """The methods with every setting written out, by key."""
        out = {key: spec(value) for key, value in self.methods().items() if value is not None}
        if self.objective is None:
            return out
        objective = self.aim()
        if hasattr(objective, "kind"):
            out["objective"] = spec(objective)
        else:
            out["objective"] = [{**spec(term), "weight": weight} for weight, term in objective.parts]
        return out

    # ------------------------------------------------------------------------------------------ methods

    def methods(self) -> Mapping[str, Any]:
        """Every method that the recipe names, by key, built and checked once."""
        if "methods" not in self._built:
            self._built["methods"] = self._build()
        return self._built["methods"]

    def _build(self) -> dict[str, Any]:
        out: dict[str, Any] = {"architecture": None, "quantization": None, "evaluate": None, "plan": None}
        if self.architecture != "auto":
            out["architecture"] = build("architecture", self.architecture)
        out["tuner"] = build("tuner", self.tuner)
        if self.quantization is not None:
            out["quantization"] = build("quantizer", self.quantization)
        out["estimator"] = build("estimator", self.estimator)
        if isinstance(self.optim, (list, tuple)):
            out["optim"] = build_each("transform", self.optim)
        else:
            out["optim"] = build("optimizer", self.optim)
        out["stages"] = build_each("stage", self.stages)
        out["online_stages"] = build_each("stage", self.online_stages)
        if self.evaluate is not None:
            out["evaluate"] = build_each("evaluator", self.evaluate)
        out["roles"] = {name: build("role", r) for name, r in self.roles.items()}
        if self.plan is not None:
            out["plan"] = build("plan", self.plan_spec())
        return out

    def aim(self) -> Any:
        """The objective, a Sum where several terms were named; None where nothing is trained."""
        if self.objective is None:
            return None
        if "objective" not in self._built:
            self._built["objective"] = terms(self.objective)
        return self._built["objective"]

    def chain(self) -> tuple:
        """The transforms of the optimizer."""
        optim = self.methods()["optim"]
        chain = tuple(optim) if isinstance(optim, list) else optim.chain()
        if self.learning_rates:
            chain += (build("transform", {"name": "parameter_rates", "factors": self.rate_factors()}),)
        return chain

    def rate_factors(self) -> dict[str, float]:
        """Name -> its learning rate divided by that of all other parameters."""
        if not self.learning_rate:
            raise RecipeError("learning_rate: beside rates of single parameters the default must not be 0")
        return {name: rate / self.learning_rate for name, rate in self.learning_rates.items()}

    def plan_spec(self) -> Any:
        """The plan as a method; a list is a sequence of changes to this recipe."""
        if isinstance(self.plan, list):
            return {"name": "sequence", "runs": self.plan}
        return self.plan


def key_of(word: str) -> str:
    """The key of a recipe that a word stands for: other tools' and former ones are understood."""
    return FORMER_KEYS.get(word, ALIASES.get(word, word))


def build_each(kind: str, specs: Sequence[Any]) -> list[Any]:
    """The methods of a list of specs."""
    return [build(kind, each) for each in specs]


def plain(value: Any) -> Any:
    """As YAML and JSON can write it: what is neither a collection nor a scalar as text."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    return str(value)


def weight_of(value: Any) -> float:
    """The weight of a term of an objective. Raises RecipeError where it is no finite number."""
    try:
        weight = float(value)
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if isinstance(value, bool) or not math.isfinite(weight):
        raise RecipeError(f"objective: weight must be a finite number, not {quoted(value)}")
    return weight


def terms(value: Any) -> Any:
    """'sft + 0.1*kl', a name, {name: dpo, beta: 0.2}, or [{name: dpo, weight: 1}, ...] -> an objective.

    Raises RecipeError where it is none of these.
    """
    from luthier.methods.objectives._base import Sum

    if getattr(value, "kind", None) == "objective":
        return value
    if isinstance(value, str):
        if not re.fullmatch(rf"{TERM}(\+{TERM})*", value):
            raise RecipeError(f"objective: {quoted(value)} must be a name or a sum such as 'dpo + 0.1*sft'")
        value = [{"name": name, "weight": weight or 1} for weight, name in re.findall(TERM, value)]
    if not isinstance(value, (list, tuple)):
        value = [value]
    parts = []
    for term in value:
        if not isinstance(term, (str, Mapping)):
            raise RecipeError(f"objective: expected a name or {{name: ..., weight: ...}}, not {quoted(term)}")
        settings = as_spec(term)
        weight = weight_of(settings.pop("weight", 1.0))
        parts.append((weight, build("objective", settings)))
    if len(parts) == 1 and parts[0][0] == 1.0:
        return parts[0][1]
    return Sum(parts=tuple(parts))


Recipe.__pydantic_config__ = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
DEFAULTS = {f.name: f.default for f in fields(Recipe) if f.name not in HIDDEN}
_ADAPTER = TypeAdapter(Recipe)
