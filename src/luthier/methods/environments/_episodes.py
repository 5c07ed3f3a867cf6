"""Episodes that are played together: every turn, all that still run are answered in one batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from luthier.errors import RecipeError
from luthier.methods.environments._base import Environment, World, tools_of

Answer = Callable[[list[dict]], dict[str, dict]]  # rows with a prompt -> id -> the row with its completion


@dataclass
class Turn:
    """One action of an episode. row: what was read, with the action's token ids as its completion."""

    row: dict
    observation: str
    action: str
    reward: float


@dataclass
class Episode:
    """One episode of a row. over: it came to an end by itself, rather than by the limit of turns."""

    row: dict
    id: str
    world: World
    observation: str
    prompt: Any
    turns: list[Turn] = field(default_factory=list)
    over: bool = False
    stopped: bool = False  # its next prompt leaves no room for an action

    @property
    def rewards(self) -> list[float]:
        return [turn.reward for turn in self.turns]

    @property
    def total(self) -> float:
        return math.fsum(self.rewards)

    def question(self) -> dict:
        """The row whose completion is the next action."""
        row = {**self.row, "id": f"{self.id}/{len(self.turns)}", "prompt": self.prompt}
        tools = tools_of(self.world)
        return {**row, "tools": tools} if tools else row

    def act(self, answer: dict, action: str) -> None:
        """Take an action in the world."""
        observation, reward, over = self.checked(self.world.step(action))
        self.turns.append(Turn(answer, self.observation, action, reward))
        self.prompt = after(self.prompt, action, observation)
        self.observation, self.over = observation, over

    def checked(self, outcome: Any) -> tuple[str, float, bool]:
        """Raises RecipeError where a world's answer is not (text, finite number, bool)."""
        try:
            observation, reward, over = outcome
            reward = float(reward)
        except (TypeError, ValueError):
            raise RecipeError(
                f"the environment's step returned {outcome!r:.80}; it must return an observation, a reward"
                " and whether the episode is over"
            ) from None
        if not math.isfinite(reward):
            raise RecipeError(f"the environment's reward is {reward}; it must be a finite number")
        return str(observation), reward, bool(over)


def begin(environment: Environment, row: dict, id: str, seed: int) -> Episode:
    """A new episode of a row, at its first observation."""
    world = environment.world(row, seed)
    observation = str(world.reset())
    return Episode(row, id, world, observation, first(row["prompt"], observation))


def play(
    episodes: Sequence[Episode], answer: Answer, text: Callable[[Any], str], max_turns: int
) -> Iterator[list[Episode]]:
    """Play episodes to their end, or for `max_turns` actions each; after each turn the episodes that took
    one are handed out, so that whoever plays can stop some (`stopped`). text: what a completion says.
    """
    try:
        for _ in range(max_turns):
            running = [e for e in episodes if not (e.over or e.stopped)]
            if not running:
                return
            answers = answer([e.question() for e in running])
            for episode in running:
                row = answers.get(episode.question()["id"])
                if row is None:
                    episode.stopped = True
                else:
                    episode.act(row, text(row["completions"][0]))
            yield [e for e in running if not e.stopped]
    finally:
        for episode in episodes:
            close = getattr(episode.world, "close", None)
            if close is not None:
                close()


def first(prompt: Any, observation: str) -> Any:
    """A row's prompt with the first observation behind it. A conversation that ends with the user's turn has
    it in this turn, since templates do not take two of a user.
    """
    if isinstance(prompt, str):
        return f"{prompt}\n{observation}\n" if prompt else f"{observation}\n"
    if not prompt or prompt[-1].get("role") != "user":
        return [*prompt, {"role": "user", "content": observation}]
    *earlier, last = prompt
    content = last.get("content") or ""
    if isinstance(content, str):
        content = f"{content}\n\n{observation}" if content else observation
    else:
        content = [*content, {"type": "text", "text": observation}]
    return [*earlier, {**last, "content": content}]


def after(prompt: Any, action: str, observation: str) -> Any:
    """The prompt of the next action."""
    if isinstance(prompt, str):
        return f"{prompt}{action}\n{observation}\n"
    return [*prompt, {"role": "assistant", "content": action}, {"role": "user", "content": observation}]
