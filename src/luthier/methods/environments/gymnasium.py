"""An environment of Gymnasium (the successor of OpenAI Gym) as a world of texts.

Observations and actions of text spaces pass as they are. Another observation is written as Python prints it,
or by `observation`, a template; an action of a discrete space is the first of `actions` that the text begins
with, or its number. An action that cannot be read ends nothing: the world stands still, and the reward is
`invalid`.
"""

from __future__ import annotations

import re
from dataclasses import field
from typing import Any

from luthier.errors import RecipeError
from luthier.methods.environments._base import Environment
from luthier.registry import environment


@environment(
    use_when="the world is one of Gymnasium's, or of a package that registers with it.",
    costs="the environment's own time at every action.",
)
class Gymnasium(Environment):
    """`gymnasium.make(id, **kwargs)` for each episode; needs the package `gymnasium`."""

    id: str  # of the environment, e.g. FrozenLake-v1
    kwargs: dict[str, Any] = field(default_factory=dict)  # of gymnasium.make
    actions: list[str] = field(default_factory=list)  # words for a discrete space's actions, in their order
    observation: str = "{observation}"  # how an observation is written
    invalid: float = 0.0  # reward of a text that is no action

    def __post_init__(self):
        self.package()

    def package(self) -> Any:
        try:
            import gymnasium
        except ImportError as error:
            raise RecipeError(
                "environment 'gymnasium' needs the package gymnasium: pip install gymnasium"
            ) from error
        return gymnasium

    def world(self, row: dict, seed: int) -> GymnasiumWorld:
        gymnasium = self.package()
        try:
            env = gymnasium.make(self.id, **self.kwargs)
        except gymnasium.error.Error as error:
            raise RecipeError(f"environment 'gymnasium': {error}") from error
        return GymnasiumWorld(self, env, seed)


class GymnasiumWorld:
    """An episode of one environment."""

    def __init__(self, settings: Gymnasium, env: Any, seed: int):
        self.settings, self.env, self.seed = settings, env, seed
        self.last = ""  # the last observation

    def reset(self) -> str:
        observation, _ = self.env.reset(seed=self.seed % 2**31)
        self.last = self.written(observation)
        return self.last

    def step(self, action: str) -> tuple[str, float, bool]:
        chosen = self.read(action.strip())
        if chosen is None:
            return f"'{action.strip():.40}' is no action.\n{self.last}", self.settings.invalid, False
        observation, reward, terminated, truncated, _ = self.env.step(chosen)
        self.last = self.written(observation)
        return self.last, float(reward), bool(terminated or truncated)

    def close(self) -> None:
        self.env.close()

    def written(self, observation: Any) -> str:
        return self.settings.observation.replace("{observation}", str(observation))

    def read(self, text: str) -> Any:
        """The action that a text means; None where it means none."""
        space = self.env.action_space
        count = getattr(space, "n", None)
        if count is None:
            return text if space.contains(text) else None
        for number, word in enumerate(self.settings.actions):
            if text.lower().startswith(word.lower()):
                return int(getattr(space, "start", 0)) + number
        match = re.match(r"-?\d+", text)
        number = int(match[0]) if match else None
        return number if number is not None and space.contains(number) else None
