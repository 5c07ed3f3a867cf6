"""Adapt-inf: from all rows so far, some of every skill, by whichever score tells the rows of a skill apart.

The rows of this step join a pool. Gradients of one layer, projected, are clustered into skills; in each
cluster the score whose histogram has the highest entropy is used, out of perplexity, the entropy of
predictions, EL2N and the norm of the gradient (GraNd); each cluster has the same budget, what a small one
leaves goes to the others, and within it rows are drawn alike from all strata of the score without its tails
(CCS). The pool is cut to `pool_size`: the rows most like an earlier row of their cluster leave for good
(Maharana et al., 2025).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from luthier.methods.architectures._base import ENTROPY, LOGPROBS
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.stages._base import Stage
from luthier.methods.stages.select._embedding import embed, texts_of
from luthier.methods.stages.select._influence.gradients import row_gradients, row_losses
from luthier.methods.stages.select._influence.projection import Projection
from luthier.methods.stages.select._influence.store import digest_of
from luthier.methods.stages.select.kmq import budgets, k_means
from luthier.registry import stage
from luthier.storage import files

BINS, REACH, CUT = 50, 4.0, 0.05  # of the histogram, in standard deviations, and the share of each tail
SIZES = (2, 4, 8, 16, 32, 64)  # numbers of clusters that are tried


@stage(
    example={"n": 3, "clusters": 2, "dim": 64},
    paper="arXiv:2410.10636",
    row="adapt-inf",
    requires=[COMPLETIONS, LOGPROBS, ENTROPY],
    use_when="data sets come one after another, and each run is to learn from a fixed number of rows of all"
    " of them without losing rare skills.",
    costs="a forward and a backward pass over each row of the pool, and embeddings of what is pruned.",
    covers="pseudo-skills by gradients of a layer, the score of each by entropy, budgets with spill-over,"
    " CCS, and permanent pruning by likeness.",
    omits="the image-grounding score. The forgetting of rare skills over three data sets against random"
    " choice was not measured here; a run for each data set with the same `pool` does.",
    tests=[
        "methods/stages/select/test_adapt_inf.py::test_the_score_of_a_cluster_has_the_highest_entropy",
        "methods/stages/select/test_adapt_inf.py::test_strata_give_alike_and_tails_nothing",
        "methods/stages/select/test_adapt_inf.py::test_copies_are_pruned_before_other_rows",
        "methods/stages/select/test_adapt_inf.py::test_rows_of_two_steps_make_one_choice",
    ],
)
class AdaptInf(Stage):
    """`n` rows of the pool; columns `cluster` and `scorer`."""

    n: Annotated[int, Field(ge=1)] = 25_000  # rows that are learned from in this step
    pool: str | None = None  # file of the pool, read and written (JSON lines); null: this step's rows alone
    pool_size: Annotated[int, Field(ge=1)] = 100_000  # rows that the pool holds at most
    clusters: Annotated[int, Field(ge=1)] | None = None  # skills; null: where the sum of squares bends
    depth: Annotated[float, Field(ge=0, le=1)] = 0.66  # of the layer whose gradients count
    dim: Annotated[int, Field(ge=1)] = 1024  # numbers of a projected gradient
    encoder: str | None = None  # a sentence encoder for likeness; null: the policy's last layer
    batch_size: Annotated[int, Field(ge=1)] = 8  # rows per backward pass

    def __call__(self, rows, roles):
        rows = self.usable(self.merged(rows), roles)
        if not rows:
            return []
        features, scores = self.read(roles, rows)
        rng = roles.clock.rng("adapt_inf", at=0)
        k = self.clusters or elbow(features, [s for s in SIZES if s < len(rows)], rng)
        labels = k_means(features, min(k, len(rows)), rng)
        names = scorers(scores, labels)
        sizes = torch.bincount(labels).double()
        chosen: list[int] = []
        for cluster, budget in enumerate(budgets(torch.ones_like(sizes), sizes, self.n)):
            places = (labels == cluster).nonzero()[:, 0]
            drawn = stratified(scores[names[cluster]][places], budget, rng)
            chosen += places[drawn].tolist()
        if self.pool is not None:
            self.write_pool(roles, rows, labels)
        marked = []
        for row, label in zip(rows, labels.tolist(), strict=True):
            marked.append({**row, "cluster": label, "scorer": names[label]})
        return self.drop(roles, marked, chosen, "other rows of their skill were drawn")

    def merged(self, rows: Sequence[dict]) -> list[dict]:
        """The pool and this step's rows, of equal ones the first; ids made unique."""
        pool = []
        if self.pool is not None and Path(self.pool).is_file():
            pool = files.read_rows(Path(self.pool))
        out, digests, ids = [], set(), set()
        for row in (*pool, *rows):
            digest = digest_of(row)
            if digest in digests:
                continue
            name = str(row["id"])
            while name in ids:
                name += "~"
            digests.add(digest)
            ids.add(name)
            out.append({**row, "id": name})
        return out

    def read(self, roles: Any, rows: list[dict]) -> tuple[Tensor, dict[str, Tensor]]:
        """[N, dim] unit gradients of the layer, and score -> [N]."""
        only = groups_at(roles.policy.attached, self.depth)
        features, parts = [], []
        for start in range(0, len(rows), self.batch_size):
            some = rows[start : start + self.batch_size]
            gradients = row_gradients(roles, some, only)
            projection = Projection(gradients.shape[1], self.dim, 1)
            features.append(torch.nn.functional.normalize(projection(gradients), dim=-1).cpu())
            parts.append({**row_scores(roles, some), "grand": gradients.norm(dim=-1).cpu()})
        scores = {}
        for name in parts[0]:
            scores[name] = torch.cat([part[name] for part in parts]).double()
        return torch.cat(features), scores

    def write_pool(self, roles: Any, rows: list[dict], labels: Tensor) -> None:
        """What is left of the pool for the next step."""
        vectors = embed(roles, texts_of(roles, rows, "row"), self.encoder, self.batch_size)
        places = pruned(vectors, labels, self.pool_size)
        why = "they are like other rows of the pool, for good"
        self.left(roles, len(rows) - len(places), len(rows), why)
        files.write_rows(Path(str(self.pool)), [rows[place] for place in places])


def groups_at(tuned: Any, depth: float) -> set[str] | None:
    """Names of what trains in the layer at this depth; None, for all, where names have no numbers."""
    by_layer: dict[int, set[str]] = {}
    for group in tuned.param_groups():
        match = re.search(r"\.(\d+)\.", group.name)
        if match:
            by_layer.setdefault(int(match[1]), set()).add(group.name)
    if not by_layer:
        return None
    numbers = sorted(by_layer)
    return by_layer[numbers[round(depth * (len(numbers) - 1))]]


@torch.no_grad()
def row_scores(roles: Any, rows: Sequence[dict]) -> dict[str, Tensor]:
    """Score -> [G]: log-perplexity, mean entropy of predictions, EL2N (mean distance of predictions to
    labels).
    """
    policy, batch = roles.policy, roles.batch(list(rows))

    def distance(z: Tensor, label: Tensor) -> Tensor:
        p = z.float().softmax(-1)
        at = p.gather(1, label)
        return (p.square().sum(-1, keepdim=True) - 2 * at + 1).clamp(min=0).sqrt()[:, 0]

    def by_row(values: Tensor) -> Tensor:
        means = batch.means(values.float())
        counts = torch.bincount(batch.group, minlength=len(batch.rows)).clamp(min=1)
        return (means.new_zeros(len(batch.rows)).index_add(0, batch.group, means) / counts).cpu()

    with policy.eval_mode():
        outputs = policy.outputs(batch)
        distances = outputs.apply(distance, outputs.labels[:, None])
        return {
            "perplexity": row_losses(policy, batch).cpu(),
            "entropy": by_row(outputs.entropy),
            "el2n": by_row(distances),
        }


def histogram_entropy(scores: Tensor) -> float:
    """Shannon entropy, in nats, of a histogram of standardised scores."""
    spread = scores.std(correction=0)
    if len(scores) < 2 or float(spread) == 0:
        return 0.0
    standard = ((scores - scores.mean()) / spread).clamp(-REACH, REACH)
    counts = torch.histc(standard, BINS, -REACH, REACH)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * shares.log()).sum())


def scorers(scores: dict[str, Tensor], labels: Tensor) -> list[str]:
    """The score of each cluster: that of the highest entropy."""
    names = []
    for cluster in range(int(labels.max()) + 1):
        own = labels == cluster
        names.append(max(scores, key=lambda name: histogram_entropy(scores[name][own])))
    return names


def stratified(scores: Tensor, n: int, rng: torch.Generator) -> list[int]:
    """Places of n rows: as many from each of the strata of equal width, small ones first, so that what they
    lack comes from the others. The tails are used only where the middle is not enough.
    """
    order = scores.argsort(stable=True)
    cut = int(CUT * len(scores))
    middle = order[cut : len(order) - cut]
    if len(middle) < n:
        rest = torch.cat([order[:cut], order[len(order) - cut :]])
        more = rest[torch.randperm(len(rest), generator=rng)[: n - len(middle)]]
        return torch.cat([middle, more])[:n].tolist()
    low, high = float(scores[middle[0]]), float(scores[middle[-1]])
    width = (high - low) / BINS or 1.0
    number = ((scores[middle] - low) / width).long().clamp(max=BINS - 1)
    strata = [middle[number == k] for k in range(BINS)]
    strata = sorted((s for s in strata if len(s)), key=len)
    chosen: list[int] = []
    for k, stratum in enumerate(strata):
        part = round((n - len(chosen)) / (len(strata) - k))
        drawn = torch.randperm(len(stratum), generator=rng)[:part]
        chosen += stratum[drawn].tolist()
    return chosen


def pruned(vectors: Tensor, labels: Tensor, n: int) -> list[int]:
    """Places of n rows, in order, without those most like an earlier row of their cluster. vectors: [N, d] of
    length one.
    """
    nearest = torch.full((len(vectors),), -1.0)
    for cluster in range(int(labels.max()) + 1):
        places = (labels == cluster).nonzero()[:, 0]
        for first in range(0, len(places), 1024):
            some = places[first : first + 1024]
            likeness = vectors[some] @ vectors[places[: first + len(some)]].T
            earlier = torch.ones_like(likeness).tril(first - 1).bool()
            nearest[some] = likeness.masked_fill(~earlier, -1.0).amax(1)
    order = nearest.argsort(stable=True)[: min(n, len(vectors))]
    return sorted(order.tolist())


def elbow(vectors: Tensor, candidates: Sequence[int], rng: torch.Generator) -> int:
    """The number of clusters farthest below the line from the first to the last, by the sum of squares."""
    if len(candidates) < 3:
        return candidates[-1] if candidates else 1
    sums = []
    for k in candidates:
        labels = k_means(vectors, k, rng)
        counts = torch.bincount(labels).clamp(min=1)
        centres = vectors.new_zeros(len(counts), vectors.shape[1]).index_add(0, labels, vectors)
        sums.append(float((vectors - (centres / counts[:, None])[labels]).square().sum()))
    x, y = torch.tensor(candidates).double().log(), torch.tensor(sums).double()
    line = y[0] + (y[-1] - y[0]) * (x - x[0]) / (x[-1] - x[0])
    return candidates[int((line - y).argmax())]
