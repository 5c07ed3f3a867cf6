"""What tests share: one thread, a tiny model with a tokenizer made here, small row sets, and real data where
it is there.
"""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)

LONGEST = (
    "tuners practice recipes loop kernels_compiled search studio_page studio tuners_weight plans claims"
    " quantizers start".split()
)


def pytest_collection_modifyitems(items):
    """Files that take long begin first: a file stays with one process, and the others would wait for one that
    began last.
    """
    rank = {f"test_{name}": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


CHAT = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{% generation %}{{ m.content"
    " }}<|end|>{% endgeneration %}{% else %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endif %}{% endfor %}{%"
    " if add_generation_prompt %}<|assistant|>{% endif %}"
)
SUMS = [
    {"prompt": f"{a}+{b}=", "completion": str(a + b), "answer": str(a + b)}
    for a in range(8)
    for b in range(8)
]
PAIRS = [
    {"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": "no way " + "x" * a}
    for a in range(5)
    for b in range(5)
]
UNPAIRED = [
    {"prompt": f"{a}+{b}=", "completion": str(a + b + b % 2), "label": b % 2 == 0}
    for a in range(5)
    for b in range(6)
]


def make_tokenizer():
    """A byte is a token; eos, pad and turn marks are tokens of their own; nothing is added by itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|mask|>"]
    vocabulary = {t: i for i, t in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        mask_token="<|mask|>",
        additional_special_tokens=special[2:5],
        chat_template=CHAT,
    )


def make_llama(seed: int = 0, **changes):
    """A Llama of 4 layers and about 100,000 parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = dict(
        vocab_size=262,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
        initializer_range=0.15,
    )
    return LlamaForCausalLM(LlamaConfig(**{**shape, **changes})).eval()


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
    from forks import parent

    with parent() as made:
        yield made


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder of real data; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("LUTHIER_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not (folder / "models" / "stories260K").is_dir():
        pytest.skip("no real data here (LUTHIER_DATA)")
    return folder


def recipe_of(model: str) -> dict:
    """A recipe that runs in a second."""
    return {
        "model": model,
        "data": SUMS,
        "dtype": "float32",
        "tuner": "full",
        "objective": "sft",
        "max_steps": 6,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "save_steps": 2,
        "evaluate": [],
        "eval_data": 0,
    }


@pytest.fixture
def base(tiny) -> dict:
    """A recipe that runs in a second, on the tiny Llama."""
    return recipe_of(tiny)


def example_value(column, row: dict, place: int = 0):
    """What a declared column holds in a row of a test: its examples in turn, of tokens from the last one
    back.
    """
    values = column.example
    if column.per == "row":
        return values[place % len(values)]
    if column.per == "completion":
        return [values[k % len(values)] for k in range(len(row["completions"]))]
    masks = row.get("supervised") or [[True] * len(c) for c in row["completions"]]
    return [[values[(sum(m) - 1 - t) % len(values)] for t in range(sum(m))] for m in masks]
