"""New tokens of a tokenizer, and their rows in a network's embeddings.

A new row begins as the mean of the rows of what its token was split into before, so that the untuned model
reads it as something near. Nothing is drawn: a run's folder is loaded with the same rows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from tokenizers import AddedToken

from luthier.errors import RecipeError

if TYPE_CHECKING:
    from luthier.model.network import Network
    from luthier.recipe.new_tokens import NewTokens


@torch.no_grad()
def add_tokens(model: Network, tokenizer: Any, new: NewTokens) -> list[int]:
    """Give a tokenizer its new tokens and a network their rows, in place; the ids of those that are new.

    Tokens that the tokenizer has already stay as they are. Raises RecipeError where the embeddings cannot be
    resized.
    """
    vocabulary = tokenizer.get_vocab()
    fresh = [token for token in new.tokens if token not in vocabulary]
    parts: dict[str, Any] = {t: tokenizer(t, add_special_tokens=False).input_ids for t in fresh}
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=new.special) for t in fresh])
    ids = {token: int(tokenizer.convert_tokens_to_ids(token)) for token in fresh}
    if ids and max(ids.values()) >= model.get_input_embeddings().weight.shape[0]:
        try:
            cast(Any, model).resize_token_embeddings(max(ids.values()) + 1, mean_resizing=False)
        except (NotImplementedError, AttributeError, ValueError) as error:
            raise RecipeError(f"add_tokens: {type(model).__name__} takes no more tokens: {error}") from None
    for module in token_modules(model).values():
        rows = {i: module.weight[parts[token]].float().mean(0) for token, i in ids.items() if parts[token]}
        bias = getattr(module, "bias", None)
        for i, row in rows.items():
            module.weight[i] = row.to(module.weight.dtype)
            if bias is not None:
                bias[i] = 0
    return sorted(ids.values())


def token_modules(model: Network) -> dict[str, Any]:
    """Name -> module that has a row for every token: the embeddings, and a head with a weight of its own."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    modules = {}
    for name, module in model.named_modules():
        if module is embeddings or (module is head and head.weight is not embeddings.weight):
            modules[name] = module
    return modules


def with_tokens(tuner: Any, names: list[str], train: str, ids: list[int]) -> Any:
    """A tuner that also trains the rows of new tokens and saves them with its adapter, where it has a setting
    for that; else itself. names: of the modules. train: `new` rows, `all` of them, or what fits the tuner
    (`auto`).
    """
    if hasattr(tuner, "trainable_token_indices"):
        if train == "all":
            return replace(tuner, modules_to_save=sorted({*(tuner.modules_to_save or ()), *names}))
        return replace(tuner, trainable_token_indices={name: ids for name in names})
    if tuner.name == "peft" and hasattr(tuner.peft_config, "trainable_token_indices"):
        setting: dict[str, Any] = {"trainable_token_indices": {name: ids for name in names}}
        if train == "all":
            setting = {"modules_to_save": names}
        return replace(tuner, config={**(tuner.config or {}), **setting})
    if train == "new":
        raise RecipeError(
            f"add_tokens: tuner '{tuner.name}' cannot train new rows of the embeddings alone; leave `train`"
            " out to train what it trains, or use lora"
        )
    return tuner


def check_tokens_train(attached: Any, names: list[str]) -> None:
    """Refuse a tuner that leaves the rows of new tokens in one of these modules as they are."""
    own = {id(p) for p in attached.parameters().values()}
    for name in names:
        if not any(id(p) in own for p in attached.model.get_submodule(name).parameters()):
            raise RecipeError(
                f"add_tokens: tuner '{attached.settings.name}' does not train the rows of new tokens in"
                f" {name}; use lora, full, or any with trainable_token_indices"
            )
