"""pass@k of sampled programs: how likely one of k samples passes all tests of a row.

Of n samples with c right ones the unbiased estimate is 1 - C(n - c, k) / C(n, k) (Chen et al., 2021), its
mean over problems; k = n is the share of problems that any sample solves, as MBPP reports with 80 samples
(Austin et al., 2021). Programs run in the sandbox of reward `python_tests`. `part` takes MBPP's split by
`task_id`, so that nothing of train or of the few-shot prompts is measured.
"""

from __future__ import annotations

from dataclasses import field
from math import comb
from typing import Annotated, Any, Literal

from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.architectures._base import GENERATE
from luthier.methods.evaluators._base import Evaluator, keep
from luthier.registry import Metric, build, evaluator

# first and last task_id of each part of MBPP
MBPP = {"few_shot": (1, 10), "test": (11, 510), "validation": (511, 600), "train": (601, 974)}


@evaluator(
    metrics=[
        Metric("pass_at_1", "pass@1", unit="%", better="higher"),
        Metric("pass_at_n", "problems that a sample solves", unit="%", better="higher"),
    ],
    paper="arXiv:2108.07732",
    row="mbpp",
    requires=[GENERATE],
    use_when="you tune on code with tests and want the numbers that papers report.",
    costs="`samples` programs for each of `n` problems, each run in the sandbox.",
    covers="pass@k by the unbiased formula, samples and problems that pass, MBPP's split by id, and runs"
    " in the"
    " sandbox with limits.",
    omits="MathQA-Python; repair in dialogue; hidden tests; prediction of a program's output.",
    tests=[
        "methods/evaluators/quality/test_pass_at_k.py::test_it_is_the_mean_over_subsets",
        "methods/evaluators/quality/test_pass_at_k.py::test_parts_of_mbpp",
        "methods/evaluators/quality/test_pass_at_k.py::test_programs_of_which_some_pass",
        "methods/evaluators/quality/test_pass_at_k.py::test_reference_solutions_pass",
    ],
)
class PassAtK(Evaluator):
    """`pass_at_1`, which is the share of samples that pass, `pass_at_k/K` of each K, and `pass_at_n`."""

    reward: Any = field(
        default_factory=lambda: {"name": "python_tests", "all_or_nothing": True}
    )  # 1 is right
    ks: list[int] = field(default_factory=lambda: [1, 5])  # each at most `samples`
    samples: Annotated[int, Field(ge=1)] = 10  # programs for each problem
    n: Annotated[int, Field(ge=1)] = 32  # problems
    part: Literal["few_shot", "test", "validation", "train"] | None = None  # of MBPP, by column task_id
    temperature: Annotated[float, Field(gt=0)] = 0.5  # sampling temperature
    max_new_tokens: Annotated[int, Field(ge=1)] = 256  # tokens per program

    def __post_init__(self):
        if not self.ks or not all(1 <= k <= self.samples for k in self.ks):
            raise RecipeError(f"evaluator 'pass_at_k': ks are numbers from 1 to samples ({self.samples})")

    @property
    def active_requires(self):
        return self.requires | build("reward", self.reward).requires

    def run(self, roles, rows, folder, when):
        judge = build("reward", self.reward)
        rows = [row for row in rows if row["prompt"] and self.belongs(row)][: self.n]
        if not rows:
            return {}
        written = roles.policy.generate(
            [roles.renderer.prompt(row) for row in rows],
            rows=rows,
            seeds=[roles.clock.derive_seed("pass_at_k", row["id"], at=0) for row in rows],
            n=self.samples,
            temperature=self.temperature,
            max_new_tokens=self.max_new_tokens,
            stop=roles.renderer.stop_ids,
        )
        columns: dict[str, dict[str, float]] = {}
        for row, programs in zip(rows, written, strict=True):
            scores = judge.scores(row, [roles.renderer.answer(ids) for ids in programs])
            right = sum(score >= 1 for score in scores)
            for name, k in self.names().items():
                columns.setdefault(name, {})[str(row["id"])] = pass_at_k(len(scores), right, k)
        keep(folder, when, **columns)
        return {name: sum(column.values()) / len(column) for name, column in columns.items()}

    def names(self) -> dict[str, int]:
        names = {f"pass_at_k/{k}": k for k in self.ks}
        return {"pass_at_1": 1, **names, "pass_at_n": self.samples}

    def belongs(self, row: dict) -> bool:
        """Is a row of the part that is measured?"""
        if self.part is None:
            return True
        if not str(row.get("task_id", "")).isdigit():
            raise RecipeError("evaluator 'pass_at_k': part needs rows with MBPP's numbers in column task_id")
        return part_of(int(row["task_id"])) == self.part


def part_of(task_id: int) -> str | None:
    """The part of MBPP to which a problem belongs."""
    for name, (first, last) in MBPP.items():
        if first <= task_id <= last:
            return name
    return None


def pass_at_k(n: int, right: int, k: int) -> float:
    """The share of subsets of k of n samples with a right one among them. Raises ValueError where k > n."""
    if not 0 < k <= n:
        raise ValueError(f"of {n} samples, k is from 1 to {n}, not {k}")
    return 1.0 - comb(n - right, k) / comb(n, k)
