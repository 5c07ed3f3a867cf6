"""What a person at a terminal sees: sentences, a progress bar with rate and time left, rows as the model
reads them.

At a pipe or in a log file the same text has no colours and no bar: a line for about every tenth of the run.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from luthier.report import benchmarks
from luthier.report.changes import shown_changes, verdict
from luthier.report.numbers import (
    MetricRow,
    cost,
    format_duration,
    format_metric,
    format_number,
    generations,
    headline,
    metric_of,
    metric_rows,
    row_counts,
    split_rows,
)
from luthier.report.retention import HEAD, Skill, read_skills, sentence, skill_of
from luthier.report.text import MARKS, cut, plain, render_rows, visible

COLOURS = {True: "green", False: "red", None: "default"}
INTERVAL = 15  # seconds between two lines of progress at a pipe
DECAY = 0.9  # of what was: the rate is that of about the last ten steps


class Callback:
    """Sees everything, stores the sentences, prints nothing."""

    def __init__(self):
        self.notes: list[str] = []

    def warn(self, sentence: str) -> None:
        """Something the user should know."""
        self.notes.append(sentence)

    def stage(self, name: str) -> None:
        """What is being done now."""

    @contextmanager
    def working(self, name: str) -> Iterator[Callable[[int, int, str], None]]:
        """Around a long piece of work, such as an evaluation. What it yields is called with how much of it is
        done, of how much, and of what.
        """
        self.stage(name)
        yield lambda done, of, what: None

    def rows(self, roles: Any, rows: Sequence[dict], stats: dict) -> None:
        """The training data, encoded."""

    @contextmanager
    def training(self, total: int, done: int) -> Iterator[None]:
        """Around the steps."""
        yield

    def step(self, log: dict) -> None:
        """After each step."""

    def finish(self, report: Any) -> None:
        """After the run."""


LISTED_COLUMNS = 30  # that a look at rows names
LISTED_REASONS = 8


class Console(Callback):
    """Prints. `file` is for tests; rich finds out by itself whether it speaks to a terminal."""

    def __init__(self, file: Any = None):
        from rich.console import Console as Screen

        super().__init__()
        self.screen = Screen(file=file, highlight=False)
        if not self.screen.is_terminal:
            self.screen = Screen(file=file, highlight=False, no_color=True, width=110)
        self.bar: Any = None
        self.task: Any = None
        self.total = self.done = self.last_printed = self.steps = 0
        self.began = self.tokens = self.seconds = self.silence = 0.0
        self.smooth: float | None = None  # the loss, averaged over about the last ten steps

    # ------------------------------------------------------------------------------------------ sentences

    def say(self, text: str = "", style: str = "") -> None:
        """Text as it is: user text must not be read as markup, and at a pipe no line is broken."""
        self.screen.print(visible(text), style=style, markup=False, soft_wrap=not self.screen.is_terminal)

    def warn(self, sentence: str) -> None:
        super().warn(sentence)
        self.say(f"· {sentence}", "yellow")

    def stage(self, name: str) -> None:
        self.say(name, "dim")

    @contextmanager
    def working(self, name: str) -> Iterator[Callable[[int, int, str], None]]:
        """On a terminal a line that is written over and over; at a pipe a line every 15 seconds."""
        if self.screen.is_terminal and self.bar is None:
            with self.screen.status(name) as status:
                yield lambda done, of, what: status.update(f"{name}: {done:,} of {of:,} {what}")
            self.say(name, "dim")
            return
        if self.bar is None:
            self.stage(name)
        last = time.perf_counter()

        def progress(done: int, of: int, what: str) -> None:
            nonlocal last
            if time.perf_counter() - last > INTERVAL:
                last = time.perf_counter()
                self.say(f"{name}: {done:,} of {of:,} {what}", "dim")

        yield progress

    def rows(self, roles: Any, rows: Sequence[dict], stats: dict) -> None:
        share = stats.get("supervised_share")
        supervised = f" ({100 * share:.0f}% supervised)" if share else ""
        tokens = f"{stats.get('row_tokens', 0):,} tokens{supervised}"
        if counts := row_counts(stats):
            self.say(counts)
        self.say(f"{len(rows):,} training rows, {tokens}; the first ones as the model sees them:")
        self._marked_rows(render_rows(roles, rows))

    def _marked_rows(self, texts: Iterable[str], limit: int = 600) -> None:
        """Rows with supervised tokens highlighted, at a pipe between ⟦ and ⟧."""
        from rich.text import Text

        for text in texts:
            self.say()
            text = visible(cut(text, limit)).replace("\n", "\n  ")
            if not self.screen.is_terminal:
                self.say("  " + text.replace(MARKS[0], "⟦").replace(MARKS[1], "⟧"))
                continue
            prompt, *parts = text.split(MARKS[0])
            line = Text("  ").append(prompt, "dim")
            for part in parts:
                supervised, _, rest = part.partition(MARKS[1])
                line.append(supervised, "bold green")
                line.append(rest.replace(MARKS[1], ""), "dim")
            self.screen.print(line)
        self.say()

    # ------------------------------------------------------------------------------------------ steps

    @contextmanager
    def training(self, total: int, done: int) -> Iterator[None]:
        self.total, self.done, self.last_printed, self.began = total, done, done, time.perf_counter()
        self.tokens = self.seconds = 0.0
        self.smooth, self.steps = None, 0
        self.silence = INTERVAL  # seconds into training before a line tells how long it will take
        if not self.screen.is_terminal:
            yield
            return
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (
            TextColumn("{task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[status]}"),
        )
        with Progress(*columns, console=self.screen, transient=False, expand=True) as self.bar:
            self.task = self.bar.add_task("", total=total, completed=done, status="")
            try:
                yield
            finally:
                self.bar = None

    def step(self, log: dict) -> None:
        loss = log.get("loss")
        if loss is not None:
            self.smooth = loss if self.smooth is None else self.smooth + 0.2 * (loss - self.smooth)
        self.tokens = DECAY * self.tokens + log.get("tokens", 0)
        self.seconds = DECAY * self.seconds + log.get("seconds", 0.0)
        steps, self.done = log["step"] - self.done, log["step"]
        self.steps += steps
        sentence = log.get("message")  # of a step that is worth a line of its own
        if sentence:
            status = "" if self.bar is not None else self._status()
            self.say(f"{sentence} ({status})" if status else sentence)
        if self.bar is not None:
            self.bar.update(self.task, advance=steps, status=self._status())
        elif not sentence and self._line_is_due():
            self.last_printed = self.done
            self.silence = max(self.silence, 2 * (time.perf_counter() - self.began))
            self.say(f"step {self.done}/{self.total}  {self._status()}")

    def _line_is_due(self) -> bool:
        """At a pipe: after each tenth of the steps, and early in long runs, so that their length is known."""
        if self.done == self.total or (self.done - self.last_printed) * 10 >= self.total:
            return True
        return time.perf_counter() - self.began > self.silence

    def _status(self) -> str:
        """Loss, rate and time left; what is not known is left out."""
        phrases = []
        if self.smooth is not None:
            phrases.append(f"loss {format_number(self.smooth)}")
        if self.seconds and self.tokens:
            phrases.append(f"{self.tokens / self.seconds:,.0f} tokens/s")
        if self.steps and self.done < self.total:
            # Wall-clock time of this process over its steps: what is saved and evaluated on the way counts
            # too.
            each = (time.perf_counter() - self.began) / self.steps
            phrases.append(f"{format_duration(each * (self.total - self.done))} left")
        return "  ".join(phrases)

    # ------------------------------------------------------------------------------------------ results

    def finish(self, report: Any) -> None:
        self.say()
        skills = read_skills(report.folder)
        self.say(headline(report), "bold")
        if trend := report.stats.get("trend"):
            self.say(f"{trend[0].upper()}{trend[1:]}.")
        if skills:
            self.say(sentence(skills))
        self._generations(generations(report.folder))
        self._metrics(report, skills)
        for what, amount in cost(report.stats):
            self.say(f"  {what:<20} {amount}")
        if table := report.stats.get("table"):
            self.listing(table, tuple(table[0]), heads=True)
        page = Path(report.folder) / "report.html"
        self.say()
        for run in report.runs:
            self.say(f"  {run}")
        if page.is_file():
            self.say(f"Report: {page}")
        if report.runs:
            whole = Path(report.runs[0]).parent / "report.html"
            if whole != page and whole.is_file():
                self.say(f"Report of all runs: {whole}")
        if report.stats.get("writes", True):
            self.say(f"Chat with the model: luthier chat {report.folder}")

    def _generations(self, rows: Sequence[dict], most: int = 4) -> None:
        """The same prompts before and after."""
        from rich.text import Text

        if not rows:
            return
        table = self._grid("prompt", "before", "after", "reference")
        for row in rows[:most]:
            cells = [
                Text(visible(cut((row[k] or "").strip(), 240)))
                for k in ("prompt", "before", "after", "expected")
            ]
            for cell, score in ((cells[1], row["score_before"]), (cells[2], row["score_after"])):
                if score is not None:
                    cell.stylize("green" if score > 0 else "red")
            table.add_row(*cells)
        self.screen.print(table)

    def _metrics(self, report: Any, skills: Sequence[Skill] = ()) -> None:
        """Metrics before and after; the parts of a metric in a table of their own, those of retention with
        their intervals.
        """
        whole, parts = split_rows(metric_rows(report), skills)
        self._before_after(report.stats.get("measured_on", "metric"), whole)
        if skills:
            self._retention(skills)
        for label, rows in parts.items():
            self._before_after(f"{label} by task", rows)

    def _retention(self, skills: Sequence[Skill]) -> None:
        """What could be done beside the trained task, skill by skill."""
        from rich.text import Text

        table = self._grid(*HEAD, right=HEAD[1:])
        for skill in skills:
            rows, before, after, change, interval = skill.cells()
            name = Text(visible(skill.label))
            table.add_row(name, rows, before, after, Text(change, COLOURS[skill.better]), interval)
        self.screen.print(table)

    def _before_after(self, title: str, rows: Sequence[MetricRow]) -> None:
        from rich.text import Text

        if not rows:
            return
        heads = ["before", "after", "change"]
        if any(row.interval for row in rows):
            heads.append("interval (95%)")
        table = self._grid(title, *heads, right=heads)
        for row in rows:
            cells = [row.before, row.after, Text(row.change, COLOURS[row.better]), row.interval]
            table.add_row(Text(visible(row.label)), *cells[: len(heads)])
        self.screen.print(table)

    def inspection(self, result: dict) -> None:
        """Two models side by side; `result` as luthier.inspect gives it."""
        base, tuned, on = result["base"], result["tuned"], result["measured_on"]
        self.say(f"{base['model']} and {tuned['model']}, on {result['rows']:,} {on}")
        skills = [skill_of(values) for values in result.get("skills", ())]
        changes = [skill_of(values) for values in result.get("changes", ())]
        if text := verdict(shown_changes(changes, skills)):
            self.say(text)
        report = SimpleNamespace(before=base["metrics"], after=tuned["metrics"], stats={"measured_on": on})
        self._metrics(report, skills)
        for note in result["notes"]:
            self.say(f"· {note}", "yellow")

    def benchmarks(self, result: dict) -> None:
        """Public benchmarks; `result` as luthier.evaluate gives it."""
        from rich.text import Text

        lines = benchmarks.table(result)
        self.say(lines["note"], "dim")
        grid = self._grid(*lines["head"], right=lines["head"][1:])
        for cells in lines["rows"]:
            grid.add_row(*(Text(visible(cell)) for cell in cells))
        self.screen.print(grid)

    def survey(self, source: str, profile: dict, every: bool = False) -> None:
        """What rows are, and which objective suits them; `profile` as text.preview gives it. every: also what
        all other objectives make of them.
        """
        rows = profile["rows"]
        self.say(
            f"{source}: {rows:,} of {profile['total']:,} rows can be read, as '{profile['format']}':"
            f" {profile['reading']}",
            "bold",
        )
        objective = profile["objective"]
        needs = f" ({objective['needs']})" if objective["needs"] else ""
        self.say(f"objective to begin with: {objective['name']}{needs}", "bold")
        for note in profile["notes"]:
            self.say(f"· {note}")
        self._lengths(profile)
        if profile["repeated"]:
            self.say(f"· {profile['repeated']:,} rows repeat an earlier row", "yellow")
        if profile["prompts"]:
            self.say(f"· {profile['prompts']:,} prompts have several different answers", "yellow")
        columns = [f"{name} ({n:,})" if n < rows else name for name, n in profile["columns"].items()]
        self.say("columns: " + ", ".join(columns[:LISTED_COLUMNS]))
        if profile["unlearned"]:
            names = ", ".join(profile["unlearned"][:LISTED_COLUMNS])
            self.say(f"not learned from (rewards and stages may read them): {names}")
        reasons = [*profile["bad"], *profile["unreadable"]]
        for bad in reasons[:LISTED_REASONS]:
            self.say(f"· {bad['rows']:,} unusable: {bad['reason']} (first: {bad['first']})", "yellow")
        if len(reasons) > LISTED_REASONS:
            left = sum(bad["rows"] for bad in reasons[LISTED_REASONS:])
            self.say(f"· {left:,} unusable for other reasons; --json lists them", "yellow")
        self._marked_rows(profile["shown"])
        self.say()
        if every:
            self.listing(profile["feeds"], ("objective", "feeds", "why"))
            return
        able = Counter(answer["feeds"] for answer in profile["feeds"])
        self.say(
            f"{able['yes']} objectives can train on these rows as they are, {able['with a stage']} after a"
            " stage; --all lists them, and why others cannot",
            "dim",
        )

    def _lengths(self, profile: dict) -> None:
        """Tokens of rows: how many, their percentiles, and what is cut."""
        if not profile["lengths"]:
            return
        supervised = f"{100 * profile['share']:.0f}% supervised"
        parts = []
        for part, counts in profile["lengths"].items():
            listed = " / ".join(f"{counts[p]:,}" for p in counts)
            parts.append(f"{part} {listed}")
        self.say(f"{profile['tokens']:,} tokens ({supervised}), the longest row has {profile['longest']:,}")
        self.say(f"tokens at 50 / 90 / 99 / 100%: {'; '.join(parts)}")
        if profile["cut"]:
            self.say(f"· {profile['cut']:,} rows are cut at {profile['max_length']:,} tokens", "yellow")
        if profile["full"]:
            self.say(
                f"· {profile['full']:,} prompts leave no room for a completion, so their rows are unusable"
            )
        if profile["pieces"]:
            self.say(f"· {profile['pieces']:,} texts are cut into pieces of {profile['max_length']:,} tokens")

    def comparison(self, result: dict) -> None:
        """Several arms; `result` as luthier.compare gives it."""
        from rich.text import Text

        arms = [name for name in result["arms"] if name not in result["stopped"]]
        heads = [f"{name} ★" if name in result["front"] else name for name in arms]
        table = self._grid("", "untuned", *heads, right=("untuned", *heads))
        for metric, cells in result["table"].items():
            if "/" in metric:
                continue
            before = format_metric(metric, result["before"].get(metric))
            values = [_with_interval(metric, cells[arm]) for arm in arms]
            table.add_row(Text(metric_of(metric).label), before, *values)
        self.say()
        self.say(result["sentence"], "bold")
        if arms:
            self.screen.print(table)
            goals = ", ".join(metric_of(goal).label for goal in result["goals"])
            self.say(f"★ on the Pareto front: no other arm is better in all of {goals}", "dim")
        for name, why in result["stopped"].items():
            self.say(f"· {name} is left out: {why}", "yellow")
        self.say(f"Report: {Path(result['folder']) / 'report.html'}")

    def search(self, result: dict) -> None:
        """A hyperparameter search; `result` as luthier.search gives it."""
        candidates = [*filter(None, [result.get("baseline")]), *result["chosen"]]
        lines = []
        for one in candidates:
            line = {"": one["name"], "configuration": one["description"] or "unchanged"}
            for goal in result["goals"]:
                metric, name = goal["metric"], goal["name"]
                line[f"{name}, tuning"] = format_metric(metric, one["tuning"].get(name))
                low, high = one.get("interval", {}).get(name, (0, 0))
                line[f"{name}, test"] = _with_interval(
                    metric, {"mean": one["test"].get(name), "low": low, "high": high}
                )
            lines.append(line)
        self.say()
        self.say(result["sentence"], "bold")
        if lines:
            self.listing(lines, tuple(lines[0]), heads=True)
        for i, one in enumerate(result["chosen"]):
            self.say(f"  luthier tune {Path(result['folder']) / one['name']}.yaml", "bold" if i == 0 else "")
        self.say(f"Report: {Path(result['folder']) / 'report.html'}")

    # ------------------------------------------------------------------------------------------ tables

    def listing(self, objects: Sequence[dict], columns: Sequence[str], heads: bool = False) -> None:
        """Objects as a table: a line each at a pipe, so that it can be searched; there `heads` names the
        columns.
        """
        from rich.text import Text

        rows = [[plain(one[column]) for column in columns] for one in objects]
        if self.screen.is_terminal:
            table = self._grid(*columns)
            for row in rows:
                table.add_row(*(Text(visible(cell)) for cell in row))
            self.screen.print(table)
            return
        if heads:
            rows.insert(0, list(columns))
        widths = [min(48, max(map(len, column), default=0)) for column in zip(*rows)]
        for row in rows:
            self.say("  ".join(map(str.ljust, row, widths)).rstrip())

    def _grid(self, *columns: str, right: Sequence[str] = ()) -> Any:
        from rich import box
        from rich.table import Table

        style = box.SIMPLE_HEAD if self.screen.is_terminal else box.ASCII2
        table = Table(box=style, pad_edge=False, header_style="bold")
        for name in columns:
            table.add_column(name, justify="right" if name in right else "left", overflow="fold")
        return table


def _with_interval(metric: str, cell: Mapping[str, Any]) -> str:
    """'37.0% (35.1% to 39.0%)', the interval where there is one."""
    mean = format_metric(metric, cell["mean"])
    if not mean or cell["low"] >= cell["high"]:
        return mean
    return f"{mean} ({format_metric(metric, cell['low'])} to {format_metric(metric, cell['high'])})"
