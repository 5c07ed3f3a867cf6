"""Answers from retrieved passages, verified and mended (KALMV): a useless passage makes way for the next one,
a wrong answer is written again, a right one is returned.

Rows bring `passages`, in the order in which they were retrieved; their prompts are put behind the passage.
Rows without passages are answered as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

from pydantic import Field

from luthier.methods.decoders._base import Decoder
from luthier.registry import decoder, nested

Ids = list[int]


@decoder(
    paper="arXiv:2310.12836",
    row="kalmv",
    use_when="rows have retrieved passages, and a verifier tells whether a passage or an answer is at fault.",
    costs="at most `turns` answers, and their verification.",
    covers="the loop over passages and samples, bounded; the last answer or none where none is accepted.",
    tests=[
        "methods/decoders/search/test_verified_retrieval.py::test_the_loop_ends_and_accepts",
        "methods/decoders/search/test_verified_retrieval.py::test_verified_answers_are_right_more_often",
    ],
)
class VerifiedRetrieval(Decoder):
    """The first answer that the verifier accepts; else the last one."""

    verifier: Annotated[Any, nested("reward")] = "knowledge_verifier"  # says which of the three it is
    turns: Annotated[int, Field(ge=1)] = 4  # answers that are written at most
    abstain: bool = False  # an answer that is never accepted becomes an empty one
    template: str = "{knowledge}\n\n{prompt}"  # how the passage and the prompt are joined
    temperature: Annotated[float, Field(gt=0)] = 1.0  # of answers that are written again

    def begin(self, renderer):
        return lambda logits, prompts, responses: logits

    def generate(self, roles, rows, prompts, **how):
        n, seeds = how.pop("n", 1), how.pop("seeds")
        stop: Ids = list(how.get("stop") or ())
        out = []
        for row, prompt, seed in zip(rows, prompts, seeds, strict=True):
            passages = row.get("passages")
            if not passages:
                out += roles.policy.generate([prompt], n=n, seeds=[seed], **how)
                continue
            answers: list[Ids] = []
            for number in range(n):

                def write(passage: str, draw: int, number: int = number, seed: int = seed, row=row) -> Ids:
                    asks = roles.renderer.prompt({**row, "prompt": self.prompt(row["prompt"], passage)})
                    again = {**how, "temperature": how.get("temperature", 1.0)}
                    if draw:
                        again["temperature"] = again["temperature"] or self.temperature
                    chance = (seed + 7919 * (draw + 1000 * number)) % 2**63
                    return roles.policy.generate([asks], n=1, seeds=[chance], **again)[0][0]

                def verify(passage: str, ids: Ids, row=row) -> str:
                    (options,) = self.verifier.options(
                        {**row, "knowledge": passage}, [roles.renderer.answer(ids)]
                    )
                    return "ABC"[max(range(3), key=options.__getitem__)]

                answer, accepted = rectify(list(passages), self.turns, write, verify)
                answers.append(stop[:1] if self.abstain and not accepted else answer)
            out.append(answers)
        return out

    def prompt(self, prompt: Any, passage: str) -> Any:
        """The prompt behind a passage; of a conversation its last turn."""
        if isinstance(prompt, str):
            return self.template.replace("{knowledge}", passage).replace("{prompt}", prompt)
        last = prompt[-1]
        return [*prompt[:-1], {**last, "content": self.prompt(str(last["content"]), passage)}]


def rectify(
    passages: Sequence[str],
    turns: int,
    write: Callable[[str, int], Any],
    verify: Callable[[str, Any], str],
) -> tuple[Any, bool]:
    """The answer, and whether it was accepted. write: an answer from a passage, by the number of the draw.
    verify: A, B or C.
    """
    place = draw = 0
    answer: Any = None
    for _ in range(turns):
        answer = write(passages[place], draw)
        verdict = verify(passages[place], answer)
        if verdict == "C":
            return answer, True
        draw += 1
        if verdict == "A" and place + 1 < len(passages):
            place += 1
    return answer, False
