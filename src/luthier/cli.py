"""The command line: a small function per command. What a command does lies in the module it calls, imported
only then.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from luthier import compat
from luthier.compat.lazy_imports import READER, after, rarely, read_once
from luthier.errors import RecipeError
from luthier.storage.toy import is_toy

# command -> former name of an option -> its name; former names are accepted, and left out of the help
FORMER_OPTIONS = {
    "tune": {"--until": "--stop-at"},
    "data": {"--shown": "--examples"},
    "compare": {"--to": "--output-dir"},
    "search": {"--over": "--space", "--where": "--constraint", "--to": "--output-dir"},
    "export": {"--to": "--output-dir"},
    "bench": {"--to": "--output-dir"},
    "docs": {"--to": "--output-dir"},
}

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE] [KEY=VALUE]...",
        help="A recipe (or a run's folder, or toy:TASK), and changes.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]


class Commands(TyperGroup):
    """The commands. A refusal is one sentence on stderr with exit code 2; Ctrl-C exits with 130. Former names
    of options are read as their names.
    """

    def resolve_command(self, ctx, args):
        name, command, rest = super().resolve_command(ctx, args)
        former = FORMER_OPTIONS.get(name or "", {})
        words = []
        for i, word in enumerate(rest):
            if word == "--":  # what follows is no option
                return name, command, words + rest[i:]
            option, equals, value = word.partition("=")
            words.append(former.get(option, option) + equals + value)
        return name, command, words

    def invoke(self, ctx):
        warnings.simplefilter("ignore", FutureWarning)  # of other libraries to their developers
        try:
            return super().invoke(ctx)
        except RecipeError as error:
            typer.echo(f"luthier: {error}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            message = "stopped"
            if ctx.invoked_subcommand in ("tune", "search", "compare"):
                message += "; run the same command again and it goes on"
            if ctx.invoked_subcommand == "tune":
                message += " from its last checkpoint"
            typer.echo(f"\nluthier: {message}", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=Commands,
    name="luthier",
    help="Tune foundation models from one recipe, and see what tuning changed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    compat.keep()
    rarely()
    after(READER, read_once)
    app()


@app.callback(invoke_without_command=True)
def top(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        from luthier.version import __version__

        typer.echo(f"luthier {__version__}")
        raise typer.Exit


@app.command()
def tune(
    words: Words = None,
    model: Annotated[str | None, typer.Option(help="Folder, hub name or toy:NAME.")] = None,
    data: Annotated[str | None, typer.Option(help="File, folder, hub name or toy:TASK.")] = None,
    tuner: Annotated[str | None, typer.Option(help="What trains: `luthier methods --kind tuner`.")] = None,
    objective: Annotated[str | None, typer.Option(help="The loss, e.g. sft or 'dpo + 0.1*sft'.")] = None,
    output_dir: Annotated[str | None, typer.Option(help="The run's folder.")] = None,
    front: Annotated[
        int | None,
        typer.Option(min=2, help="So many models, each with other weights of the goals; see plan front."),
    ] = None,
    stop_at: Annotated[
        float | None,
        typer.Option(help="Pause at this step (below 1: at this share of the run), to resume later."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only the run's folder.")] = False,
) -> None:
    """Fine-tune a model. A run that was stopped resumes when the same command is run again."""
    from luthier.recipe.recipe import Recipe

    source, changes = recipe_words(
        words, model=model, data=data, tuner=tuner, objective=objective, output_dir=output_dir
    )
    if front:
        changes += ["plan.name=front", f"plan.points={front}"]
    recipe = Recipe.load(source, changes)
    from luthier.run.run import perform

    callback = progress(quiet)
    report = perform(recipe, callback=callback, stop_at=stop_at)
    if "paused_at" not in report.stats:
        callback.finish(report)
    if quiet:
        typer.echo(report.folder)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="A run's folder, a model folder, a hub name or toy:NAME.")],
    prompt: Annotated[str | None, typer.Option(help="Answer this once instead of asking.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the random draws, where temperature is above 0.")] = 0,
) -> None:
    """Talk to a model."""
    from luthier.serve.chat import chat

    chat(model, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="One method: what it does, and its settings.")] = None,
    kind: Annotated[str | None, typer.Option(help="One kind: tuner, objective, transform, ...")] = None,
    wide: Annotated[
        bool,
        typer.Option(
            "--wide", help="Of tuners: what each can do, tested now, and its trainable share of a Llama-7B."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List every method (tuners, objectives, optimizers, ...), or describe one."""
    if name and not (wide or as_json):
        from luthier.recipe import catalogue
        from luthier.tools.method_page import terminal_page

        typer.echo("\n".join(catalogue.pages(name, kind, terminal_page)).rstrip())
        return
    if wide:
        if kind not in (None, "tuner"):
            raise RecipeError(f"--wide is a table of tuners; there is none of {kind}s")
        from luthier.tools import capability_matrix as abilities

        show(abilities.tuners(), as_json, abilities.WIDE)
        return
    from luthier.recipe import catalogue

    rows = [m for m in catalogue.methods(kind) if name in (None, m["name"])]
    show(rows, as_json, ("kind", "name", "paper", "summary"))


@app.command()
def papers(
    word: Annotated[str | None, typer.Argument(help="In the title, kind, family or method.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the papers of the catalogue, and which method implements each."""
    from luthier.recipe import catalogue

    show(catalogue.papers(word), as_json, ("row", "title", "kind", "family", "by"))


@app.command()
def explain(words: Words = None, as_json: AsJson = False) -> None:
    """Print every resolved value of a recipe, and where it comes from."""
    from dataclasses import asdict

    from luthier.recipe import catalogue

    source, changes = recipe_words(words)
    values, messages = catalogue.explain(source, changes)
    for message in messages:
        typer.echo(message, err=True)
    if as_json:
        typer.echo(dumped([asdict(value) for value in values]))
    else:
        show([value.as_text() for value in values], False, ("key", "value", "origin"))


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Report what is installed, what this machine can do, and what is missing for each extra."""
    from luthier.tools import doctor

    facts = doctor.examine()
    if as_json:
        typer.echo(dumped(facts))
    else:
        typer.echo(doctor.summary(facts))


@app.command()
def inspect(
    base: Annotated[str, typer.Argument(help="The model before: a folder, hub name, toy:NAME or run.")],
    tuned: Annotated[str, typer.Argument(help="The model after.")],
    data: Annotated[
        str | None, typer.Option(help="Rows to evaluate on; default: the run's held-out rows.")
    ] = None,
    preference: Annotated[
        bool, typer.Option("--preference", help="Preference pairs: ranking accuracy, margins, drift.")
    ] = False,
    report: Annotated[
        Path | None, typer.Option(help="A page to write: also the weights, answers, calibration, diversity.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare two models: loss, accuracy, and retention of other tasks."""
    from luthier.report.console import Console
    from luthier.serve.inspect import inspect

    result = inspect(base, tuned, data, preference=preference, report=report)
    if as_json:
        typer.echo(dumped(result))
        return
    Console().inspection(result)
    if report is not None:
        typer.echo(f"Report: {report}")


@app.command()
def data(
    source: Annotated[str, typer.Argument(help="A file, folder, hub name or toy:TASK.")],
    model: Annotated[str, typer.Option(help="Whose tokenizer shows the rows.")] = "toy:lm",
    chat_template: Annotated[str | None, typer.Option(help="As in a recipe.")] = None,
    examples: Annotated[int, typer.Option(min=0, help="Rows to show.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Look at rows: how they are read, which tokens are supervised, which objectives can train on them and
    why the others cannot.
    """
    from luthier.report.text import MARKS
    from luthier.text.preview import preview

    result = preview(source, model, chat_template, examples, MARKS)
    if as_json:
        typer.echo(dumped(result))
        return
    from luthier.report.console import Console

    Console().survey(source, result)


@app.command()
def compare(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE]... [KEY=VALUE]...", help="Recipes, and changes to all."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Folder, hub name or toy:NAME, for every arm.")] = None,
    data: Annotated[str | None, typer.Option(help="Rows, for every arm.")] = None,
    tuners: Annotated[str, typer.Option(help="Arms that differ in the tuner, e.g. lora,ssf,full.")] = "",
    objectives: Annotated[str, typer.Option(help="Arms that differ in the objective, e.g. dpo,ipo.")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each arm.")] = 3,
    budget: Annotated[
        str | None, typer.Option(help="Of each run: a time (30m), steps (500 steps) or tokens (200k tokens).")
    ] = None,
    metric: Annotated[str, typer.Option(help="By which arms are ranked, and stopped early.")] = "loss",
    learning_rates: Annotated[
        str,
        typer.Option(help="Each arm takes its best of these, e.g. 1e-4,1e-3, tuned on a seed of its own."),
    ] = "",
    keep_all: Annotated[bool, typer.Option("--keep-all", help="Stop no arm early.")] = False,
    together: Annotated[
        bool,
        typer.Option(
            "--together",
            help=(
                "Train LoRA runs that share a base in one process, in one pass where that is faster; memory"
                " is not measured."
            ),
        ),
    ] = False,
    output_dir: Annotated[Path | None, typer.Option(help="The comparison's folder.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare ways to tune on the same rows, seeds and budget. The same command resumes what was stopped."""
    from luthier.report.console import Console
    from luthier.study.compare import ComparisonSpec, arms_of, parse_learning_rates, run_comparison

    files = [w for w in words or () if "=" not in w or Path(w).is_file()]
    changes = [w for w in words or () if w not in files]
    if model:
        changes.append(f"model={json.dumps(model)}")
    if data:
        changes.append(f"data={json.dumps(data)}")
    arms = arms_of(files, changes, tuners, objectives)
    spec = ComparisonSpec(
        arms,
        seeds,
        budget,
        metric,
        stop_early=not keep_all,
        learning_rates=parse_learning_rates(learning_rates),
        together=together,
    )
    result = run_comparison(spec, output_dir, progress(as_json))
    if as_json:
        typer.echo(dumped(result))
    else:
        Console().comparison(result)


@app.command()
def search(
    words: Words = None,
    space: Annotated[
        list[str] | None,
        typer.Option(
            help="What varies: tuner.r, learning_rate=1e-5..1e-2, 'tuner=lora|ssf|dora', layers, ..."
        ),
    ] = None,
    goals: Annotated[
        list[str] | None,
        typer.Option(
            help="quality, forgetting, parameters, memory, time, or any metric; several make a front."
        ),
    ] = None,
    constraint: Annotated[
        list[str] | None,
        typer.Option(help="A limit, e.g. 'memory <= 8GB'; may be given several times."),
    ] = None,
    trials: Annotated[
        float | None, typer.Option(help="Full runs to spend (for each seed). Default: 40.")
    ] = None,
    budget: Annotated[str | None, typer.Option(help="A time to spend in place of trials, e.g. 30m.")] = None,
    sampler: Annotated[
        str,
        typer.Option(
            help="`luthier methods --kind searcher`; with settings: '{name: hyperband, inner: tpe}'."
        ),
    ] = "gp",
    seeds: Annotated[
        str, typer.Option(help="Tuning seeds of each configuration: how many, or which (5,6,7).")
    ] = "1",
    test_seeds: Annotated[
        str, typer.Option(help="Seeds on which the best configurations run again: how many, or which.")
    ] = "3",
    test_data: Annotated[
        str | None,
        typer.Option(
            metavar="ROWS",
            help="Rows on which they are evaluated then. Default: the held-out rows that selected them.",
        ),
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="What `quality` means. Default: loss; of pairs, ranking_accuracy.")
    ] = None,
    earlier: Annotated[
        Path | None, typer.Option("--from", help="An earlier search's folder: its best are tried first.")
    ] = None,
    storage: Annotated[
        str | None, typer.Option(help="An Optuna storage URL, e.g. sqlite:///study.db. Default: a journal.")
    ] = None,
    workers: Annotated[
        int,
        typer.Option(
            min=1, help="How many of a Ray cluster (RAY_ADDRESS, or this machine) measure side by side."
        ),
    ] = 1,
    output_dir: Annotated[Path | None, typer.Option(help="The search's folder.")] = None,
    as_json: AsJson = False,
) -> None:
    """Search for better configurations, for several goals, within limits. The same command resumes what was
    stopped.
    """
    import yaml

    from luthier.report.console import Console
    from luthier.study.search import run_search, search_spec

    source, changes = recipe_words(words)
    spec = search_spec(
        source,
        space or (),
        goals or (),
        constraint or (),
        trials=trials,
        budget=budget,
        sampler=yaml.safe_load(sampler),
        seeds=seeds,
        test_seeds=test_seeds,
        metric=metric,
        earlier=earlier,
        test_data=test_data,
        changes=changes,
    )
    result = run_search(spec, output_dir, storage, progress(as_json), workers)
    if as_json:
        typer.echo(dumped(result))
    else:
        Console().search(result)


@app.command()
def export(
    folder: Annotated[str, typer.Argument(help="A run's folder.")],
    output_dir: Annotated[Path, typer.Option(help="Where to write it.")],
    kind: Annotated[
        str, typer.Option("--as", help="lora: an adapter for plain PEFT. merged: a plain transformers model.")
    ] = "merged",
) -> None:
    """Write a run's result for other tools, and check that it answers like the tuned model."""
    from luthier.serve.export import export

    typer.echo(export(folder, kind, output_dir))


@app.command()
def studio(
    folder: Annotated[Path, typer.Argument(help="Where runs, uploads and exports lie.")] = Path("."),
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Of this machine; default: 8765, or any that is free."),
    ] = None,
) -> None:
    """A local page: look at rows, choose methods, train, watch, compare, talk, export."""
    from luthier.studio import serve

    serve(folder, port, typer.echo)


@app.command()
def reproduce(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Claims to reproduce; default: all.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Test seeds, in place of what the claim's file says.")
    ] = None,
    listed: Annotated[bool, typer.Option("--list", help="Only list the claims and their verdicts.")] = False,
    as_json: AsJson = False,
) -> None:
    """Reproduce a paper's claim on small models. The same command resumes what was stopped."""
    from luthier.study.reproduce.page import listing
    from luthier.study.reproduce.spec import all_claims

    if listed:
        show(listing(), as_json, ("name", "verdict", "paper", "claim"))
        return
    from luthier.study.reproduce.run import reproduce

    results = {}
    for name in names or all_claims():
        results[name] = reproduce(name, seeds, tell=lambda line: typer.echo(line, err=as_json))
    if as_json:
        typer.echo(dumped(results))


app.command("claims", hidden=True)(reproduce)  # its former name


@app.command()
def bench(
    scenarios: Annotated[
        list[str],
        typer.Argument(help="sft, dpo, subset, frozen, fleet, fleet_top, mezo, rollout, start, memory."),
    ],
    shape: Annotated[
        list[str] | None, typer.Option(help="a, b, c, gpt2, moe; may be given several times. Default: a.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each contestant; the median counts.")] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    only: Annotated[
        list[str] | None, typer.Option(help="Only these contestants; may be given several times.")
    ] = None,
    output_dir: Annotated[Path | None, typer.Option(help="A folder for JSON files and pictures.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure speed and memory beside TRL + PEFT and a plain loop on the same work, in turns."""
    from luthier.study.bench import bench

    tell = lambda line: typer.echo(line, err=as_json)
    results = bench(
        scenarios,
        shape or ["a"],
        repeats=repeats,
        device=device,
        only=only,
        output_dir=output_dir,
        tell=tell,
    )
    if as_json:
        typer.echo(dumped(results))


@app.command(hidden=True)
def docs(
    check: Annotated[
        bool, typer.Option("--check", help="Fail where the pages differ from the declarations.")
    ] = False,
    output_dir: Annotated[Path, typer.Option(help="The docs folder.")] = Path("docs"),
) -> None:
    """Write the pages that follow from the declarations."""
    from luthier.tools.docs import docs

    raise typer.Exit(docs(output_dir, check))


# --------------------------------------------------------------------------------------- arguments and output


def recipe_words(words: list[str] | None, **options: str | None) -> tuple[Path | str | None, list[str]]:
    """A recipe's path or toy:TASK, if one was named, and every change: key=value words, then options."""
    files = [w for w in words or () if "=" not in w or Path(w).is_file()]
    if len(files) > 1:
        raise RecipeError(f"one recipe at a time, not {' and '.join(files)} (changes are written key=value)")
    # taken as they are; the others may be YAML such as "{name: lora, r: 16}"
    plain = ("model", "data", "output_dir")
    changes = []
    for key, value in options.items():
        if value is not None and key in plain:
            value = json.dumps(value)
        if value is not None:
            changes.append(f"{key}={value}")
    changes += [w for w in words or () if w not in files]
    if not files:
        return None, changes
    if is_toy(files[0]):
        return files[0], changes
    path = Path(files[0])
    if path.is_dir():
        path = path / "recipe.yaml"
    return path, changes


def progress(quiet: bool):
    """The callback of a command: one that prints progress, or one that prints nothing."""
    from luthier.report.console import Callback, Console

    return Callback() if quiet else Console()


def dumped(value) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, default=str)


def show(rows: list[dict], as_json: bool, columns: tuple[str, ...]) -> None:
    """A list of objects, as JSON or as a table."""
    if as_json:
        typer.echo(dumped(rows))
        return
    from luthier.report.console import Console

    Console().listing(rows, columns)
