"""Models that score texts: loaded once for all rewards that name them, and read by steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from luthier.methods.rewards._base import Reward
from luthier.registry import family
from luthier.text.encode import tokenize

AGGREGATES: dict[str, Callable[[Sequence[float]], float]] = {  # scores of a text's steps -> its score
    "min": min,
    "last": lambda steps: steps[-1],
    "sum": sum,
    "mean": lambda steps: sum(steps) / len(steps),
    "product": math.prod,
}


@cache
def loaded(model: str, dtype: str, architecture: str = "auto") -> Any:
    """Who plays the roles of a model: a run's folder, a model's folder, a Hub name or toy:NAME; loaded
    once.
    """
    from luthier.model.loaded import load

    settings: dict[str, Any] = {} if architecture == "auto" else {"architecture": architecture}
    roles = load(model, dtype=dtype, **settings).roles
    if torch.cuda.is_available():
        roles.policy.model.to("cuda")
        roles.device = torch.device("cuda")
    return roles


@family
class ModelReward(Reward):
    """Family: a model reads the prompt and the text."""

    model: str = "toy:lm"  # a run's folder, a model's folder, a Hub name or toy:NAME
    dtype: str = "auto"  # precision in which it is loaded
    batch_size: Annotated[int, Field(ge=1)] = 8  # texts per forward pass

    def read(
        self, row: dict, texts: list[Any], roles: Any, ask: Callable[[Any], Tensor]
    ) -> list[list[float]]:
        """Of each text, what `ask` says of its tokens."""
        out: list[list[float]] = []
        for i in range(0, len(texts), self.batch_size):
            some = texts[i : i + self.batch_size]
            batch = roles.batch([{"id": "reward", "prompt": row["prompt"], "completions": some}])
            with torch.no_grad(), roles.policy.eval_mode():
                values = ask(batch).float().cpu()
            out += [part.tolist() for part in values.split(batch.lengths.long().tolist())]
        return out


@family
class StepReward(ModelReward):
    """Family: scores of the steps of a text, and of these one."""

    separator: str = "\n"  # text that ends a step
    # how the scores of steps become that of the text
    aggregate: Literal["min", "last", "sum", "mean", "product"] = "min"

    def step_tokens(self, roles: Any, text: str) -> tuple[list[int], list[int]]:
        """The tokens of a text, step by step, and how many each step has."""
        ids: list[int] = []
        sizes: list[int] = []
        parts = text.split(self.separator)
        steps = [part + self.separator for part in parts[:-1]] + parts[-1:]
        for step in steps:
            tokens = tokenize(roles.renderer.tokenizer, step) if step else []
            if tokens:
                ids += tokens
                sizes.append(len(tokens))
        return ids, sizes

    def steps(self, row: dict, texts: list[str]) -> list[list[float]]:
        """Of each text, the scores of its steps; none of an empty one."""
        raise NotImplementedError

    def scores(self, row: dict, texts: list[str]) -> list[float]:
        """One score per text, 0 for an empty one."""
        return [AGGREGATES[self.aggregate](steps) if steps else 0.0 for steps in self.steps(row, texts)]
