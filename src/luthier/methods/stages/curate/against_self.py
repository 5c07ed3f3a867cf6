"""SPIN's pairs: the row's own answer is preferred to a sample of the current policy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.architectures._base import GENERATE
from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.stages._base import CACHED_LOGPROBS, OLD_LOGPROBS, Stage, best_first, pick, without
from luthier.methods.stages.rollout.rollout import Rollout
from luthier.registry import stage
from luthier.storage.files import read_rows

BEFORE = "@before"  # ends the id of a pair that an earlier round made


@stage(
    example={"max_new_tokens": 3},
    paper="arXiv:2401.01335",
    row="spin",
    requires=[COMPLETIONS, GENERATE],
    provides=[PAIRS, SCORES],
    removes=[CACHED_LOGPROBS, OLD_LOGPROBS],
    use_when="you have only SFT rows and want preference pairs from them: the row's answer against the"
    " model's own (SPIN).",
    costs="one sample for each row.",
)
class AgainstSelf(Stage):
    """completions = [the given answer, a sample of the policy]; scores = [1, 0]. Columns that only concern
    the given answer are dropped.
    """

    max_new_tokens: Annotated[int, Field(ge=1)] = 128  # maximum tokens of the sample
    temperature: Annotated[float, Field(ge=0)] = 1.0  # sampling temperature
    # nucleus sampling: most likely tokens with this total probability
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    draw: int = 0  # number of the draw; another number gives other samples
    earlier: str | None = None  # folder of the previous round, whose pairs are trained on again

    def __call__(self, rows, roles):
        rows = self.usable(rows, roles)
        how = {k: getattr(self, k) for k in ("max_new_tokens", "temperature", "top_p", "draw")}
        requests = [{**row, "from": place} for place, row in enumerate(rows)]
        alike, out = 0, []
        for answer in Rollout(n=1, **how)(requests, roles):
            row = rows[answer["from"]]
            reference = pick(row, best_first(row)[:1] if "scores" in row else [0])
            alike += (
                roles.policy.architecture.encode(reference, roles.renderer).completions[0]
                == answer["completions"][0]
            )
            out.append(
                {
                    **without(row),
                    "completions": [reference["completions"][0], answer["completions"][0]],
                    "scores": [1.0, 0.0],
                }
            )
        if alike:
            self.warn(
                roles,
                f"{alike} of {len(out)} samples equal the given answer; these pairs do not train anything",
            )
        return [*out, *self.before()]

    def before(self) -> list[dict]:
        """The pairs that the round before made itself."""
        if self.earlier is None:
            return []
        path = Path(self.earlier) / "rows.jsonl"
        if not path.is_file():
            raise RecipeError(
                f"stage 'against_self': earlier: {self.earlier} has no rows.jsonl, the pairs of"
                " the previous round"
            )
        return [
            {**r, "id": f"{r['id']}{BEFORE}"} for r in read_rows(path) if not str(r["id"]).endswith(BEFORE)
        ]
