"""The run folders of a place: what each is, whether a process runs in it, and how one is started, stopped,
resumed and compared.

All of it is read from the folder each time, so that pages, tabs and shells agree. A folder that the studio
began also holds submitted.yaml (the recipe as it was submitted; asked.yaml in version 0.1), console.log (the
command's output) and studio.json (which process it is).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import yaml

from luthier.errors import Damaged, RecipeError, shortened
from luthier.report.numbers import (
    cost,
    damaged_generations,
    format_duration,
    generations,
    headline,
    metric_rows,
    row_counts,
)
from luthier.storage import files
from luthier.storage.bounded_yaml import read_yaml
from luthier.storage.failure import read_failure
from luthier.storage.layout import FAILED, REPORT, STATUS, run_folders
from luthier.studio import facts
from luthier.studio.facts import SEARCH, Measured, read_object
from luthier.studio.studies import comparison_result, search_result

# any of them makes a folder a run's
MARKS = (
    "run.json",
    "submitted.yaml",
    "asked.yaml",
    "study.json",
    SEARCH,
    "quest.json",
    "report.json",
)
RESULTS = {"run": "report.json", "comparison": "comparison.json", "search": "search.json"}
COUNTED = {"run": "step", "comparison": "run", "search": "configuration"}  # what a status counts
NAME = r"[A-Za-z0-9][\w.+-]{0,120}"
CHUNK = 1 << 20  # bytes of metrics.jsonl in one answer
TAIL = 8000  # characters of a log in an answer
ANSWERS = 40  # generations in an answer
MAX_RECIPE = 1 << 22  # bytes of a recipe in an answer
RECENT = 1 << 16  # bytes of a log that the table of runs looks through
MAX_LOG = 1 << 24  # bytes of a log that are looked through for the latest metrics
# what reading a damaged or foreign folder may raise
DAMAGE = (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
PATIENCE = 10.0  # seconds after Ctrl-C until a run is terminated

# A run reacts to interrupts whatever the studio was started by: what a shell puts into the background ignores
# them, and its children would.
COMMAND = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from luthier.cli import main;"
    " main()"
)


class RunStore:
    """The folders `home/runs/*`. Names are those of the folders, never paths."""

    def __init__(self, home: Path):
        self.home = home.resolve()
        self.folders = self.home / "runs"
        # children of this process, so that they can be waited for
        self.children: dict[str, subprocess.Popen] = {}

    # ------------------------------------------------------------------------------------------ reading

    def place(self, name: str) -> Path:
        """Where a run of this name is or would be. Refuses what is not a plain name: a path stays where the
        user pointed.
        """
        if not isinstance(name, str) or not re.fullmatch(NAME, name):
            raise RecipeError(f"'{name}' is not a valid run name: use letters, digits and - _ . +")
        return self.folders / name

    def folder(self, name: str) -> Path:
        """The folder of a run that is there."""
        path = self.place(name)
        if not is_run(path):
            raise RecipeError(f"there is no run {name} in {self.folders}")
        return path

    def runs(self) -> list[dict[str, Any]]:
        """A summary of every run, the latest first."""
        summaries = []
        if self.folders.is_dir():
            for path in self.folders.iterdir():
                if is_run(path) and re.fullmatch(NAME, path.name):
                    summaries.append(self.summary_of_any(path.name))
        return sorted(summaries, key=lambda summary: -summary["changed"])

    def summary_of_any(self, name: str) -> dict[str, Any]:
        """As `summary`; of a folder that cannot be summed up, that it cannot: the others are shown all the
        same.
        """
        try:
            return self.summary(name)
        except DAMAGE as error:
            reason = f"this folder cannot be read ({shortened(str(error), 200)})"
            return {**UNREADABLE, "name": name, "why": reason}

    def summary(self, name: str) -> dict[str, Any]:
        """What it is, its step and state, why it ended if it did not finish, and its columns in the table.

        While a process runs, step and `doing` come from its status file alone, so that they agree.
        """
        folder = self.folder(name)
        pid = self.process(name)  # first: once it has ended, the end of its log is there
        state, output = read_object(folder / "run.json"), log(folder)
        kind = kind_of(folder)
        finished = (folder / RESULTS[kind]).is_file() and (not state or bool(state.get("finished")))
        at = folder if state or kind != "run" else current_run(folder)
        status = current_status(at, pid) if pid else {}
        condition, reason = "stopped", ""
        if pid:
            condition = "starting"
            if status or kind != "run" or (at / "before.json").is_file():
                condition = "running"
        elif finished:
            condition = "finished"
        else:
            reason = why_ended(folder, output)
            if reason and not reason.startswith("stopped"):
                condition = "failed"
        return {
            "name": name,
            "kind": kind,
            "state": condition,
            "why": reason,
            "step": number(status.get("step")) or facts.as_it_stands(last_step, at / "metrics.jsonl"),
            "steps": number(status.get("steps")) or number(read_object(at / "run.json").get("steps")),
            "counted": COUNTED[kind],
            "act": at.name if at != folder else "",
            "what": title(folder),
            "doing": doing(status, kind) if pid else "",
            "report": (folder / "report.html").is_file(),
            "changed": last_change(folder),
            **facts.labels_of(folder),
            **self.columns(folder, at, kind),
        }

    def columns(self, folder: Path, at: Path, kind: str) -> dict[str, Any]:
        """What the table of runs shows of a run beside its state. at: the folder of a plan's current run."""
        if kind != "run":
            return {"methods": {}, "metrics": {}, "stats": {}, "measured_on": ""}
        measured, _, _ = facts.report_of(folder)
        if measured.stats:
            cells = or_else({}, facts.as_it_stands, facts.cells_in, folder / REPORT)
        else:
            measured = Measured(facts.before_of(at), last_metrics(at / "metrics.jsonl", RECENT), {})
            cells = or_else({}, facts.metric_cells, measured)
        return {
            "methods": facts.methods_of(folder, recipe_in(folder)),
            "metrics": cells,
            "stats": facts.numbers_in({k: v for k, v in measured.stats.items() if k in facts.SHOWN_STATS}),
            "measured_on": facts.measured_on(at, measured.stats),
        }

    def describe(self, name: str) -> dict[str, Any]:
        """A run with its recipe, output, metrics and generations, as far as they are there."""
        folder = self.folder(name)
        recipe, command = recipe_in(folder), self.command(name)
        exports = []
        for path in sorted((self.home / "exports").glob(f"{name}-*")):
            if path.is_dir():
                exports.append(str(path.relative_to(self.home)))
        measured, notes, reported = facts.report_of(folder)
        if measured.stats:
            at, writes = self.home / reported, bool(measured.stats.get("writes", False))
        else:
            at, writes = current_run(folder), True
            if (folder / "run.json").is_file():
                at = folder
            measured = Measured(facts.before_of(at), last_metrics(at / "metrics.jsonl"), {})
        return {
            **self.summary_of_any(name),
            "recipe": or_else("", files.read_text, recipe, MAX_RECIPE) if recipe else "",
            "command": shlex.join(["luthier", *command]) if command else "",
            "log": log(folder),
            "exports": exports,
            "sentence": or_else("", sentence_of, folder, measured),
            "trend": str(measured.stats.get("trend") or ""),
            "row_counts": or_else("", row_counts, measured.stats),
            "study": or_else(None, study_of, folder, self.home),
            "numbers": [asdict(row) for row in or_else([], metric_rows, measured)],
            "losses": {"before": measured.before.get("loss"), "after": measured.after.get("loss")},
            "cost": or_else([], lambda: list(cost(measured.stats))),
            "notes": [*notes, *or_else([], damaged_generations, at)],
            "writes": writes,
            "answers": or_else([], generations, at)[:ANSWERS],
        }

    def metrics(self, name: str, since: int, mark: str) -> dict[str, Any]:
        """Lines of metrics.jsonl from this byte on. A resumed run writes a new file: then from its beginning.

        mark: of the file that was read before, from the previous answer.
        """
        folder = self.folder(name)
        if not (folder / "run.json").is_file():
            folder = current_run(folder)
        path = folder / "metrics.jsonl"
        if not path.is_file():
            return {"lines": [], "next": 0, "mark": "", "anew": bool(mark)}
        with open(path, "rb") as file:
            current = f"{folder.name}/{os.fstat(file.fileno()).st_ino}"
            if mark != current:
                since = 0
            since = min(since, os.fstat(file.fileno()).st_size)
            file.seek(since)
            chunk = file.read(CHUNK)
        chunk = chunk[: chunk.rfind(b"\n") + 1]  # the last line may be being written
        return {
            "lines": parse_lines(chunk),
            "next": since + len(chunk),
            "mark": current,
            "anew": mark != current,
        }

    # ------------------------------------------------------------------------------------------ processes

    def process(self, name: str) -> int | None:
        """The process that runs in this folder: the one that holds its lock, or the one that a studio has
        just started. A number in a file is nobody's word: the process must have the lock open, or be the
        command of this run.
        """
        if child := self.children.get(name):
            if child.poll() is None:
                return child.pid
            del self.children[name]
        folder = self.place(name)
        holder = files.lock_holder(folder)
        if holder is not None and has_open(holder, folder / files.LOCK):
            return holder
        started = read_object(folder / "studio.json", pid=int, born=(int, float))
        if started and birth(started["pid"]) == started["born"] and self.is_command(started["pid"], name):
            return started["pid"]
        return None

    def is_command(self, pid: int, name: str) -> bool:
        """Whether a process is the command of this run, as a studio starts it."""
        try:
            process = psutil.Process(pid)
            return process.cmdline()[1:] == ["-c", COMMAND, *self.command(name)] and Path(
                process.cwd()
            ).samefile(self.home)
        except (psutil.Error, RecipeError, OSError):
            return False

    def begin(self, name: str, text: str) -> dict[str, Any]:
        """Start a recipe as `luthier tune runs/NAME/submitted.yaml output_dir=runs/NAME`."""
        folder = self.place(name)
        if is_run(folder):
            raise RecipeError(
                f"{folder.relative_to(self.home)} already exists; choose another name for this run"
            )
        files.write_text(folder / "submitted.yaml", text)
        return self.resume(name)

    def resume(self, name: str) -> dict[str, Any]:
        """The same command again: a run that was stopped goes on from its last checkpoint."""
        folder = self.folder(name)
        if self.process(name):
            raise RecipeError(f"another process is using {folder}")
        command = self.command(name)
        if not command:
            raise RecipeError(f"{folder} has no recipe to resume from; run the original command again")
        self.spawn(name, command)
        return self.summary(name)

    def command(self, name: str) -> list[str]:
        """The arguments of `luthier` that began a run and resume it; none where there is no recipe."""
        folder = self.place(name)
        if (folder / "arms.json").is_file():
            words = files.read_json(folder / "arms.json")
            if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
                raise Damaged(f"{folder / 'arms.json'} is damaged: it is no command")
            return words
        recipe = recipe_in(folder)
        if recipe is None:
            return []
        return ["tune", str(recipe.relative_to(self.home)), f"output_dir={folder.relative_to(self.home)}"]

    def compare(self, name: str, runs: Sequence[str], seeds: int, budget: str, metric: str) -> dict[str, Any]:
        """`luthier compare` of the recipes of some runs."""
        folder = self.place(name)
        target = str(folder.relative_to(self.home))
        if folder.exists():
            raise RecipeError(f"{target} already exists; choose another name for this comparison")
        if len(set(runs)) < 2:
            raise RecipeError("a comparison needs two recipes or more, or --tuners a,b,c")
        texts = {}
        for run in runs:
            source = recipe_in(self.folder(run))
            if source is None:
                raise RecipeError(f"{run} has no recipe to compare")
            keys = read_yaml(source)
            if not isinstance(keys, dict):
                raise RecipeError(f"the recipe of {run} is no mapping of `key: value`")
            keys.pop("output_dir", None)
            texts[run] = yaml.safe_dump(keys, sort_keys=False, allow_unicode=True)
        command, submitted = ["compare"], []
        for run, text in texts.items():
            path = folder / "arms" / f"{run}.yaml"
            files.write_text(path, text)
            command.append(str(path.relative_to(self.home)))
            submitted.append(f"# {run}\n{text}\n")
        command += ["--seeds", str(int(seeds)), "--output-dir", target, "--metric", metric or "loss"]
        if budget:
            command += ["--budget", budget]
        files.write_json(folder / "arms.json", command)
        files.write_text(folder / "submitted.yaml", "".join(submitted))
        self.spawn(name, command)
        return self.summary(name)

    def spawn(self, name: str, command: Sequence[str]) -> None:
        """A process of its own, in a session of its own: it outlives the studio."""
        folder = self.place(name)
        if (folder / "console.log").exists() and not (folder / "console.log").is_file():
            raise RecipeError(f"{folder / 'console.log'} is not a file")
        with open(folder / "console.log", "wb") as output:
            child = subprocess.Popen(
                [sys.executable, "-c", COMMAND, *command],
                cwd=self.home,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.children[name] = child
        files.write_json(folder / "studio.json", {"pid": child.pid, "born": birth(child.pid)})

    def stop(self, name: str) -> dict[str, Any]:
        """As Ctrl-C does; a process that ignores interrupts is terminated: the last checkpoint stays."""
        pid = self.process(name)
        if pid is None:
            raise RecipeError(f"no run is active in {self.folder(name)}")
        try:
            process = psutil.Process(pid)
            born, group = process.create_time(), [process]
            if name in self.children or self.is_command(pid, name):
                group += process.children(recursive=True)
        except psutil.Error:
            raise RecipeError(f"the run in {self.folder(name)} has just ended") from None

        def terminate_later() -> None:
            end = time.monotonic() + PATIENCE
            while time.monotonic() < end and birth(pid) == born:
                time.sleep(0.2)
            for member in group:
                with suppress(psutil.Error):
                    member.terminate()

        for member in group:
            with suppress(psutil.Error):
                member.send_signal(signal.SIGINT)
        threading.Thread(target=terminate_later, daemon=True).start()
        return self.summary(name)

    def remove(self, name: str) -> None:
        """Delete a run's folder, for good."""
        folder = self.folder(name)
        if self.process(name):
            raise RecipeError(f"{name} is still running; stop it first")
        if folder.is_symlink():
            folder.unlink()  # what it leads to is not the studio's
        else:
            shutil.rmtree(folder)


# --------------------------------------------------------------------------------------------------- folders


# of a folder that cannot be read
UNREADABLE = {
    "kind": "run",
    "state": "failed",
    "step": 0,
    "steps": None,
    "act": "",
    "what": "",
    "doing": "",
    "report": False,
    "changed": 0.0,
    "counted": "step",
    "tags": [],
    "note": "",
    "methods": {},
    "metrics": {},
    "stats": {},
    "measured_on": "",
}


def or_else(default: Any, read: Callable[..., Any], *arguments: Any) -> Any:
    """What a reader makes of a folder's files; the default where they are damaged or foreign."""
    try:
        return read(*arguments)
    except DAMAGE:
        return default


def is_run(folder: Path) -> bool:
    try:
        return any((folder / mark).is_file() for mark in MARKS)
    except OSError:
        return False


def has_open(pid: int, path: Path) -> bool:
    """Whether a process other than this one has a file open."""
    if pid == os.getpid():
        return False
    try:
        opened = psutil.Process(pid).open_files()
        return any(os.path.samefile(file.path, path) for file in opened if os.path.exists(file.path))
    except (psutil.Error, OSError):
        return False


def kind_of(folder: Path) -> str:
    """What lies in a folder: a run, a comparison or a search."""
    if (folder / "study.json").is_file() or (folder / "arms").is_dir():
        return "comparison"
    if (folder / SEARCH).is_file() or (folder / "quest.json").is_file():
        return "search"
    return "run"


def current_status(folder: Path, pid: int) -> dict[str, Any]:
    """What the process of a run last wrote of itself; empty where it has not yet, and an earlier one did."""
    path = folder / STATUS
    status = read_object(path, doing=str, step=int)
    began = birth(pid)
    if not status or began is None or path.stat().st_mtime < began:
        return {}
    return status


def doing(status: Mapping[str, Any], kind: str) -> str:
    """What a process is doing now: 'evaluating before training: 3 of 16 rows'."""
    if not status:
        return "starting: loading libraries and rows"
    text, of, left = status["doing"], status.get("of"), status.get("left")
    if isinstance(of, int) and isinstance(status.get("done"), int):
        text += f": {status['done']:,} of {of:,} {status.get('unit', '')}"
    elif isinstance(left, (int, float)) and text == "training":
        text += f", about {format_duration(left)} left"
    if kind != "run" and text.startswith("training"):
        text = text.replace("training", f"running each {COUNTED[kind]}", 1)
    return text


def sentence_of(folder: Path, measured: Measured) -> str:
    """A run, a comparison or a search in one sentence; empty where nothing is measured yet."""
    for name in (RESULTS["comparison"], RESULTS["search"]):
        if (folder / name).is_file():
            return str(read_object(folder / name).get("sentence", ""))
    if not measured.stats:
        return ""
    return headline(measured)


def study_of(folder: Path, home: Path) -> dict[str, Any] | None:
    """The result of a comparison or a search as its page shows it; None of a run, and where there is none."""
    if (folder / RESULTS["search"]).is_file():
        return search_result(folder / RESULTS["search"], home)
    if (folder / RESULTS["comparison"]).is_file():
        return comparison_result(folder / RESULTS["comparison"], home)
    return None


def number(value: Any) -> int | None:
    return value if type(value) is int else None


def current_run(folder: Path) -> Path:
    """The last run of a plan; the folder itself where it is none."""
    runs = run_folders(folder)
    if not runs:
        return folder
    return runs[-1]


def birth(pid: int) -> float | None:
    """When a living process began; a number may be another process's by now."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return process.create_time()
    except (psutil.Error, ValueError, OverflowError):  # a number that no process can have
        return None


def last_change(folder: Path) -> float:
    """When a run wrote last, in seconds since 1970."""
    latest = 0.0
    for name in (*MARKS, "metrics.jsonl", "console.log"):
        path = folder / name
        if path.is_file():
            latest = max(latest, path.stat().st_mtime)
    return latest


def recipe_in(folder: Path) -> Path | None:
    """The recipe as it was submitted, or as the run wrote it."""
    for name in ("submitted.yaml", "asked.yaml", "recipe.yaml"):
        path = folder / name
        if path.is_file():
            return path
    return None


def parse_lines(text: bytes) -> list[dict]:
    """Lines of a log. Those that are cut short are left out; a number that JSON has no word for is None."""
    entries = []
    for line in text.splitlines():
        try:
            entry = json.loads(line, parse_constant=lambda _: None)
        except (ValueError, RecursionError):
            continue
        if entry and isinstance(entry, dict):
            entries.append(entry)
    return entries


def log(folder: Path) -> str:
    """The end of the command's output."""
    path = folder / "console.log"
    if not path.is_file():
        return ""
    return or_else(b"", tail, path, TAIL).decode("utf-8", "replace")


def tail(path: Path, size: int) -> bytes:
    """The last bytes of a file."""
    with files.open_regular(path) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - size))
        return file.read(size)


def why_ended(folder: Path, output: str) -> str:
    """Why a command ended: as its run wrote down, or the sentence after `luthier:`, or the last line of a
    traceback. output: the end of its log.
    """
    started, failed = folder / "studio.json", folder / FAILED
    # what is older than the last start of the studio is of an earlier attempt
    if failed.is_file() and not (started.is_file() and failed.stat().st_mtime < started.stat().st_mtime):
        if failure := or_else(None, read_failure, folder):
            return str(failure)
    lines = [line for line in output.strip().splitlines() if line.strip()]
    for line in reversed(lines):
        if line.startswith("luthier: "):
            return line.removeprefix("luthier: ")
    if lines and lines[-1].strip() == "KeyboardInterrupt":
        return "stopped before training began; run the same command to start it"
    if lines and "Traceback (most recent call last)" in output:
        return lines[-1]
    return ""


def last_step(path: Path) -> int:
    """The step of the last whole line."""
    if not path.is_file():
        return 0
    entries = parse_lines(tail(path, 20_000))
    if not entries:
        return 0
    step = entries[-1].get("step")
    return step if isinstance(step, int) else 0


def last_metrics(path: Path, limit: int = MAX_LOG) -> dict[str, float]:
    """The latest value of each metric that is measured during a run, in the last bytes of its log."""
    latest: dict[str, float] = {}
    if path.is_file():
        for entry in parse_lines(tail(path, limit)):
            for key, value in entry.items():
                if key.startswith("eval_") and isinstance(value, (int, float)):
                    latest[key.removeprefix("eval_")] = value
    return latest


def title(folder: Path) -> str:
    """'toy:lm, lora, sft' of a run or of what a search varies, the arms of a comparison."""
    if (folder / "arms").is_dir():
        return " / ".join(sorted(path.stem for path in (folder / "arms").glob("*.yaml")))
    if (folder / "study.json").is_file():
        study = facts.as_it_stands(read_object, folder / "study.json")
        return " / ".join(map(str, study.get("arms") or ()))
    methods = facts.as_it_stands(facts.methods_in, recipe_in(folder) or folder / SEARCH)
    names = [methods.get(key) for key in ("model", "tuner", "objective")]
    return ", ".join(filter(None, names))
