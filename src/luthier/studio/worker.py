"""What the studio asks of torch: rows as a model reads them, recipes played through, what a run will cost,
what a model says.

Each worker is a process that reads one JSON line a question and writes one an answer; where it dies, the next
question starts another. An answer that is wanted while it grows comes as lines {"part": ...} before it; each
waits for the word to go on, or to end there. `python -m luthier.studio.worker` is its main.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from luthier.errors import RecipeError
from luthier.registry import default_of, find, helps

SAMPLE = 2000  # rows that are encoded to be counted: a large file is looked at, not read to its end
PARTS = 4000  # characters of a row shown
KEPT = 200  # bad rows shown
GO_ON, STOP = "on", "stop"  # what a part of an answer is answered with


# ---------------------------------------------------------------------------------------------- recipes


def given(changes: Mapping[str, str]) -> dict[str, Any]:
    """The fields of the form, `tuner.r` -> "16", as the mapping that a recipe's file would hold."""
    from luthier.recipe.read import put, read_changes
    from luthier.recipe.recipe import DEFAULTS

    out: dict[str, Any] = {}
    for key, value in sorted(
        read_changes([f"{k}={v}" for k, v in changes.items()]), key=lambda c: c[0].count(".")
    ):
        put(out, key, value, DEFAULTS)
    return out


def fields_of(text: str) -> dict[str, str]:
    """The way back: a recipe's text as fields of the form."""
    from luthier.recipe.aliases import METHOD_KEYS
    from luthier.recipe.read import read_source
    from luthier.recipe.recipe import Recipe

    Recipe.load(text if "\n" in text else text + "\n")
    out = {}
    for key, value in read_source(text if "\n" in text else text + "\n")[0].items():
        if key in (*METHOD_KEYS, "objective") and isinstance(value, Mapping) and "name" in value:
            out[key] = str(value["name"])
            out |= {f"{key}.{k}": flow(v) for k, v in value.items() if k != "name"}
        else:
            out[key] = flow(value)
    return out


def flow(value: Any) -> str:
    """A value in a line of YAML."""
    if isinstance(value, str) and yaml.safe_load(value) == value:
        return value
    return (
        yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=1e9)
        .strip()
        .removesuffix("\n...")
        .strip()
    )


def check(changes: Mapping[str, str], rehearsed: bool = True) -> dict[str, Any]:
    """A recipe's text, all it comes to, and the sentence that it would be refused with. With its rows, it is
    played through.
    """
    from luthier.data.load import sample_rows
    from luthier.recipe.recipe import Recipe
    from luthier.recipe.validate import validate
    from luthier.run.folder import default_folder

    out: dict[str, Any] = {"text": "", "whole": "", "told": [], "error": "", "name": ""}
    try:
        keys = given({k: v for k, v in changes.items() if k != "output_dir"})
        out["text"] = yaml.safe_dump(keys, sort_keys=False, allow_unicode=True, width=110) if keys else ""
        recipe = Recipe.load(keys)
        out |= {"whole": recipe.yaml(), "told": list(recipe.warnings), "name": default_folder(recipe).name}
        if rehearsed:
            if recipe.data is None:
                raise RecipeError("a recipe needs `data`: a file, a folder, a hub name, rows, or toy:TASK")
            validate(recipe, rows_of(recipe.data).rows[:100], sample_rows)
    except RecipeError as error:
        out["error"] = str(error)
    return out


def settings(kind: str, name: str) -> list[dict[str, Any]]:
    """The fields of a method (or of a recipe) as a form shows them."""
    from pydantic import TypeAdapter
    from pydantic.errors import PydanticUserError

    from luthier.recipe.recipe import Recipe

    cls = Recipe if kind == "recipe" else find(kind, name)
    said = helps(cls)
    try:
        schema = TypeAdapter(cls).json_schema().get("properties", {})
    except (PydanticUserError, ValueError, TypeError):  # a field that no schema can tell: a line of YAML
        schema = {}
    return [
        {
            "name": f.name,
            "default": default_of(f),
            "help": said.get(f.name, ""),
            "choices": choices(schema.get(f.name, {})),
        }
        for f in fields(cls)
        if f.name not in ("origins", "told")
    ]


def choices(schema: Mapping[str, Any]) -> list[str]:
    """The words that a field takes, where it takes no others."""
    if schema.get("type") == "boolean":
        return ["true", "false"]
    found: list[str] = []
    for one in schema.get("anyOf", [schema]):
        if one.get("type") == "boolean":
            found += ["true", "false"]
        elif one.get("type") == "null":
            found.append("null")
        elif "enum" in one or "const" in one:
            found += map(str, one.get("enum", [one.get("const")]))
        else:
            return []
    return found if len(found) > 1 else []


# ---------------------------------------------------------------------------------------------- rows


def rows_of(source: Any) -> Any:
    """The rows of a source, bad ones apart; read once as long as its file stays as it is."""
    from luthier.data.load import load_rows

    path = Path(source) if isinstance(source, str) else None
    mark = (path.stat().st_mtime_ns, path.stat().st_size) if path and path.is_file() else None
    return (
        _rows(json.dumps(source, sort_keys=True, default=str), mark)
        if mark or not path or not path.exists()
        else load_rows(source, max_bad_rows=1.0)
    )


@lru_cache(maxsize=2)
def _rows(source: str, mark: Any) -> Any:
    from luthier.data.load import load_rows

    return load_rows(json.loads(source), max_bad_rows=1.0)


@lru_cache(maxsize=4)
def reader_of(
    model: str, architecture: str, chat_template: str | None, max_length: int | None
) -> tuple[Any, Any]:
    """How a model's tokenizer reads rows, without the model's weights."""
    from transformers import AutoTokenizer

    from luthier.recipe.model_names import model_config, resolve_model
    from luthier.recipe.validate import detect
    from luthier.registry import build

    made = detect(model) if architecture == "auto" else build("architecture", yaml.safe_load(architecture))
    config = model_config(model)
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    limit = max_length or min(2048, most or 2048)
    return made, made.renderer(
        AutoTokenizer.from_pretrained(resolve_model(model)),
        config,
        max_length=limit,
        chat_template=chat_template,
    )


def look(changes: Mapping[str, str], offset: int = 0, shown: int = 4) -> dict[str, Any]:
    """Rows as the model of a recipe reads them: [[text, learned], ...] of each; those set aside with reasons;
    what they can feed.
    """
    from luthier.data.profile import objectives_for
    from luthier.data.quarantine import count_reasons
    from luthier.recipe.recipe import Recipe
    from luthier.recipe.validate import columns_of
    from luthier.report.text import MARKS

    keys = given(
        {
            k: v
            for k, v in changes.items()
            if k in ("model", "data", "chat_template", "max_length", "architecture")
        }
    )
    recipe = Recipe.load(keys)
    if recipe.data is None:
        raise RecipeError("a recipe needs `data`: a file, a folder, a hub name, rows, or toy:TASK")
    loaded = rows_of(recipe.data)
    architecture, renderer = reader_of(
        recipe.model, changes.get("architecture") or "auto", recipe.chat_template, recipe.max_length
    )
    some = loaded.rows[:SAMPLE]
    kept, bad, stats = architecture.encode_all(some, renderer)
    rows = []
    for row in kept[offset : offset + shown]:
        text = renderer.decode_marked(row, MARKS) if row.get("completions") else str(row["prompt"])
        rows.append({"id": str(row.get("id", "")), "parts": spans(text, MARKS)})
    every = [*loaded.bad, *bad]
    return {
        "format": loaded.format,
        "total": loaded.total,
        "rows": len(loaded.rows),
        "counted": len(some),
        "usable": len(kept),
        "columns": sorted({k for row in some for k in row if k != "id"}),
        "tokens": stats.get("tokens", 0),
        "share": stats.get("supervised_share", 0.0),
        "longest": stats.get("longest", 0),
        "cut": stats.get("cut", 0),
        "note": renderer.note or "",
        "shown": rows,
        "offset": offset,
        "bad": len(every),
        "reasons": count_reasons(every),
        "aside": [{k: str(b.get(k, ""))[:600] for k in ("where", "reason", "raw")} for b in every[:KEPT]],
        "feeds": {
            f["objective"]: [f["feeds"], f["why"]] for f in objectives_for(columns_of(loaded.rows[:100]))
        },
    }


def spans(text: str, marks: tuple[str, str]) -> list[list[Any]]:
    """Marked text as [[part, whether it is learned], ...]. Control characters are made visible, and a long
    row is cut.
    """
    from luthier.report.text import visible

    out: list[list[Any]] = []
    room = PARTS
    for i, piece in enumerate(text.split(marks[0])):
        learned, _, rest = piece.partition(marks[1]) if i else ("", "", piece)
        for part, is_learned in ((learned, True), (rest, False)):
            if part and room > 0:
                out.append([visible(part[:room]), is_learned])
                room -= len(part)
    if room <= 0:
        out.append([" … (cut here)", False])
    return out


# ---------------------------------------------------------------------------------------------- what it will cost


def forecast(changes: Mapping[str, str]) -> dict[str, Any]:
    """What a run will take, before it is started: {figures: [[what, how much, what that is]], notes}. Loads
    the model for it.
    """

    from luthier.data.load import load_data
    from luthier.model.load import assemble, take_parts
    from luthier.recipe.recipe import Recipe
    from luthier.recipe.schedule import schedule
    from luthier.recipe.validate import dry_run
    from luthier.report.numbers import format_duration, format_trainable
    from luthier.train import checks as guards
    from luthier.train import memory
    from luthier.train.optimizer import Chain

    recipe = Recipe.load(given(changes))
    if recipe.plan is not None:
        raise RecipeError(
            "a plan has several runs, which depend on each other: what it will cost is not known before"
        )
    data = load_data(recipe)
    parts = dry_run(recipe, data.rows[:100])
    roles = assemble(recipe, parts, parts.architecture.fit_to(data.rows), None, data.rows)
    take_parts(roles, parts)
    kept, bad, stats = parts.architecture.encode_all(data.rows[:SAMPLE], roles.renderer)
    if not kept:
        raise RecipeError(f"none of {len(data.rows):,} rows can be used; the first: {bad[0]['reason']}")
    moving = guards.check_trainable(roles.tuner)
    per_step = recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps
    rows = round(len(data.rows) * len(kept) / max(1, len(data.rows[:SAMPLE])))
    steps = (
        recipe.max_steps
        if recipe.max_steps is not None
        else -(-max(1, round(rows * recipe.num_train_epochs)) // per_step) * recipe.num_iterations
    )
    about = "" if len(data.rows) <= SAMPLE else f", counted on the first {SAMPLE:,}"
    figures = [
        [
            "trainable parameters",
            format_trainable(moving["moving"], max(1, moving["all"])),
            "exact",
        ],
        [
            "steps",
            f"{steps:,}",
            f"of {per_step:,} rows each; {rows:,} rows, {len(data.held_out):,} held out{about}",
        ],
        ["tokens per step", f"{round(stats['tokens'] / len(kept) * per_step):,}", "on average"],
        ["supervised tokens", f"{100 * stats['supervised_share']:.0f}%", f"of all tokens{about}"],
    ]
    weights = sum(p.nbytes for p in {id(p): p for p in roles.policy.model.parameters()}.values())
    figures.append(
        [
            "model",
            size(weights),
            (
                "its weights in memory, as"
                f" {str(next(roles.policy.model.parameters()).dtype).removeprefix('torch.')}"
            ),
        ]
    )
    fed = sorted((r for r in kept[:16] if r.get("completions")), key=lambda row: len(str(row)))[:2]
    notes = []
    if fed and parts.objective is not None and not parts.online_stages:
        chain = Chain(
            parts.chain,
            roles.tuner,
            roles.clock,
            recipe.learning_rate,
            schedule(recipe.lr_scheduler_type, recipe.warmup_steps, max(1, steps)),
        )
        micro, longest = min(recipe.per_device_train_batch_size, rows), int(stats["longest"])
        tokens = longest + round((micro - 1) * stats["tokens"] / len(kept))
        some = [roles.batch(fed[:n]) for n in (1, len(fed))]
        notes += memory.choose(
            roles, chain, parts.estimator, some, tokens, longest, recipe.gradient_checkpointing
        )[1]
        seconds = (
            3 * read_in(roles, roles.batch([kept[i % len(kept)] for i in range(micro)])) * per_step / micro
        )
        figures.append(
            [
                "time",
                f"about {format_duration(steps * seconds)}",
                (
                    "of training: forward of one micro-batch was timed, backward is assumed to take twice as"
                    " long; evaluation and saving come on top"
                ),
            ]
        )
        need = memory.predict(
            roles,
            chain,
            parts.estimator,
            some,
            tokens,
            bool(getattr(roles.policy.model, "is_gradient_checkpointing", False)),
        )
        each = {
            "gradients": need.gradients,
            "optimizer": need.state,
            "activations": need.activations,
            "temporary": need.temporary,
        }
        said = ", ".join(f"{name} {size(much)}" for name, much in each.items())
        figures.append(
            [
                "memory of a step",
                size(need.total),
                (
                    f"on top of the model: {said}. Two rows were read to see what backward keeps; a"
                    " micro-batch with the longest row is assumed"
                ),
            ]
        )
    else:
        notes.append("the memory of a step is not estimated: it depends on what is generated during the run")
    have = memory.free(roles.device)
    if have:
        figures.append(["there is", size(have), f"of memory free on {roles.device}"])
    if bad:
        notes.append(
            f"{len(bad):,} of {len(data.rows[:SAMPLE]):,} rows cannot be used; the first: {bad[0]['reason']}"
        )
    return {"figures": figures, "notes": notes}


def read_in(roles: Any, batch: Any) -> float:
    """Seconds in which a batch is read, the second time: the first also starts what is needed once."""
    import time

    import torch

    took = 0.0
    with torch.no_grad():
        for _ in range(2):
            began = time.perf_counter()
            # a view is read anew; the number waits for a device that works on its own
            roles.policy.logprobs(batch.view()).sum().item()
            took = time.perf_counter() - began
    return took


def size(n: float) -> str:
    return f"{n / 2**30:.2f} GB" if n >= 2**30 else f"{n / 2**20:.0f} MB"


# ---------------------------------------------------------------------------------------------- talking


@lru_cache(maxsize=1)
def loaded(model: str, mark: float) -> Any:
    from luthier.model.loaded import load

    return load(model)


def say(
    model: str,
    text: str,
    before: list[dict],
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    hear: Callable[[str], bool] = lambda part: False,
) -> dict[str, Any]:
    """A model's answer, after what was said before. hear: is told each part of it; where it says true, the
    answer ends there.
    """
    made = Path(model) / "report.json"
    them = loaded(model, made.stat().st_mtime if made.is_file() else 0.0)
    turns = [{"role": str(t["role"]), "content": str(t["content"])} for t in before]
    told, stopped = "", False

    def heard(answer: str) -> bool:
        nonlocal told, stopped
        # half a character waits for its other half
        whole = told if answer.endswith("\ufffd") else answer.lstrip()
        stopped, told = hear(whole[len(told) :]), whole
        return stopped

    answer = them.ask(
        text, turns, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, hear=heard
    )
    return {"answer": answer.strip(), "turns": them.turns, "notes": them.notes, "stopped": stopped}


def export(folder: str, kind: str, to: str) -> str:
    from luthier.serve import export as exporting

    return exporting.export(folder, kind, to)


# ---------------------------------------------------------------------------------------------- questions and answers

DOES: dict[str, Callable[..., Any]] = {
    "check": check,
    "settings": settings,
    "look": look,
    "forecast": forecast,
    "say": say,
    "export": export,
    "fields_of": fields_of,
}


def answered(asked: Mapping[str, Any], hear: Callable[[str], bool] | None = None) -> dict[str, Any]:
    """{do, with} -> {is} or {error}, the sentence that the command line would say. hear: of what grows, each
    part.
    """
    try:
        return {"is": DOES[asked["do"]](**asked["with"], **({"hear": hear} if hear else {}))}
    except RecipeError as error:
        return {"error": str(error)}
    except MemoryError:
        return {"error": "it does not fit into memory"}
    except Exception as error:
        import traceback

        traceback.print_exc()
        return {"bug": f"{type(error).__name__}: {error}"}


class Worker:
    """A process that answers; one question at a time."""

    def __init__(self, home: Path):
        self.home, self.lock = home, threading.Lock()
        self.child: subprocess.Popen | None = None

    def ask(self, do: str, hear: Callable[[str], bool] | None = None, **how: Any) -> Any:
        """Raises RecipeError with the command line's sentence, RuntimeError where the worker failed. hear:
        see `answered`.
        """
        with self.lock:
            child = self.child = self.child if self.child and self.child.poll() is None else self.started()
            try:
                text = put(child, json.dumps({"do": do, "with": how, "aloud": hear is not None}))
                while hear and text.startswith('{"part"'):
                    text = put(child, STOP if hear(json.loads(text)["part"]) else GO_ON)
            except BrokenPipeError:
                text = ""
        return told(
            json.loads(text)
            if text
            else {
                "error": (
                    f"the process that was to {do} died, which is mostly a lack of memory; try again, or a"
                    " smaller model"
                )
            }
        )

    def started(self) -> subprocess.Popen:
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

    def ask(self, do: str, hear: Callable[[str], bool] | None = None, **how: Any) -> Any:
        with self.lock:
            return told(json.loads(json.dumps(answered({"do": do, "with": how}, hear))))

    def end(self) -> None:
        pass


def put(child: Any, line: str) -> str:
    """A line to the process, and the one it says."""
    child.stdin.write(line + "\n")
    child.stdin.flush()
    return child.stdout.readline()


def told(answer: Mapping[str, Any]) -> Any:
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

    def hear(part: str) -> bool:
        write({"part": part})
        return sys.stdin.readline().strip() != GO_ON  # also where nobody is there any more

    while line := sys.stdin.readline():
        asked = json.loads(line)
        write(answered(asked, hear if asked["aloud"] else None))


if __name__ == "__main__":
    main()
