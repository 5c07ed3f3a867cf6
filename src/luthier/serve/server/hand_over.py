"""Serving by another engine: runs are exported into the form that it takes, its command is printed, and it is
started where it is installed.

Exports lie in the run's folder, under a name that says what they were made of, so they are made once.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from luthier.errors import RecipeError
from luthier.registry import did_you_mean
from luthier.serve.export import export
from luthier.serve.server.models import named
from luthier.serve.server.run import PORT, server_token
from luthier.storage import files
from luthier.storage.layout import STATE

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # values of its --max-lora-rank


@dataclass(frozen=True)
class Model:
    """What an engine serves under a name."""

    name: str
    path: Path | str  # an exported folder; a plain model as it was named


@dataclass(frozen=True)
class Command:
    """How an engine is started. key: the environment variable that it takes its token from."""

    words: list[str]
    key: str


def hand_over(
    engine: str,
    words: Sequence[str],
    host: str,
    port: int | None = None,
    tell: Callable[[str], object] = print,
) -> None:
    """Print an engine's command and become it, where it is installed.

    Args:
        engine: vllm or llama.cpp.
        words: RUN or NAME=RUN, as `serve` takes them.

    Raises:
        RecipeError: the engine is not known or cannot serve these together, or a run has no such form.
    """
    if engine not in ENGINES:
        raise RecipeError(f"--engine: there is no '{engine}'{did_you_mean(engine, ['luthier', *ENGINES])}")
    form, command_of = ENGINES[engine]
    token, drawn = server_token()
    port = port or PORT
    models = [Model(name, exported(path, form, tell)) for name, path in named(words).items()]
    command = command_of(models, host, port)
    tell(f"{engine}, as OpenAI's API at http://{host}:{port}/v1; models: {', '.join(m.name for m in models)}")
    tell(f"{command.key}=TOKEN {shlex.join(command.words)}")
    program = shutil.which(command.words[0])
    if program is None:
        raise RecipeError(
            f"{command.words[0]} is not installed here: run the command above where it is, with a token of"
            " your own"
        )
    if drawn:
        tell(f"Token (api_key): {token}")
    os.execve(program, command.words, {**os.environ, command.key: token})


def exported(path: str, form: str, tell: Callable[[str], object]) -> Path | str:
    """A run in the form that an engine takes, made now or before; a plain model as it is."""
    run = Path(path).expanduser()
    if not (run / STATE).is_file():
        return path
    mark = hashlib.sha256((run / STATE).read_bytes()).hexdigest()[:8]
    folder = run / "exports" / f"{form}-{mark}"
    if not folder.is_dir():
        folder.parent.mkdir(exist_ok=True)
        tell(export(run, form, folder))
    return folder


def vllm(models: Sequence[Model], host: str, port: int) -> Command:
    """Adapters on one base, or one whole model."""
    adapters, bases, ranks = [], set(), [0]
    for model in models:
        config = Path(model.path) / "adapter_config.json"
        if config.is_file():
            adapter = files.read_object(config, base_model_name_or_path=str, r=int)
            bases.add(adapter["base_model_name_or_path"])
            ranks += [adapter["r"], *(adapter.get("rank_pattern") or {}).values()]
            adapters.append(f"{model.name}={model.path}")
    if adapters and (len(bases) > 1 or len(adapters) < len(models)):
        raise RecipeError("vLLM serves adapters on one base, or one whole model: start it for each of these")
    if not adapters and len(models) > 1:
        raise RecipeError("vLLM serves one whole model at a time: start it for each of these")
    words = ["vllm", "serve"]
    if adapters:
        rank = next((rank for rank in VLLM_RANKS if rank >= max(ranks)), VLLM_RANKS[-1])
        words += [bases.pop(), "--enable-lora", "--max-loras", str(len(adapters))]
        words += ["--max-lora-rank", str(rank), "--lora-modules", *adapters]
    else:
        words += [str(models[0].path), "--served-model-name", models[0].name]
    return Command([*words, "--host", host, "--port", str(port)], "VLLM_API_KEY")


def llama_cpp(models: Sequence[Model], host: str, port: int) -> Command:
    """One model, in GGUF form."""
    if len(models) > 1:
        raise RecipeError("llama.cpp serves one model at a time: start it for each of these")
    (model,) = models
    path = Path(model.path)
    weights = sorted(path.glob("*.gguf")) if path.is_dir() else [path]
    if not weights or weights[0].suffix != ".gguf":
        raise RecipeError(f"{model.path} holds no .gguf file; serve a run, or a file of that kind")
    words = ["llama-server", "--model", str(weights[0]), "--alias", model.name, "--jinja"]
    return Command([*words, "--host", host, "--port", str(port)], "LLAMA_API_KEY")


ENGINES = {"vllm": ("vllm", vllm), "llama.cpp": ("gguf", llama_cpp)}
