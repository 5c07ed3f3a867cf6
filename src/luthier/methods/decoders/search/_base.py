"""Decoders that write several texts, or parts of texts, and choose by a reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator

from luthier.errors import RecipeError
from luthier.methods.decoders._base import Decoder
from luthier.registry import build, family, nested

Ids = list[int]
AnyReward = Annotated[Any, BeforeValidator(lambda v: v if v is None else build("reward", v))]


@family
class Search(Decoder):
    """A decoder with a reward. Rewards read the row's columns, e.g. `answer`; those of `luthier.load(...)
    .generate` have the prompt alone.
    """

    reward: Annotated[Any, nested("reward")] = "length"  # the reward that scores texts

    def scores(self, roles: Any, row: Mapping[str, Any], answers: Sequence[Ids]) -> list[float]:
        """The reward of each answer, as text."""
        texts = [roles.renderer.answer(ids) for ids in answers]
        return [float(score) for score in self.reward.scores(dict(row), texts)]

    def only(self, how: Mapping[str, Any], *options: str) -> None:
        """Refuse sampling options that the search has no use for."""
        idle = {"top_p": 1.0, "top_k": 0}
        for option, value in idle.items():
            if option not in options and how.get(option, value) != value:
                raise RecipeError(f"decoder '{self.name}' does not support {option}")


def ended(ids: Sequence[int], stop: Sequence[int], most: int) -> bool:
    """Whether a text is complete: it has a stop token at its end, or no room is left."""
    return len(ids) >= most or bool(ids) and ids[-1] in stop
