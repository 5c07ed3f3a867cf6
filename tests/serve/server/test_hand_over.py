"""Other engines: runs in the form that they take, their command, and the program itself where it is there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from luthier.errors import RecipeError
from luthier.serve.server import hand_over as module
from luthier.serve.server.hand_over import hand_over
from luthier.serve.server.run import TOKEN
from luthier.storage.layout import STATE

SECRET = "a-token-for-tests"


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    """Two runs whose exports are adapters of rank 4 and 24, one that is merged, and no program on the way."""
    for name in ("a", "b", "whole"):
        (tmp_path / name).mkdir()
        (tmp_path / name / STATE).write_text(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv(TOKEN, SECRET)

    def export(run, form, to):
        to.mkdir()
        if form == "gguf":
            (to / "model.gguf").touch()
        elif run.name != "whole":
            config = {"base_model_name_or_path": "base", "r": 4, "rank_pattern": {}}
            if run.name == "b":
                config["rank_pattern"] = {"q": 24}
            (to / "adapter_config.json").write_text(json.dumps(config))
        return f"exported {run.name}"

    monkeypatch.setattr(module, "export", export)
    return tmp_path


def command_of(engine: str, *words: str) -> list[str]:
    """The words of the command that is printed."""
    lines: list[str] = []
    with pytest.raises(RecipeError, match="not installed here"):
        hand_over(engine, words, "127.0.0.1", 8000, lines.append)
    assert not any(SECRET in line for line in lines)
    return lines[-1].split()


def test_commands_of_other_engines(runs):
    command = command_of("vllm", "a", "other=b")
    assert command[:5] == ["VLLM_API_KEY=TOKEN", "vllm", "serve", "base", "--enable-lora"]
    assert command[command.index("--max-lora-rank") + 1] == "32"
    modules = command[command.index("--lora-modules") + 1 :][:2]
    assert [each.partition("=")[0] for each in modules] == ["a", "other"]
    assert all(Path(each.partition("=")[2]).is_dir() for each in modules)
    assert command_of("vllm", "a", "other=b") == command  # exported once
    assert "--served-model-name" in command_of("vllm", "whole")
    assert command_of("vllm", "models/plain")[3] == "models/plain"
    server = command_of("llama.cpp", "a")
    assert server[1] == "llama-server" and server[3].endswith("model.gguf")
    for engine, words in (
        ("vllm", ["a", "whole"]),
        ("vllm", ["whole", "models/plain"]),
        ("llama.cpp", ["a", "b"]),
        ("llama.cpp", ["models/plain"]),
        ("nothing", ["a"]),
    ):
        with pytest.raises(RecipeError):
            hand_over(engine, words, "127.0.0.1", 8000, [].append)


def test_a_program_that_is_there_is_started(runs, monkeypatch):
    program = runs / "llama-server"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    started = []
    monkeypatch.setattr(os, "execve", lambda *what: started.append(what))
    hand_over("llama.cpp", ["a"], "127.0.0.1", 8000, [].append)
    ((path, words, environment),) = started
    assert path == str(program) and words[0] == "llama-server"
    assert environment["LLAMA_API_KEY"] == SECRET and SECRET not in words
