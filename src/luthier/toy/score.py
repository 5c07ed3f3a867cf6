"""Accuracy of a toy model on every task: python -m luthier.toy.score MODEL.

If every token of the answer is the most likely one after those before it, greedy decoding writes that answer.
So thousands of rows take seconds, wherever the right completion is unique. Where it is not (code, SQL) and
the answer differs, it is written out and run.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from . import verify
from ._card import SPLITS
from ._corpus import halves
from .tasks import find, names, rows

# tasks whose rows can be answered rightly by other texts than their completion
SEVERAL = frozenset({"code", "sql"})


def tokens_of(row: dict, tokenizer) -> tuple[list[int], list[bool]]:
    """The tokens of a row as a tuned model would see them, and which of them are the model's to write."""
    if "messages" in row:
        rendered = tokenizer.apply_chat_template(
            row["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return list(rendered["input_ids"]), [bool(mine) for mine in rendered["assistant_masks"]]
    prompt = tokenizer(row["prompt"])["input_ids"]
    completion = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
    ids = [*prompt, *completion, tokenizer.eos_token_id]
    return ids, [i >= len(prompt) for i in range(len(ids))]


def load(folder, dtype: torch.dtype | None = None):
    """A toy model of any kind, for scoring; by default in the precision that the processor multiplies in."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

    from luthier.model.load import pick_dtype

    kind = {"bert": AutoModelForMaskedLM, "t5": AutoModelForSeq2SeqLM}.get(
        AutoConfig.from_pretrained(folder).model_type, AutoModelForCausalLM
    )
    return kind.from_pretrained(folder, dtype=dtype or pick_dtype("auto", torch.device("cpu"))).eval()


@torch.no_grad()
def is_exact(model, tokenizer, some_rows: list[dict], batch_size: int = 64) -> list[bool]:
    """For each row: would greedy decoding write exactly its completion (or its assistant turns)?

    An encoder fills all of a completion's places at once; an encoder-decoder says the last turn of a
    conversation.
    """
    ask: Any = {"bert": _filled, "t5": _decoded}.get(model.config.model_type, _continued)
    encoded: list[Any] = [
        (_halves if ask is not _continued else tokens_of)(row, tokenizer) for row in some_rows
    ]
    order = sorted(range(len(some_rows)), key=lambda i: len(encoded[i][0]) + len(encoded[i][1]))
    exact = [False] * len(some_rows)
    for start in range(0, len(order), batch_size):
        some = order[start : start + batch_size]
        for i, right in zip(some, ask(model, tokenizer, [encoded[i] for i in some]).tolist(), strict=True):
            exact[i] = right
    return exact


def _continued(model, tokenizer, some: list[tuple[list[int], list[bool]]]) -> torch.Tensor:
    ids = _padded([ids for ids, _ in some], tokenizer.pad_token_id)
    supervised = _padded([supervised for _, supervised in some], False)
    # Padding stands on the right and attention is causal: nothing read depends on it, no mask is needed.
    guess = model(input_ids=ids, use_cache=False).logits[:, :-1].argmax(-1)
    return ((guess == ids[:, 1:]) | ~supervised[:, 1:]).all(1)


def _halves(row: dict, tokenizer) -> tuple[list[int], list[int]]:
    """The tokens that are read, and those that are said."""
    prompt, completion = halves(row)
    return tokenizer(prompt)["input_ids"], tokenizer(completion, add_special_tokens=False)["input_ids"]


def _filled(model, tokenizer, some: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    labels = _padded([[-100] * len(p) + c[:-1] + [-100] for p, c in some], -100)
    ids = _padded([p + c for p, c in some], tokenizer.pad_token_id)
    mask = _padded([[1] * (len(p) + len(c)) for p, c in some], 0)
    guess = model(
        input_ids=ids.masked_fill(labels >= 0, tokenizer.mask_token_id), attention_mask=mask
    ).logits.argmax(-1)
    return ((guess == labels) | (labels < 0)).all(1)


def _decoded(model, tokenizer, some: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    ids, labels = _padded([p for p, _ in some], tokenizer.pad_token_id), _padded([c for _, c in some], -100)
    mask = _padded([[1] * len(p) for p, _ in some], 0)
    begun = torch.full((len(some), 1), model.config.decoder_start_token_id)
    begun = torch.cat([begun, labels[:, :-1].clamp(min=0)], 1)
    guess = model(input_ids=ids, attention_mask=mask, decoder_input_ids=begun, use_cache=False).logits.argmax(
        -1
    )
    return ((guess == labels) | (labels < 0)).all(1)


def _padded(rows: list[list], fill) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([list(row) + [fill] * (width - len(row)) for row in rows])


def is_right(model, tokenizer, some_rows: list[dict]) -> list[bool]:
    """Exact, or where other texts can be right too (SEVERAL): what is written instead is run, and does the
    same.
    """
    right = is_exact(model, tokenizer, some_rows)
    if model.config.model_type != "bert":
        left = [
            i
            for i, row in enumerate(some_rows)
            if not right[i] and row.get("task") in SEVERAL and "completion" in row
        ]
        for i, text in zip(
            left, written(model, tokenizer, [some_rows[i]["prompt"] for i in left]), strict=True
        ):
            right[i] = verify(some_rows[i], text) == 1.0
    return right


@torch.no_grad()
def written(
    model, tokenizer, prompts: list[str], batch_size: int = 64, max_new_tokens: int = 96
) -> list[str]:
    """Greedy answers to raw prompts."""
    texts: list[str] = []
    for start in range(0, len(prompts), batch_size):
        inputs = tokenizer(prompts[start : start + batch_size], return_tensors="pt", padding=True)
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        first = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        texts += tokenizer.batch_decode(ids[:, first:], skip_special_tokens=True)
    return texts


def right_share(model, tokenizer, some_rows: list[dict], judge: Callable = is_right) -> dict[str, float]:
    """The share of right rows, by kind and over "all"."""
    by_kind: dict[str, list[bool]] = defaultdict(list)
    for row, exact in zip(some_rows, judge(model, tokenizer, some_rows), strict=True):
        by_kind[row["kind"]].append(exact)
        by_kind["all"].append(exact)
    return {kind: sum(exact) / len(exact) for kind, exact in by_kind.items()}


def exact_share(model, tokenizer, some_rows: list[dict]) -> dict[str, float]:
    """The same, letter for letter: nothing is written, so it takes no time."""
    return right_share(model, tokenizer, some_rows, is_exact)


def measure(
    model, tokenizer, n: int, splits: tuple[str, ...], judge: Callable = right_share
) -> dict[str, dict[str, float]]:
    """The share of right rows by "task/split" on n rows each, as {kind or "all": share}."""
    model.eval()
    shares = {}
    for task in names():
        for split in splits:
            if split in find(task).SPLITS:
                shares[f"{task}/{split}"] = judge(model, tokenizer, rows(task, split, n, "card"))
    return shares


def main() -> None:
    """python -m luthier.toy.score MODEL: a table of all tasks, in seconds."""
    from transformers import AutoTokenizer

    from luthier.recipe.model_names import resolve_model

    parser = argparse.ArgumentParser(
        "luthier.toy.score", description="The share of right answers of a model on every task."
    )
    parser.add_argument("model", help="toy:NAME or a folder")
    parser.add_argument("-n", type=int, default=100, help="rows of each split")
    args = parser.parse_args()
    folder, began = resolve_model(args.model), time.perf_counter()
    numbers = measure(load(folder), AutoTokenizer.from_pretrained(folder), args.n, SPLITS)
    print(f"{'task':16}" + "".join(f"{split:>12}" for split in SPLITS))
    for task in names():
        print(
            f"{task:16}"
            + "".join(
                f"{numbers[f'{task}/{s}']['all']:12.0%}" if f"{task}/{s}" in numbers else " " * 12
                for s in SPLITS
            )
        )
    print(f"{len(numbers) * args.n} rows in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
