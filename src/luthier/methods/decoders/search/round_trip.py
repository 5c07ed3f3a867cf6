"""Round-trip repair: buggy code is translated to another language and back by the same model, many times, and
the candidate that passes most tests is returned.

Models write what is frequent, so that rare tokens, bugs among them, are lost on the way. Forward: the code's
description, or the code in another programming language; backward: Python again, its signature in the prompt.
`forward` times `backward` candidates are sampled and scored by the reward, `python_tests` for rows with
`tests`; the first of the best is the answer (Ruiz et al., 2024). `by: resample` writes candidates straight
from the buggy code, as the baseline.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from luthier.clock import Clock
from luthier.methods.decoders.search._base import Ids, Search
from luthier.methods.stages.select._embedding import question
from luthier.registry import Range, decoder, nested
from luthier.sandbox.code import extract_code

FORWARD = "Translate this code to {language}.\n\n{code}\n"
BACKWARD = "Translate this to Python. Write the whole function, which begins with `{signature}`.\n\n{text}\n"
RESAMPLE = "Write this Python function without its bug.\n\n{code}\n"
SIGNATURE = re.compile(r"^[ \t]*(?:async )?def .*?:\s*$", re.M)


@decoder(
    paper="arXiv:2401.07994",
    row="round-trip-repair",
    use_when="programs have bugs and tests, and no model was tuned to repair them.",
    costs="`forward` translations and `forward` x `backward` programs, each run on the tests.",
    example={"forward": 1, "backward": 1, "reward": "length"},
    covers="both passes with several candidates, other languages in between, the signature in the backward"
    " prompt, execution of tests, the baseline without the way round.",
    omits="HumanEval-Java and QuixBugs; compile rates and change of style; patches judged by hand.",
    tests=[
        "methods/decoders/search/test_round_trip.py::test_an_identity_translator_repairs_nothing",
        "methods/decoders/search/test_round_trip.py::test_what_forgets_rare_tokens_repairs",
    ],
)
class RoundTrip(Search):
    """The best of several round trips; of equals the first."""

    reward: Annotated[Any, nested("reward")] = "python_tests"  # the reward that scores candidates
    language: str = "an English description"  # in between, e.g. C# or an English description
    forward: Annotated[int, Field(ge=1), Range(1, 16)] = 3  # translations, the first of them greedy
    backward: Annotated[int, Field(ge=1), Range(1, 16)] = 3  # programs from each, the first of them greedy
    temperature: Annotated[float, Field(gt=0)] = 1.0  # of all but the first
    by: Literal["round_trip", "resample"] = "round_trip"  # or straight from the buggy code

    def generate(self, roles, rows, prompts, **how):
        self.only(how, "top_p", "top_k")
        n, seeds = how.pop("n", 1), how.pop("seeds")
        how.pop("hear", None)
        how.pop("temperature", None)
        answers = []
        for row, seed in zip(rows, seeds, strict=True):
            some = []
            for number in range(n):
                clock = Clock(Clock(seed).derive_seed("round_trip", number))
                candidates = self.candidates(roles, row, clock, how)
                scores = self.scores(roles, row, candidates)
                some.append(candidates[max(range(len(scores)), key=scores.__getitem__)])
            answers.append(some)
        return answers

    def candidates(
        self, roles: Any, row: Mapping[str, Any], clock: Clock, how: Mapping[str, Any]
    ) -> list[Ids]:
        """Programs, as token ids."""
        code = extract_code(question(dict(row)))
        if self.by == "resample":
            prompt = RESAMPLE.replace("{code}", code)
            return self.written(roles, prompt, self.forward * self.backward, clock, "resample", how)
        signature = SIGNATURE.search(code)
        back = BACKWARD.replace("{signature}", signature[0].strip() if signature else code.split("\n")[0])
        prompt, out = FORWARD.replace("{language}", self.language).replace("{code}", code), []
        for number, ids in enumerate(self.written(roles, prompt, self.forward, clock, "forward", how)):
            text = back.replace("{text}", roles.renderer.answer(ids).strip())
            out += self.written(roles, text, self.backward, clock, f"backward {number}", how)
        return out

    def written(
        self, roles: Any, prompt: str, count: int, clock: Clock, name: str, how: Mapping[str, Any]
    ) -> list[Ids]:
        """Answers to a prompt, the first greedy."""
        ids = [roles.renderer.prompt({"id": "round_trip", "prompt": prompt})]
        first = roles.policy.generate(ids, seeds=[0], n=1, **how, temperature=0.0)[0]
        if count == 1:
            return first
        seed = clock.derive_seed(name)
        more = roles.policy.generate(ids, seeds=[seed], n=count - 1, **how, temperature=self.temperature)[0]
        return [*first, *more]
