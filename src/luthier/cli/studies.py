"""Several runs: side by side, searched for, after a paper's claim, beside other tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from luthier.cli.options import AsJson, Words, dumped, progress, recipe_words, show
from luthier.errors import RecipeError


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


def bench(
    scenarios: Annotated[
        list[str] | None,
        typer.Argument(
            help="Benchmark: sft, dpo, subset, frozen, fleet, fleet_top, mezo, rollout, start, memory;"
            " or optimizers: which of them reaches a tuned baseline's loss first."
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
    repeats: Annotated[
        int | None,
        typer.Option(
            min=1, help="Runs per contestant (5), or studies of an optimizer (1); the median is reported."
        ),
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Of optimizers: learning rates that each may try.")] = 3,
    steps: Annotated[int, typer.Option(min=5, help="Of optimizers: steps of a run.")] = 40,
    device: Annotated[str, typer.Option(help="Device: cpu or cuda.")] = "cpu",
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Only these contestants, or these optimizers, the baseline first; can be repeated."
        ),
    ] = None,
    output_dir: Annotated[Path | None, typer.Option(help="Folder for JSON files and charts.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure speed and memory beside TRL + PEFT and a plain loop in turns; or which optimizer is fastest."""
    from luthier.study.bench import bench, bench_models

    tell = lambda line: typer.echo(line, err=as_json)
    if scenarios and "optimizers" in scenarios:
        from luthier.study.bench.optimizers import bench_optimizers

        if len(scenarios) > 1:
            raise RecipeError("bench: `optimizers` is a benchmark of its own; name no other beside it")
        studies = repeats or 1
        result = bench_optimizers(
            only,
            model=model,
            data=data,
            trials=trials,
            studies=studies,
            steps=steps,
            output_dir=output_dir,
            tell=tell,
        )
        if as_json:
            typer.echo(dumped(result))
        return
    repeats = repeats or 5
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
