"""What tests share: one thread, and fixtures of a tiny model, a process that may be killed, and real data."""

from __future__ import annotations

import gc
import os
from pathlib import Path

gc.disable()  # looking for garbage among what is imported takes a quarter of that time, and finds none

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# of linear algebra and of processes that tests start: more threads than cores wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from helpers.forks import parent
from helpers.models import make_llama, make_tokenizer
from helpers.paths import DATA
from helpers.rows import recipe_of
from helpers.seeds import shift_seeds
from luthier.toy.real import default_folder, is_there

# PEFT's own tests of luthier's tuners, where its sources are
collect_ignore = [] if os.environ.get("LUTHIER_PEFT") else ["contracts/test_peft_sources.py"]

torch.set_num_threads(int(os.environ.get("LUTHIER_TEST_THREADS", "1")))
shift_seeds(int(os.environ.get("LUTHIER_TEST_SEED", "0")))  # tests/machines.py

MARKERS = {
    "contracts": "contract",
    "run": "long",
    "sandbox": "long",
    "study": "long",
    "studio": "long",
}  # folder -> marker of its tests
LONG_FILES = (  # a minute or more of a core
    *("contracts/test_tuners", "toy/test_models", "contracts/test_recipes", "run/test_resume"),
    *("contracts/test_objectives", "train/test_distributed", "study/test_compare", "studio/test_page"),
    *("test_cli", "contracts/test_outside_package", "run/test_damage", "contracts/test_quantizers"),
    *("study/test_search", "contracts/test_interop", "contracts/test_architectures"),
)


def pytest_collection_modifyitems(items):
    """Marks tests by their folder; begins with the longest files, since a file stays with one process."""
    home = Path(__file__).parent
    for item in items:
        folder = item.path.relative_to(home).parts[0]
        marker = "long" if folder.endswith(".py") else MARKERS.get(folder)
        if item.get_closest_marker("slow") is None and item.get_closest_marker("long") is None:
            item.add_marker(marker or "fast")
    rank = {name: place for place, name in enumerate(LONG_FILES)}
    name_of = lambda item: item.path.relative_to(home).with_suffix("").as_posix()
    items.sort(key=lambda item: rank.get(name_of(item), len(rank)))


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def unhurried():
    """What is written need not outlast a power cut here: waiting for the disk is half of a small run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def four_layers(tmp_path_factory) -> str:
    """The folder of a tiny Llama with its tokenizer."""
    folder = tmp_path_factory.mktemp("four_layers")
    make_llama().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny(four_layers) -> str:
    """The model of most tests; in folders of many runs it is `shallow`."""
    return four_layers


@pytest.fixture(scope="session")
def shallow(tmp_path_factory) -> str:
    """The same with two layers."""
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


@pytest.fixture(scope="session")
def smol() -> str:
    """The folder of SmolLM2-135M-Instruct; tests that need it are skipped where it was not brought."""
    folder = default_folder()
    if not is_there(folder):
        pytest.skip("SmolLM2 is not here (python -m luthier.toy.real, or LUTHIER_SMOL)")
    return str(folder)


@pytest.fixture
def base(tiny) -> dict:
    """A recipe that runs in a second, on the tiny Llama."""
    return recipe_of(tiny)


@pytest.fixture(scope="module")
def tiny_roles(tiny):
    """Roles of the tiny Llama, all of it trained, with itself, untuned, as the reference and the judge."""
    from helpers.stages import make_roles

    return make_roles(tiny)


@pytest.fixture
def sentences(tiny_roles) -> list[str]:
    """What `roles` warn of."""
    warnings = []
    tiny_roles.warn, tiny_roles.clock.step = warnings.append, 0
    return warnings


@pytest.fixture
def roles(tiny_roles, sentences):
    """`tiny_roles` at step 0, whose warnings go to `sentences`."""
    return tiny_roles


@pytest.fixture(scope="session")
def trl():
    return pytest.importorskip("trl")
