"""The run folders of a place: what each is, whether somebody is running in it, and how one is started,
stopped, cloned.

Whatever is known is read from the folder each time, so that pages, tabs and shells agree. A folder that the
studio began also holds submitted.yaml (the recipe as it was submitted; asked.yaml in version 0.1), console.log (what the command said) and
studio.json (which process it is).
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import yaml

from luthier.errors import RecipeError
from luthier.report.numbers import cost, generations, metric_rows
from luthier.storage import files
from luthier.storage.layout import run_folders

MARKS = (
    "run.json",
    "submitted.yaml",
    "asked.yaml",
    "study.json",
    "report.json",
)  # any of them makes a folder a run's
CHUNK = 1 << 20  # bytes of metrics.jsonl told at once
TAIL = 8000  # characters of a log told
PATIENCE = 10.0  # seconds after Ctrl-C until a run is ended less kindly


# Interrupts are heard whatever the studio was started by: what a shell puts into the background ignores them,
# and its children would.
HEARING = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from luthier.cli import main;"
    " main()"
)


class Shelf:
    """The folders `home/runs/*`. Names are those of the folders, never paths."""

    def __init__(self, home: Path):
        self.home = home.resolve()
        self.runs = self.home / "runs"
        # children of this process, so that they can be waited for
        self.begun: dict[str, subprocess.Popen] = {}

    # ------------------------------------------------------------------------------------------ finding

    def place(self, name: str) -> Path:
        """Where a run of this name is or would be. Refuses what is not a plain name: a path stays where the
        user pointed.
        """
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.+-]{0,120}", name):
            raise RecipeError(f"'{name}' is no name for a run: letters, digits and - _ . +")
        return self.runs / name

    def folder(self, name: str) -> Path:
        path = self.place(name)
        if not any((path / mark).is_file() for mark in MARKS):
            raise RecipeError(f"there is no run {name} in {self.runs}")
        return path

    def listing(self) -> list[dict[str, Any]]:
        """Every run in a few words, the latest first."""
        found = (
            [p for p in self.runs.iterdir() if any((p / m).is_file() for m in MARKS)]
            if self.runs.is_dir()
            else []
        )
        named = [p for p in found if re.fullmatch(r"[A-Za-z0-9][\w.+-]*", p.name)]
        return sorted((self.brief(p.name) for p in named), key=lambda r: -r["changed"])

    def brief(self, name: str) -> dict[str, Any]:
        """What it is, how far it is, and why it ended if it did not finish."""
        folder = self.folder(name)
        pid = self.process(name)  # first: once it has ended, its last words are there
        known, said = read_json(folder / "run.json"), log(folder)
        comparison = (folder / "study.json").is_file() or (folder / "arms").is_dir()
        finished = (folder / ("comparison.json" if comparison else "report.json")).is_file() and (
            known or {"finished": True}
        ).get("finished")
        at = folder if known else (run_folders(folder) or [folder])[-1]
        state = "running" if pid else "finished" if finished else "stopped"
        if state == "running" and not comparison and not (at / "before.json").is_file():
            state = "starting"
        why = "" if pid or finished else ended(said)
        if why and not why.startswith("stopped"):
            state = "failed"
        return {
            "name": name,
            "kind": "comparison" if comparison else "run",
            "state": state,
            "why": why,
            "step": last_step(at / "metrics.jsonl"),
            "steps": (read_json(at / "run.json") or {}).get("steps"),
            "act": at.name if at != folder else "",
            "what": what(folder),
            "doing": said.strip().rsplit("\n", 1)[-1] if pid else "",
            "report": (folder / "report.html").is_file(),
            "changed": max(
                (
                    p.stat().st_mtime
                    for m in (*MARKS, "metrics.jsonl", "console.log")
                    if (p := folder / m).is_file()
                ),
                default=0.0,
            ),
        }

    def whole(self, name: str) -> dict[str, Any]:
        """A run with its recipe, what was told, its numbers and answers, as far as they are there."""
        folder = self.folder(name)
        report, before = read_json(folder / "report.json"), read_json(folder / "before.json")
        asked = recipe_in(folder)
        comparison = read_json(folder / "comparison.json")
        out: dict[str, Any] = {
            **self.brief(name),
            "recipe": asked.read_text(encoding="utf-8") if asked else "",
            "command": shlex.join(["luthier", *words]) if (words := self.words(name)) else "",
            "log": log(folder),
            "exports": [
                str(p.relative_to(self.home))
                for p in sorted((self.home / "exports").glob(f"{name}-*"))
                if p.is_dir()
            ],
            "sentence": (comparison or {}).get("sentence", ""),
            "arms": {
                k: Path(v["runs"][0]).name
                for k, v in ((comparison or {}).get("arms") or {}).items()
                if v["runs"]
            },
        }
        if report:
            told = Report(report["before"], report["after"], report["stats"])
            out |= {
                "numbers": [asdict(x) for x in metric_rows(told)],
                "cost": list(cost(report["stats"])),
                "notes": report["notes"],
            }
            out["writes"], at = report["stats"].get("writes", False), Path(report["folder"])
        else:
            told, at = Report(before or {}, latest(folder / "metrics.jsonl"), {}), folder
            out |= {
                "numbers": [asdict(x) for x in metric_rows(told)],
                "cost": [],
                "notes": [],
                "writes": True,
            }
        out["answers"] = generations(at if at.is_absolute() else self.home / at)[:40]
        return out

    def metrics(self, name: str, since: int, mark: str) -> dict[str, Any]:
        """Lines of metrics.jsonl after a place in the file. A resumed run writes the file anew: then from its
        beginning.
        """
        folder = self.folder(name)
        path = folder / "metrics.jsonl"
        if not (folder / "run.json").is_file():
            path = (run_folders(folder) or [folder])[-1] / "metrics.jsonl"
        if not path.is_file():
            return {"lines": [], "next": 0, "mark": "", "anew": bool(mark)}
        with open(path, "rb") as file:
            now = f"{path.parent.name}/{psutil.os.fstat(file.fileno()).st_ino}"
            anew = mark != now
            file.seek(0 if anew else since)
            some = file.read(CHUNK)
        some = some[: some.rfind(b"\n") + 1]
        start = 0 if anew else since
        return {
            "lines": [x for x in map(parsed, some.splitlines()) if x],
            "next": start + len(some),
            "mark": now,
            "anew": anew,
        }

    # ------------------------------------------------------------------------------------------ processes

    def process(self, name: str) -> int | None:
        """Who runs in this folder: the process that its lock names, or the one that the studio has just
        started.
        """
        if child := self.begun.get(name):
            if child.poll() is None:
                return child.pid
            del self.begun[name]
        folder = self.place(name)
        lock, began = folder / ".lock", read_json(folder / "studio.json") or {}
        holder = lock.read_text(encoding="ascii", errors="replace") if lock.is_file() else ""
        if holder.isdigit() and (made := born(int(holder))) and made <= lock.stat().st_mtime + 1:
            return int(holder)
        return began["pid"] if began and born(began["pid"]) == began["born"] else None

    def begin(self, name: str, text: str) -> dict[str, Any]:
        """Start a recipe as `luthier tune runs/NAME/submitted.yaml output_dir=runs/NAME`."""
        folder = self.place(name)
        if any((folder / m).is_file() for m in MARKS):
            raise RecipeError(f"{folder.relative_to(self.home)} is there already; give this run another name")
        files.write_text(folder / "submitted.yaml", text)
        return self.go_on(name)

    def go_on(self, name: str) -> dict[str, Any]:
        """The same command again: a run that was stopped goes on from its last checkpoint."""
        folder = self.folder(name)
        if self.process(name):
            raise RecipeError(f"another process is running in {folder}")
        words = self.words(name)
        if not words:
            raise RecipeError(
                f"{folder} holds no recipe to go on with; run the same command again that began it"
            )
        self.spawn(name, words)
        return self.brief(name)

    def words(self, name: str) -> list[str]:
        """The command that began a run and goes on with it; empty where its folder does not say."""
        folder = self.place(name)
        if (folder / "arms.json").is_file():
            return json.loads((folder / "arms.json").read_text(encoding="utf-8"))
        asked = recipe_in(folder)
        return (
            ["tune", str(asked.relative_to(self.home)), f"output_dir={folder.relative_to(self.home)}"]
            if asked
            else []
        )

    def compare(self, name: str, runs: Sequence[str], seeds: int, budget: str, metric: str) -> dict[str, Any]:
        """`luthier compare` of the recipes of some runs."""
        folder = self.place(name)
        if folder.exists():
            raise RecipeError(
                f"{folder.relative_to(self.home)} is there already; give this comparison another name"
            )
        if len(set(runs)) < 2:
            raise RecipeError("a comparison wants two recipes or more, or --tuners a,b,c")
        texts = {}
        for run in runs:
            source = recipe_in(self.folder(run))
            if source is None:
                raise RecipeError(f"{run} holds no recipe to compare")
            keys = yaml.safe_load(source.read_text(encoding="utf-8"))
            texts[run] = yaml.safe_dump(
                {k: v for k, v in keys.items() if k != "output_dir"}, sort_keys=False, allow_unicode=True
            )
        for run, text in texts.items():
            files.write_text(folder / "arms" / f"{run}.yaml", text)
        words = ["compare", *(str((folder / "arms" / f"{run}.yaml").relative_to(self.home)) for run in texts)]
        words += [
            "--seeds",
            str(int(seeds)),
            "--output-dir",
            str(folder.relative_to(self.home)),
            "--metric",
            metric or "loss",
        ]
        words += ["--budget", budget] if budget else []
        files.write_json(folder / "arms.json", words)
        files.write_text(
            folder / "submitted.yaml", "".join(f"# {run}\n{text}\n" for run, text in texts.items())
        )
        self.spawn(name, words)
        return self.brief(name)

    def spawn(self, name: str, words: Sequence[str]) -> None:
        """A process of its own, in a session of its own: it outlives the studio."""
        folder = self.place(name)
        with open(folder / "console.log", "wb") as said:
            child = subprocess.Popen(
                [sys.executable, "-c", HEARING, *words],
                cwd=self.home,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.begun[name] = child
        files.write_json(folder / "studio.json", {"pid": child.pid, "born": born(child.pid)})

    def stop(self, name: str) -> dict[str, Any]:
        """As Ctrl-C does; who does not listen (started where interrupts are ignored) is ended: the last
        checkpoint stays.
        """
        pid = self.process(name)
        if pid is None:
            raise RecipeError(f"nothing is running in {self.folder(name)}")
        them = psutil.Process(pid)
        made = them.create_time()
        group = (
            [them, *them.children(recursive=True)]
            if name in self.begun or read_json(self.place(name) / "studio.json")
            else [them]
        )
        for one in group:
            quietly(one.send_signal, signal.SIGINT)

        def insist() -> None:
            until = time.monotonic() + PATIENCE
            while time.monotonic() < until and born(pid) == made:
                time.sleep(0.2)
            for one in group:
                quietly(one.terminate)

        threading.Thread(target=insist, daemon=True).start()
        return self.brief(name)

    def remove(self, name: str) -> None:
        """Take a run off the shelf, for good."""
        folder = self.folder(name)
        if self.process(name):
            raise RecipeError(f"{name} is running; stop it first")
        shutil.rmtree(folder)


# ---------------------------------------------------------------------------------------------- reading


class Report:
    """What the sentences about numbers are made from."""

    def __init__(self, before: dict, after: dict, stats: dict):
        self.before, self.after, self.stats = before, after, stats


def quietly(do: Any, *how: Any) -> None:
    try:
        do(*how)
    except psutil.NoSuchProcess:
        pass


def born(pid: int) -> float | None:
    """When a living process began; a number may be another process's by now."""
    try:
        them = psutil.Process(pid)
        return None if them.status() == psutil.STATUS_ZOMBIE else them.create_time()
    except psutil.Error:
        return None


def recipe_in(folder: Path) -> Path | None:
    """The recipe as it was submitted, or as it was written down."""
    return next(
        (p for f in ("submitted.yaml", "asked.yaml", "recipe.yaml") if (p := folder / f).is_file()), None
    )


def read_json(path: Path) -> Any:
    """None where it is not there or not whole."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def parsed(text: bytes) -> dict | None:
    """A log line; a number that JSON has no word for is left out."""
    try:
        found = json.loads(text, parse_constant=lambda _: None)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def log(folder: Path) -> str:
    path = folder / "console.log"
    return path.read_bytes()[-TAIL:].decode("utf-8", "replace") if path.is_file() else ""


def ended(said: str) -> str:
    """Why a command ended, from its last words: the sentence after `luthier:`, or the last line of a
    traceback.
    """
    every = [x for x in said.strip().splitlines() if x.strip()]
    sentence = next((x for x in reversed(every) if x.startswith("luthier: ")), "")
    if sentence:
        return sentence.removeprefix("luthier: ")
    if every and every[-1].strip() == "KeyboardInterrupt":
        return "stopped before it began; the same command begins it"
    return every[-1] if every and "Traceback (most recent call last)" in said else ""


def last_step(path: Path) -> int:
    """The step of the last whole line."""
    if not path.is_file():
        return 0
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 20_000))
        found = [x for x in map(parsed, file.read().splitlines()) if x]
    return int(found[-1].get("step", 0)) if found else 0


def latest(path: Path) -> dict[str, float]:
    """What was measured last during a run."""
    out: dict[str, float] = {}
    if path.is_file():
        for x in map(parsed, path.read_bytes().splitlines()):
            out |= {
                k.removeprefix("eval_"): v
                for k, v in (x or {}).items()
                if k.startswith("eval_") and v is not None
            }
    return out


def what(folder: Path) -> str:
    """'toy:lm, lora, sft' of a run, the arms of a comparison."""
    if (folder / "arms").is_dir():
        return " / ".join(sorted(p.stem for p in (folder / "arms").glob("*.yaml")))
    asked = recipe_in(folder)
    try:
        keys: Any = yaml.safe_load(asked.read_text(encoding="utf-8")) if asked else None
    except (yaml.YAMLError, OSError):
        keys = None
    if not isinstance(keys, Mapping):
        return ""

    def word(x: Any) -> str:
        if isinstance(x, list):
            return " + ".join(map(word, x))
        return str(x.get("name", "")) if isinstance(x, Mapping) else str(x)

    said = [
        word(keys.get(k) or default)
        for k, default in (("model", "toy:lm"), ("tuner", "lora"), ("objective", "sft"))
    ]
    return ", ".join(w for w in said if w)
