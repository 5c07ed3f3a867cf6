"""Code-switching restore (CSR): replaces some words of a text by words of another language; the model learns
to restore the text.

For a run between pretraining and fine-tuning on translation. The dictionary is given, or learned from the
rows themselves (`dictionary: learn`): from prompts and completions, where a row is a pair of texts, or from
rows of two `source`s, each monolingual. Words without an entry are unchanged. Departs from the paper in how
the dictionary is learned (`translations.py`): by words, not subwords; and where rows are pairs, words that
occur in the same ones are seeds in addition to numerals.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.stages._base import Stage, without
from luthier.registry import stage

LEARN = "learn"


@stage(
    example={"share": 1.0},
    row="csr",
    requires=[COMPLETIONS],
    use_when="you train a translation model between two languages and want a stage before it that"
    " brings their words together.",
    costs="no model is read; `dictionary: learn` fits word vectors first.",
    covers="code-switching restoration with dictionaries induced from the rows themselves.",
    omits="multilingual pretrained models and their benchmarks.",
    tests=[
        "methods/stages/augment/test_code_switch.py"
        "::test_code_switching_learns_its_dictionary_and_writes_both_languages",
        "methods/stages/augment/test_code_switch.py"
        "::test_restoring_before_translating_helps_and_brings_languages_together",
    ],
)
class CodeSwitch(Stage):
    """Texts, or the completions of rows, become rows (text with replaced words -> text)."""

    asks_model = False

    # word -> its translations, for both directions; a JSON file of that; or `learn`
    dictionary: Any = Field(default_factory=dict)
    share: Annotated[float, Field(ge=0, le=1)] = 0.35  # share of the words that is replaced
    # two `source`s to learn the dictionary from, one per language; not given: prompts and completions
    languages: tuple[str, str] | None = None
    # translations learned per word; one of them is drawn each time
    neighbours: Annotated[int, Field(ge=1)] = 3
    min_count: Annotated[int, Field(ge=1)] = 2  # minimum occurrences of a word
    window: Annotated[int, Field(ge=1)] = 5  # context window of the word vectors

    def __post_init__(self):
        if self.languages and self.dictionary != LEARN:
            raise RecipeError("languages: only used with `dictionary: learn`")

    def words(self) -> dict[str, list[str]]:
        dictionary = self.dictionary
        if isinstance(dictionary, str):
            if not Path(dictionary).is_file():
                raise RecipeError(
                    f"dictionary: file {dictionary} does not exist (`learn` learns one from the rows)"
                )
            dictionary = json.loads(Path(dictionary).read_text(encoding="utf-8"))
        if not isinstance(dictionary, dict):
            raise RecipeError(
                "dictionary: expected {word: [translation, ...]}, a JSON file of that form, or learn"
            )
        return {w: [t] if isinstance(t, str) else list(t) for w, t in dictionary.items()}

    def __call__(self, rows, roles):
        texts = list(self.texts(rows))
        self.left(
            roles,
            len(rows) - len({id(row) for row, *_ in texts}),
            len(rows),
            "they are not a single plain text",
        )
        translations = self.learned(texts, roles) if self.dictionary == LEARN else (self.words(),)
        out = []
        for row, side, text in texts:
            name = str(row["id"]) if self.dictionary != LEARN or self.languages else f"{row['id']}/{side}"
            prompt = self.switched(text, translations[side], roles.clock.rng("code_switch", name))
            out.append(
                {
                    **without(row),
                    "id": name if self.dictionary == LEARN else row["id"],
                    "prompt": prompt,
                    "completions": [text],
                }
            )
        return out

    def texts(self, rows):
        """(row, language 0 or 1, text): of pairs both texts, one after the other. A given dictionary is one
        for both.
        """
        for row in rows:
            completions = row.get("completions") or []
            both = [row["prompt"], completions[0]] if len(completions) == 1 else []
            if not all(isinstance(t, str) for t in both[1:]) or not any(both[1:]):
                continue
            if self.dictionary != LEARN:
                yield row, 0, both[1]
            elif self.languages:
                if row.get("source") in self.languages:
                    yield row, self.languages.index(row["source"]), both[1]
            elif isinstance(both[0], str) and both[0].strip():
                yield from ((row, side, text.strip()) for side, text in enumerate(both))

    def learned(self, texts, roles) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        """The translations of each language's words."""
        from luthier.methods.stages.augment.code_switch.translations import learned

        sides = [[text.split(" ") for _, s, text in texts if s == side] for side in (0, 1)]
        if not all(sides):
            where = (
                f"rows of source {' and '.join(map(repr, self.languages))}"
                if self.languages
                else "rows with a text as prompt and one as completion"
            )
            raise RecipeError(f"stage 'code_switch' learns its dictionary from {where}, but there are none")
        pairs = self.languages is None
        translations = learned(
            sides[0],
            sides[1],
            roles.clock.rng,
            pairs,
            self.neighbours,
            window=self.window,
            least=self.min_count,
        )
        some = ", ".join(f"{w} = {translations[0][w][0]}" for w in list(translations[0])[:5])
        self.warn(
            roles,
            f"translations of {len(translations[0])} and {len(translations[1])} words are learned"
            + (f", such as {some}" if some else ""),
        )
        return translations

    def switched(self, text: str, translations: dict[str, list[str]], rng: torch.Generator) -> str:
        words = text.split(" ")
        for i in torch.randperm(len(words), generator=rng)[: round(self.share * len(words))].tolist():
            others = translations.get(words[i])
            if others:
                words[i] = others[int(torch.randint(len(others), (), generator=rng))]
        return " ".join(words)
