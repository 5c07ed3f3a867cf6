"""Makes a toy model again.

    python -m luthier.toy.make [--model lm|lm-small|lm-large|chat|encoder|seq2seq] [--minutes 25] [--steps N]
    [--seed 0] [--start DIR] [--weak STEP ...]

Trains the tokenizer, writes and packs the pretraining text of all tasks, pretrains, measures held-out exact
match and writes a folder that plain transformers loads, with its card. Needs no network. The text follows
from the seed and the minutes; training ends by the clock or after `--steps` (the card says how many).

What was stopped goes on from its last hundred steps when the same command is run again.

`--start` goes on from a model made before: another round of warm-up, constant rate and decay on the text of
another seed. Give it as long as the first: a short round unlearns more at its high rate than it wins back.

`--weak` keeps the model as it is after these steps, in folders beside its files: with other seeds, a family
of weak and strong models to ask how a method's gain grows.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

# Threads that wait busily slow every other process down thirtyfold, those that sleep at once wake up too late
# for small operations: wait for some microseconds, then sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from luthier.compat.malloc import keep_memory
from luthier.sandbox.sandbox import cores

from . import _corpus, _encoder, _pretrain, _seq2seq, path, score
from ._card import SPLITS, card
from .tasks import names, rows

SIZES = {  # a Llama, unless WITH says otherwise
    "lm": {"hidden": 256, "layers": 4, "heads": 4, "intermediate": 640},
    "lm-small": {"hidden": 128, "layers": 3, "heads": 2, "intermediate": 320},
    "encoder": {"hidden": 192, "layers": 4, "heads": 4, "intermediate": 512},
    "seq2seq": {"hidden": 192, "layers": 3, "heads": 4, "intermediate": 448},
}
WITH = {"encoder": _encoder, "seq2seq": _seq2seq}
ON = {"chat": "lm", "lm-large": "lm"}  # made of another model, and with its tokenizer
PEAK = {"chat": 0.25, "lm-large": 0.5, "encoder": 0.3}
"""Of the learning rates: at the full ones, a short round unlearns more than it gains, and a BERT learns
little.
"""
MINUTES = {"lm": 25.0, "lm-small": 5.0, "encoder": 10.0, "seq2seq": 10.0, "chat": 4.0, "lm-large": 20.0}
TOKENS_PER_SECOND = {
    "lm": 24_000,
    "lm-small": 60_000,
    "encoder": 20_000,
    "seq2seq": 20_000,
    "chat": 24_000,
    "lm-large": 14_000,
}
"""At most, so that text suffices for the time given."""
LENGTH = 512


def make_tokenizer(name: str, folder: Path, seed: int) -> PreTrainedTokenizerFast:
    """Train, save and reload the tokenizer, so that what is used is what was written."""
    if name in ON:
        AutoTokenizer.from_pretrained(path(ON[name])).save_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_corpus.train_tokenizer(seed=seed),
        bos_token=_corpus.START,
        eos_token=_corpus.END,
        pad_token=_corpus.PAD,
        mask_token=_corpus.MASK,
        additional_special_tokens=list(_corpus.ROLES.values()),
        # What an encoder reads is given its start token by the tokenizer, after the template.
        chat_template=(
            _corpus.CHAT_TEMPLATE.replace("{{- bos_token }}\n", "")
            if name == "seq2seq"
            else _corpus.CHAT_TEMPLATE
        ),
        model_max_length=LENGTH,
        padding_side="left" if name not in WITH else "right",
        clean_up_tokenization_spaces=False,
    )
    if name == "seq2seq":
        tokenizer.add_tokens(_seq2seq.SENTINELS, special_tokens=True)
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def make(
    name: str,
    folder: Path,
    minutes: float,
    steps: int | None,
    seed: int,
    start: Path | None,
    weak: Sequence[int] = (),
) -> None:
    """Make one model into a folder, telling what happens; `rounds.json` there keeps account of the rounds."""
    torch.set_num_threads(min(2, cores()))
    keep_memory()
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()

    def tell(words: str) -> None:
        print(f"[{time.perf_counter() - began:6.0f} s] {words}", flush=True)

    rounds = json.loads((start / "rounds.json").read_text(encoding="utf-8")) if start else []
    tokenizer = make_tokenizer(name, folder, rounds[0]["seed"] if rounds else seed)
    tokens = int(60 * minutes * TOKENS_PER_SECOND[name])
    tell(f"tokenizer of {len(tokenizer)} tokens; writing {tokens / 1e6:.0f}M tokens of text")
    if name in WITH:
        documents = _corpus.documents(folder / "tokenizer.json", tokens, seed)
        model = WITH[name].build(tokenizer, **SIZES[name], seed=seed)
        loss_of = WITH[name].loss_of(model, tokenizer, documents, seed=seed)
    else:
        shares = _corpus.CHAT_SHARES if name == "chat" else None
        windows = _corpus.corpus(folder / "tokenizer.json", tokens, LENGTH, seed, shares)
        if start or name in ON:
            model = LlamaForCausalLM.from_pretrained(start or path(ON[name]), dtype=torch.bfloat16).train()
            model = _pretrain.deepened(model) if name == "lm-large" and not start else model
        else:
            model = _pretrain.build(tokenizer, **SIZES[name], seed=seed)
        loss_of = _pretrain.causal(model, windows)
    tell(f"pretraining {model.num_parameters() / 1e6:.2f}M parameters")

    def look() -> str:
        numbers = score.measure(model, tokenizer, 60, ("validation",), score.exact_share)
        model.train()
        return " ".join(f"{key.split('/')[0]} {value['all']:.0%}" for key, value in numbers.items())

    checkpoint = folder / "training.safetensors"
    early = {step: partial(_save, model, tokenizer, folder / f"step-{step}") for step in weak}
    decay = 1.0 if name in ON else _pretrain.DECAY_SHARE  # a short round falls from its start on
    took = _pretrain.pretrain(
        model,
        loss_of,
        minutes,
        steps,
        checkpoint,
        PEAK.get(name, 1.0),
        decay,
        tell=tell,
        look=look,
        weak=early,
    )
    model.save_pretrained(folder)
    checkpoint.unlink(missing_ok=True)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    if name != "encoder":
        decoder = {"decoder_start_token_id": model.config.decoder_start_token_id} if name == "seq2seq" else {}
        GenerationConfig(
            **ids, **decoder, pad_token_id=tokenizer.pad_token_id, max_new_tokens=128
        ).save_pretrained(folder)
    rounds.append({"seed": seed, "minutes": minutes, **took})
    (folder / "rounds.json").write_text(json.dumps(rounds, indent=1) + "\n", encoding="utf-8")
    write_probe(folder)
    write_card(name, folder)
    tell(f"done: {folder}")


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_probe(folder: Path, n: int = 40) -> None:
    """Beside the model, rows of all it was taught: what to ask after tuning to see what was forgotten."""
    with (folder / "probe.jsonl").open("w", encoding="utf-8") as file:
        for task in names():
            for row in rows(task, "test", n, seed=1):
                columns = {key: row[key] for key in ("prompt", "completion", "messages") if key in row}
                file.write(json.dumps({**columns, "skill": task}) + "\n")


def write_card(name: str, folder: Path) -> None:
    """Measure the saved model and say so in its README."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = score.load(folder, torch.bfloat16)
    rows_per_split = 200
    numbers = score.measure(model, tokenizer, rows_per_split, (*SPLITS, "instruct_test"))
    rounds = json.loads((folder / "rounds.json").read_text(encoding="utf-8"))
    text = card(name, model, rounds, numbers, rows_per_split)
    (folder / "README.md").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser("luthier.toy.make", description="Make a toy model again.")
    parser.add_argument("--model", choices=list(MINUTES), default="lm", help="which model to make")
    parser.add_argument("--minutes", type=float, help="time for pretraining, compiling aside")
    parser.add_argument("--steps", type=int, help="end after so many steps, not by the clock")
    parser.add_argument("--out", type=Path, help="the folder to write (default: ./toy-MODEL)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="go on from this model, made before")
    parser.add_argument(
        "--weak",
        type=int,
        nargs="*",
        default=(),
        metavar="STEP",
        help="keep the model after these steps as well",
    )
    args = parser.parse_args()
    folder = args.out or Path(f"toy-{args.model}")
    make(
        args.model,
        folder,
        args.minutes or MINUTES[args.model],
        args.steps,
        args.seed,
        args.start,
        args.weak,
    )


if __name__ == "__main__":
    main()
