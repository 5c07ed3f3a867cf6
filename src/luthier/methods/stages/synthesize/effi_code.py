"""Effi-Code: solutions that are right and fast, by a loop of profiling and rewriting.

Of each task the writer gives several solutions and tests, unless the row brings tests; tests that most
solutions pass are kept, and a solution that passes these is where the loop starts. `rounds` times at most the
writer sees code, tests and a profile (time, memory, how often each line ran) and rewrites; a rewrite is
accepted where it passes every test and costs less, by `gain`, in memory over time; a round without gain ends
the loop. Tasks whose solution became better are the rows (Huang et al., 2024).
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.architectures._base import GENERATE
from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.rewards.verifiers.python_tests import split
from luthier.methods.stages._base import text_of
from luthier.methods.stages.select._embedding import question
from luthier.methods.stages.synthesize._overhead import Overhead, measure, profile, ratio
from luthier.methods.stages.synthesize._synthesis import Author, Synthesis
from luthier.registry import stage
from luthier.sandbox.code import extract_code
from luthier.sandbox.sandbox import run

SOLVE = "Solve this task in Python. Write the code alone.\n\n{task}"
TESTS = "Write assertions in Python, one a line, that test a solution of this task.\n\n{task}"
REWRITE = (
    "Make this program faster and let it use less memory; what it computes must stay. Write the whole"
    " program.\n\nTask:\n{task}\n\nIt took {seconds:.3f} s and {peak:.2f} MB. How often each line"
    " ran:\n{profile}\n\nTests:\n{tests}\n"
)


@stage(
    example={"solutions": 1, "rounds": 1, "max_new_tokens": 4},
    paper="arXiv:2410.10209",
    row="effi-code",
    requires=[GENERATE],
    provides=[COMPLETIONS],
    removes=[PAIRS, SCORES],
    use_when="programming tasks are at hand, and their solutions should be fast as well as right.",
    costs="a reply for each solution, one for tests and one for each round; three runs in the sandbox a"
    " round.",
    covers="tests by agreement, profiles by line, time, peak and area of memory over time with their ratios,"
    " rewrites that pass and cost less.",
    omits="languages other than Python, EffiBench, and that a model tuned on the rows writes the fast form.",
    contract={"gives": "a tiny model writes no program that passes its tests"},
    tests=[
        "methods/stages/synthesize/test_effi_code.py::test_the_fast_program_stays_and_never_the_wrong_one",
        "methods/stages/synthesize/test_effi_code.py::test_the_area_of_a_program_of_two_phases",
        "methods/stages/synthesize/test_effi_code.py::test_tests_that_most_solutions_pass_are_kept",
    ],
)
class EffiCode(Synthesis):
    """prompt = task, completion = the fastest right program; columns `tests`, `ratio`, `rounds`."""

    solutions: Annotated[int, Field(ge=1)] = 5  # of each task, the row's own first where it has one
    rounds: Annotated[int, Field(ge=1)] = 5  # of rewriting at most
    gain: Annotated[float, Field(ge=0, lt=1)] = 0.1  # share of memory over time that a rewrite must save
    timeout: Annotated[float, Field(gt=0)] = 10.0  # seconds of a program and its tests
    memory_mb: Annotated[int, Field(ge=16)] = 512  # of a program

    def __call__(self, rows, roles):
        rows, out = list(rows), []
        author = self.author(roles)
        for row in rows:
            task = question(row)
            tests, code = self.start(author, row, task)
            if code is None:
                author.reject(row["id"], "\n".join(tests), "has no solution that passes agreed tests")
                continue
            first = measure(code, "\n".join(tests), self.timeout, self.memory_mb)
            best, last, rounds = self.improved(author, row, task, tests, code, first)
            if first is None or last is None or not rounds:
                author.reject(row["id"], code, "did not become faster")
                continue
            columns = {"tests": tests, "ratio": ratio(last, first), "rounds": rounds}
            out.append(author.row(row, "fast", task, f"```python\n{best}\n```", **columns))
        return author.finish(rows, out, "no right and faster program was written")

    def start(self, author: Author, row: dict, task: str) -> tuple[list[str], str | None]:
        """Tests, and the first solution that passes them all; None where there is none."""
        programs = []
        if row.get("completions"):
            programs.append(extract_code(text_of(author.roles, row["completions"][0])))
        missing = max(0, self.solutions - len(programs))
        keys = [f"{row['id']} solution {k}" for k in range(missing)]
        replies = author.ask([SOLVE.replace("{task}", task)] * missing, keys)
        programs += [extract_code(reply) for reply in replies]
        source = row.get("tests")
        if not source:
            (reply,) = author.ask([TESTS.replace("{task}", task)], [f"{row['id']} tests"])
            source = extract_code(reply)
        try:
            tests = split(source)
        except RecipeError:
            return [], None
        passed = [self.passed(program, tests) for program in programs]
        if not row.get("tests"):
            agreed = []
            for place in range(len(tests)):
                if 2 * sum(results[place] for results in passed) > len(programs):
                    agreed.append(place)
            tests = [tests[place] for place in agreed]
            passed = [tuple(results[place] for place in agreed) for results in passed]
        for program, results in zip(programs, passed, strict=True):
            if tests and all(results):
                return tests, program
        return tests, None

    def passed(self, program: str, tests: list[str]) -> tuple[bool, ...]:
        return run(program, checks=tests, timeout=self.timeout, memory_mb=self.memory_mb).passed

    def improved(
        self, author: Author, row: dict, task: str, tests: list[str], code: str, cost: Overhead | None
    ) -> tuple[str, Overhead | None, int]:
        """The best program, what it costs, and how many rewrites were accepted."""
        limits, joined, accepted = (self.timeout, self.memory_mb), "\n".join(tests), 0
        for number in range(self.rounds):
            if cost is None:
                break
            prompt = REWRITE.format(
                task=task,
                seconds=cost.seconds,
                peak=cost.peak,
                profile=profile(code, joined, *limits),
                tests=joined,
            )
            (reply,) = author.ask([prompt], [f"{row['id']} rewrite {number}"])
            rewrite = extract_code(reply)
            if not all(self.passed(rewrite, tests)):
                author.reject(row["id"], rewrite, "does not pass its tests")
                break
            new = measure(rewrite, joined, *limits)
            if new is None or new.area > (1 - self.gain) * cost.area:
                author.reject(row["id"], rewrite, "is no gain")
                break
            code, cost, accepted = rewrite, new, accepted + 1
        return code, cost, accepted
