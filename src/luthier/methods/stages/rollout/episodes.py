"""Episodes of several turns in an environment: the policy reads an observation, acts, reads the next one, and
every turn becomes a row with an advantage of its own.

All episodes of a step are played together, a turn of each in one batch. A turn has earned the rewards from it
to the end, each less by `gamma` for every turn in between; its advantage is that less the mean of what the
other episodes of the same row have earned from the same turn on (nothing where they are over), which does not
depend on its own action: REINFORCE with the others as baseline, over turns. A prompt holds the whole history,
so what turns share is read once where rows share prefixes.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from luthier.methods.architectures._base import GENERATE
from luthier.methods.environments._episodes import Episode, begin, play
from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.stages._base import OCCURRENCE, SAMPLES, TRUNCATED, Stage, text_of
from luthier.methods.stages.rollout.advantages import TOKEN_ADVANTAGES
from luthier.methods.stages.rollout.rollout import Rollout
from luthier.registry import Range, nested, stage


@stage(
    example={"environment": "site", "n": 2, "max_turns": 2, "max_new_tokens": 3},
    requires=[GENERATE],
    provides=[COMPLETIONS, SAMPLES, SCORES, TRUNCATED, TOKEN_ADVANTAGES],
    removes=[PAIRS],
    use_when="an agent is to learn by acting: under `online_stages`, with objective `reinforce_pp`; under"
    " `stages`, to collect its turns as rows.",
    costs="`n` episodes of up to `max_turns` samples for each row, and a row to train for every turn.",
)
class Episodes(Stage):
    """A row of each turn: the history as its prompt, the action as its completion, `scores` what was earned
    from it on, `token_advantages`; `rewards` of an episode's last turn names its `return` and its `turns`.
    """

    environment: Annotated[Any, nested("environment")]  # the world, e.g. {name: function, path: maze.py:Maze}
    n: Annotated[int, Field(ge=1), Range(2, 32, log=True)] = 4  # episodes of each row
    max_turns: Annotated[int, Field(ge=1)] = 8  # actions of an episode at most
    max_new_tokens: Annotated[int, Field(ge=1)] = 64  # maximum tokens of an action
    temperature: Annotated[float, Field(ge=0)] = 1.0  # sampling temperature
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0  # how much a reward counts one turn earlier

    @property
    def active_requires(self):
        return self.requires | self.environment.requires

    def __call__(self, rows, roles):
        groups = self.started(rows, roles)
        every = [episode for group in groups for episode in group]
        rollout = Rollout(n=1, max_new_tokens=self.max_new_tokens, temperature=self.temperature)

        def answer(questions: list[dict]) -> dict[str, dict]:
            return {row["id"]: row for row in rollout(questions, roles)}

        for _ in play(every, answer, lambda completion: text_of(roles, completion), self.max_turns):
            pass
        stopped = sum(not (e.over or e.turns) for e in every)
        self.left(roles, stopped, len(every), "their first observation leaves no room for an action")
        out: list[dict] = []
        for group in groups:
            earned = [returns_to_go(e.rewards, self.gamma) for e in group]
            for place, episode in enumerate(group):
                out += self.turns(episode, earned, place)
        return out

    def started(self, rows, roles) -> list[list[Episode]]:
        """`n` new episodes of each row."""
        groups = []
        for row in rows:
            group = []
            for k in range(self.n):
                seed = roles.clock.derive_seed("episodes", row["id"], k, row.get(OCCURRENCE, 0))
                group.append(begin(self.environment, row, f"{row['id']}/{k}", seed))
            groups.append(group)
        return groups

    def turns(self, episode: Episode, earned: list[list[float]], place: int) -> list[dict]:
        """The rows of an episode's turns."""
        out = []
        for k, turn in enumerate(episode.turns):
            others = [returns[k] if k < len(returns) else 0.0 for returns in earned]
            own = others.pop(place)
            advantage = own - sum(others) / len(others) if others else own
            row = {**turn.row, "scores": [own]}
            row["token_advantages"] = [[advantage] * len(turn.row["completions"][0])]
            if k == len(episode.turns) - 1:
                row["rewards"] = {"return": [episode.total], "turns": [float(len(episode.turns))]}
            out.append(row)
        return out


def returns_to_go(rewards: list[float], gamma: float) -> list[float]:
    """Of each turn, its reward and those after it, discounted."""
    out: list[float] = []
    total = 0.0
    for reward in reversed(rewards):
        total = reward + gamma * total
        out.insert(0, total)
    return out
