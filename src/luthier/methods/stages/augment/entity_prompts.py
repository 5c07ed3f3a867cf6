"""IF-WRANER's prompts: named entities are listed from definitions of their types and from examples that share
a word with the sentence (Nandi and Agrawal, 2024).

A prompt is an instruction, the types with their definitions, `k` examples with their lists, and the
sentence; a new domain brings definitions and examples (`support`), and no weight moves. Examples are
retrieved by words: a sentence is as near as its nearest word to any word of the query, by cosine, times
how rare the word is among the examples; so a rare word in common outranks a common topic. That a model
reads its prompt and does not learn the names of types by heart, `rename` gives types new names in
definitions, examples and answer alike, `drop` leaves types out of all three, `vary` draws how many
examples there are and in which order, and `noise` puts a random sentence in an example's place.

Departs: the authors embed words within their sentence, and rarity is ours, in the place of a list of stop
words; numbers of both kinds of noise were not verified.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from luthier.data.load import load_rows
from luthier.errors import RecipeError
from luthier.methods.architectures._base import HIDDEN, LOGPROBS
from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.formats.labelled.tagged import ENTITIES, listed
from luthier.methods.stages._base import CACHED_LOGPROBS, OLD_LOGPROBS, Stage, without
from luthier.methods.stages.select._embedding import embed, question
from luthier.registry import stage

Share = Annotated[float, Field(ge=0, le=1)]


@stage(
    paper="arXiv:2411.00451",
    row="if-wraner",
    requires=[ENTITIES, LOGPROBS, HIDDEN],
    provides=[COMPLETIONS],
    removes=[PAIRS, SCORES, OLD_LOGPROBS, CACHED_LOGPROBS],
    example={"k": 2},
    use_when="a decoder is to list named entities, and new domains bring definitions and a few sentences.",
    costs="every different word is embedded once; longer prompts.",
    covers="instruction, definitions and retrieved examples in one prompt, answers as lists; retrieval by"
    " words, by whole sentences or at random; types renamed alike in definitions, examples and answer, types"
    " left out, varied and noisy examples; span F1 is evaluator `entities`, low-rank tuning is there anyway.",
    omits="words embedded within their sentence, the authors' prompt and its wording, CrossNER's scores.",
    tests=[
        "methods/stages/augment/test_entity_prompts.py::test_a_rare_word_outranks_a_topic",
        "methods/stages/augment/test_entity_prompts.py::test_types_are_renamed_everywhere_and_back",
        "methods/evaluators/quality/test_entities.py::test_f1_of_spans_is_that_of_seqeval",
    ],
)
class EntityPrompts(Stage):
    """prompt = instruction, definitions, examples, sentence; completion = list of [text, type]. `renamed`:
    {new name of a type: its own}.
    """

    definitions: dict[str, str] = field(default_factory=dict)  # of types; others stand by their name alone
    support: Any = None  # rows that examples are from, as `data` names them; by default the rows themselves
    k: Annotated[int, Field(ge=0)] = 3  # examples of each row
    by: Literal["words", "sentences", "random"] = "words"  # how examples are chosen
    encoder: str | None = None  # folder or hub name of what embeds words; by default the policy itself
    instruction: str = "List the named entities of the sentence as [text, type]."  # what stands first
    rename: Share = 0.0  # share of rows whose types get new names
    drop: Share = 0.0  # probability that a type is left out of a row's prompt and answer
    vary: bool = False  # 0 to k examples in random order, definitions in random order
    noise: Share = 0.0  # probability that an example is a random one instead
    batch_size: Annotated[int, Field(ge=1)] = 32  # words that are embedded at once

    def __call__(self, rows, roles):
        rows = [row for row in rows if row.get("entities") is not None]
        support = rows if self.support is None else load_rows(self.support).rows
        if any(row.get("entities") is None for row in support):
            raise RecipeError("stage 'entity_prompts': rows of `support` need tokens and tags, or entities")
        names = [entity["type"] for row in [*rows, *support] for entity in row["entities"]]
        types = list(dict.fromkeys([*self.definitions, *sorted(names)]))
        orders = self.orders(rows, support, roles)
        for row, order in zip(rows, orders, strict=True):
            yield self.written(row, [support[k] for k in order], types, roles)

    def orders(self, rows: Sequence[dict], support: Sequence[dict], roles: Any) -> list[list[int]]:
        """Places of support for each row, the nearest first, without its own sentence."""
        sentences, others = ([question(row).strip() for row in some] for some in (rows, support))
        if self.by == "random" or not self.k or not others:
            likeness = torch.zeros(len(rows), len(others))
            for place, row in enumerate(rows):
                likeness[place] = torch.rand(
                    len(others), generator=roles.clock.rng("entity_prompts", row["id"], at=0)
                )
        elif self.by == "sentences":
            vectors = embed(roles, [*sentences, *others], self.encoder, self.batch_size)
            likeness = vectors[: len(rows)] @ vectors[len(rows) :].T
        else:
            likeness = self.by_words(sentences, others, roles)
        orders = []
        for sentence, values in zip(sentences, likeness, strict=True):
            order = values.argsort(descending=True, stable=True).tolist()
            orders.append([k for k in order if others[k] != sentence])
        return orders

    def by_words(self, sentences: Sequence[str], others: Sequence[str], roles: Any) -> Tensor:
        """[rows, support] likeness by words."""
        vocabulary = sorted({word for text in [*sentences, *others] for word in words_of(text)})
        vectors = embed(roles, vocabulary, self.encoder, self.batch_size)
        index = {word: place for place, word in enumerate(vocabulary)}
        return word_likeness([words_of(t) for t in sentences], [words_of(t) for t in others], index, vectors)

    def written(self, row: dict, near: Sequence[dict], types: Sequence[str], roles: Any) -> dict:
        """A row with its prompt, from the support rows in their order."""
        rng = roles.clock.rng("entity_prompts", row["id"], "draws", at=0)
        view = self.view(types, rng)
        examples = list(near[: self.k])
        for place in range(len(examples)):
            if float(torch.rand(1, generator=rng)) < self.noise:
                examples[place] = near[int(torch.randint(len(near), (1,), generator=rng))]
        if self.vary:
            count = int(torch.randint(len(examples) + 1, (1,), generator=rng))
            chosen = torch.randperm(len(examples), generator=rng).tolist()[:count]
            examples = [examples[k] for k in chosen]
        parts = [self.instruction, view.text(self.definitions)]
        for example in reversed(examples):  # the nearest is the last
            parts.append(f"Sentence: {question(example).strip()}\nEntities: {view.answer(example)}")
        parts.append(f"Sentence: {question(row).strip()}\nEntities:")
        prompt, reply = "\n\n".join(parts), view.answer(row)
        entities = view.entities(row)
        new = {**without(row), "entities": entities, "renamed": view.own_names()}
        if isinstance(row["prompt"], str):
            return {**new, "prompt": f"{prompt} ", "completions": [reply]}
        turns = [{"role": "user", "content": prompt}]
        return {**new, "prompt": turns, "completions": [[{"role": "assistant", "content": reply}]]}

    def view(self, types: Sequence[str], rng: torch.Generator) -> View:
        """Which types a prompt has, in which order and under which names."""
        chosen = [name for name in types if float(torch.rand(1, generator=rng)) >= self.drop]
        chosen = chosen or list(types[:1])
        if self.vary:
            chosen = [chosen[k] for k in torch.randperm(len(chosen), generator=rng).tolist()]
        if float(torch.rand(1, generator=rng)) >= self.rename:
            return View({name: name for name in chosen})
        numbers = torch.randperm(10 * len(types), generator=rng).tolist()
        return View({name: f"type_{number}" for name, number in zip(chosen, numbers, strict=False)})


@dataclass(frozen=True)
class View:
    """The types of one prompt: their own names, and those that the prompt has for them."""

    names: dict[str, str]

    def text(self, definitions: dict[str, str]) -> str:
        lines = []
        for own, name in self.names.items():
            meaning = definitions.get(own, "" if own == name else own)
            lines.append(f"{name}: {meaning}" if meaning else name)
        return "Types:\n" + "\n".join(lines)

    def entities(self, row: dict) -> list[dict]:
        """A row's entities of these types, under the prompt's names."""
        some = [entity for entity in row["entities"] if entity["type"] in self.names]
        return [{**entity, "type": self.names[entity["type"]]} for entity in some]

    def answer(self, row: dict) -> str:
        return listed(self.entities(row))

    def own_names(self) -> dict[str, str]:
        return {name: own for own, name in self.names.items()}


def words_of(text: str) -> list[str]:
    """The words of a text, in small letters; a text without words is one."""
    return re.findall(r"\w+", text.lower()) or [text.lower()]


def word_likeness(
    sentences: Sequence[Sequence[str]],
    others: Sequence[Sequence[str]],
    index: dict[str, int],
    vectors: Tensor,
) -> Tensor:
    """Words of N sentences and of M others; unit vectors [V, d] of all words, at the places of `index` ->
    [N, M]: the largest cosine of two words, times the inverse document frequency of the other's word.
    """
    idf = torch.zeros(len(vectors))
    for word in {word for words in others for word in words}:
        count = sum(word in words for words in others)
        idf[index[word]] = math.log(1 + (len(others) - count + 0.5) / (count + 0.5))
    places = [torch.tensor([index[word] for word in words]) for words in others]
    likeness = torch.zeros(len(sentences), len(others))
    for row, words in enumerate(sentences):
        own = vectors[[index[word] for word in words]]
        nearest = (own @ vectors.T).amax(0) * idf
        likeness[row] = torch.stack([nearest[some].max() for some in places])
    return likeness
