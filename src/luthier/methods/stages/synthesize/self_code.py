"""SelfCodeAlign: a model writes its own coding exercises, and learns from those whose tests pass.

From each seed, a function, the model lists the concepts it uses; from concepts, a drawn difficulty and a
drawn category it writes an instruction; to each instruction it gives several responses with tests of their
own, which run in the sandbox. One response that passes stays, drawn at random, for each instruction (Wei et
al., 2024). Departs: instructions are told apart by their words alone, not by near copies (`deduplicate` does
that), and prompts have no bank of examples: `writer` should follow instructions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

import torch
from pydantic import Field

from luthier.methods.architectures._base import GENERATE
from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.stages._base import text_of
from luthier.methods.stages.synthesize._synthesis import Synthesis, items, section
from luthier.registry import stage
from luthier.sandbox.code import extract_code
from luthier.sandbox.sandbox import run_many

DIFFICULTIES = ("easy", "medium", "hard")
CATEGORIES = ("a function", "a class", "a small program")
CONCEPTS = "List the programming concepts that this code uses, one a line.\n\n{code}"
INSTRUCTION = (
    "Write one programming exercise in Python about these concepts: {concepts}. It asks for {category} and is"
    " {difficulty}. Write the exercise alone, without its solution."
)
RESPONSE = (
    "Solve this exercise in Python, and write assertions that test the solution. Put the solution between"
    " [Response] and [/Response], and the assertions between [Tests] and [/Tests].\n\n{instruction}"
)


@stage(
    paper="arXiv:2410.24198",
    row="selfcodealign",
    requires=[COMPLETIONS, GENERATE],
    provides=[COMPLETIONS],
    removes=[PAIRS, SCORES],
    use_when="code is at hand, instructions are not, and no other model's answers may be learned from.",
    costs="for each seed two replies, and `n` with a run in the sandbox each.",
    covers="concepts, instructions of a drawn difficulty and category, responses with tests, their execution,"
    " one passing response for each instruction; all or failing ones for comparison.",
    omits="the choice of seeds (rows as they come) and the bank of examples in prompts.",
    contract={"gives": "a tiny model writes no program that passes its tests"},
    tests=[
        "methods/stages/synthesize/test_self_code.py::test_only_programs_whose_tests_pass_stay",
        "methods/stages/synthesize/test_self_code.py::test_a_stage_that_was_killed_asks_nothing_twice",
        "methods/stages/synthesize/test_self_code.py::test_passing_rows_teach_more_than_failing_ones",
    ],
)
class SelfCode(Synthesis):
    """New rows: instruction and response; columns `tests`, `concepts`, `provenance`."""

    n: Annotated[int, Field(ge=1)] = 10  # responses to each instruction
    outcome: Literal["pass", "fail", "all"] = "pass"  # of tests, which responses stay
    instructions: Annotated[int, Field(ge=1)] = 1  # for each seed
    timeout: Annotated[float, Field(gt=0)] = 5.0  # seconds of a program and its tests
    memory_mb: Annotated[int, Field(ge=16)] = 512  # of a program

    def __call__(self, rows, roles):
        rows = [row for row in rows if row.get("completions")]
        author = self.author(roles)
        codes = [text_of(roles, row["completions"][0]) for row in rows]
        replies = author.ask(
            [CONCEPTS.replace("{code}", code) for code in codes], [row["id"] for row in rows], 0.0
        )
        out, earlier = [], set()
        for row, reply in zip(rows, replies, strict=True):
            concepts = items(reply)[:8]
            for number, instruction in enumerate(self.written(author, row, concepts)):
                words = " ".join(instruction.lower().split())
                if not words or words in earlier:
                    author.reject(row["id"], instruction, "is empty or a copy")
                    continue
                earlier.add(words)
                out += self.solved(author, row, number, instruction, concepts)
        return author.finish(rows, out, "none of its responses is right")

    def written(self, author, row: dict, concepts: list[str]) -> list[str]:
        """Instructions about the concepts of a seed."""
        prompts, keys = [], []
        for number in range(self.instructions):
            rng = author.roles.clock.rng(self.name, row["id"], number, at=0)
            level, kind = (int(torch.randint(3, (1,), generator=rng)) for _ in range(2))
            text = INSTRUCTION.replace("{concepts}", ", ".join(concepts))
            text = text.replace("{category}", CATEGORIES[kind]).replace("{difficulty}", DIFFICULTIES[level])
            prompts.append(text)
            keys.append(f"{row['id']} instruction {number}")
        return [reply.strip() for reply in author.ask(prompts, keys)]

    def solved(self, author, row: dict, number: int, instruction: str, concepts: list[str]) -> list[dict]:
        """The row of an instruction, where a response is right; of other outcomes that is asked for."""
        prompt = RESPONSE.replace("{instruction}", instruction)
        keys = [f"{row['id']} {number} response {k}" for k in range(self.n)]
        responses = list(self.parsed(author, row, author.ask([prompt] * self.n, keys)))
        jobs = []
        for response, tests in responses:
            limits = {"timeout": self.timeout, "memory_mb": self.memory_mb}
            jobs.append({"code": extract_code(response), "checks": [extract_code(tests)], **limits})
        chosen = []
        for (response, tests), result in zip(responses, run_many(jobs), strict=True):
            if self.outcome == "all" or result.ok == (self.outcome == "pass"):
                chosen.append((response, tests))
            else:
                why = "passes its tests" if result.ok else "does not pass its tests"
                author.reject(row["id"], response, why)
        if not chosen:
            return []
        rng = author.roles.clock.rng(self.name, "choice", row["id"], number, at=0)
        response, tests = chosen[int(torch.randint(len(chosen), (1,), generator=rng))]
        return [author.row(row, number, instruction, response, tests=tests, concepts=concepts)]

    def parsed(self, author, row: dict, replies: list[str]) -> Iterable[tuple[str, str]]:
        """Response and tests of each reply that has both."""
        for reply in replies:
            response, tests = section(reply, "Response"), section(reply, "Tests")
            if response and tests:
                yield response, tests
            else:
                author.reject(row["id"], reply, "has no response with tests")
