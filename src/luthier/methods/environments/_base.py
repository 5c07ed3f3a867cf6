"""The kind's protocol: worlds in which a policy acts over several turns. It reads an observation and answers
with an action, both texts, until the episode ends.
"""

from __future__ import annotations

from typing import Any, Protocol

from luthier.registry import family


class World(Protocol):
    """One episode's world. A world that may also be closed has a method `close`, and one whose actions are
    calls of tools has `tools`, a list of JSON schemas that chat templates show.
    """

    def reset(self) -> str:
        """The first observation."""
        ...

    def step(self, action: str) -> tuple[str, float, bool]:
        """An action -> what is observed now, the reward of this step, and whether the episode is over."""
        ...


@family
class Environment:
    """Family: makes the world of an episode. It has no state itself."""

    def world(self, row: dict, seed: int) -> World:
        """A new world for a row, whose chances follow from the seed. Raises RecipeError where the row does
        not say what the world needs.
        """
        raise NotImplementedError


def tools_of(world: Any) -> list[dict]:
    """The schemas of a world's tools; empty where its actions are plain texts."""
    return list(getattr(world, "tools", None) or [])
