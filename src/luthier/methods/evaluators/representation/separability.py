"""How well rows fall into classes, seen without labels by the topology of their embeddings, and at which
step they did best.

The death times of connected components in a Vietoris-Rips filtration are the edges of the minimum spanning
tree. Divided by the longest, clear clusters leave few long ones and many short: the score is 1 minus their
mean (Ghalyan et al., 2023). Measured during training it names the step after which it no longer improved,
where labels for early stopping are missing. Departs: embeddings are the policy's own unless `encoder` names
one.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.evaluators._base import Evaluator
from luthier.methods.evaluators._trajectory import record
from luthier.methods.stages.select._embedding import embed, question
from luthier.registry import Artifact, Metric, evaluator


@evaluator(
    metrics=[
        Metric("separability", "separability without labels", better="higher"),
        Metric("separability_low", "separability, low end of its interval"),
        Metric("separability_high", "separability, high end of its interval"),
        Metric("separability_best_step", "step of the best separability"),
    ],
    artifacts=[Artifact("separability.jsonl")],
    paper="arXiv:2305.15016",
    row="ph-class-separability",
    requires=[LOGPROBS],
    use_when="you tune a classifier with few labels and want to know when its classes stopped moving apart.",
    costs="one forward pass over `n` prompts, and a minimum spanning tree of them for each subsample.",
    covers="death times, the score with a band over subsamples, and the best step of a run's measurements.",
    omits="the labelled measures that the paper compares with; stopping by itself: it advises.",
    tests=[
        "methods/evaluators/representation/test_separability.py::test_death_times_are_edges_of_the_tree",
        "methods/evaluators/representation/test_separability.py::test_centres_further_apart_score_higher",
        "methods/evaluators/representation/test_separability.py::test_the_best_step_of_a_run",
    ],
)
class Separability(Evaluator):
    """`separability` with the interval of `subsamples` draws of 80 % of the rows (`separability_low`,
    `separability_high`), and `separability_best_step` so far.
    """

    n: Annotated[int, Field(ge=8)] = 256  # prompts that are embedded
    subsamples: Annotated[int, Field(ge=2)] = 20  # draws for the interval
    encoder: str | None = None  # folder or hub name of an encoder; the policy itself if not given
    batch_size: Annotated[int, Field(ge=1)] = 16  # prompts read at once

    def run(self, roles, rows, folder, when):
        texts = [question(row) for row in rows if row["prompt"]][: self.n]
        if len(texts) < 8:
            return {}
        points = embed(roles, texts, self.encoder, self.batch_size)
        rng = roles.clock.rng("separability", at=0)
        draws = []
        for _ in range(self.subsamples):
            some = torch.randperm(len(points), generator=rng)[: round(0.8 * len(points))]
            draws.append(separability(points[some]))
        low, high = torch.tensor(draws).quantile(torch.tensor([0.025, 0.975])).tolist()
        metrics = {"separability": separability(points), "separability_low": low, "separability_high": high}
        trajectory = record(folder / "separability.jsonl", when, {"step": roles.clock.step, **metrics})
        best = max(trajectory, key=lambda point: point["separability"])
        return {**metrics, "separability_best_step": float(best["step"])}


def death_times(points: Tensor) -> Tensor:
    """[N, d] -> [N - 1] lengths of the edges of the Euclidean minimum spanning tree, in the order in which
    Prim's algorithm finds them.
    """
    points = points.double()
    nearest = torch.cdist(points[:1], points)[0]  # distance of each point to the tree
    outside = torch.ones(len(points), dtype=torch.bool)
    outside[0] = False
    times = []
    for _ in range(len(points) - 1):
        at = int(nearest.masked_fill(~outside, torch.inf).argmin())
        times.append(nearest[at].clone())
        outside[at] = False
        nearest = nearest.minimum((points - points[at]).norm(dim=1))
    return torch.stack(times)


def separability(points: Tensor) -> float:
    """[N, d] -> 1 minus the mean of the death times by the longest: 0 where all are equally far apart."""
    times = death_times(points)
    longest = float(times.max())
    return 1.0 - float(times.mean()) / longest if longest > 0 else 0.0
