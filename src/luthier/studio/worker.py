"""The studio's work that needs torch: rows as a model reads them, recipes validated, what a run will cost,
answers of a model.

Each worker is a process that reads one JSON line a question and writes one an answer; where it dies, the next
question starts another. An answer that is streamed comes as lines {"part": ...} before it; after each the
worker reads whether to go on, or to end there. `python -m luthier.studio.worker` is its main.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from luthier.errors import RecipeError, outcome_of, shortened
from luthier.registry import default_of, find, helps
from luthier.storage.bounded_yaml import load_yaml
from luthier.studio import presets

SAMPLE = 2000  # rows that are encoded to be counted: a large file is looked at, not read to its end
ROW_LENGTH = 4000  # characters of a row in an answer
MAX_BAD_ROWS = 200  # unusable rows in an answer
GO_ON, STOP = "on", "stop"  # what a part of an answer is answered with
NO_DATA = "the recipe has no `data`; set it to a file, a folder, a Hub name, rows, or toy:TASK"


# --------------------------------------------------------------------------------------------------- recipes


def read_form(changes: Mapping[str, str]) -> dict[str, Any]:
    """The fields of the form, `tuner.r` -> "16", as the mapping that a recipe's file would hold."""
    from luthier.recipe.read import put, read_changes
    from luthier.recipe.recipe import DEFAULTS

    entries = read_changes([f"{key}={value}" for key, value in changes.items()])
    keys: dict[str, Any] = {}
    for key, value in sorted(entries, key=lambda entry: entry[0].count(".")):
        put(keys, key, value, DEFAULTS)
    return keys


def fields_of(text: str) -> dict[str, str]:
    """The way back: a recipe's text as fields of the form."""
    from luthier.recipe.aliases import METHOD_KEYS
    from luthier.recipe.read import read_source
    from luthier.recipe.recipe import Recipe

    if "\n" not in text:
        text += "\n"  # text, not the name of a file
    Recipe.load(text)
    form = {}
    for key, value in read_source(text)[0].items():
        if key in (*METHOD_KEYS, "objective") and isinstance(value, Mapping) and "name" in value:
            form[key] = str(value["name"])
            for option, setting in value.items():
                if option != "name":
                    form[f"{key}.{option}"] = flow(setting)
        else:
            form[key] = flow(value)
    return form


def flow(value: Any) -> str:
    """A value in a line of YAML."""
    if isinstance(value, str):
        with suppress(RecipeError):
            if load_yaml(value) == value:
                return value
    line = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=1e9)
    return line.strip().removesuffix("\n...").strip()


def check(changes: Mapping[str, str], read_rows: bool = True) -> dict[str, Any]:
    """A recipe's text, the recipe with all defaults, the learning rate that it gets where it names none, its
    warnings, and the error that it would be refused with. read_rows: validate it with its rows too.
    """
    from luthier.data.load import sample_rows
    from luthier.recipe.recipe import Recipe
    from luthier.recipe.validate import validate
    from luthier.run.folder import default_folder

    answer: dict[str, Any] = {"text": "", "whole": "", "warnings": [], "error": "", "name": "", "rate": None}
    try:
        keys = read_form(changes)
        keys.pop("output_dir", None)
        if keys:
            answer["text"] = yaml.safe_dump(keys, sort_keys=False, allow_unicode=True, width=110)
        recipe = Recipe.load(keys)
        answer["whole"] = recipe.yaml()
        answer["warnings"] = list(recipe.warnings)
        answer["name"] = default_folder(recipe).name
        rate = recipe.default_rate()
        answer["rate"] = {"value": f"{rate.value:g}", "reason": rate.reason}
        if read_rows:
            if recipe.data is None:
                raise RecipeError(NO_DATA)
            validate(recipe, rows_of(recipe.data).rows[:100], sample_rows)
    except RecipeError as error:
        answer["error"] = str(error)
    return answer


def settings(kind: str, name: str) -> list[dict[str, Any]]:
    """The fields of a method (or of a recipe) as a form shows them."""
    from pydantic import TypeAdapter
    from pydantic.errors import PydanticUserError

    from luthier.recipe.recipe import HIDDEN, Recipe

    described = find(kind, name) if kind != "recipe" else Recipe
    try:
        schema = TypeAdapter(described).json_schema().get("properties", {})
    except (PydanticUserError, ValueError, TypeError):  # a field that no schema can tell: a line of YAML
        schema = {}
    texts, answer = helps(described), []
    for field in fields(described):
        if kind == "recipe" and field.name in HIDDEN:
            continue
        answer.append(
            {
                "name": field.name,
                "default": default_of(field),
                "help": texts.get(field.name, ""),
                "choices": choices(schema.get(field.name, {})),
            }
        )
    return answer


def choices(schema: Mapping[str, Any]) -> list[str]:
    """The words that a field takes, where it takes no others."""
    if schema.get("type") == "boolean":
        return ["true", "false"]
    words: list[str] = []
    for option in schema.get("anyOf", [schema]):
        if option.get("type") == "boolean":
            words += ["true", "false"]
        elif option.get("type") == "null":
            words.append("null")
        elif "enum" in option or "const" in option:
            words += map(str, option.get("enum", [option.get("const")]))
        else:
            return []
    if len(words) < 2:
        return []
    return words


# ------------------------------------------------------------------------------------------------------ rows


def rows_of(source: Any) -> Any:
    """The rows of a source, unusable ones apart; read once as long as its file stays as it is."""
    from luthier.data.load import load_rows

    version = None
    if isinstance(source, str) and Path(source).exists():
        if not Path(source).is_file():
            return load_rows(source, max_bad_rows=1.0)  # a folder may change without a sign
        status = Path(source).stat()
        version = (status.st_mtime_ns, status.st_size)
    return _rows(json.dumps(source, sort_keys=True, default=str), version)


@lru_cache(maxsize=2)
def _rows(source: str, version: Any) -> Any:
    from luthier.data.load import load_rows

    return load_rows(json.loads(source), max_bad_rows=1.0)


@lru_cache(maxsize=4)
def reader_of(
    model: str, architecture: str, chat_template: str | None, max_length: int | None
) -> tuple[Any, Any]:
    """How a model's tokenizer reads rows, without the model's weights."""
    from luthier.recipe.model_names import model_config, resolve_model
    from luthier.recipe.validate import detect
    from luthier.registry import build

    if architecture == "auto":
        reader = detect(model)
    else:
        reader = build("architecture", load_yaml(architecture, "architecture"))
    config = model_config(model)
    if not max_length:
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        max_length = min(2048, positions or 2048)
    try:
        tokenizer = reader.tokenizer(resolve_model(model))
    except (OSError, ValueError, ImportError) as error:
        reason = shortened(str(error), 300)
        raise RecipeError(f"model: the tokenizer of {model} cannot be loaded: {reason}") from None
    return reader, reader.renderer(tokenizer, config, max_length=max_length, chat_template=chat_template)


def look(changes: Mapping[str, str], offset: int = 0, limit: int = 4) -> dict[str, Any]:
    """Rows as the model of a recipe reads them: [[text, supervised], ...] of each; unusable ones with
    reasons; the objectives that the rows are enough for.
    """
    from luthier.data.profile import objectives_for
    from luthier.data.quarantine import count_reasons
    from luthier.recipe.recipe import Recipe
    from luthier.recipe.validate import columns_of
    from luthier.report.text import MARKS

    read = ("model", "data", "chat_template", "max_length", "architecture")
    recipe = Recipe.load(read_form({key: value for key, value in changes.items() if key in read}))
    if recipe.data is None:
        raise RecipeError(NO_DATA)
    source = rows_of(recipe.data)
    architecture, renderer = reader_of(
        recipe.model, changes.get("architecture") or "auto", recipe.chat_template, recipe.max_length
    )
    sample = source.rows[:SAMPLE]
    usable, bad, stats = architecture.encode_all(sample, renderer)
    bad = [*source.bad, *bad]
    page = []
    for row in usable[offset : offset + limit]:
        text = str(row["prompt"])
        if row.get("completions"):
            text = renderer.decode_marked(row, MARKS)
        page.append({"id": str(row.get("id", "")), "parts": spans(text, MARKS)})
    quarantine = []
    for entry in bad[:MAX_BAD_ROWS]:
        quarantine.append({key: str(entry.get(key, ""))[:600] for key in ("where", "reason", "raw")})
    objectives = {}
    for objective in objectives_for(columns_of(source.rows[:100])):
        objectives[objective["objective"]] = [objective["feeds"], objective["why"]]
    return {
        "format": source.format,
        "total": source.total,
        "rows": len(source.rows),
        "counted": len(sample),
        "usable": len(usable),
        "columns": sorted(set().union(*sample) - {"id"}),
        "tokens": stats.get("tokens", 0),
        "share": stats.get("supervised_share", 0.0),
        "longest": stats.get("longest", 0),
        "cut": stats.get("cut", 0),
        "note": renderer.note or "",
        "model": recipe.model,
        "template": template_of(recipe.chat_template, renderer),
        "shown": page,
        "offset": offset,
        "bad": len(bad),
        "reasons": count_reasons(bad),
        "aside": quarantine,
        "feeds": objectives,
    }


def template_of(chat_template: str | None, renderer: Any) -> str:
    """Which template rows were rendered with, in words; empty where they were not rendered as turns."""
    if renderer.note:
        return ""
    if chat_template:
        return "the chat template of the recipe"
    return "the model's own chat template"


def spans(text: str, marks: tuple[str, str]) -> list[list[Any]]:
    """Marked text as [[part, whether it is supervised], ...]. Control characters are made visible, and a long
    row is cut.
    """
    from luthier.report.text import visible

    before, *pieces = text.split(marks[0])
    parts = [(before, False)]
    for piece in pieces:
        supervised, _, rest = piece.partition(marks[1])
        parts += [(supervised, True), (rest, False)]
    answer: list[list[Any]] = []
    room = ROW_LENGTH
    for part, is_supervised in parts:
        if part and room > 0:
            answer.append([visible(part[:room]), is_supervised])
            room -= len(part)
    if room <= 0:
        answer.append([" … (cut here)", False])
    return answer


# ----------------------------------------------------------------------------------------- what it will cost


def forecast(changes: Mapping[str, str]) -> dict[str, Any]:
    """What a run will take, before it is started: {figures: [[what, how much, what that is]], notes}. Loads
    the model for it.
    """
    from luthier.data.load import load_data
    from luthier.model.load import assemble, take_parts
    from luthier.recipe.recipe import Recipe
    from luthier.recipe.validate import dry_run
    from luthier.report.numbers import format_duration, format_trainable
    from luthier.run.prepare import run_length
    from luthier.run.rows import EncodedRows
    from luthier.train import checks, memory

    recipe = Recipe.load(read_form(changes))
    if recipe.plan is not None:
        raise RecipeError(
            "a plan has several runs that depend on each other, so its cost cannot be estimated"
        )
    data = load_data(recipe)
    methods = dry_run(recipe, data.rows[:100])
    roles = assemble(recipe, methods, methods.fit_to(data.rows), None, data.rows)
    take_parts(roles, methods)
    sample = data.rows[:SAMPLE]
    usable, bad, stats = methods.architecture.encode_all(sample, roles.renderer)
    if not usable:
        raise RecipeError(
            f"none of the {len(data.rows):,} rows can be used; reason for the first: {bad[0]['reason']}"
        )
    training = EncodedRows.of(usable, stats)
    parameters = checks.check_trainable(roles.tuner)
    rows = round(len(data.rows) * len(usable) / len(sample))
    length = run_length(recipe, methods, rows)
    counted = f", counted on the first {SAMPLE:,}" if len(data.rows) > SAMPLE else ""
    step_tokens = round(stats["tokens"] / len(usable) * length.per_step)
    weights = {id(p): p.nbytes for p in roles.policy.model.parameters()}
    dtype = str(next(roles.policy.model.parameters()).dtype).removeprefix("torch.")
    figures = [
        ["trainable parameters", format_trainable(parameters["moving"], max(1, parameters["all"])), "exact"],
        [
            "steps",
            f"{length.steps:,}",
            f"of {length.per_step:,} rows each; {rows:,} rows, {len(data.held_out):,} held out{counted}",
        ],
        ["tokens per step", f"{step_tokens:,}", "on average"],
        ["supervised tokens", f"{100 * stats['supervised_share']:.0f}%", f"of all tokens{counted}"],
        ["model", format_size(sum(weights.values())), f"its weights in memory, as {dtype}"],
    ]
    notes = []
    answered = [row for row in usable[:16] if row.get("completions")]
    if answered and methods.objective is not None and not methods.online_stages:
        micro = min(recipe.per_device_train_batch_size, rows)
        need, warnings = step_memory(recipe, methods, roles, training, answered, micro, length.steps)
        notes += warnings
        batch = roles.batch([usable[i % len(usable)] for i in range(micro)])
        seconds = 3 * forward_seconds(roles, batch) * length.per_step / micro
        figures.append(
            [
                "time",
                f"about {format_duration(length.steps * seconds)}",
                "of training: forward of one micro-batch was timed, backward is assumed to take twice as"
                " long; evaluation and saving come on top",
            ]
        )
        parts = {
            "gradients": need.gradients,
            "optimizer": need.state,
            "activations": need.activations,
            "temporary": need.temporary,
        }
        sizes = ", ".join(f"{name} {format_size(size)}" for name, size in parts.items())
        figures.append(
            [
                "memory of a step",
                format_size(need.total),
                f"on top of the model: {sizes}. Two rows were read to measure activations; a micro-batch with"
                " the longest row is assumed",
            ]
        )
    else:
        notes.append("the memory of a step is not estimated: it depends on what is generated during the run")
    if available := memory.free(roles.device):
        figures.append(["there is", format_size(available), f"of memory free on {roles.device}"])
    if bad:
        notes.append(
            f"{len(bad):,} of {len(sample):,} rows cannot be used; reason for the first: {bad[0]['reason']}"
        )
    return {"figures": figures, "notes": notes}


def step_memory(
    recipe: Any, methods: Any, roles: Any, training: Any, answered: list[dict], micro: int, steps: int
) -> tuple[Any, list[str]]:
    """What a training step takes as the run itself will predict it (memory.Need), and warnings about it.

    answered: rows with completions, to measure it on. Switches gradient checkpointing on as the run will.
    """
    from luthier.recipe.schedule import schedule
    from luthier.run.rows import short_batches
    from luthier.train import memory
    from luthier.train.optimizer import Chain

    factor = schedule(
        recipe.lr_scheduler_type,
        recipe.warmup_steps,
        max(1, steps),
        recipe.lr_scheduler_kwargs,
        recipe.learning_rate,
    )
    chain = Chain(methods.chain, roles.tuner, roles.clock, recipe.learning_rate, factor)
    samples, tokens = short_batches(roles, answered), training.micro_batch_tokens(micro)
    longest, checkpointing = int(training.stats["longest"]), recipe.gradient_checkpointing
    need, warnings = memory.choose(roles, chain, methods.estimator, samples, tokens, longest, checkpointing)
    if need is None:  # free memory is unknown: the run predicts nothing
        recompute = any(getattr(m, "gradient_checkpointing", False) for m in roles.policy.model.modules())
        need = memory.predict(roles, chain, methods.estimator, samples, tokens, recompute)
    return need, warnings


def forward_seconds(roles: Any, batch: Any) -> float:
    """Seconds of a forward pass, the second time: the first also prepares what is needed once."""
    import time

    import torch

    seconds = 0.0
    with torch.no_grad():
        for _ in range(2):
            start = time.perf_counter()
            # a view is read anew; the number waits for a device that works asynchronously
            roles.policy.logprobs(batch.view()).sum().item()
            seconds = time.perf_counter() - start
    return seconds


def format_size(n: float) -> str:
    """Bytes for people: '512 MB', '1.50 GB'."""
    if n < 2**30:
        return f"{n / 2**20:.0f} MB"
    return f"{n / 2**30:.2f} GB"


@lru_cache(maxsize=8)
def model_size(model: str) -> dict[str, int]:
    """A model counted by its configuration, no weight loaded: parameters, those of linear layers, those of an
    adapter of the presets' rank, bytes of each. Raises RecipeError where it cannot be read.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from luthier.model.load import device, pick_dtype
    from luthier.recipe.model_names import model_config

    config = model_config(model)
    try:
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, TypeError, KeyError) as error:
        reason = shortened(str(error), 200)
        raise RecipeError(f"model: {model} cannot be counted as a language model: {reason}") from None
    linear = adapter = 0
    head = network.get_output_embeddings()
    for module in network.modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            linear += module.weight.numel()
            adapter += presets.RANK * sum(module.weight.shape)
    total = sum(p.numel() for p in network.parameters())
    size = pick_dtype("auto", device()).itemsize
    return {"parameters": total, "linear": linear, "lora": adapter, "bytes": size}


def preset_costs(model: str) -> dict[str, Any]:
    """What each preset takes of a model: {parameters, costs: {preset: {memory, trained}}}."""
    from luthier.report.numbers import format_count

    size = model_size(model)
    costs = {}
    for preset in presets.PRESETS:
        need = presets.memory(preset, size)
        share = 100 * need["trained"] / size["parameters"]
        costs[preset.name] = {
            "memory": format_size(need["weights"] + need["state"]),
            "trained": f"trains {share:.3g}%",
        }
    return {"parameters": format_count(size["parameters"]), "costs": costs}


# --------------------------------------------------------------------------------------------------- talking


@lru_cache(maxsize=1)
def loaded(model: str, version: float) -> Any:
    from luthier.model.loaded import load

    return load(model)


def version_of(model: str) -> float:
    """When a run's folder was last finished: then it is loaded again."""
    report = Path(model) / "report.json"
    if report.is_file():
        return report.stat().st_mtime
    return 0.0


def prepare_model(model: str) -> dict[str, Any]:
    """Load a model to talk to: whether it takes turns, the system prompt of its rows, what to know of it."""
    network = loaded(model, version_of(model))
    return {"turns": network.turns, "system": network.system, "notes": network.notes}


def say(
    model: str,
    text: str,
    before: list[dict],
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    on_part: Callable[[str], bool] = lambda part: False,
) -> dict[str, Any]:
    """A model's answer after earlier turns. on_part: called with each part of it; where it returns true, the
    answer ends there.
    """
    network = loaded(model, version_of(model))
    turns = [{"role": str(turn["role"]), "content": str(turn["content"])} for turn in before]
    streamed, stopped = "", False

    def stream(answer: str) -> bool:
        nonlocal streamed, stopped
        whole = answer.lstrip()
        if answer.endswith("\ufffd"):  # half a character waits for its other half
            whole = streamed
        part, streamed = whole[len(streamed) :], whole
        stopped = on_part(part)
        return stopped

    answer = network.ask(
        text, turns, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, hear=stream
    )
    return {"answer": answer.strip(), "turns": network.turns, "notes": network.notes, "stopped": stopped}


def export(folder: str, kind: str, to: str, settings: Mapping[str, str]) -> dict[str, Any]:
    """Export a run; what was written in a sentence, and how each tool uses it. settings: of the form, each a
    line of YAML.
    """
    from luthier.serve.export import export_form

    form: dict[str, Any] = {"name": kind}
    for name, value in settings.items():
        form[name] = load_yaml(value, name)
    done = export_form(folder, form, to)
    usage = [{"tool": one.tool, "code": one.code} for one in done.usage]
    return {"message": str(done), "usage": usage}


# ------------------------------------------------------------------------------------- questions and answers

TASKS: dict[str, Callable[..., Any]] = {
    "check": check,
    "settings": settings,
    "look": look,
    "forecast": forecast,
    "say": say,
    "prepare_model": prepare_model,
    "export": export,
    "preset_costs": preset_costs,
    "fields_of": fields_of,
}


def perform(
    task: str, arguments: Mapping[str, Any], on_part: Callable[[str], bool] | None = None
) -> dict[str, Any]:
    """{is: result}, {error: the sentence that the command line prints}, or {bug}. on_part: called with each
    part of an answer that is streamed.
    """
    if on_part:
        arguments = {**arguments, "on_part": on_part}
    try:
        return {"is": TASKS[task](**arguments)}
    except RecipeError as error:
        return {"error": str(error)}
    except Exception as error:
        outcome = outcome_of(error)
        if isinstance(outcome, RecipeError):
            return {"error": str(outcome)}
        traceback.print_exc()
        return {"bug": f"{type(error).__name__}: {error}"}


class Worker:
    """A process that answers; one question at a time."""

    def __init__(self, home: Path):
        self.home, self.lock = home, threading.Lock()
        self.child: subprocess.Popen | None = None

    def ask(self, task: str, on_part: Callable[[str], bool] | None = None, **arguments: Any) -> Any:
        """Raises RecipeError with the command line's sentence, RuntimeError where the worker failed. on_part:
        see `perform`.
        """
        question = {"task": task, "arguments": arguments, "stream": on_part is not None}
        with self.lock:
            if self.child is None or self.child.poll() is not None:
                self.child = self.start()
            try:
                line = exchange(self.child, json.dumps(question))
                while on_part and line.startswith('{"part"'):
                    reply = STOP if on_part(json.loads(line)["part"]) else GO_ON
                    line = exchange(self.child, reply)
            except BrokenPipeError:
                line = ""
        if not line:
            raise RecipeError(
                f"the process for {task!r} died, most likely out of memory; try again, or use a smaller model"
            )
        return result(json.loads(line))

    def start(self) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "luthier.studio.worker"],
            cwd=self.home,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )

    def end(self) -> None:
        if self.child and self.child.poll() is None:
            self.child.terminate()


class Here:
    """The same without a process, for tests."""

    def __init__(self, home: Path):
        self.home, self.lock = home, threading.Lock()

    def ask(self, task: str, on_part: Callable[[str], bool] | None = None, **arguments: Any) -> Any:
        with self.lock:
            answer = perform(task, json.loads(json.dumps(arguments)), on_part)
            return result(json.loads(json.dumps(answer)))

    def end(self) -> None:
        pass


def exchange(child: Any, line: str) -> str:
    """Write a line to the process and read one."""
    child.stdin.write(line + "\n")
    child.stdin.flush()
    return child.stdout.readline()


def result(answer: Mapping[str, Any]) -> Any:
    if "error" in answer:
        raise RecipeError(answer["error"])
    if "bug" in answer:
        raise RuntimeError(answer["bug"])
    return answer["is"]


def main() -> None:
    """Questions on standard input, answers where standard output was; whatever else prints goes to standard
    error.
    """
    warnings.simplefilter("ignore", FutureWarning)  # of other libraries to their developers
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def write(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer, ensure_ascii=True, default=str) + "\n")
        answers.flush()

    def on_part(part: str) -> bool:
        write({"part": part})
        return sys.stdin.readline().strip() != GO_ON  # also where the studio has ended

    while line := sys.stdin.readline():
        question = json.loads(line)
        callback = on_part if question["stream"] else None
        write(perform(question["task"], question["arguments"], callback))


if __name__ == "__main__":
    main()
