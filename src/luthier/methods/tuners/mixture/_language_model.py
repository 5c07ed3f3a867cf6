"""Language adapters on a model: which language each row is in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from luthier.errors import RecipeError
from luthier.methods.tuners.mixture._routed import RoutedModel
from luthier.registry import did_you_mean

if TYPE_CHECKING:
    from luthier.model.network import Network


class LanguageModel(RoutedModel):
    """Rows are read under the adapter of their column `language`."""

    def __init__(self, settings: Any, model: Network):
        super().__init__(settings, model)
        self.per_row = settings.languages is not None

    def language_of(self, row: Any) -> int:
        """The number of a row's language; -1: it names none."""
        name = row.get("language")
        if name is None:
            return -1
        if str(name) not in self.settings.languages:
            hint = did_you_mean(str(name), self.settings.languages)
            raise RecipeError(
                f"a row has language '{name}', which tuner 'language_adapter' does not list in"
                f" languages{hint}"
            )
        return self.settings.languages.index(str(name))

    def routes(self, batch):
        return torch.tensor([self.language_of(row) for row in batch.rows])

    def prompt_routes(self, prompts, rows):
        if not rows:
            return torch.full((len(prompts),), -1)
        return torch.tensor([self.language_of(row) for row in rows])
