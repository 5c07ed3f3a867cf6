"""How well a policy acts in an environment: greedy episodes of held-out rows, and what they earned."""

from __future__ import annotations

from statistics import fmean
from typing import Annotated, Any

from pydantic import Field

from luthier.methods.architectures._base import GENERATE
from luthier.methods.environments._episodes import Episode, begin, play
from luthier.methods.evaluators._base import Evaluator
from luthier.methods.stages._base import text_of
from luthier.registry import Artifact, Metric, evaluator, nested
from luthier.storage import files


@evaluator(
    metrics=[
        Metric("success", "episodes that succeed", unit="%", better="higher", rank=4),
        Metric("episode_return", "mean return of an episode", better="higher", rank=5),
        Metric("episode_turns", "mean turns of an episode", rank=6),
    ],
    artifacts=[Artifact("episodes-*.jsonl")],
    requires=[GENERATE],
    example={"environment": "site", "n": 2, "max_turns": 2, "max_new_tokens": 3},
    use_when="a policy acts in an environment, and you want to know how often it gets there.",
    costs="a greedy episode of up to `max_turns` answers for each of `n` rows.",
)
class Success(Evaluator):
    """`success`: share of episodes whose return is at least `threshold`; `episode_return` and
    `episode_turns`: means. Writes episodes-<when>.jsonl: id, return, and the observation, action and reward
    of each turn.
    """

    environment: Annotated[Any, nested("environment")]  # the world, e.g. {name: function, path: maze.py:Maze}
    n: Annotated[int, Field(ge=1)] = 64  # rows whose episodes are played
    max_turns: Annotated[int, Field(ge=1)] = 8  # actions of an episode at most
    max_new_tokens: Annotated[int, Field(ge=1)] = 64  # maximum tokens of an action
    threshold: float = 1.0  # return of an episode that counts as a success

    def run(self, roles, rows, folder, when):
        episodes = []
        for row in list(rows)[: self.n]:
            seed = roles.clock.derive_seed("success", row["id"], at=0)
            episodes.append(begin(self.environment, row, str(row["id"]), seed))
        if not episodes:
            return {}

        def answer(questions: list[dict]) -> dict[str, dict]:
            return self.answers(roles, questions)

        for _ in play(episodes, answer, lambda ids: text_of(roles, ids), self.max_turns):
            pass
        files.write_rows(folder / f"episodes-{when}.jsonl", [self.line(e) for e in episodes])
        return {
            "success": fmean(float(e.total >= self.threshold) for e in episodes),
            "episode_return": fmean(e.total for e in episodes),
            "episode_turns": fmean(len(e.turns) for e in episodes),
        }

    def answers(self, roles, questions: list[dict]) -> dict[str, dict]:
        """Greedy actions; none of a prompt that fills what the model reads."""
        limit = getattr(roles.renderer, "max_length", None)
        room, prompts = [], []
        for row in questions:
            prompt = roles.renderer.prompt(row)
            if limit is None or len(prompt) + self.max_new_tokens <= limit:
                room.append(row)
                prompts.append(prompt)
        how = {"max_new_tokens": self.max_new_tokens, "temperature": 0.0, "stop": roles.renderer.stop_ids}
        seeds = [0] * len(room)
        written = roles.policy.generate(prompts, rows=room, seeds=seeds, **how) if room else []
        out = {}
        for row, (ids,) in zip(room, written, strict=True):
            out[row["id"]] = {**row, "completions": [ids]}
        return out

    def line(self, episode: Episode) -> dict:
        """An episode as it is written down."""
        turns = []
        for turn in episode.turns:
            line = {"observation": turn.observation, "action": turn.action, "reward": turn.reward}
            turns.append(line)
        return {"id": episode.row["id"], "return": episode.total, "over": episode.over, "turns": turns}
