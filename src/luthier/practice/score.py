"""Exact match without generating.

If every token of the answer is the most likely one after those before it, greedy decoding writes that
answer. So thousands of rows take seconds, wherever the right completion is unique, which the worlds take
care of.
"""

import argparse
import time
from collections import defaultdict
from typing import Any

import torch

from ._card import SPLITS
from ._corpus import halves
from .worlds import find, names, rows


def tokens_of(row: dict, tokenizer) -> tuple[list[int], list[bool]]:
    """The tokens of a row as a tuned model would see them, and which of them are the model's to write."""
    if "messages" in row:
        rendered = tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return list(rendered["input_ids"]), [bool(mine) for mine in rendered["assistant_masks"]]
    prompt = tokenizer(row["prompt"])["input_ids"]
    completion = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
    ids = [*prompt, *completion, tokenizer.eos_token_id]
    return ids, [i >= len(prompt) for i in range(len(ids))]


def load(folder):
    """A practice model of any kind, to be asked."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

    kind = {"bert": AutoModelForMaskedLM, "t5": AutoModelForSeq2SeqLM}.get(
        AutoConfig.from_pretrained(folder).model_type, AutoModelForCausalLM
    )
    return kind.from_pretrained(folder, dtype=torch.bfloat16).eval()


@torch.no_grad()
def is_exact(model, tokenizer, some_rows: list[dict], batch_size: int = 64) -> list[bool]:
    """For each row: would greedy decoding write exactly its completion (or its assistant turns)?

    An encoder fills all of a completion's places at once; an encoder-decoder says the last turn of a conversation.
    """
    ask: Any = {"bert": _filled, "t5": _said}.get(model.config.model_type, _continued)
    encoded: list[Any] = [(_halves if ask is not _continued else tokens_of)(row, tokenizer) for row in some_rows]
    order = sorted(range(len(some_rows)), key=lambda i: len(encoded[i][0]) + len(encoded[i][1]))
    exact = [False] * len(some_rows)
    for start in range(0, len(order), batch_size):
        some = order[start : start + batch_size]
        for i, right in zip(some, ask(model, tokenizer, [encoded[i] for i in some]).tolist(), strict=True):
            exact[i] = right
    return exact


def _continued(model, tokenizer, some: list[tuple[list[int], list[bool]]]) -> torch.Tensor:
    ids = _padded([ids for ids, _ in some], tokenizer.pad_token_id)
    asked = _padded([asked for _, asked in some], False)
    # Padding stands on the right and attention is causal: nothing read depends on it, no mask is needed.
    guess = model(input_ids=ids, use_cache=False).logits[:, :-1].argmax(-1)
    return ((guess == ids[:, 1:]) | ~asked[:, 1:]).all(1)


def _halves(row: dict, tokenizer) -> tuple[list[int], list[int]]:
    """The tokens that are read, and those that are said."""
    prompt, completion = halves(row)
    return tokenizer(prompt)["input_ids"], tokenizer(completion, add_special_tokens=False)["input_ids"]


def _filled(model, tokenizer, some: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    labels = _padded([[-100] * len(p) + c[:-1] + [-100] for p, c in some], -100)
    ids = _padded([p + c for p, c in some], tokenizer.pad_token_id)
    mask = _padded([[1] * (len(p) + len(c)) for p, c in some], 0)
    guess = model(input_ids=ids.masked_fill(labels >= 0, tokenizer.mask_token_id), attention_mask=mask).logits.argmax(-1)
    return ((guess == labels) | (labels < 0)).all(1)


def _said(model, tokenizer, some: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    ids, labels = _padded([p for p, _ in some], tokenizer.pad_token_id), _padded([c for _, c in some], -100)
    mask = _padded([[1] * len(p) for p, _ in some], 0)
    begun = torch.full((len(some), 1), model.config.decoder_start_token_id)
    begun = torch.cat([begun, labels[:, :-1].clamp(min=0)], 1)
    guess = model(input_ids=ids, attention_mask=mask, decoder_input_ids=begun, use_cache=False).logits.argmax(-1)
    return ((guess == labels) | (labels < 0)).all(1)


def _padded(rows: list[list], fill) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([list(row) + [fill] * (width - len(row)) for row in rows])


def exact_match(model, tokenizer, some_rows: list[dict]) -> dict[str, float]:
    """The share of exactly right rows, by kind and over "all"."""
    by_kind: dict[str, list[bool]] = defaultdict(list)
    for row, exact in zip(some_rows, is_exact(model, tokenizer, some_rows), strict=True):
        by_kind[row["kind"]].append(exact)
        by_kind["all"].append(exact)
    return {kind: sum(exact) / len(exact) for kind, exact in by_kind.items()}


def measure(model, tokenizer, n: int, splits: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Exact match by "world/split" on n rows each, as {kind or "all": share}."""
    model.eval()
    found = {}
    for world in names():
        for split in splits:
            if split in find(world).SPLITS:
                found[f"{world}/{split}"] = exact_match(model, tokenizer, rows(world, split, n, "card"))
    return found


def main() -> None:
    """python -m luthier.practice.score MODEL: a table of all worlds, in seconds."""
    from transformers import AutoTokenizer

    from luthier.store import resolve_model

    parser = argparse.ArgumentParser("luthier.practice.score", description="Exact match of a model on every world.")
    parser.add_argument("model", help="practice:NAME or a folder")
    parser.add_argument("-n", type=int, default=100, help="rows of each split")
    given = parser.parse_args()
    folder, began = resolve_model(given.model), time.perf_counter()
    numbers = measure(load(folder), AutoTokenizer.from_pretrained(folder), given.n, SPLITS)
    print(f"{'world':16}" + "".join(f"{split:>12}" for split in SPLITS))
    for world in names():
        print(f"{world:16}" + "".join(f"{numbers[f'{world}/{s}']['all']:12.0%}" if f"{world}/{s}" in numbers else " " * 12 for s in SPLITS))
    print(f"{len(numbers) * given.n} rows in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
