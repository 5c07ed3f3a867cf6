"""Rows as vectors, for stages that choose by likeness."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from luthier.errors import RecipeError
from luthier.methods.formats._base import text_of_parts
from luthier.methods.stages._base import text_of
from luthier.model.policy import eval_mode
from luthier.recipe.model_names import resolve_model

LENGTH = 512  # tokens that an encoder reads of a text


def question(row: dict) -> str:
    """What a row asks: its prompt as text, of a conversation the user's turns."""
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return prompt
    turns = [turn for turn in prompt if turn.get("role") == "user"] or prompt
    return "\n".join(text_of_parts(turn.get("content") or "") for turn in turns)


def whole(roles: Any, row: dict) -> str:
    """Question and first completion of a row."""
    if not row.get("completions"):
        return question(row)
    return f"{question(row)}\n{text_of(roles, row['completions'][0])}"


def texts_of(roles: Any, rows: Sequence[dict], part: str) -> list[str]:
    """part: `prompt`, or `row` for the answer as well."""
    if part == "prompt":
        return [question(row) for row in rows]
    return [whole(roles, row) for row in rows]


def embed(roles: Any, texts: Sequence[str], encoder: str | None, batch_size: int) -> Tensor:
    """[N, d] unit vectors in fp32: means over tokens of the last layer's states.

    encoder: folder or hub name of an encoder such as a sentence transformer; None: the policy itself.
    """
    if encoder is None:
        vectors = _by_policy(roles, texts, batch_size)
    else:
        vectors = _by_encoder(encoder, texts, batch_size)
    return torch.nn.functional.normalize(vectors.float().cpu(), dim=-1)


@torch.no_grad()
def _by_policy(roles: Any, texts: Sequence[str], batch_size: int) -> Tensor:
    vectors = []
    for start in range(0, len(texts), batch_size):
        rows = []
        for k, text in enumerate(texts[start : start + batch_size]):
            rows.append({"id": str(start + k), "prompt": "", "completions": [text or " "]})
        batch = roles.batch(rows)
        with eval_mode(roles.policy.model):
            states = roles.policy.layers(batch)[-1].float()
        sums = states.new_zeros(len(batch.completion), states.shape[-1]).index_add(0, batch.owner, states)
        vectors.append(sums / batch.lengths.clamp(min=1)[:, None])
    return torch.cat(vectors)


@torch.no_grad()
def _by_encoder(encoder: str, texts: Sequence[str], batch_size: int) -> Tensor:
    from transformers import AutoModel, AutoTokenizer

    try:
        folder = resolve_model(encoder)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model = AutoModel.from_pretrained(folder, trust_remote_code=False).eval()
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"the encoder {encoder} cannot be loaded: {str(error).partition(chr(10))[0]}"
        ) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    vectors = []
    for start in range(0, len(texts), batch_size):
        some = list(texts[start : start + batch_size])
        inputs = tokenizer(some, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
        states = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None].to(states.dtype)
        vectors.append((states * mask).sum(1) / mask.sum(1).clamp(min=1))
    return torch.cat(vectors)


def number(row: dict, columns: Sequence[str], stage: str) -> float:
    """The product of a row's numbers under these columns. Raises RecipeError where one is missing."""
    product = 1.0
    for column in columns:
        value = row.get(column)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise RecipeError(
                f"stage '{stage}' needs a number in column '{column}', but row {row['id']} has none; a stage"
                " before it may write one (likert, perplexity, ifd)"
            )
        product *= value
    return product
