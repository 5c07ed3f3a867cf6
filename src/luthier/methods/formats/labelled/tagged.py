"""Sentences as words with a tag each (CoNLL-2003, CrossNER, WikiAnn): the completion lists the entities."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from luthier.methods.formats._base import BadRow, Format, first_of, opened, text
from luthier.registry import Column, row_format

ENTITIES = Column(
    "entities",
    says="rows with the `entities` of a sentence, each with its text and type",
    example=([{"text": "is", "type": "word"}],),
)


@row_format(
    provides=[ENTITIES],
    use_when="rows are sentences whose words have tags such as B-person, as in CoNLL-2003.",
)
class Tagged(Format):
    """{"tokens": ["Ann", "sings"], "tags": ["B-person", "O"]}; also `ner_tags`, or `entities` beside the
    `sentence`: [{"text": "Ann", "type": "person"}]. Tags are names, of the schemes BIO, IO or IOBES; words
    are joined by spaces.
    """

    reading = "sentences with entities, which are learned as a list"
    advice = "or stages: [entity_prompts], which adds definitions and examples"
    columns = ("tokens tags", "tokens ner_tags", "sentence entities")
    generic = True  # a prompt and a completion beside the words say more

    def read(self, raw):
        if raw.get("entities") is not None:
            sentence, entities = text(raw, "sentence"), opened(raw["entities"], "entities")
            if not isinstance(entities, list) or not all(is_entity(entity) for entity in entities):
                raise BadRow("entities is not a list of objects with text and type")
        else:
            words, tags = words_and_tags(raw)
            sentence, entities = " ".join(words), []
            for kind, start, stop in spans_of(tags):
                entities.append({"text": " ".join(words[start:stop]), "type": kind})
        prompt = sentence + self.prompt_end
        return {"prompt": prompt, "completions": [listed(entities)], "entities": entities}


def is_entity(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("text", "type"))


def words_and_tags(raw: dict) -> tuple[list[str], list[str]]:
    """The words of a row and their tags. Raises BadRow."""
    name = first_of(raw, ("tags", "ner_tags"), "tags")
    words, tags = opened(raw.get("tokens"), "tokens"), opened(raw.get(name), name)
    if not isinstance(words, list) or not isinstance(tags, list) or len(words) != len(tags) or not words:
        raise BadRow(f"tokens and {name} are not two lists of the same length")
    if not all(isinstance(tag, str) for tag in tags):
        raise BadRow(f"{name} are numbers; they must be names such as B-person")
    return [text({"tokens": word}, "tokens") for word in words], tags


def spans_of(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """(type, first word, word behind the last) of every entity. Tags that break the scheme are read as
    conlleval does: I- or E- after another type, or after none, begins an entity.
    """
    spans: list[tuple[str, int, int]] = []
    kind, start = None, 0
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, own = tag.partition("-")
        goes_on = prefix in ("I", "E") and own == kind
        if kind is not None and not goes_on:
            spans.append((kind, start, place))
            kind = None
        if prefix != "O" and not goes_on:
            kind, start = own, place
        if prefix in ("E", "S"):
            spans.append((own, start, place + 1))
            kind = None
    return spans


def listed(entities: Sequence[dict]) -> str:
    """Entities as the text that a model writes: a JSON list of pairs, text and type."""
    return json.dumps([[entity["text"], entity["type"]] for entity in entities], ensure_ascii=False)


def entities_in(answer: str) -> list[dict] | None:
    """The way back, from the first list in an answer; None where there is none."""
    start = answer.find("[")
    if start < 0:
        return None
    try:
        pairs, _ = json.JSONDecoder().raw_decode(answer[start:])
    except (ValueError, RecursionError):
        return None
    entities = []
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            return None
        entities.append({"text": pair[0], "type": pair[1]})
    return entities
