"""The command line: a small function per command. What a command does lies in the module it calls, imported
only then.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from luthier import compat
from luthier.compat.lazy_imports import READER, after, rarely, read_once
from luthier.errors import PluginWarning, RecipeError, outcome_of
from luthier.report.streams import steady
from luthier.storage.failure import report_outcome
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

COMPLETE = "_LUTHIER_COMPLETE"  # in the environment when a shell asks for completions

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE] [KEY=VALUE]...",
        help="A recipe (or the folder of a run, or toy:TASK), and KEY=VALUE changes.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


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
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of other libraries to their developers
                warnings.showwarning = plugins_in_one_line(warnings.showwarning)
                return super().invoke(ctx)
        except KeyboardInterrupt:
            message = "stopped"
            if ctx.invoked_subcommand in ("tune", "search", "compare"):
                message += "; run the same command again to continue"
            if ctx.invoked_subcommand == "tune":
                message += " from its last checkpoint"
            typer.echo(f"\nluthier: {message}", err=True)
            raise typer.Exit(130) from None
        except Exception as error:
            outcome = outcome_of(error)
            if not isinstance(outcome, RecipeError):
                raise
            report_outcome(outcome)
            typer.echo(f"luthier: {outcome}", err=True)
            raise typer.Exit(2) from None


def method_names(kind: str) -> Callable[[str], list[str]]:
    """What a shell offers where a method of this kind is to be named."""

    def complete(incomplete: str) -> list[str]:
        from luthier.registry import names

        return [name for name in names(kind) if name.startswith(incomplete)]

    return complete


def plugins_in_one_line(show: Callable[..., None]) -> Callable[..., None]:
    """How warnings are shown: of other packages' methods without the place in luthier's code."""

    def show_warning(message, category, *place, **where):
        if issubclass(category, PluginWarning):
            typer.echo(f"luthier: {message}", err=True)
        else:
            show(message, category, *place, **where)

    return show_warning


app = typer.Typer(
    cls=Commands,
    name="luthier",
    help="Fine-tune foundation models from one YAML recipe, and measure what changed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    output = steady()
    compat.keep()
    rarely()
    after(READER, read_once)
    if COMPLETE in os.environ:  # a shell asks what could follow
        from typer.completion import completion_init

        completion_init()
    try:
        app()
    finally:
        if output is not None:
            output.flush()
            if output.failure is not None and not isinstance(output.failure, BrokenPipeError):
                typer.echo(f"luthier: standard output could not be written: {output.failure}", err=True)
                sys.exit(1)


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
    model: Annotated[str | None, typer.Option(help="Model: a folder, Hub name or toy:NAME.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Training data: a file, folder, Hub name or toy:TASK.")
    ] = None,
    tuner: Annotated[
        str | None,
        typer.Option(
            help="Tuner, e.g. lora or full; `luthier methods --kind tuner` lists all.",
            autocompletion=method_names("tuner"),
        ),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            help="Objective (loss), e.g. sft, or 'dpo + 0.1*sft'.", autocompletion=method_names("objective")
        ),
    ] = None,
    output_dir: Annotated[str | None, typer.Option(help="Folder of the run.")] = None,
    front: Annotated[
        int | None,
        typer.Option(
            min=2, help="Number of models to train, each with other weights of the goals; see plan front."
        ),
    ] = None,
    stop_at: Annotated[
        float | None,
        typer.Option(help="Pause at this step (below 1: at this fraction of the run) to resume later."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only the folder of the run.")] = False,
) -> None:
    """Fine-tune a model. A run that was stopped resumes when the same command is run again."""
    from luthier.recipe.recipe import Recipe

    source, changes = recipe_words(
        words, model=model, data=data, tuner=tuner, objective=objective, output_dir=output_dir
    )
    if front:
        changes += ["plan.name=front", f"plan.points={front}"]
    with started_together() as main:
        recipe = Recipe.load(source, changes)
        from luthier.run.run import perform

        callback = progress(quiet or not main)
        report = perform(recipe, callback=callback, stop_at=stop_at)
    if "paused_at" not in report.stats:
        callback.finish(report)
    if quiet and main:
        typer.echo(report.folder)


@app.command()
def chat(
    model: Annotated[
        str, typer.Argument(help="The folder of a run, a model folder, a Hub name or toy:NAME.")
    ],
    prompt: Annotated[str | None, typer.Option(help="Answer this prompt and exit.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Maximum number of new tokens per answer.")
    ] = 256,
    temperature: Annotated[
        float, typer.Option(min=0, help="Sampling temperature; 0 is greedy decoding.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Random seed, used when temperature is above 0.")] = 0,
    system: Annotated[
        str | None,
        typer.Option(help="System prompt (default: the one that all rows of the run had); '' for none."),
    ] = None,
    chat_template_kwargs: Annotated[
        str | None,
        typer.Option(help="Variables for the chat template, e.g. '{enable_thinking: false}'."),
    ] = None,
) -> None:
    """Talk to a model."""
    from luthier.serve.chat import chat
    from luthier.storage.bounded_yaml import load_yaml

    options = load_yaml(chat_template_kwargs or "{}", "--chat-template-kwargs")
    if not isinstance(options, dict):
        raise RecipeError("--chat-template-kwargs: expected a mapping, e.g. '{enable_thinking: false}'")
    chat(
        model,
        prompt,
        system=system,
        chat_template_kwargs=options,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )


@app.command()
def methods(
    name: Annotated[
        str | None, typer.Argument(help="Show one method: what it does, and its settings.")
    ] = None,
    kind: Annotated[str | None, typer.Option(help="List one kind: tuner, objective, transform, ...")] = None,
    wide: Annotated[
        bool,
        typer.Option(
            "--wide",
            help="Table of tuners with their capabilities (tested now) and trainable parameters (%)"
            " on a Llama-7B.",
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
            raise RecipeError(f"--wide shows a table of tuners; there is none for {kind}s")
        from luthier.tools import capability_matrix as abilities

        show(abilities.tuners(), as_json, abilities.WIDE)
        return
    from luthier.recipe import catalogue

    rows = [m for m in catalogue.methods(kind) if name in (None, m["name"])]
    show(rows, as_json, ("kind", "name", "paper", "summary"))


@app.command()
def papers(
    word: Annotated[
        str | None, typer.Argument(help="A paper's short name, or text in the title, kind, family or method.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the papers of the catalogue, and which method implements each. With a paper's short name: what of
    it is there, what is not, and the tests that show it.
    """
    from luthier.recipe import catalogue

    if word and not as_json and (lines := catalogue.paper_page(word)):
        typer.echo("\n".join(lines))
        return
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
    base: Annotated[
        str, typer.Argument(help="The base model: a folder, Hub name, toy:NAME or the folder of a run.")
    ],
    tuned: Annotated[str, typer.Argument(help="The tuned model, in the same forms.")],
    data: Annotated[
        str | None, typer.Option(help="Rows to evaluate on (default: the run's held-out rows).")
    ] = None,
    preference: Annotated[
        bool,
        typer.Option(
            "--preference", help="Use preference pairs: ranking accuracy, margins, drift from the base model."
        ),
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(
            help="HTML file to write, with weights, answers, calibration and diversity in addition."
        ),
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
def evaluate(
    run: Annotated[str, typer.Argument(help="The folder of a run, or any other model.")],
    tasks: Annotated[str, typer.Option(help="Tasks of lm-eval, with commas between them: arc_easy,gsm8k.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each task at most.")] = None,
    base: Annotated[
        str | None, typer.Option(help="The model before (default: the run's base model).")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put questions through the chat template; lm-eval does not.")
    ] = False,
    include: Annotated[
        Path | None, typer.Option(help="A folder with tasks of your own, as lm-eval's YAML.")
    ] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="Examples before each question.")] = None,
    as_json: AsJson = False,
) -> None:
    """Public benchmarks by name, before and after, with paired intervals (through lm-eval)."""
    from luthier.report.console import Console
    from luthier.serve.benchmarks import evaluate

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    result = evaluate(run, names, limit=limit, base=base, chat=chat, include=include, shots=shots)
    if as_json:
        typer.echo(dumped(result))
        return
    Console().benchmarks(result)
    if (Path(run) / "report.html").is_file():
        typer.echo(f"Report: {Path(run) / 'report.html'}")


@app.command()
def data(
    source: Annotated[str, typer.Argument(help="A file, folder, Hub name or toy:TASK.")],
    model: Annotated[str, typer.Option(help="Model whose tokenizer renders the rows.")] = "toy:lm",
    chat_template: Annotated[
        str | None, typer.Option(help="Chat template that renders conversations, as in a recipe.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Maximum row length in tokens, as in a recipe.")
    ] = None,
    examples: Annotated[int, typer.Option(min=0, help="Number of rows to show.")] = 3,
    every: Annotated[
        bool,
        typer.Option("--all", help="List every objective: whether it can train on these rows, or why not."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Look at rows: how they are read, which objective suits them, how long they are, what repeats, what is
    unusable and why, and which tokens are supervised.
    """
    from luthier.report.text import MARKS
    from luthier.text.preview import preview

    result = preview(source, model, chat_template, examples, MARKS, max_length)
    if as_json:
        typer.echo(dumped(result))
        return
    from luthier.report.console import Console

    Console().survey(source, result, every)


@app.command()
def compare(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE]... [KEY=VALUE]...",
            help="Recipes to compare, and KEY=VALUE changes for all of them.",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model for every arm: a folder, Hub name or toy:NAME.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Training data for every arm.")] = None,
    tuners: Annotated[str, typer.Option(help="Compare tuners, one arm each, e.g. lora,ssf,full.")] = "",
    objectives: Annotated[str, typer.Option(help="Compare objectives, one arm each, e.g. dpo,ipo.")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Number of runs (seeds) per arm.")] = 3,
    budget: Annotated[
        str | None,
        typer.Option(help="Budget per run: time (30m), steps (500 steps) or tokens (200k tokens)."),
    ] = None,
    metric: Annotated[
        str, typer.Option(help="Metric that ranks the arms and stops weak ones early.")
    ] = "loss",
    learning_rates: Annotated[
        str,
        typer.Option(
            help="Learning rates to choose from for each arm, e.g. 1e-4,1e-3; chosen on a separate seed."
        ),
    ] = "",
    keep_all: Annotated[bool, typer.Option("--keep-all", help="Do not stop weak arms early.")] = False,
    together: Annotated[
        bool,
        typer.Option(
            "--together",
            help=(
                "Train LoRA runs with the same base in one process, in one pass where that is"
                " faster; memory is not measured then."
            ),
        ),
    ] = False,
    output_dir: Annotated[Path | None, typer.Option(help="Folder of the comparison.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare ways to tune on the same rows, seeds and budget. The same command resumes what was stopped;
    with the --output-dir of an earlier comparison, arms are added to it.
    """
    from luthier.report.console import Console
    from luthier.study.compare import ComparisonSpec, arms_of, parse_learning_rates, run_comparison

    files = [w for w in words or () if "=" not in w or Path(w).is_file()]
    changes = [w for w in words or () if w not in files]
    if model:
        changes.append(f"model={json.dumps(model)}")
    if data:
        changes.append(f"data={json.dumps(data)}")
    adds = output_dir is not None and (output_dir / "study.json").is_file()
    arms = arms_of(files, changes, tuners, objectives, least=1 if adds else 2)
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
            help="What to vary: tuner.r, learning_rate=1e-5..1e-2, 'tuner=lora|ssf|dora', layers, ..."
        ),
    ] = None,
    goals: Annotated[
        list[str] | None,
        typer.Option(
            help="Goals: quality, forgetting, parameters, memory, time, or any metric. Several"
            " goals give a Pareto front."
        ),
    ] = None,
    constraint: Annotated[
        list[str] | None,
        typer.Option(help="A constraint, e.g. 'memory <= 8GB'; can be repeated."),
    ] = None,
    trials: Annotated[float | None, typer.Option(help="Budget in full runs, per seed (default: 40).")] = None,
    budget: Annotated[str | None, typer.Option(help="Budget in time instead of trials, e.g. 30m.")] = None,
    sampler: Annotated[
        str,
        typer.Option(
            help="Search algorithm (`luthier methods --kind searcher`); with settings: '{name:"
            " hyperband, inner: tpe}'."
        ),
    ] = "gp",
    seeds: Annotated[
        str, typer.Option(help="Seeds used to tune each configuration: how many, or which (5,6,7).")
    ] = "1",
    test_seeds: Annotated[
        str, typer.Option(help="Seeds used to test the best configurations: how many, or which.")
    ] = "3",
    test_data: Annotated[
        str | None,
        typer.Option(
            metavar="ROWS",
            help="Rows for testing the best configurations (default: the held-out rows used for tuning).",
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(help="Metric that `quality` stands for (default: loss; ranking_accuracy for pairs)."),
    ] = None,
    earlier: Annotated[
        Path | None,
        typer.Option("--from", help="Folder of an earlier search; its best configurations are tried first."),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(help="Optuna storage URL, e.g. sqlite:///study.db (default: a journal file)."),
    ] = None,
    workers: Annotated[
        int,
        typer.Option(
            min=1, help="Number of trials at a time on a Ray cluster (RAY_ADDRESS, or this machine)."
        ),
    ] = 1,
    output_dir: Annotated[Path | None, typer.Option(help="Folder of the search.")] = None,
    as_json: AsJson = False,
) -> None:
    """Search for better configurations, for several goals, within limits. The same command resumes what was
    stopped.
    """
    from luthier.report.console import Console
    from luthier.storage.bounded_yaml import load_yaml
    from luthier.study.search import run_search, search_spec

    source, changes = recipe_words(words)
    spec = search_spec(
        source,
        space or (),
        goals or (),
        constraint or (),
        trials=trials,
        budget=budget,
        sampler=load_yaml(sampler, "--sampler"),
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
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN [KEY=VALUE]...",
            help="Folder of a run, and settings of the form, such as quantization=q8_0 for gguf.",
        ),
    ],
    output_dir: Annotated[Path, typer.Option(help="Folder to write to.")],
    form: Annotated[
        str,
        typer.Option(
            "--as",
            help="lora, merged, gguf, ollama, vllm, int8, fp8, gptq, awq or nf4"
            " (`luthier methods --kind exporter`).",
        ),
    ] = "merged",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Precision of what stays in floats: float32, bfloat16 or float16 (default: the run's own)."
        ),
    ] = None,
) -> None:
    """Write a run's result for other tools, and check that it answers like the tuned model."""
    from luthier.serve.export import export_form

    folder, settings = form_words(words, form)
    done = export_form(folder, settings, output_dir, dtype)
    typer.echo(done)
    for usage in done.usage:
        typer.echo(f"\n{usage.tool}:\n{usage.code}")


@app.command()
def push(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN OWNER/NAME [KEY=VALUE]...",
            help="Folder of a run or of an export, the repository on the hub, and settings of the form.",
        ),
    ],
    form: Annotated[
        str | None,
        typer.Option("--as", help="Form of a run's result (default: lora, or merged)."),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Let everyone see a new repository.")] = False,
    base_model: Annotated[
        str | None,
        typer.Option(help="Name on the hub of the base model, where the run was tuned on a local folder."),
    ] = None,
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
) -> None:
    """Upload a run's result to the Hugging Face hub, with its model card; private unless --public says
    otherwise.
    """
    from luthier.serve.push import push

    if len(words) < 2:
        raise RecipeError("push needs a folder and a repository: luthier push RUN OWNER/NAME")
    folder, settings = form_words([words[0], *words[2:]], form)
    typer.echo(push(folder, words[1], settings, public=public, base_model=base_model, message=message))


@app.command()
def serve(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Folders of runs, exported adapters, model folders, Hub names or toy:NAME; NAME=RUN sets the"
            " name that requests use.",
        ),
    ],
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port (default: 8000, or a free one).")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16 (default: as they were tuned).")
    ] = None,
    max_running: Annotated[int, typer.Option(min=1, help="Answers that are written at once.")] = 64,
    max_waiting: Annotated[
        int, typer.Option(min=0, help="Prompts that wait for a place; more are refused (429).")
    ] = 128,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of an answer whose request does not say how many.")
    ] = 1024,
    grace: Annotated[
        float, typer.Option(min=0, help="Seconds that answers may go on for after SIGTERM or Ctrl-C.")
    ] = 30.0,
    engine: Annotated[
        str,
        typer.Option(
            help="luthier; or vllm or llama.cpp: export the runs, print the engine's command, and run it."
        ),
    ] = "luthier",
) -> None:
    """Serve runs by OpenAI's API: chat completions, completions, streaming; many requests in one batch, LoRA
    runs with the same base side by side.
    """
    if engine != "luthier":
        from luthier.serve.server.hand_over import hand_over

        hand_over(engine, models, host, port, typer.echo)
        return
    from luthier.serve.server.run import serve

    serve(
        models,
        host=host,
        port=port,
        dtype=dtype,
        max_running=max_running,
        max_waiting=max_waiting,
        max_tokens=max_tokens,
        grace=grace,
        tell=typer.echo,
    )


@app.command("import")
def import_configuration(
    file: Annotated[
        Path,
        typer.Argument(help="A configuration of LLaMA-Factory, axolotl, ms-swift or TRL: YAML, JSON or .sh."),
    ],
    output: Annotated[
        Path | None, typer.Option(help="Recipe to write (default: print it to standard output).")
    ] = None,
    tool: Annotated[
        str | None,
        typer.Option(help="llama_factory, axolotl, ms_swift or trl, where the file does not tell."),
    ] = None,
    devices: Annotated[
        int | None,
        typer.Option(min=1, help="Devices it was written for; the effective batch size counts all of them."),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse keys that are not known.")] = False,
) -> None:
    """Turn another tool's configuration into a recipe, and say what became of every key."""
    from luthier.tools.foreign.convert import import_file, sentence

    imported = import_file(file, tool, devices)
    for note in imported.notes:
        typer.echo(sentence(note), err=True)
    unknown = imported.of("unknown")
    if unknown and strict:
        raise RecipeError(f"{file}: unknown keys: {', '.join(note.key for note in unknown)}")
    if output is None:
        typer.echo(imported.yaml(), nl=False)
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(imported.yaml(), encoding="utf-8")
    typer.echo(f"Recipe: {output}")


@app.command()
def studio(
    folder: Annotated[Path, typer.Argument(help="Folder for runs, uploads and exports.")] = Path("."),
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Port on this machine (default: 8765, or a free one)."),
    ] = None,
) -> None:
    """A local page: look at rows, choose methods, train, watch, compare, talk, export."""
    from luthier.studio import serve

    serve(folder, port, typer.echo)


@app.command()
def reproduce(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Claims to reproduce (default: all).")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Test seeds, instead of those in the claim's file.")
    ] = None,
    listed: Annotated[bool, typer.Option("--list", help="Only list the claims and their results.")] = False,
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
        list[str] | None,
        typer.Argument(
            help="Benchmark: sft, dpo, subset, frozen, fleet, fleet_top, mezo, rollout, start, memory."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder of a real model: whole processes on --data, in turns.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Rows for --model.")] = None,
    scenario: Annotated[
        list[str] | None,
        typer.Option(help="With --model: sft, dpo, grpo, evaluate, generate; can be repeated."),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="With --model: so many rows.")] = 64,
    minutes: Annotated[float, typer.Option(help="With --model: no round begins that would end later.")] = 10,
    shape: Annotated[
        list[str] | None, typer.Option(help="Model shape: a, b, c, gpt2, moe; can be repeated (default: a).")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs per contestant; the median is reported.")] = 5,
    device: Annotated[str, typer.Option(help="Device: cpu or cuda.")] = "cpu",
    only: Annotated[list[str] | None, typer.Option(help="Only these contestants; can be repeated.")] = None,
    output_dir: Annotated[Path | None, typer.Option(help="Folder for JSON files and charts.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure speed and memory beside TRL + PEFT and a plain loop on the same work, in turns."""
    from luthier.study.bench import bench, bench_models

    tell = lambda line: typer.echo(line, err=as_json)
    if model or data:
        names = [*(scenarios or ()), *(scenario or ())] or ["sft"]
        results = bench_models(
            names,
            model,
            data,
            n_rows=rows,
            repeats=repeats,
            minutes=minutes,
            device=device,
            only=only,
            output_dir=output_dir,
            tell=tell,
        )
        if as_json:
            typer.echo(dumped(results))
        return
    if not scenarios:
        raise RecipeError("bench: name a benchmark, e.g. `luthier bench sft`, or --model and --data")
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


@app.command()
def completion(
    shell: Annotated[Literal["bash", "zsh", "fish"], typer.Argument(help="The shell: bash, zsh or fish.")],
) -> None:
    """Print the completion of this command line: `eval "$(luthier completion bash)"`."""
    from typer.completion import completion_init, get_completion_script

    completion_init()
    script = {"prog_name": "luthier", "complete_var": COMPLETE, "shell": shell}
    typer.echo(get_completion_script(**script))


@app.command(hidden=True)
def docs(
    check: Annotated[
        bool, typer.Option("--check", help="Fail if the pages differ from the declarations.")
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
        raise RecipeError(
            f"only one recipe at a time, not {' and '.join(files)} (write changes as KEY=VALUE)"
        )
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


def form_words(words: list[str], form: str | None) -> tuple[str, Any]:
    """A run's folder, and a form of export with the settings that were named as KEY=VALUE; None for no
    form.
    """
    from luthier.storage.bounded_yaml import load_yaml

    folder, *changes = words
    settings: dict[str, Any] = {}
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise RecipeError(f"'{change}' is no setting; write settings as KEY=VALUE")
        settings[key] = load_yaml(value, key)
    if not settings:
        return folder, form
    if form is None:
        raise RecipeError(f"{', '.join(settings)}: settings belong to a form; name it with --as")
    return folder, {"name": form, **settings}


@contextmanager
def started_together() -> Iterator[bool]:
    """Within a command that several processes may run: is this the one that talks? What one of them is
    refused for, also before its run begins, all are.
    """
    from luthier.processes import launcher

    if not launcher.several():
        yield True
        return
    from luthier.processes import group

    with group.together() as processes:
        yield processes.main


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
