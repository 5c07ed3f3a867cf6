"""What a person at a terminal sees: sentences, a progress bar with rate and time left, rows as the model will
read them.

At a pipe or in a log file the same is said without colours and without a bar: a line for about every tenth of
the run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any


class Callback:
    """Sees everything, keeps the sentences, prints nothing."""

    def __init__(self):
        self.notes: list[str] = []

    def warn(self, sentence: str) -> None:
        """Something the user should know."""
        self.notes.append(sentence)

    def stage(self, name: str) -> None:
        """What is being done now."""

    def rows(self, roles: Any, rows: Sequence[dict], stats: dict) -> None:
        """The data, about to be learned."""

    @contextmanager
    def training(self, total: int, done: int) -> Iterator[None]:
        """Around the steps."""
        yield

    def step(self, log: dict) -> None:
        """After each step."""

    def finish(self, report: Any) -> None:
        """What came of it."""


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
        self.total = self.done = self.told = self.steps = 0
        self.began = self.tokens = self.seconds = 0.0
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

    def rows(self, roles: Any, rows: Sequence[dict], stats: dict) -> None:
        from luthier.report import rendered

        share = stats.get("supervised_share")
        learned = f", {100 * share:.0f}% of them learned" if share else ""
        self.say(
            f"{len(rows):,} rows, {stats.get('row_tokens', 0):,} tokens{learned}; the first as the model"
            " reads them:"
        )
        for text in rendered(roles, rows):
            self.say()
            self._marked(text)
        self.say()

    def _marked(self, text: str, limit: int = 600) -> None:
        """A row: what is learned stands out, at a pipe between ⟦ and ⟧."""
        from rich.text import Text

        from luthier.report import MARKS

        text = visible(cut(text, limit))
        if not self.screen.is_terminal:
            self.say("  " + text.replace(MARKS[0], "⟦").replace(MARKS[1], "⟧").replace("\n", "\n  "))
            return
        shown = Text("  ")
        for i, part in enumerate(text.replace("\n", "\n  ").split(MARKS[0])):
            learned, _, rest = part.partition(MARKS[1]) if i else ("", "", part)
            shown.append(learned, "bold green")
            shown.append(rest.replace(MARKS[1], ""), "dim")
        self.screen.print(shown)

    # ------------------------------------------------------------------------------------------ steps

    @contextmanager
    def training(self, total: int, done: int) -> Iterator[None]:
        self.total, self.done, self.told, self.began = total, done, done, time.perf_counter()
        self.tokens = self.seconds = 0.0
        self.smooth, self.steps = None, 0
        if not self.screen.is_terminal:
            yield
            return
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (
            TextColumn("{task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[said]}"),
        )
        with Progress(*columns, console=self.screen, transient=False, expand=True) as self.bar:
            self.task = self.bar.add_task("", total=total, completed=done, said="")
            try:
                yield
            finally:
                self.bar = None

    def step(self, log: dict) -> None:
        loss = log.get("loss")
        if loss is not None:
            self.smooth = loss if self.smooth is None else self.smooth + 0.2 * (loss - self.smooth)
        keep = 0.9  # of what was: the rate is that of about the last ten steps
        self.tokens = keep * self.tokens + log.get("tokens", 0)
        self.seconds = keep * self.seconds + log.get("seconds", 0.0)
        steps, self.done = log["step"] - self.done, log["step"]
        self.steps += steps
        if line := log.get("said"):  # a step that is worth a line of its own
            left = self._said() if self.bar is None else ""
            self.say(f"{line} ({left})" if left else line)
        if self.bar is not None:
            self.bar.update(self.task, advance=steps, said=self._said())
        elif line:
            return
        elif self.done == self.total or (self.done - self.told) * 10 >= self.total:
            self.told = self.done
            self.say(f"step {self.done}/{self.total}  {self._said()}")

    def _said(self) -> str:
        """Loss, rate and time left; what is not known is left out."""
        from luthier.report.numbers import duration, number

        said = [f"loss {number(self.smooth)}"] if self.smooth is not None else []
        if self.seconds and self.tokens:
            said.append(f"{self.tokens / self.seconds:,.0f} tokens/s")
        if self.steps and self.done < self.total:
            # Wall-clock time of this process over its steps: what is saved and measured on the way counts
            # too.
            each = (time.perf_counter() - self.began) / self.steps
            said.append(f"{duration(each * (self.total - self.done))} left")
        return "  ".join(said)

    # ------------------------------------------------------------------------------------------ the end

    def finish(self, report: Any) -> None:
        from luthier.report.numbers import answers, cost, headline

        self.say()
        self.say(headline(report), "bold")
        self.answers(answers(report.folder))
        self.table(report)
        for what, much in cost(report.stats):
            self.say(f"  {what:<20} {much}")
        if compared := report.stats.get("table"):
            self.listing(compared, tuple(compared[0]), heads=True)
        page = Path(report.folder) / "report.html"
        self.say()
        for run in report.runs:
            self.say(f"  {run}")
        if page.is_file():
            self.say(f"Report: {page}")
        whole = Path(report.runs[0]).parent / "report.html" if report.runs else page
        if whole != page and whole.is_file():
            self.say(f"Of all: {whole}")
        if report.stats.get("writes", True):
            self.say(f"Talk to it: luthier chat {report.folder}")

    def answers(self, said: Sequence[dict], few: int = 4) -> None:
        """The same questions before and after."""
        from rich.text import Text

        if not said:
            return
        table = self._grid("asked", "before", "after", "expected")
        for one in said[:few]:
            cells = [
                Text(visible(cut((one[k] or "").strip(), 240)))
                for k in ("prompt", "before", "after", "expected")
            ]
            for cell, score in ((cells[1], one["score_before"]), (cells[2], one["score_after"])):
                cell.stylize("" if score is None else "green" if score > 0 else "red")
            table.add_row(*cells)
        self.screen.print(table)

    def table(self, report: Any) -> None:
        """Metric, before, after, change."""
        from rich.text import Text

        from luthier.report.numbers import lines

        table = self._grid("", "before", "after", "change", right=("before", "after", "change"))
        for line in lines(report):
            table.add_row(
                Text(visible(line.label)), line.before, line.after, Text(line.change, COLOUR[line.better])
            )
        if table.row_count:
            self.screen.print(table)

    def comparison(self, found: dict) -> None:
        """Two models side by side; `found` as luthier.inspect gives it."""
        stats = {"measured_on": found["measured_on"]}
        self.say(
            f"{found['base']['model']} and {found['tuned']['model']}, on {found['rows']:,}"
            f" {found['measured_on']}"
        )
        self.table(
            SimpleNamespace(before=found["base"]["metrics"], after=found["tuned"]["metrics"], stats=stats)
        )
        for note in found["notes"]:
            self.say(f"· {note}", "yellow")

    def survey(self, source: str, found: dict) -> None:
        """What rows are, and what they can feed; `found` as luthier.data.profile gives it."""
        self.say(
            f"{source}: {found['rows']:,} of {found['total']:,} rows can be read, as '{found['format']}'",
            "bold",
        )
        self.say(
            "columns: "
            + ", ".join(f"{k} ({n:,})" if n < found["rows"] else k for k, n in found["columns"].items())
        )
        for bad in (*found["bad"], *found["unreadable"]):
            self.say(f"· {bad['rows']:,} set aside: {bad['reason']} (first: {bad['first']})", "yellow")
        if found["shown"]:
            self.say(
                f"{found['tokens']:,} tokens, {100 * found['share']:.0f}% of them learned, the longest row"
                f" {found['longest']:,}:"
            )
        for text in found["shown"]:
            self.say()
            self._marked(text)
        self.say()
        self.listing(found["feeds"], ("objective", "feeds", "why"))

    def arms(self, result: dict) -> None:
        """A comparison; `result` as luthier.compare gives it."""
        from rich.text import Text

        from luthier.report.comparison import label, shown

        names = [n for n in result["arms"] if n not in result["stopped"]]
        self.say()
        self.say(result["sentence"], "bold")
        table = self._grid(
            "",
            "untuned",
            *(f"{n} ★" if n in result["front"] else n for n in names),
            right=("untuned", *names),
        )
        for metric, cells in result["table"].items():
            if "/" in metric:
                continue
            before = result["before"].get(metric)
            spread = [
                shown(metric, c["mean"])
                + (
                    f" ({shown(metric, c['low'])} to {shown(metric, c['high'])})"
                    if c["low"] < c["high"]
                    else ""
                )
                for c in (cells[n] for n in names)
            ]
            table.add_row(Text(label(metric)), "" if before is None else shown(metric, before), *spread)
        if names:
            self.screen.print(table)
            self.say(
                f"★ on the front: nobody is better in all of {', '.join(label(g) for g in result['goals'])}",
                "dim",
            )
        for name, why in result["stopped"].items():
            self.say(f"· {name} was stopped: {why}", "yellow")
        self.say(f"Report: {Path(result['folder']) / 'report.html'}")

    def found(self, result: dict) -> None:
        """A search; `result` as luthier.search gives it."""
        from luthier.report.comparison import shown

        self.say()
        self.say(result["sentence"], "bold")
        lines = []
        for one in [*([result["start"]] if result.get("start") else []), *result["found"]]:
            line = {"": one["name"], "configuration": one["said"] or "as it was"}
            for goal in result["goals"]:
                for when in ("tuning", "test"):
                    value = one[when].get(goal["name"])
                    low, high = (
                        one.get("interval", {}).get(goal["name"], (0, 0)) if when == "test" else (0, 0)
                    )
                    span = (
                        f" ({shown(goal['metric'], low)} to {shown(goal['metric'], high)})"
                        if low < high
                        else ""
                    )
                    line[f"{goal['name']}, {when}"] = (
                        "" if value is None else shown(goal["metric"], value) + span
                    )
            lines.append(line)
        if lines:
            self.listing(lines, tuple(lines[0]), heads=True)
        for i, one in enumerate(result["found"]):
            self.say(f"  luthier tune {Path(result['folder']) / one['name']}.yaml", "bold" if not i else "")
        self.say(f"Report: {Path(result['folder']) / 'report.html'}")

    def listing(self, found: Sequence[dict], columns: Sequence[str], heads: bool = False) -> None:
        """Objects as a table: a line each at a pipe, so that it can be searched. heads: what columns are is
        said there, too.
        """
        from rich.text import Text

        if not self.screen.is_terminal:
            cells = [
                *([list(columns)] if heads else []),
                *([plain(one[c]) for c in columns] for one in found),
            ]
            widths = [min(48, max((len(row[i]) for row in cells), default=0)) for i in range(len(columns))]
            for row in cells:
                self.say("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())
            return
        table = self._grid(*columns)
        for one in found:
            table.add_row(*(Text(visible(plain(one[c]))) for c in columns))
        self.screen.print(table)

    def _grid(self, *columns: str, right: Sequence[str] = ()) -> Any:
        from rich import box
        from rich.table import Table

        table = Table(
            box=box.SIMPLE_HEAD if self.screen.is_terminal else box.ASCII2,
            pad_edge=False,
            header_style="bold",
        )
        for name in columns:
            table.add_column(name, justify="right" if name in right else "left", overflow="fold")
        return table


COLOUR = {True: "green", False: "red", None: "default"}


CONTROLS = {c: chr(0x2400 + c) for c in range(32) if chr(c) not in "\n\t"} | {
    0x7F: "␡",
    **{c: "�" for c in range(0x80, 0xA0)},
}


def visible(text: str) -> str:
    """Text that models and rows may have written: its control characters must not reach the terminal."""
    return text.translate(CONTROLS)


def cut(text: str, limit: int) -> str:
    """The beginning and the end of a long text."""
    return text if len(text) <= limit else f"{text[: limit * 2 // 3]} … {text[-limit // 3 :]}"


def plain(value: Any) -> str:
    """A value in a table cell, as YAML users write it."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value))
    return (
        {None: "", True: "true", False: "false"}[value]
        if value is None or isinstance(value, bool)
        else str(value)
    )
