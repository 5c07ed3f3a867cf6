"""Use a run's result: talk to it, serve it, write it for other tools; and the page that does all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from luthier.cli.options import form_words
from luthier.errors import RecipeError


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
    image: Annotated[
        list[str] | None, typer.Option(help="An image that the first prompt is about; repeat it for several.")
    ] = None,
    chat_template_kwargs: Annotated[
        str | None, typer.Option(help="Variables for the chat template, e.g. '{enable_thinking: false}'.")
    ] = None,
    decoder: Annotated[
        str | None,
        typer.Option(
            help="How answers are written: a decoder's name, or a mapping such as '{name: structured_outputs,"
            " choice: [yes, no]}' (see luthier methods decoder)."
        ),
    ] = None,
) -> None:
    """Talk to a model."""
    from luthier.registry import build
    from luthier.serve.chat import chat
    from luthier.storage.bounded_yaml import load_yaml

    options = load_yaml(chat_template_kwargs or "{}", "--chat-template-kwargs")
    if not isinstance(options, dict):
        raise RecipeError("--chat-template-kwargs: expected a mapping, e.g. '{enable_thinking: false}'")
    how = load_yaml(decoder, "--decoder") if decoder else None
    if how is not None:
        build("decoder", how)  # a wrong setting is told before the model is loaded
    chat(
        model,
        prompt,
        system=system,
        images=image or (),
        chat_template_kwargs=options,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        decoder=how,
    )


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


def push(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN OWNER/NAME [KEY=VALUE]...",
            help="Folder of a run or of an export, the repository on the hub, and settings of the form.",
        ),
    ],
    form: Annotated[
        str | None, typer.Option("--as", help="Form of a run's result (default: lora, or merged).")
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


def merge(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG.yaml | FOLDER...",
            help="A YAML of mergekit; or folders of models, of runs with full weights, or of adapters.",
        ),
    ],
    output_dir: Annotated[Path, typer.Option(help="Folder to write to.")],
    merger: Annotated[
        str | None,
        typer.Option(
            help="average, or a mapping such as '{name: ties, density: 0.2}' (luthier methods merger)."
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Folder of the model that all of them began with, for mergers of changes."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16 (default: as the first model has it).")
    ] = None,
) -> None:
    """Merge models, or adapters, into one, tensor by tensor from disk to disk."""
    from luthier.serve.mergekit import Merge, read_mergekit
    from luthier.serve.merging import merge_folders
    from luthier.storage.bounded_yaml import load_yaml

    if len(models) == 1 and Path(models[0]).suffix in (".yaml", ".yml"):
        if merger or base or dtype:
            raise RecipeError(
                "merger, base and dtype stand in the YAML; leave --merger, --base and --dtype out"
            )
        what = read_mergekit(Path(models[0]))
    else:
        what = Merge(load_yaml(merger or "average", "--merger"), models, base, dtype)
    typer.echo(merge_folders(what, output_dir))


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
