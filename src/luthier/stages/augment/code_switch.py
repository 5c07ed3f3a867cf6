"""Code-switching restore (CSR): some words of a text are exchanged for words of the other language, and the text is restored.

An act between pretraining and learning to translate. Departs from the paper in where the dictionary comes from: it is given
(the paper learns it from the task's own texts by word2vec and VecMap); words without an entry stay as they are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from luthier.method import RecipeError, stage
from luthier.stages._stage import Stage, without


@stage(row="csr", wants="completions")
class CodeSwitch(Stage):
    """Texts, or what completions say, become (text with exchanged words -> text)."""

    asks_model = False

    dictionary: Any = Field(default_factory=dict)  # word -> its translations, for both directions; or a JSON file of it
    share: Annotated[float, Field(ge=0, le=1)] = 0.35  # of the words that are chosen

    def words(self) -> dict[str, list[str]]:
        said = self.dictionary
        if isinstance(said, str):
            if not Path(said).is_file():
                raise RecipeError(f"dictionary: there is no file {said}")
            said = json.loads(Path(said).read_text(encoding="utf-8"))
        if not isinstance(said, dict):
            raise RecipeError("dictionary: {word: [translation, ...]}, or a JSON file of that")
        return {w: [t] if isinstance(t, str) else list(t) for w, t in said.items()}

    def __call__(self, rows, roles):
        known, out = self.words(), []
        for row in rows:
            text = row["completions"][0] if len(row["completions"]) == 1 else None
            if isinstance(text, str) and text:
                out.append({**without(row), "prompt": self.switched(text, known, roles.clock.rng("code_switch", str(row["id"])))})
                out[-1]["completions"] = [text]
        self.left(roles, len(rows) - len(out), len(rows), "what they say is no single plain text")
        return out

    def switched(self, text: str, known: dict[str, list[str]], rng: torch.Generator) -> str:
        words = text.split(" ")
        for i in torch.randperm(len(words), generator=rng)[: round(self.share * len(words))].tolist():
            others = known.get(words[i])
            if others:
                words[i] = others[int(torch.randint(len(others), (), generator=rng))]
        return " ".join(words)
