"""Exact match without generating.

If every token of the answer is the most likely one after those before it, greedy decoding writes that
answer. So thousands of rows take seconds, wherever the right completion is unique, which the worlds take
care of.
"""

from collections import defaultdict

import torch


def tokens_of(row: dict, tokenizer) -> tuple[list[int], list[bool]]:
    """The tokens of a row as a tuned model would see them, and which of them are the model's to write."""
    if "messages" in row:
        rendered = tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return list(rendered["input_ids"]), [bool(mine) for mine in rendered["assistant_masks"]]
    prompt = tokenizer(row["prompt"])["input_ids"]
    completion = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
    ids = [*prompt, *completion, tokenizer.eos_token_id]
    return ids, [i >= len(prompt) for i in range(len(ids))]


@torch.no_grad()
def is_exact(model, tokenizer, rows: list[dict], batch_size: int = 64) -> list[bool]:
    """For each row: would greedy decoding write exactly its completion (or its assistant turns)?"""
    encoded = [tokens_of(row, tokenizer) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: len(encoded[i][0]))
    exact = [False] * len(rows)
    for start in range(0, len(order), batch_size):
        some = order[start : start + batch_size]
        longest = max(len(encoded[i][0]) for i in some)
        ids = torch.full((len(some), longest), tokenizer.pad_token_id)
        asked = torch.zeros(len(some), longest, dtype=torch.bool)
        for place, i in enumerate(some):
            ids[place, : len(encoded[i][0])] = torch.tensor(encoded[i][0])
            asked[place, : len(encoded[i][1])] = torch.tensor(encoded[i][1])
        # Padding stands on the right and attention is causal: nothing read depends on it, no mask is needed.
        guess = model(input_ids=ids, use_cache=False).logits[:, :-1].argmax(-1)
        right = ((guess == ids[:, 1:]) | ~asked[:, 1:]).all(1)
        for place, i in enumerate(some):
            exact[i] = bool(right[place])
    return exact


def exact_match(model, tokenizer, rows: list[dict]) -> dict[str, float]:
    """The share of exactly right rows, by kind and over "all"."""
    by_kind: dict[str, list[bool]] = defaultdict(list)
    for row, exact in zip(rows, is_exact(model, tokenizer, rows), strict=True):
        by_kind[row["kind"]].append(exact)
        by_kind["all"].append(exact)
    return {kind: sum(exact) / len(exact) for kind, exact in by_kind.items()}
