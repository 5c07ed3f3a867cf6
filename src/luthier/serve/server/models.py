"""What a server answers with: runs and plain models by name, LoRA runs on one base side by side."""

from __future__ import annotations

import copy
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.data.images import with_images, without_paths
from luthier.errors import RecipeError
from luthier.methods.formats._base import BadRow, is_continued, text_of_parts
from luthier.model.continuous import sequence_batch
from luthier.model.load import load_model, try_attach
from luthier.model.loaded import Base, Loaded, load
from luthier.model.row_adapters import RowAdapters
from luthier.recipe.model_names import resolve_model
from luthier.recipe.recipe import Recipe
from luthier.recipe.validate import build_methods
from luthier.serve.server.engine import Group
from luthier.storage.layout import saved_network
from luthier.text.cache import EncodingCache
from luthier.text.call_forms import CallForm
from luthier.text.structured_outputs import Vocabulary
from luthier.text.tool_calls import call_format
from luthier.train import memory
from luthier.train.batched_forward import share_weights

if TYPE_CHECKING:
    from luthier.text.encode import Renderer

NAME = re.compile(r"([\w.:-]+)=(.+)")  # NAME=RUN
MEMORY_SHARE = 0.4  # of what is free, for keys and values of all running batches
CACHE_TOKENS = 1_000_000  # of prompts that were rendered and may come again


@dataclass(eq=False)
class ServedModel:
    """A model under the name that requests say."""

    name: str
    path: str
    loaded: Loaded
    group: Group
    adapter: int | None = None  # its number on the group's network; None: the network as it is
    parent: str | None = None  # the name of the base that it shares
    created: int = field(default_factory=lambda: int(time.time()))

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Tokens at which an answer ends."""
        return frozenset(self.loaded.roles.renderer.stop_ids)

    @cached_property
    def texts(self) -> Renderer:
        """What turns tokens into text, with a tokenizer of its own: tokenizers cannot read in one thread
        while their settings change in another.
        """
        texts = copy.copy(self.loaded.roles.renderer)
        texts.tokenizer = copy.deepcopy(texts.tokenizer)
        return texts

    @cached_property
    def vocabulary(self) -> int:
        """Tokens that the network knows."""
        return self.group.model.get_input_embeddings().weight.shape[0]

    @cached_property
    def structures(self) -> Vocabulary:
        """The tokens, for answers that must have a structure."""
        return Vocabulary(self.texts.tokenizer, list(self.stop_ids), self.vocabulary)

    @cached_property
    def call_format(self) -> CallForm | None:
        """How its chat template writes tool calls."""
        return call_format(self.loaded.roles.renderer.chat)

    def room(self, prompt: int) -> int | None:
        """Tokens that an answer to a prompt of this length has room for; None: no end."""
        if self.group.limit is None:
            return None
        return self.group.limit - self.group.needed(prompt)

    def chat_prompt(
        self, turns: list[dict], tools: list[dict] | None = None, options: dict | None = None
    ) -> list[int]:
        """The token ids that ask for the answer to a conversation, in the form that it was tuned on. Raises
        BadRow where the chat template does not take it.
        """
        loaded = self.loaded
        if not loaded.turns:
            return self.single_prompt(turns, tools)
        if loaded.system and turns[0]["role"] not in ("system", "developer"):
            turns = [{"role": "system", "content": loaded.system}, *turns]
        row: dict[str, Any] = {"id": "request", "prompt": turns}
        if is_continued(turns):
            row |= {"prompt": turns[:-1], "prefix": text_of_parts(turns[-1]["content"])}
        if tools:
            row["tools"] = tools
        if options:
            row["chat_template_kwargs"] = options
        without_paths(row["prompt"])
        return loaded.roles.renderer.prompt(with_images(row))

    def single_prompt(self, turns: list[dict], tools: list[dict] | None) -> list[int]:
        """The same of a model that was tuned on plain texts: it continues the one text that it is sent."""
        if len(turns) != 1 or turns[0]["role"] != "user" or tools:
            raise BadRow(
                "this model was tuned on single texts, not on conversations: send one user message, or use"
                " /v1/completions"
            )
        text = text_of_parts(turns[0]["content"])
        if not text.endswith(self.loaded.ends):
            text += self.loaded.ends
        return self.text_prompt(text)

    def text_prompt(self, text: str) -> list[int]:
        """The token ids of a text that is continued as it is. Raises BadRow."""
        return self.loaded.roles.renderer.prompt({"id": "request", "prompt": text})

    def prepare(self) -> None:
        """Find out what requests will need, while there is only one thread."""
        _ = self.stop_ids, self.loaded.roles.renderer.reply_opening, self.texts, self.call_format

    def seed(self, seed: int, position: int = 0) -> int:
        """What `Loaded.generate` draws from with this seed, for the prompt at this position of a list."""
        return self.loaded.roles.clock.derive_seed("ask", seed, position, at=0)


@dataclass
class Served:
    """Everything that a server answers with."""

    models: dict[str, ServedModel]  # the first is what is meant where a request names none
    groups: list[Group]
    notes: list[str]


def named(words: Sequence[str]) -> dict[str, str]:
    """Name -> run, of RUN or NAME=RUN. Raises RecipeError where two have one name."""
    paths: dict[str, str] = {}
    for word in words:
        match = NAME.fullmatch(word)
        if match and not Path(word).exists():
            name, path = match[1], match[2]
        else:
            name, path = Path(word).expanduser().name or word, word
        if name in paths:
            raise RecipeError(f"{paths[name]} and {path} would both be served as '{name}'; write NAME={path}")
        paths[name] = path
    return paths


def load_served(words: Sequence[str], dtype: str | None = None) -> Served:
    """Load runs and models. words: RUN or NAME=RUN. Raises RecipeError where one cannot be served."""
    settings = {"dtype": dtype} if dtype else {}
    models: dict[str, ServedModel] = {}
    groups: list[Group] = []
    notes: list[str] = []
    bases: dict[str, SharedNetwork] = {}
    paths = named(words)
    for name, path in paths.items():
        shared = shared_network(path, settings, bases)
        loaded = load(path, base=shared.network() if shared else None, **settings)
        check_writes(path, loaded)
        loaded.roles.renderer.cache = EncodingCache(CACHE_TOKENS)
        notes += [f"{name}: {note}" for note in loaded.notes]
        if shared:
            models[name] = shared.add(name, path, loaded)
        else:
            group = new_group(loaded)
            groups.append(group)
            models[name] = ServedModel(name, path, loaded, group)
    for shared in bases.values():
        if shared.models:
            groups.append(shared.finish(models))
    share_memory(groups)
    for model in models.values():
        model.prepare()
    return Served(models, groups, notes)


def check_writes(path: str, loaded: Loaded) -> None:
    """Refuse what does not generate text."""
    architecture = loaded.roles.policy.architecture
    if "generate" not in architecture.provides:
        raise RecipeError(f"{path} cannot be served: architecture {architecture.name} does not generate text")


def new_group(loaded: Loaded, adapters: RowAdapters | None = None) -> Group:
    """A batch for a model's network."""
    policy = loaded.roles.policy
    policy.eval()
    batch = sequence_batch(policy.architecture, policy.model, policy.attached, adapters)
    writer, limit = policy.architecture.writer(policy.model, policy.attached)
    return Group(batch, policy.model, limit, writer.needed)


def share_memory(groups: Sequence[Group]) -> None:
    """How many tokens each group has room for."""
    for group in groups:
        available = memory.free(next(group.model.parameters()).device)
        if available and group.batch.token_bytes:
            share = MEMORY_SHARE * available / len(groups)
            group.most_tokens = int(share / group.batch.token_bytes)


# ---------------------------------------------------------------------------------------------- one base


class SharedNetwork:
    """A base network, and the LoRA runs on it."""

    def __init__(self, recipe: Recipe, folder: Path):
        self.recipe = recipe
        self.base: Base = load_model(recipe, build_methods(recipe), saved_network(folder), folder)
        self.models: list[ServedModel] = []

    def network(self) -> Base:
        """For one of the runs: a network of its own on the same weights, and a tokenizer of its own, since a
        chat template is set on it.
        """
        model, tokenizer = self.base
        return share_weights(model), copy.deepcopy(tokenizer)

    def add(self, name: str, path: str, loaded: Loaded) -> ServedModel:
        """Serve a run of this base. Its group is there after `finish`."""
        group: Any = None
        model = ServedModel(name, path, loaded, group, len(self.models), self.recipe.model)
        self.models.append(model)
        return model

    def finish(self, models: dict[str, ServedModel]) -> Group:
        """Put the adapters on the base; it is served itself, too, under its own name."""
        loaded = load(self.recipe.model, base=self.base, dtype=self.recipe.dtype)
        loaded.roles.renderer.cache = EncodingCache(CACHE_TOKENS)
        architecture = self.models[0].loaded.roles.policy.architecture
        loaded.roles.policy.architecture = architecture
        adapters = RowAdapters(loaded.roles.policy.model, [each.loaded.roles.tuner for each in self.models])
        group = new_group(loaded, adapters)
        for model in self.models:
            model.group = group
        if self.recipe.model not in models:
            models[self.recipe.model] = ServedModel(self.recipe.model, self.recipe.model, loaded, group)
        return group


def shared_network(
    path: str, settings: dict[str, Any], bases: dict[str, SharedNetwork]
) -> SharedNetwork | None:
    """The base of a LoRA run, loaded once for all runs on it; None of anything else."""
    folder = Path(path).expanduser()
    if not (folder / "recipe.yaml").is_file():
        return None
    recipe = Recipe.load(folder / "recipe.yaml", settings)
    if recipe.plan is not None or recipe.quantization is not None or recipe.torch_compile:
        return None
    # tried on a network without weights: a tuner that writes into its base must not meet a shared one
    attached = try_attach(recipe, build_methods(recipe), [])
    if attached is None or attached.why_not_batched() is not None:
        return None
    key = [resolve_model(recipe.model), recipe.dtype, recipe.attn_implementation, recipe.architecture]
    name = json.dumps([*key, saved_network(folder)], default=str)
    if name not in bases:
        bases[name] = SharedNetwork(recipe, folder)
    return bases[name]
