"""A recipe: plain data, read from YAML or Python, written back in full, refused in a sentence before any
compute.

`Recipe.load` knows aliases of other tools, settings of methods written at the top, and `a.b=c` changes; it
remembers where every value came from. `validate` matches what each part wants with what the others give.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from luthier.errors import RecipeError
from luthier.registry import Range, build, cards, did_you_mean, find, format_errors, names, spec
from luthier.storage.toy import is_toy, toy_name, toy_package

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run; with `plan`, several. Every field is a key of the YAML file."""

    # the model
    model: str = "toy:lm"  # folder, hub name, or toy:NAME
    architecture: Any = "auto"  # how the network reads and writes: causal, seq2seq, masked_lm, classifier
    # auto: bfloat16 where the chip computes in it
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attn_implementation: str | None = None  # as in transformers: sdpa, eager, ...
    # built-in name, .jinja file or template text, where the tokenizer's own will not do
    chat_template: str | None = None
    # what the base's linear weights are kept in: nf4, int8, {name: nf4, block_size: 64}; load_in_4bit
    # reads as nf4
    quantization: Any = None
    start: Any = None  # a finished run to go on from, or {merge: average, of: [run, run]}

    # what moves, toward what, how
    tuner: Any = "lora"  # what moves
    # toward what: a name, a sum such as "dpo + 0.1*sft", or a list of {name, weight, ...}
    objective: Any = "sft"
    # who else is asked: {reference: off | start | {name: model, ...}}
    roles: dict[str, Any] = field(default_factory=dict)
    estimator: Any = "backprop"  # where the gradient comes from
    optim: Any = "adamw"  # what becomes of it, by name
    transforms: list[Any] | None = None  # the same as a chain of transforms, in place of optim
    learning_rate: Annotated[float, Field(ge=0), Range(1e-5, 1e-2, log=True)] = 2e-4  # length of a step
    lr_scheduler_type: str = "linear"  # constant, linear, cosine, warmup_stable_decay
    # steps of linear warm-up; below 1, a share of the run
    warmup_steps: Annotated[float, Field(ge=0), Range(0, 0.3)] = 0.03

    # on which rows
    # file, folder, hub name, toy:TASK, {path, split, format, columns, limit}, rows, or a list
    data: Any = None
    eval_data: Any = 0.05  # the same, or the share of data that is held out
    max_length: Count | None = None  # tokens of a row at most; default: what the model can read, up to 2048
    max_bad_rows: Share = 0.05  # share of unusable rows above which the run stops before it starts
    stages: list[Any] = field(default_factory=list)  # rows in, rows out: once, before training
    # rows in, rows out: on the rows of each step, with the policy of that step
    live: list[Any] = field(default_factory=list)
    num_iterations: Count = 1  # optimizer steps for each draw of live rows

    # for how long
    num_train_epochs: Annotated[float, Field(gt=0)] = 1.0  # passes over the rows
    # optimizer steps, in place of epochs; 0 trains nothing
    max_steps: Annotated[int, Field(ge=0)] | None = None
    per_device_train_batch_size: Count = 8  # rows of a micro-batch
    # micro-batches of an optimizer step; changes memory, never the result
    gradient_accumulation_steps: Count = 1
    # recompute activations in backward; auto: where a step would not fit
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    # compile the network's layers: for long runs, as the first steps then take minutes
    torch_compile: bool = False
    # keep on disk what layers below the tuner say of a row; auto: where rows are read again
    cache_frozen: bool | Literal["auto"] = "auto"
    # keep on disk what a role that never changes says of a row; auto: where rows are read again
    cache_reference: bool | Literal["auto"] = "auto"
    seed: int = 0  # of every random draw

    # over which plan
    plan: Any = None  # rounds, continual, search; a list is a sequence of changes to this recipe

    # and then
    # measured before and after; default: loss, accuracy, generate, forgetting, where the rows allow
    evaluate: list[Any] | None = None
    # and every so many steps (below 1: a share of the run)
    eval_steps: Annotated[float, Field(gt=0)] | None = None
    save_steps: Annotated[float, Field(gt=0)] = 0.1  # steps between checkpoints (below 1: a share of the run)
    save_total_limit: Count = 2  # checkpoints that are kept
    logging_steps: Count = 1  # steps between lines of metrics.jsonl
    # trackers of accelerate: tensorboard, wandb, mlflow, trackio, ...
    report_to: list[str] = field(default_factory=list)
    output_dir: str | None = None  # run folder; default: runs/<name made of the recipe>
    overwrite: bool = False  # start anew in a folder that holds another recipe's run

    # key -> where its value came from
    origins: dict[str, str] = field(default_factory=dict, compare=False, repr=False)
    # what was understood differently from how it was written
    told: tuple[str, ...] = field(default=(), compare=False, repr=False)

    # ------------------------------------------------------------------------------------------ reading

    @staticmethod
    def load(
        source: str | Path | Mapping | Recipe | None = None, changes: Sequence[str] | Mapping | None = None
    ) -> Recipe:
        """source: a YAML file, YAML text, a mapping, or toy:TASK. changes: ["learning_rate=1e-4",
        "tuner.r=16"] or a mapping.

        Raises RecipeError for whatever cannot be understood.
        """
        if isinstance(source, Recipe):
            source = source.public()
        given, name = _read(source)
        origins = {k: name for k in given}
        # tuner=lora must not undo tuner.r=16
        for key, value in sorted(_changes(changes), key=lambda c: c[0].count(".")):
            _put(given, key, value)
            origins[key.split(".")[0]] = "command line"
        return _recipe(given, origins)

    def but(self, **changes: Any) -> Recipe:
        """The same with changes; keys (aliases, a.b) and values as in YAML."""
        named = {"dtype" if k in ("bf16", "fp16") else ALIASES.get(k, k) for k in changes}
        return Recipe.load({k: v for k, v in self.public().items() if k not in named}, changes)

    # ------------------------------------------------------------------------------------------ writing

    def public(self) -> dict[str, Any]:
        """Every key and value as plain data."""
        return {
            f.name: spec(getattr(self, f.name)) for f in fields(self) if f.name not in ("origins", "told")
        }

    def yaml(self) -> str:
        """The whole recipe, defaults included, methods with all their settings."""
        resolved = {**self.public(), **self._specs()}
        return yaml.safe_dump(_plain(resolved), sort_keys=False, allow_unicode=True, width=110)

    def fingerprint(self) -> str:
        """What makes two runs the same run: all but where it is written, how it is watched, and where its
        rows lie (the rows themselves are compared by what is in them)."""
        shy = (
            "data",
            "eval_data",
            "output_dir",
            "overwrite",
            "logging_steps",
            "report_to",
            "save_steps",
            "save_total_limit",
        )
        values = {k: v for k, v in self.public().items() if k not in shy}
        values |= self._specs()
        return hashlib.sha256(json.dumps(_plain(values), sort_keys=True, default=str).encode()).hexdigest()[
            :16
        ]

    def _specs(self) -> dict[str, Any]:
        """The methods with every setting written out."""
        out = {k: spec(v) for k, v in self.methods().items() if v is not None}
        if self.objective is not None:
            aim = self.aim()
            out["objective"] = (
                [{**spec(o), "weight": w} for w, o in aim.parts] if not hasattr(aim, "kind") else spec(aim)
            )
        return out

    # ------------------------------------------------------------------------------------------ parts

    def methods(self) -> dict[str, Any]:
        """Every method that the recipe names, built and checked."""
        made = {
            "architecture": None if self.architecture == "auto" else build("architecture", self.architecture),
            "tuner": build("tuner", self.tuner),
            "quantization": None if self.quantization is None else build("quantizer", self.quantization),
            "estimator": build("estimator", self.estimator),
            "optim": build("optimizer", self.optim) if self.transforms is None else None,
            "transforms": (
                None if self.transforms is None else [build("transform", t) for t in self.transforms]
            ),
            "stages": [build("stage", s) for s in self.stages],
            "live": [build("stage", s) for s in self.live],
            "evaluate": None if self.evaluate is None else [build("evaluator", e) for e in self.evaluate],
            "roles": {k: build("role", r) for k, r in self.roles.items()},
            "plan": None if self.plan is None else build("plan", self.plan_spec()),
        }
        return made

    def aim(self):
        """The objective, a Sum where several terms were named; None where nothing is trained."""
        return None if self.objective is None else terms(self.objective)

    def chain(self) -> tuple:
        """The transforms of the optimizer."""
        made = self.methods()
        return tuple(made["transforms"]) if made["optim"] is None else made["optim"].chain()

    def plan_spec(self) -> Any:
        return {"name": "sequence", "acts": self.plan} if isinstance(self.plan, list) else self.plan


# ---------------------------------------------------------------------------------------------- understanding

ALIASES = {  # other tools' words for ours
    "model_name_or_path": "model",
    "base_model": "model",
    "model_id": "model",
    "model_name": "model",
    "dataset": "data",
    "datasets": "data",
    "dataset_name": "data",
    "train_file": "data",
    "train_data": "data",
    "eval_dataset": "eval_data",
    "validation_file": "eval_data",
    "val_size": "eval_data",
    "test_datasets": "eval_data",
    "micro_batch_size": "per_device_train_batch_size",
    "batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "grad_accum": "gradient_accumulation_steps",
    "num_epochs": "num_train_epochs",
    "epochs": "num_train_epochs",
    "steps": "max_steps",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "schedule": "lr_scheduler_type",
    "warmup_ratio": "warmup_steps",
    "optimizer": "optim",
    "optimizers": "optim",
    "cutoff_len": "max_length",
    "sequence_len": "max_length",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "finetuning_type": "tuner",
    "peft_type": "tuner",
    "adapter": "tuner",
    "loss": "objective",
    "lora_r": "r",
    "lora_rank": "r",
    "rank": "r",
    "lora_target_modules": "target_modules",
    "lora_target": "target_modules",
    "lora_modules_to_save": "modules_to_save",
    "sample_packing": "packing",
    "pref_beta": "beta",
    "gradient_clipping": "max_grad_norm",
    "num_generations": "n",
    "max_completion_length": "max_new_tokens",
    "clip_grad_norm": "max_grad_norm",
    "torch_dtype": "dtype",
    "precompute_ref_log_probs": "cache_reference",
    "resume_from_checkpoint": "",
    "do_train": "",
    "overwrite_output_dir": "overwrite",
    "report": "report_to",
    "output": "output_dir",
}
SLOTS = {
    "tuner": "tuner",
    "quantization": "quantizer",
    "estimator": "estimator",
    "optim": "optimizer",
    "architecture": "architecture",
}  # key -> kind
NAMES = {
    "optim": {"adamw_torch": "adamw", "adamw_hf": "adamw", "adamw_torch_fused": "adamw"},
    "tuner": {
        "dora": {"name": "lora", "use_dora": True},
        "rslora": {"name": "lora", "use_rslora": True},
        "pissa": {"name": "lora", "init_lora_weights": "pissa"},
    },
}


def _read(source: Any) -> tuple[dict, str]:
    if source is None:
        return {}, "python"
    if isinstance(source, Mapping):
        return dict(source), "python"
    text, name = str(source), "yaml"
    if is_toy(source):
        try:
            return toy_package().recipe(toy_name(text)), text
        except ValueError as error:
            raise RecipeError(f"{text}: {error}") from None
    if isinstance(source, Path) or ("\n" not in text and text.endswith((".yaml", ".yml", ".json"))):
        path = Path(source)
        if not path.is_file():
            near = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
            raise RecipeError(f"there is no recipe {path}{did_you_mean(path.name, near)}")
        try:
            text, name = path.read_text(encoding="utf-8"), path.name
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path} cannot be read: {error}") from None
    try:
        given = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise RecipeError(
            f"{name}{where}: this is not YAML ({getattr(error, 'problem', None) or 'unreadable'})"
        ) from None
    if not isinstance(given or {}, dict):
        raise RecipeError(
            f"{name}: a recipe is `key: value` lines, not {type(given).__name__} {str(given)[:40]!r}"
        )
    return dict(given or {}), name


def _changes(changes: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(changes, Mapping):
        yield from changes.items()
        return
    for change in changes or ():
        key, equals, value = change.partition("=")
        if not equals or not key.strip():
            raise RecipeError(f"'{change}' is not a change such as learning_rate=1e-4 or tuner.r=16")
        try:
            yield key.strip(), yaml.safe_load(value)
        except yaml.YAMLError:
            raise RecipeError(f"'{change}': the value is not YAML") from None


def _put(given: dict, key: str, value: Any) -> None:
    """a.b=c; a method named by a string becomes {name: ...} so that its settings have a place."""
    first, *rest = key.split(".")
    if not rest:
        given[first] = value
        return
    here = given.get(first)
    if first in SLOTS or first == "objective":
        default = next(f.default for f in fields(Recipe) if f.name == first)
        here = {"name": here or default} if isinstance(here or default, str) else here
    elif here is None:
        here = {}
    elif first == "plan" and isinstance(here, str):
        here = {"name": here}
    if not isinstance(here, dict):
        raise RecipeError(f"'{key}': {first} holds {here!r}, which has no settings")
    here = dict(here)
    _put(here, ".".join(rest), value)
    given[first] = here


def _paths_as_text(given: Any) -> Any:
    """Paths as text, at any depth: from Python they come as `Path`."""
    if isinstance(given, Mapping):
        return {key: _paths_as_text(value) for key, value in given.items()}
    if isinstance(given, list):
        return [_paths_as_text(value) for value in given]
    return os.fspath(given) if isinstance(given, os.PathLike) else given


def _recipe(given: dict, origins: dict[str, str]) -> Recipe:
    keys = {f.name for f in fields(Recipe)} - {"origins", "told"}
    told: list[str] = []
    given = _quantized(_paths_as_text(given), origins, told)
    out: dict[str, Any] = {}
    loose: dict[str, Any] = {}
    where: dict[str, str] = {}
    for key, value in given.items():
        key = str(key)
        name = ALIASES.get(key, key) if key not in keys else key
        if name == "":
            told.append(
                f"'{key}' is left out:"
                f" {'a recipe trains' if key == 'do_train' else 'a run goes on by itself where it was stopped'}"
            )
            continue
        if key in ("bf16", "fp16") and key not in keys:
            if not value and {"dtype", "torch_dtype", "bf16", "fp16"} & (given.keys() - {key}):
                continue  # `bf16: true, fp16: false` says one thing
            name, value = "dtype", ({"bf16": "bfloat16", "fp16": "float16"}[key] if value else "auto")
        if isinstance(value, str):
            value = NAMES.get(key, NAMES.get(name, {})).get(value, value)
        if name != key:
            told.append(f"'{key}' is read as {name}")
        if name in keys:
            if name in out:
                raise RecipeError(f"'{key}' and '{name}' are the same key; give one of them")
            out[name], where[name] = value, origins.get(key, "python")
        else:
            loose[name] = value
            where[name] = origins.get(key, "python")
    if loose:
        _settle(out, loose, keys, told, where)
    try:
        made = _ADAPTER.validate_python(out)
    except ValidationError as error:
        raise RecipeError(f"recipe: {format_errors(error)}") from None
    origin = {k: where.get(k, "default") for k in keys}
    return replace(made, origins=origin, told=tuple(told))


# transformers' settings for ours
BNB = {"bnb_4bit_use_double_quant": "double_quant", "llm_int8_skip_modules": "skip_modules"}


def _quantized(given: dict, origins: dict[str, str], told: list[str]) -> dict:
    """transformers' words for a quantized base (load_in_4bit, ...), and qlora, which other tools call an
    adapter.
    """
    words = [k for k in given if k in ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", *BNB)]
    out = {k: v for k, v in given.items() if k not in words}
    for key, value in given.items():
        if key == "bnb_4bit_compute_dtype":
            out["dtype"], origins["dtype"] = out.pop(key), origins.get(key, "python")
            told.append(f"'{key}' is read as dtype")
        elif ALIASES.get(str(key), key) == "tuner" and (
            value == "qlora" or isinstance(value, Mapping) and value.get("name") == "qlora"
        ):
            out[key] = {**value, "name": "lora"} if isinstance(value, Mapping) else "lora"
            words.append(key)
            told.append(f"'{key}: qlora' is read as tuner lora on a quantized base")
    four = given.get("load_in_4bit") or (
        words and words[-1] not in (*BNB, "bnb_4bit_quant_type", "load_in_4bit", "load_in_8bit")
    )
    if given.get("load_in_4bit") and given.get("load_in_8bit"):
        raise RecipeError("'load_in_4bit' and 'load_in_8bit' cannot both be true; give one of them")
    if not four and not given.get("load_in_8bit"):
        if any(k not in ("load_in_4bit", "load_in_8bit") for k in words):
            told.append(f"{', '.join(words)}: left out, since the base is not quantized (load_in_4bit)")
        return out
    if given.get("quantization") is not None:
        if given.get("load_in_4bit") or given.get("load_in_8bit"):
            raise RecipeError(f"'{words[0]}' and 'quantization' say the same thing; give one of them")
        return out
    said = {"name": "int8" if given.get("load_in_8bit") else given.get("bnb_4bit_quant_type", "nf4")}
    said |= {ours: given[theirs] for theirs, ours in BNB.items() if theirs in given}
    if "double_quant" in said and said["name"] == "int8":
        del said["double_quant"]
    out["quantization"], origins["quantization"] = said, origins.get(str(words[0]), "python")
    told.append(f"{', '.join(repr(str(k)) for k in words)}: read as quantization {said}")
    return out


def _settle(out: dict, loose: dict, keys: set, told: list, where: dict) -> None:
    """Settings of a method that stand at the top of the recipe (`r: 16`, `beta: 0.2`) go to the method that
    has them.
    """
    default = {f.name: f.default for f in fields(Recipe)}
    slots = {}  # path -> (spec, settings)
    for slot, kind in SLOTS.items():
        value = out.get(slot, default[slot])
        if slot == "optim" and out.get("transforms") is not None:
            continue
        name = value.get("name") if isinstance(value, dict) else value
        if isinstance(name, str) and not (slot == "architecture" and name == "auto"):
            slots[slot] = (value, {f.name for f in fields(find(kind, name))})
        elif slot == "architecture":
            slots[slot] = ("causal", {f.name for f in fields(find("architecture", "causal"))})
    aim = out.get("objective", default["objective"])
    if isinstance(aim, str) and known_name("objective", aim) or isinstance(aim, dict):
        name = aim if isinstance(aim, str) else aim.get("name")
        slots["objective"] = (aim, {f.name for f in fields(find("objective", name))})
    for list_slot in ("live", "stages"):
        for i, value in enumerate(out.get(list_slot) or ()):
            name = value.get("name") if isinstance(value, dict) else value
            if isinstance(name, str) and known_name("stage", name):
                slots[f"{list_slot}.{i}"] = (value, {f.name for f in fields(find("stage", name))})
    every = set(keys) | set(ALIASES)
    for key, value in loose.items():
        homes = [slot for slot, (_, settings) in slots.items() if key in settings]
        if not homes:
            hidden = [
                f"{c.kind} '{c.name}'"
                for kind in ("tuner", "objective", "optimizer", "estimator")
                for c in cards(kind)
                if key in {f.name for f in fields(find(kind, c.name))}
            ]
            hint = (
                f"; it is a setting of {', '.join(hidden[:3])}"
                if hidden
                else did_you_mean(key, every | {s for _, ss in slots.values() for s in ss})
            )
            raise RecipeError(f"a recipe has no '{key}'{hint}")
        if len(homes) > 1:
            raise RecipeError(f"'{key}' could mean {' or '.join(f'{h}.{key}' for h in homes)}; write which")
        _into(out, homes[0], slots[homes[0]][0], key, value)
        slots[homes[0]] = (_at(out, homes[0]), slots[homes[0]][1])
        where[homes[0].split(".")[0]] = where[key]
        told.append(f"'{key}' is read as {homes[0]}.{key}")


def _into(out: dict, home: str, value: Any, key: str, setting: Any) -> None:
    full = {"name": value} if isinstance(value, str) else dict(value)
    full[key] = setting
    slot, _, i = home.partition(".")
    if i:
        out[slot] = [full if k == int(i) else x for k, x in enumerate(out[slot])]
    else:
        out[slot] = full


def _at(out: dict, home: str) -> Any:
    slot, _, i = home.partition(".")
    return out[slot][int(i)] if i else out[slot]


def known_name(kind: str, name: Any) -> bool:
    return isinstance(name, str) and name in names(kind)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


Recipe.__pydantic_config__ = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
_ADAPTER = TypeAdapter(Recipe)

TERM = r"\s*(?:([\d.]+(?:[eE][+-]?\d+)?)\s*\*\s*)?([A-Za-z]\w*)\s*"


def terms(given: Any):
    """'sft + 0.1*kl', a name, {name: dpo, beta: 0.2}, or [{name: dpo, weight: 1}, ...] -> an objective."""
    from luthier.methods.objectives._base import Sum

    if getattr(given, "kind", None) == "objective":
        return given
    if isinstance(given, str):
        if not re.fullmatch(rf"{TERM}(\+{TERM})*", given):
            raise RecipeError(f"objective '{given}' is not a name or a sum such as 'dpo + 0.1*sft'")
        given = [{"name": n, "weight": float(w or 1)} for w, n in re.findall(TERM, given)]
    made = []
    for term in given if isinstance(given, (list, tuple)) else [given]:
        term = {"name": term} if isinstance(term, str) else dict(term)
        made.append((float(term.pop("weight", 1.0)), build("objective", term)))
    return made[0][1] if len(made) == 1 and made[0][0] == 1.0 else Sum(parts=tuple(made))
