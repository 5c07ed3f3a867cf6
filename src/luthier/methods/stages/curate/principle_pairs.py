"""Rows for a reward model that follows principles (SALMON): which of two answers is better depends on what
the prompt asks for.

A judge says for each principle which of two completions it fits better, in both orders. A row then has a few
of the principles in its prompt, some of them negated; the one on which the judge is surest decides which
completion is chosen, the other way round where it is negated. A reward model that is trained on such rows
(objective `reward`) reads the principles, and reinforcement learning can choose them, also against reward
hacking: put `principles` into the prompts of its rows.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.formats._base import COMPLETIONS, PAIRS, SCORES
from luthier.methods.stages._base import Stage, pick, text_of
from luthier.registry import Range, nested, stage

HEADER = "Judge by these principles:"


@stage(
    paper="arXiv:2310.05910",
    row="salmon",
    example={"principles": {"be brief": "be long"}},
    contract={"gives": "the contract's rows have one completion, and a pair takes two"},
    requires=[COMPLETIONS],
    provides=[PAIRS, SCORES],
    use_when="a reward model is to follow instructions about what is good, without labels by people: under"
    " `stages` behind `rollout` (n: 2), with objective `reward`.",
    costs="two readings of the judge for each principle and row.",
    covers="preferences by principle averaged over both orders, sampled and negated principles, the decisive"
    " one, rows whose prompt lists them.",
    omits="self-alignment by exemplars, the paper's 31 principles, bonuses for language and length.",
    tests=[
        "methods/stages/curate/test_principle_pairs.py::test_the_label_is_the_surest_principles",
        "methods/stages/curate/test_principle_pairs.py::test_rows_of_the_stage",
        "methods/stages/curate/test_principle_pairs.py::test_a_reward_model_reads_its_principles",
    ],
)
class PrinciplePairs(Stage):
    """Rows of two completions, the better first; `scores` are 1 and 0, `principles` those in the prompt."""

    # each principle, and what it is negated
    principles: dict[str, str]
    # the judge that compares; its `criteria` become the principle
    judge: Annotated[Any, nested("reward")] = "option_judge"
    n: Annotated[int, Field(ge=1), Range(1, 5)] = 3  # principles in a prompt, at most
    negate: Annotated[float, Field(ge=0, le=1)] = 0.3  # how often a principle is negated
    draws: Annotated[int, Field(ge=1)] = 1  # rows of each pair, with principles of their own
    header: str = HEADER  # what stands before the principles

    def __post_init__(self):
        if not self.principles:
            raise ValueError("principles: give at least one, with its negation")

    def __call__(self, rows, roles):
        if not hasattr(self.judge, "criteria") or not hasattr(self.judge, "compare"):
            raise RecipeError(f"stage 'principle_pairs': '{self.judge.name}' is no judge; use option_judge")
        rows, out = list(rows), []
        for place, row in enumerate(rows):
            if len(row["completions"]) < 2:
                continue
            texts = [text_of(roles, c) for c in row["completions"][:2]]
            gaps = [self.gap(row, principle, texts) for principle in self.principles]
            for number in range(self.draws):
                chance = random.Random(roles.clock.derive_seed("principles", row["id"], place, number))
                sample = chance.sample(range(len(gaps)), min(self.n, len(gaps)))
                negated = [chance.random() < self.negate for _ in sample]
                first = decision(gaps, sample, negated)
                if first == 0:
                    continue
                lines = []
                for i, (wording, opposite) in enumerate(self.principles.items()):
                    if i in sample:
                        lines.append(opposite if negated[sample.index(i)] else wording)
                columns = {
                    "id": f"{row['id']}/{number}",
                    "prompt": self.prompt(row["prompt"], lines),
                    "scores": [1.0, 0.0],
                    "principles": lines,
                }
                out.append({**pick(row, (0, 1) if first > 0 else (1, 0)), **columns})
        lost = self.draws * len(rows) - len(out)
        self.left(roles, lost, self.draws * len(rows), "no principle tells their completions apart")
        return out

    def gap(self, row: dict, principle: str, texts: Sequence[str]) -> float:
        """How much better the first of two texts fits a principle, from -1 to 1."""
        judge = replace(self.judge, criteria=principle, compare=True)
        (first,) = judge.scores({**row, "answer": texts[1]}, [texts[0]])
        return 2 * float(first) - 1

    def prompt(self, prompt: Any, lines: Sequence[str]) -> Any:
        """The prompt, with the principles before it; in a conversation as what the system says."""
        text = "\n".join([self.header, *(f"- {line}" for line in lines)])
        if isinstance(prompt, str):
            return f"{text}\n\n{prompt}"
        if prompt and prompt[0]["role"] == "system":
            return [{**prompt[0], "content": f"{prompt[0]['content']}\n\n{text}"}, *prompt[1:]]
        return [{"role": "system", "content": text}, *prompt]


def decision(gaps: Sequence[float], sample: Sequence[int], negated: Sequence[bool]) -> float:
    """Above 0 where the first completion is the better one, below 0 where the second is: the gap of the
    sampled principle that is largest in size, of equals the first, turned round where it is negated.
    """
    surest = max(range(len(sample)), key=lambda k: abs(gaps[sample[k]]))
    gap = gaps[sample[surest]]
    return -gap if negated[surest] else gap
