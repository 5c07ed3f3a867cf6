"""BootstrapFewShot: runs a teacher program on the rows, and uses the traces that the metric accepts as
demonstrations.

Each predictor gets its own step of a trace, so intermediate steps need no labels. The remaining slots are
filled with labelled rows, for predictors whose fields the rows have. A row is never among its own
demonstrations.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from luthier.clock import Clock
from luthier.methods.compilers._base import Compiler, accepted, drawn, matching, ready
from luthier.registry import compiler


@compiler(
    paper="arXiv:2310.03714",
    row="dspy-compile",
    use_when="a program of prompts has a metric and some rows: it finds demonstrations for every predictor.",
    costs="one to `max_rounds` runs of the program for each row until enough traces are accepted.",
    covers="signatures, modules, and compilers: demonstrations from traces, random search, ensembles,"
    " fine-tuning.",
    tests=[
        "programs/test_programs.py"
        "::test_only_accepted_traces_become_demonstrations_and_each_predictor_gets_its_own_step",
        "programs/test_programs.py::test_random_search_returns_the_best_of_all_candidates",
        "programs/test_programs.py::test_a_second_compilation_asks_nobody",
    ],
)
class BootstrapFewShot(Compiler):
    """Demonstrations from the program's own accepted traces."""

    max_bootstrapped_demos: Annotated[int, Field(ge=0)] = 4  # traces that become demonstrations
    # total demonstrations per predictor, the rest filled with labelled rows
    max_labeled_demos: Annotated[int, Field(ge=0)] = 16
    max_rounds: Annotated[int, Field(ge=1)] = 1  # attempts per row, the first greedy
    threshold: float = 1.0  # lowest metric of an accepted answer
    temperature: Annotated[float, Field(ge=0)] = 0.7  # sampling temperature of the attempts after the first
    shuffle: bool = False  # take the rows in random order instead of the given one
    seed: int = 0  # random seed of the order and the attempts

    def compile(self, program, rows, metric, teacher=None):
        teacher = (teacher or program).copy()
        ready(teacher, rows)
        matching(program, teacher)
        clock, compiled = Clock(self.seed), program.copy()
        order = drawn(len(rows), clock, "rows") if self.shuffle else list(range(len(rows)))
        for predictor in teacher.predictors().values():
            if not predictor.demos:
                predictor.demos = self.labelled(
                    predictor.signature, [rows[i] for i in order], self.max_labeled_demos
                )
        demos: dict[str, list] = {name: [] for name in compiled.predictors()}
        used: list[int] = []
        for i in order:
            if len(used) == self.max_bootstrapped_demos:
                break
            trace = accepted(
                teacher,
                rows[i],
                metric,
                self.threshold,
                self.max_rounds,
                self.temperature,
                clock.derive_seed("row", i),
            )
            if trace is not None:
                used.append(i)
                for step in trace:
                    demos[step.predictor].append({**step.inputs, **step.outputs})
        left = [rows[i] for i in order if i not in used]
        for name, predictor in compiled.predictors().items():
            room = max(0, self.max_labeled_demos - len(demos[name]))
            predictor.demos = [*demos[name], *self.labelled(predictor.signature, left, room)]
        compiled.compiled = {"bootstrapped": len(used), "rows": used}
        return compiled

    @staticmethod
    def labelled(signature, rows, most: int) -> list[dict]:
        """Rows that have every field of a signature, as demonstrations."""
        fields = (*signature.inputs, *signature.outputs)
        return [{k: row[k] for k in fields} for row in rows if all(k in row for k in fields)][:most]
