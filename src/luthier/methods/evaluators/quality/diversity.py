"""Diversity: how many different answers the model gives when it samples several for one prompt.

`distinct_2` (Li et al.): distinct pairs of neighbouring tokens among all generated ones; it is low in a
collapsed model.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from luthier.methods.architectures._base import GENERATE
from luthier.methods.evaluators._base import Evaluator
from luthier.registry import Metric, evaluator


@evaluator(
    metrics=[
        Metric("distinct_2", "distinct-2 of samples", unit="%", rank=40),
        Metric("distinct_answers", "distinct samples per prompt", unit="%", rank=41),
        Metric("answer_length", "tokens per sample", rank=42),
    ],
    paper="arXiv:1510.03055",
    requires=[GENERATE],
    use_when="you fear that answers become all alike, after preference tuning or reinforcement learning.",
    costs="`samples` answers to each of `n` prompts.",
)
class Diversity(Evaluator):
    """`distinct_2`, `distinct_answers` (share of a prompt's samples that differ) and `answer_length` in
    tokens.
    """

    n: Annotated[int, Field(ge=1)] = 16  # prompts that are answered
    samples: Annotated[int, Field(ge=2)] = 4  # answers per prompt
    temperature: Annotated[float, Field(gt=0)] = 1.0  # sampling temperature
    max_new_tokens: int = 48  # tokens per answer

    def run(self, roles, rows, folder, when):
        rows = [r for r in rows if r["prompt"]][: self.n]
        if not rows:
            return {}
        seeds = [roles.clock.derive_seed("diversity", r["id"], at=0) for r in rows]
        written = roles.policy.generate(
            [roles.renderer.prompt(r) for r in rows],
            seeds=seeds,
            n=self.samples,
            temperature=self.temperature,
            max_new_tokens=self.max_new_tokens,
            stop=roles.renderer.stop_ids,
        )
        every = [tuple(ids) for answers in written for ids in answers]
        pairs = [pair for ids in every for pair in zip(ids, ids[1:])]
        return {
            "distinct_answers": (
                sum(len({tuple(a) for a in answers}) / len(answers) for answers in written) / len(written)
            ),
            "answer_length": sum(map(len, every)) / len(every),
            **({"distinct_2": len(set(pairs)) / len(pairs)} if pairs else {}),
        }
