"""An ensemble of compiled programs: the majority vote of the best candidates of a random search."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.compilers._base import Compiler
from luthier.programs.program import Majority
from luthier.registry import compiler, nested


@compiler(
    paper="arXiv:2310.03714",
    row="dspy-compile",
    use_when="several compiled candidates are about equally good and answers can be voted on.",
    costs="inference costs `size` programs.",
)
class Ensemble(Compiler):
    """Majority vote of candidates. `Majority([...])` does the same with given programs."""

    size: Annotated[int, Field(ge=1)] = 3  # programs that vote
    inner: Annotated[Any, nested("compiler")] = "random_search"  # the compiler that produces the candidates

    def compile(self, program, rows, metric, teacher=None):
        candidates = self.inner.compile(program, rows, metric, teacher).compiled.get("candidates")
        if not candidates:
            raise RecipeError(
                f"compiler '{self.inner.name}' does not return candidates to vote; use random_search"
            )
        majority = Majority([p.copy() for _, p in candidates[: self.size]])
        majority.compiled = {"scores": [score for score, _ in candidates[: self.size]]}
        return majority
