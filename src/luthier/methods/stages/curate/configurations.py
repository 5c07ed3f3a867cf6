"""Rows of tasks and the configurations that were found best for them, as prompts and answers for a model that
proposes configurations (searcher `proposals`, LLMTune).

The prompt is the row's own (a description of the task) with the settings' ranges behind it; the answer
names for each setting the bucket of its range that the row's `configuration` is in. A row without a
configuration, or with a value outside of its range, is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.searchers import _buckets
from luthier.methods.searchers._base import Dim, Space
from luthier.methods.stages._base import Stage, without
from luthier.registry import Column, stage

CONFIGURATION = Column(
    "configuration",
    says="the settings that were found best for a row's task (column `configuration`)",
    example=({"rate": 0.1}, {"rate": 0.7}),
)


@stage(
    example={"ranges": {"rate": {"low": 0.0, "high": 1.0}}},
    paper="arXiv:2404.11581",
    requires=[CONFIGURATION],
    provides=[COMPLETIONS],
    removes=[PAIRS, SCORES],
    use_when="searches of many tasks are finished, and a model should propose where the next one starts.",
    costs="nothing noticeable.",
)
class Configurations(Stage):
    """The prompt with ranges behind it; the configuration in buckets as the answer."""

    asks_model = False

    # each setting: {low, high}, with log: true or whole: true, or {choices: [...]}
    ranges: dict[str, dict[str, Any]]
    buckets: Annotated[int, Field(ge=2)] = 10  # buckets of each range

    def __call__(self, rows, roles):
        rows, out, space = list(rows), [], self.space()
        for row in rows:
            settings = row.get(CONFIGURATION)
            if isinstance(row["prompt"], str) and isinstance(settings, Mapping) and inside(space, settings):
                prompt = _buckets.question(space, row["prompt"], self.buckets)
                answer = _buckets.write(space, settings, self.buckets)
                out.append({**without(row), "prompt": prompt, "completions": [answer]})
        why = "they have no `configuration`, or one outside of `ranges`, or a prompt of several turns"
        self.left(roles, len(rows) - len(out), len(rows), why)
        return out

    def space(self) -> Space:
        """The settings as a searcher has them. Raises RecipeError for a range that is none."""
        dims = []
        for name, limits in self.ranges.items():
            unknown = limits.keys() - {"low", "high", "log", "whole", "choices"}
            if unknown or not ("choices" in limits or {"low", "high"} <= limits.keys()):
                raise RecipeError(
                    f"stage 'configurations': ranges.{name} must be {{low, high}}, with log or whole,"
                    " or {choices}"
                )
            try:
                dims.append(Dim(name, **{**limits, "choices": tuple(limits.get("choices", ()))}))
            except ValueError as why:
                raise RecipeError(f"stage 'configurations': {why}") from None
        return Space(tuple(dims))


def inside(space: Space, settings: Mapping[str, Any]) -> bool:
    """Whether every setting of the space is there, with a value that it may have."""
    return all(dim.name in settings and dim.has(settings[dim.name]) for dim in space.dims)
