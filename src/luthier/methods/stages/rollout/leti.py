"""LETI's rows: programs that the policy writes, right and wrong ones, with what the interpreter says of them.

A row is a reward token, the instruction, a program, and behind a wrong one the error with its trace between
two marks. All of it behind the instruction is trained on, so the model learns which programs follow the token
of good ones, and why others fail. Programs are sampled behind the token of good ones, as at inference.
Departs: marks are text, which the tokenizer splits; the paper adds tokens to the vocabulary.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from luthier.methods.architectures._base import GENERATE
from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES, TESTS
from luthier.methods.rewards.verifiers.python_tests import split
from luthier.methods.stages._base import CACHED_LOGPROBS, OLD_LOGPROBS, Stage, text_of, without
from luthier.methods.stages.rollout.rollout import Rollout
from luthier.registry import Range, stage
from luthier.sandbox.code import extract_code
from luthier.sandbox.sandbox import run_many


@stage(
    example={"n": 2, "max_new_tokens": 3},
    paper="arXiv:2305.10314",
    row="leti",
    requires=[TESTS, GENERATE],
    provides=[COMPLETIONS, SCORES],
    removes=[PAIRS, CACHED_LOGPROBS, OLD_LOGPROBS],
    use_when="programs can be run against tests, and errors should teach more than that a program is wrong.",
    costs="`n` programs for each row, and one or two sandboxed processes for each.",
    covers="reward tokens, errors and traces as text behind wrong programs, or either of them alone.",
    omits="new tokens in the vocabulary; event extraction cast as code.",
    tests=[
        "methods/stages/rollout/test_leti.py::test_rows_have_the_format",
        "methods/stages/rollout/test_leti.py::test_feedback_names_the_exception",
        "methods/stages/rollout/test_leti.py::test_programs_behind_the_good_token_are_right_more_often",
    ],
)
class LETI(Stage):
    """A row for each program; `scores` say whether it is right. Measures right (a share)."""

    n: Annotated[int, Field(ge=1), Range(2, 32, log=True)] = 8  # programs of each row
    max_new_tokens: Annotated[int, Field(ge=1)] = 256  # maximum tokens of a program
    temperature: Annotated[float, Field(gt=0)] = 1.0  # sampling temperature
    good: str = "<|good|>"  # before the instruction of a program that passes every test
    bad: str = "<|bad|>"  # before that of any other
    open: str = "<|lang_feedback|>"  # before the feedback
    close: str = "<|/lang_feedback|>"  # behind it
    textual: bool = True  # write the feedback; false: reward tokens alone
    prefix: str = ""  # column put before the code, such as prompt where the model completes a function
    timeout: Annotated[float, Field(gt=0)] = 5.0  # maximum seconds of a program and its tests
    memory_mb: Annotated[int, Field(ge=16)] = 512  # memory limit of a program
    draw: int = 0  # number of the draw; another number gives other samples

    def __call__(self, rows, roles):
        prompts = {row["id"]: row["prompt"] for row in rows}
        marked = [{**row, "prompt": mark(self.good, row["prompt"])} for row in rows]
        how = {"n": self.n, "max_new_tokens": self.max_new_tokens, "temperature": self.temperature}
        out, right = [], 0
        for row in Rollout(**how, draw=self.draw)(marked, roles):
            row = {**row, "prompt": prompts[row["id"]]}
            texts = [text_of(roles, ids) for ids in row["completions"]]
            for k, (text, feedback) in enumerate(zip(texts, self.feedback(row, texts), strict=True)):
                right += feedback is None
                out.append(self.row(row, k, text, feedback))
        if out:
            self.measure(roles, right=right / len(out))
        return out

    def row(self, row: dict, number: int, text: str, feedback: str | None) -> dict:
        """A training row. feedback: None of a program that is right."""
        answer = text
        if feedback is not None and self.textual:
            answer = f"{text}{self.open}{feedback}{self.close}"
        token = self.good if feedback is None else self.bad
        columns = {"completions": [answer], "scores": [float(feedback is None)]}
        prompt = mark(token, row["prompt"])
        return {**without(row), "id": f"{row['id']}/{number}", "prompt": prompt, **columns}

    def feedback(self, row: dict, texts: list[str]) -> list[str | None]:
        """Of each program what the interpreter says of it; None of one that passes every test."""
        before = str(row[self.prefix]) if self.prefix else ""
        programs, checks = [before + extract_code(text) for text in texts], split(row["tests"])
        limits = {"timeout": self.timeout, "memory_mb": self.memory_mb}
        judged = run_many({"code": code, "checks": checks, **limits} for code in programs)
        out: list[str | None] = [None] * len(texts)
        wrong, jobs = [], []
        for place, (code, result) in enumerate(zip(programs, judged, strict=True)):
            if not all(result.passed) or not result.passed:
                failed = result.passed.index(False) if False in result.passed else 0
                out[place] = result.reason
                wrong.append(place)
                # the verdict comes from outside the program; its own trace, from running the test within it
                jobs.append({"code": f"{code}\n{checks[failed]}\n", **limits})
        for place, trace in zip(wrong, run_many(jobs), strict=True):
            out[place] = trace.stderr.strip() or trace.reason or out[place]
        return out


def mark(token: str, prompt: Any) -> Any:
    """A prompt behind a reward token."""
    if isinstance(prompt, str):
        return token + prompt
    return [*prompt[:-1], {**prompt[-1], "content": token + prompt[-1]["content"]}]
