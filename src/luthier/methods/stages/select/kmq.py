"""kMQ: clusters of instructions share a budget, and each gives rows in proportion to their quality.

Instructions are embedded and clustered by k-means; each cluster has a part of the budget by its size (or all
alike), and within it rows are drawn without replacement with probability proportional to a score (Yu et al.,
2024). With `rounds`, clusters begin alike, and after each round a short run on all rows chosen so far answers
the rows of that round: a cluster weighs exp(mean of reward of the row's answer minus reward of the model's)
in the next one. Clusters of noise fade, since no answer of theirs earns anything.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.stages._base import Stage, text_of
from luthier.methods.stages.curate._answers import answers
from luthier.methods.stages.select._embedding import embed, number, texts_of
from luthier.methods.stages.select._short_run import ShortRun, restored
from luthier.registry import Range, build, stage


@stage(
    example={"n": 3, "clusters": 2},
    paper="arXiv:2409.11378",
    row="kmq-iterative",
    requires=[LOGPROBS],
    use_when="instructions fall into many kinds, and a choice by quality alone would leave kinds out.",
    costs="one forward pass for embeddings, and k-means; each of `rounds` trains on what is chosen and"
    " answers its rows.",
    covers="clusters, budgets and draws by quality; rounds that weigh clusters anew by the gain of their"
    " answers.",
    omits="the product form of the weights; the number of clusters by silhouette.",
    tests=[
        "methods/stages/select/test_choice.py::test_budgets_add_up_and_no_cluster_gives_more_than_it_has",
        "methods/stages/select/test_choice.py::test_kmq_covers_more_clusters_than_chance",
        "methods/stages/select/test_kmq.py::test_rounds_move_the_budget_from_noise_to_what_is_lacking",
        "methods/stages/select/test_kmq.py::test_one_round_is_kmq_and_rounds_add_up",
    ],
)
class KMQ(Stage):
    """`n` rows from `clusters` clusters; column `cluster`."""

    n: Annotated[int, Field(ge=1)] = 1000  # rows that are kept
    clusters: Annotated[int, Field(ge=1), Range(8, 512, log=True)] = 64  # of k-means
    by: list[str] = field(
        default_factory=list
    )  # columns of numbers whose product is the quality; empty: equal
    budget: Literal["size", "equal"] = "size"  # a cluster's part of the budget
    weights: dict[int, float] = field(default_factory=dict)  # cluster -> factor of its part
    rounds: Annotated[int, Field(ge=1)] = 1  # rounds of training, each with a part of the budget
    reward: Any = "exact_match"  # of answers, by which rounds weigh clusters
    epochs: Annotated[int, Field(ge=1)] = 1  # of a round's training
    rate: Annotated[float, Field(gt=0)] = 2e-4  # its learning rate
    max_new_tokens: Annotated[int, Field(ge=1)] = 128  # of the model's answers
    encoder: str | None = None  # a sentence encoder (folder or hub name); null: the policy's last layer
    batch_size: Annotated[int, Field(ge=1)] = 16  # rows per forward pass

    def __call__(self, rows, roles):
        rows = list(rows)
        vectors = embed(roles, texts_of(roles, rows, "prompt"), self.encoder, self.batch_size)
        rng = roles.clock.rng("kmq", at=0)
        labels = k_means(vectors, min(self.clusters, len(rows)), rng)
        sizes = torch.bincount(labels, minlength=int(labels.max()) + 1).double()
        quality = torch.tensor([number(row, self.by, self.name) for row in rows], dtype=torch.float64)
        if self.rounds == 1:
            parts = sizes.clone() if self.budget == "size" else torch.ones_like(sizes)
            for cluster, weight in self.weights.items():
                if cluster < len(parts):
                    parts[cluster] *= weight
            chosen = draw(labels, parts, quality, self.n, rng)
        else:
            chosen = self.in_rounds(roles, rows, labels, quality, rng)
        marked = []
        for row, label in zip(rows, labels.tolist(), strict=True):
            marked.append({**row, "cluster": label})
        return self.drop(roles, marked, chosen, "their cluster's budget went to others")

    def in_rounds(
        self, roles: Any, rows: list[dict], labels: Tensor, quality: Tensor, rng: torch.Generator
    ) -> list[int]:
        """Places of n rows, chosen in rounds."""
        clusters = int(labels.max()) + 1
        weights, chosen = torch.ones(clusters, dtype=torch.float64), []
        for number_of_round in range(self.rounds):
            free = torch.tensor(sorted({*range(len(rows))} - {*chosen}))
            left = self.rounds - number_of_round
            budget = min(len(free), -(-(self.n - len(chosen)) // left))
            if budget <= 0:
                break
            new = free[draw(labels[free], weights, quality[free], budget, rng)].tolist()
            chosen += new
            if left == 1:
                break
            gains = self.gains(roles, [rows[i] for i in chosen], [rows[i] for i in new], number_of_round)
            sums = torch.zeros(clusters, dtype=torch.float64).index_add(0, labels[new], gains)
            counts = torch.bincount(labels[new], minlength=clusters)
            weights = torch.where(counts > 0, (sums / counts.clamp(min=1)).exp(), weights)
            weights = weights / weights.sum()
        return chosen

    def gains(self, roles: Any, learned: list[dict], new: list[dict], number: int) -> Tensor:
        """[new] what the answer of each new row earns beyond that of a model that learned the rows so far."""
        judge = build("reward", self.reward)
        with restored(roles):
            run = ShortRun(roles, self.rate, self.batch_size, f"kmq {number}")
            for epoch in range(self.epochs):
                run.epoch(learned, epoch, self.epochs)
            written = answers(roles.policy, new, roles, self.name, 1, self.max_new_tokens, 0.0)
        out = []
        for row, (text,) in zip(new, written, strict=True):
            own = text_of(roles, row["completions"][0])
            best, reached = judge.scores({"answer": own, **row}, [own, text])
            out.append(best - reached)
        return torch.tensor(out, dtype=torch.float64)


def draw(labels: Tensor, parts: Tensor, quality: Tensor, n: int, rng: torch.Generator) -> list[int]:
    """Places of n rows: each cluster's budget by its part, within it by quality without replacement."""
    sizes = torch.bincount(labels, minlength=len(parts)).double()
    chosen: list[int] = []
    for cluster, budget in enumerate(budgets(parts, sizes, n)):
        places = (labels == cluster).nonzero()[:, 0]
        if budget:
            weights = quality[places].clamp(min=1e-12)
            drawn = torch.multinomial(weights, budget, generator=rng)
            chosen += places[drawn].tolist()
    return chosen


def budgets(parts: Tensor, sizes: Tensor, n: int) -> list[int]:
    """How many rows each cluster gives: in proportion to its part, no more than it has, n in all."""
    n = min(n, int(sizes.sum()))
    taken = torch.zeros_like(sizes)
    while (left := n - int(taken.sum())) > 0:
        free = taken < sizes
        shares = torch.where(free & (parts > 0), parts, 0.0)
        if float(shares.sum()) == 0:  # nothing weighed is left: the rest comes from all others
            shares = torch.where(free, sizes, 0.0)
        exact = shares / shares.sum() * left
        whole = torch.minimum(exact.floor(), sizes - taken)
        if float(whole.sum()) == 0:  # less than one for each: the largest remainders first
            for place in exact.argsort(descending=True, stable=True)[:left].tolist():
                if bool(free[place]) and float(exact[place]) > 0:
                    taken[place] += 1
            continue
        taken += whole
    return [int(count) for count in taken.tolist()]


def k_means(vectors: Tensor, k: int, rng: torch.Generator, iterations: int = 50) -> Tensor:
    """[N, d] -> [N] labels. Starts at k-means++ centres."""
    centres = vectors[torch.randint(len(vectors), (1,), generator=rng)]
    for _ in range(1, k):
        nearest = torch.cdist(vectors, centres).min(1).values.double() ** 2
        if float(nearest.sum()) == 0:
            break
        centres = torch.cat([centres, vectors[torch.multinomial(nearest, 1, generator=rng)]])
    labels = torch.cdist(vectors, centres).argmin(1)
    for _ in range(iterations):
        sums = torch.zeros_like(centres).index_add(0, labels, vectors)
        counts = torch.bincount(labels, minlength=len(centres))
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centres)
        new = torch.cdist(vectors, centres).argmin(1)
        if torch.equal(new, labels):
            break
        labels = new
    return labels
