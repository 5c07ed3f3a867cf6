"""Over-optimization: does the reward of training go on rising after the score that matters began to fall?

RLHF is a chain of links: the reward stands for preferences, the policy for the reward, and both for what is
wanted (Lambert and Calandra, 2023). The same sampled answers are scored by `proxy`, which training uses,
and by `gold`. Of all measurements of a run: the last step before the gold score fell by more than
`tolerance` while the proxy rose, the rank correlation of both over answers and over steps, and what else
changed, such as length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field

from luthier.methods.architectures._base import GENERATE
from luthier.methods.evaluators._base import Evaluator, keep
from luthier.methods.evaluators._trajectory import record, spearman
from luthier.registry import Artifact, Metric, build, evaluator


@evaluator(
    metrics=[
        Metric("proxy_reward", "mean reward (proxy)", better="higher"),
        Metric("gold_reward", "mean score (gold)", better="higher"),
        Metric("proxy_gold_answers", "rank correlation of proxy and gold over answers", better="higher"),
        Metric("proxy_gold_steps", "rank correlation of proxy and gold over steps", better="higher"),
        Metric("proxy_length", "rank correlation of proxy and length"),
        Metric("overoptimized_from", "step after which gold falls while proxy rises"),
    ],
    artifacts=[Artifact("overoptimization.jsonl")],
    paper="arXiv:2311.00168",
    row="alignment-ceiling objective-mismatch-mbrl",
    requires=[GENERATE],
    use_when="you train against a learned reward and can score answers by something better, if slower: it"
    " says from which step on the reward misleads.",
    costs="`samples` answers to each of `n` prompts at each evaluation, scored twice.",
    covers={
        "alignment-ceiling": "the table over a run's steps, rank correlations of its links, and the step of"
        " over-optimization.",
        "objective-mismatch-mbrl": "the correlation of what is trained with what it stands for.",
    },
    omits={
        "alignment-ceiling": "tables over many reward models; refusals of benign prompts (evaluator"
        " `refusals`); KL (the log).",
        "objective-mismatch-mbrl": "models of dynamics and their control, which tune no foundation model;"
        " rows weighted by their distance from what the controller does.",
    },
    tests=[
        "methods/evaluators/quality/test_overoptimization.py::test_links_of_known_correlation",
        "methods/evaluators/quality/test_overoptimization.py::test_a_reward_that_likes_length",
        "methods/evaluators/quality/test_overoptimization.py::test_nothing_where_nothing_is_planted",
    ],
)
class Overoptimization(Evaluator):
    """`proxy_reward`, `gold_reward`, `proxy_gold_answers`, `proxy_length`, and over the steps measured so far
    `proxy_gold_steps` and `overoptimized_from`, which is left out where it did not happen.
    """

    proxy: Any  # the reward of training
    gold: Any = "exact_match"  # the reward that matters
    tolerance: Annotated[float, Field(ge=0)] = 0.02  # the gold score may fall by so much
    n: Annotated[int, Field(ge=1)] = 32  # prompts that are answered
    samples: Annotated[int, Field(ge=1)] = 4  # answers of each
    temperature: Annotated[float, Field(gt=0)] = 1.0  # sampling temperature
    max_new_tokens: Annotated[int, Field(ge=1)] = 64  # tokens per answer

    @property
    def active_requires(self):
        return self.requires | build("reward", self.proxy).requires | build("reward", self.gold).requires

    def run(self, roles, rows, folder, when):
        proxy, gold = build("reward", self.proxy), build("reward", self.gold)
        rows = [row for row in rows if row["prompt"]][: self.n]
        if not rows:
            return {}
        written = roles.policy.generate(
            [roles.renderer.prompt(row) for row in rows],
            rows=rows,
            seeds=[roles.clock.derive_seed("overoptimization", row["id"], at=0) for row in rows],
            n=self.samples,
            temperature=self.temperature,
            max_new_tokens=self.max_new_tokens,
            stop=roles.renderer.stop_ids,
        )
        columns: dict[str, list[float]] = {"proxy": [], "gold": [], "length": []}
        by_row: dict[str, dict[str, float]] = {"proxy_reward": {}, "gold_reward": {}}
        for row, answers in zip(rows, written, strict=True):
            texts = [roles.renderer.answer(ids) for ids in answers]
            for name, judge in (("proxy", proxy), ("gold", gold)):
                scores = judge.scores(row, texts)
                columns[name] += scores
                by_row[f"{name}_reward"][str(row["id"])] = sum(scores) / len(scores)
            columns["length"] += [float(len(ids)) for ids in answers]
        keep(folder, when, **by_row)
        values = {name: torch.tensor(column) for name, column in columns.items()}
        metrics = {name: sum(scores.values()) / len(scores) for name, scores in by_row.items()}
        point = {"step": roles.clock.step, **metrics, "length": float(values["length"].mean())}
        points = record(folder / "overoptimization.jsonl", when, point)
        links = {
            "proxy_gold_answers": spearman(values["proxy"], values["gold"]),
            "proxy_length": spearman(values["proxy"], values["length"]),
            **over_steps(points, self.tolerance),
        }
        return metrics | {name: value for name, value in links.items() if value is not None}


def over_steps(points: Sequence[dict], tolerance: float) -> dict[str, float | None]:
    """Measurements of a run -> what they say together."""
    steps = [int(point["step"]) for point in points]
    proxy = [float(point["proxy_reward"]) for point in points]
    gold = [float(point["gold_reward"]) for point in points]
    enough = len(points) >= 3  # two always agree or disagree entirely
    onset = overoptimized_from(steps, proxy, gold, tolerance)
    return {
        "proxy_gold_steps": spearman(torch.tensor(proxy), torch.tensor(gold)) if enough else None,
        "overoptimized_from": None if onset is None else float(onset),
    }


def overoptimized_from(
    steps: Sequence[int], proxy: Sequence[float], gold: Sequence[float], tolerance: float
) -> int | None:
    """The first step after which the gold score falls by more than `tolerance` while the proxy rises; None
    where that does not happen.
    """
    best = 0  # of the gold score so far
    for k in range(len(steps)):
        if gold[k] > gold[best]:
            best = k
        if gold[best] - gold[k] > tolerance and proxy[k] > proxy[best]:
            return steps[best]
    return None
