"""Random search over demonstrations: bootstraps many times from different rows and keeps the best candidate
on `dev` rows.

Candidates are the unchanged program, with labelled rows only, bootstrapped in the rows' order, and then
`num_candidates` with a random order and number of traces. All are kept in `compiled["candidates"]`, best
first; ties go to the earlier.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field

from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.methods.compilers._base import Compiler, ready
from luthier.programs.program import evaluate
from luthier.registry import compiler, nested


@compiler(
    paper="arXiv:2310.03714",
    row="dspy-compile",
    use_when="`bootstrap_few_shot` helps and you can afford to try many sets of demonstrations.",
    costs="`num_candidates` times bootstrapping and an evaluation on the dev rows.",
)
class RandomSearch(Compiler):
    """BootstrapFewShot on many random subsets."""

    num_candidates: Annotated[int, Field(ge=0)] = 16  # candidates with randomly drawn demonstrations
    # the compiler that is repeated, with its settings
    inner: Annotated[Any, nested("compiler")] = "bootstrap_few_shot"
    # share of the rows, from the end, on which candidates are evaluated
    dev_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    seed: int = 0  # random seed

    def __post_init__(self):
        if self.inner.name != "bootstrap_few_shot":
            raise ValueError("inner: random_search works only with bootstrap_few_shot")

    def compile(self, program, rows, metric, teacher=None):
        ready(teacher or program, rows)
        dev = max(1, round(self.dev_share * len(rows)))
        train, dev = list(rows[:-dev]), list(rows[-dev:])
        if not train:
            raise RecipeError(
                "random search needs at least two rows, one to learn from and one to evaluate"
                f" on, not {len(rows)}"
            )
        plain = program.copy()
        candidates = [plain, *(c.compile(program, train, metric, teacher) for c in self.tries())]
        scored = [(evaluate(p, dev, metric), p) for p in candidates]
        scored.sort(key=lambda pair: -pair[0])  # stable: of equals the earlier
        best = scored[0][1].copy()
        best.compiled = {**best.compiled, "score": scored[0][0], "candidates": scored}
        return best

    def tries(self) -> list[Any]:
        """The compilers of all candidates but the plain one."""
        inner, most = self.inner, self.inner.max_bootstrapped_demos
        out = [replace(inner, max_bootstrapped_demos=0), inner]
        for k in range(self.num_candidates):
            seed = Clock(self.seed).derive_seed("candidate", k)
            out.append(
                replace(inner, shuffle=True, seed=seed, max_bootstrapped_demos=1 + seed % most if most else 0)
            )
        return out
