"""What tests share: one thread, and fixtures of a tiny model, a process that may be killed, and real data."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from helpers.forks import parent
from helpers.models import make_llama, make_tokenizer
from helpers.paths import DATA
from helpers.rows import recipe_of

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> str:
    """The folder of a tiny Llama with its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    make_llama().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def shallow(tmp_path_factory) -> str:
    """The same with two layers: for files of many runs, `tiny` is this one."""
    folder = tmp_path_factory.mktemp("shallow")
    make_llama(num_hidden_layers=2).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def forks():
    """(code, folder, *arguments) -> a process that may be killed."""
    with parent() as made:
        yield made


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder of real data; tests that need it are skipped where it is absent."""
    if not (DATA / "models" / "stories260K").is_dir():
        pytest.skip("no real data here (LUTHIER_DATA)")
    return DATA


@pytest.fixture
def base(tiny) -> dict:
    """A recipe that runs in a second, on the tiny Llama."""
    return recipe_of(tiny)


@pytest.fixture(scope="session")
def trl():
    return pytest.importorskip("trl")
