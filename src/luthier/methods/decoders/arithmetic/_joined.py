"""Several networks read the same tokens, and arithmetic on their logits gives the next one.

Each keeps a cache of its own, so a token costs one step of each network. All must have the policy's
tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from luthier.errors import RecipeError
from luthier.methods.decoders._base import Decoder
from luthier.model.generate import EncoderDecoder, Joined, Writer, decoder_writer
from luthier.model.policy import Policy
from luthier.recipe.recipe import Recipe
from luthier.registry import build, family
from luthier.storage import files

OWN_BASE = "base"  # in the place of a model: the policy itself, with its tuner off

# of each policy's network, the models that read along: loading one for every prompt would take longer than it
_loaded: WeakKeyDictionary[nn.Module, dict[str, Policy]] = WeakKeyDictionary()


@family
class Arithmetic(Decoder):
    """A decoder that combines the logits of the policy with those of other models."""

    def models(self) -> Sequence[str]:
        """The models that read along, beside the policy."""
        raise NotImplementedError

    def combine(self, logits: list[Tensor]) -> Tensor:
        """[B, V] of the policy and of each of `models`, in fp32 -> [B, V]."""
        raise NotImplementedError

    def generate(self, roles, rows, prompts, **how):
        others = [companion(roles.policy, name) for name in self.models()]
        return written_with(roles, others, self.combine, prompts, **how)


def written_with(roles: Any, others: Sequence[Policy], combine: Any, prompts: Any, **how: Any) -> Any:
    """Generate with the policy and others together. Raises RecipeError for encoder-decoders, and where a text
    may become longer than one of the others reads.
    """
    longest = max(map(len, prompts), default=0) + how.get("max_new_tokens", 0)
    for other in others:
        most = getattr(other.model.config.get_text_config(), "max_position_embeddings", None)
        if most and longest > most:
            raise RecipeError(
                f"{other.role} reads {most} tokens, but prompt and answer may have {longest}: set a smaller"
                " max_new_tokens"
            )

    def join(writer: Writer) -> Writer:
        if isinstance(writer, EncoderDecoder):
            raise RecipeError("decoders that combine several models need a causal language model")
        writers = [(writer, roles.policy.role_context)]
        for other in others:
            writers.append((decoder_writer(other.model, other.attached, writer.prefix), other.role_context))
        return Joined(writers, combine)

    return roles.policy.generate(prompts, join=join, **how)


def companion(policy: Policy, name: str) -> Policy:
    """A model that reads along, loaded once. name: a folder, run, adapter, hub name or toy:NAME, or "base"
    for the policy with its tuner off. Raises RecipeError where it cannot be loaded or has another
    tokenizer.
    """
    if name == OWN_BASE:
        return build("role", "base").play(OWN_BASE, policy)
    models = _loaded.setdefault(policy.model, {})
    if name not in models:
        role = build("role", {"name": "model", "model": name})
        models[name] = role.play(name, policy)
    return models[name]


def base_of(name: str) -> str:
    """The model that a run or an adapter was tuned from. Raises RecipeError where that is not written."""
    folder = Path(name).expanduser()
    if (folder / "recipe.yaml").is_file():
        return Recipe.load(folder / "recipe.yaml").model
    base = None
    if (folder / "adapter_config.json").is_file():
        base = files.read_object(folder / "adapter_config.json").get("base_model_name_or_path")
    if not base:
        raise RecipeError(f"{name} does not say what it was tuned from: name its base model as well")
    return str(base)
