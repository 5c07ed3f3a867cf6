"""Adam-v2 for text: contrastive learning of parts and wholes of a text, from coarse to fine.

A span of text (the whole) is divided into parts, and each is encoded separately, after the text that precedes
it. Localizability: a part, with some tokens replaced, should be closer to the teacher's embedding of the same
part than to the other parts. Composability: the parts together predict the teacher's embedding of the whole.
Decomposability: the whole predicts the teacher's embeddings of the parts. An embedding is the mean of the
hidden states that predict a span's tokens. The teacher is the policy's running average (`mean_teacher`), the
heads are `roles: {part_heads: part_whole}`; wholes are full texts at first, then halves, quarters and so on.

Departs: made for medical images and a convolutional encoder. Augmented views are replaced tokens instead of
crops; localizability is contrastive within a text, so that no loss depends on how a batch is split; all terms
have the same weight, since the paper's weights are not known here.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.methods.architectures._base import ANSWER_TOKENS, HIDDEN
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.objectives._base import Objective
from luthier.methods.objectives.preference._pairs import Probability
from luthier.methods.roles._base import TEACHER
from luthier.methods.roles.networks.part_whole import PART_HEADS
from luthier.model.batch import Batch
from luthier.registry import Range, objective


@objective(
    paper="arXiv:2404.15672",
    row="adam-v2-anatomy",
    requires=[COMPLETIONS, TEACHER, PART_HEADS, HIDDEN, ANSWER_TOKENS],
    contract={"head": "it uses embeddings below the head; train the head with a loss beside it"},
    use_when="texts have parts that make up wholes, you want representations of both, and there are no"
    " labels. It was made for medical images, so try it on a small run first.",
    costs="the parts and wholes of each text are read apart by student and teacher: several forward"
    " passes a row.",
    covers="localizability, composability and decomposability of stretches of text.",
    omits="images and anatomy.",
    tests=[
        "methods/objectives/representation/test_adam_v2.py::test_parts_of_a_linear_reader_compose_exactly",
        "methods/objectives/representation/test_adam_v2.py::test_wholes_find_their_parts",
    ],
)
class AdamV2(Objective):
    """Contrast of parts + (1 - cos) of the composed whole + mean (1 - cos) of the decomposed parts."""

    unit = "sequence"

    # number of parts of a whole; the same in role `part_whole`
    parts_of_whole: Annotated[int, Field(ge=2)] = 2
    localizability: Annotated[float, Field(ge=0)] = 1.0  # weight of distinguishing parts
    composability: Annotated[float, Field(ge=0)] = 1.0  # weight of composing the whole from its parts
    decomposability: Annotated[float, Field(ge=0)] = 1.0  # weight of decomposing the whole into its parts
    # granularities, an equal share of the run each; every one halves the wholes
    levels: Annotated[int, Field(ge=1)] = 3
    noise: Probability = 0.15  # share of the student's input tokens that is replaced at random
    # temperature of the contrastive loss
    temperature: Annotated[float, Field(gt=0), Range(0.05, 0.5, log=True)] = 0.2
    prune: float = 0.95  # parts whose similarity for the teacher is above this are no negatives

    def count(self, batch):
        return len(long_enough(batch, self.parts_of_whole))

    def rows_of_units(self, batch):
        return batch.group[long_enough(batch, self.parts_of_whole)]

    def loss(self, roles, batch):
        heads, m = roles.part_heads, self.parts_of_whole
        if heads.m != m:
            raise RecipeError(
                f"adam_v2 divides into {m} parts but role `part_whole` into {heads.m}; set"
                " parts_of_whole to the same value in both"
            )
        cut = regions(batch, m, min(self.levels - 1, int(roles.clock.progress * self.levels)), roles.clock)
        if cut is None:
            return torch.zeros(0, device=batch.ids.device)
        student = means(cut, roles.policy.outputs(self.exchanged(cut, roles)), m)
        teacher = means(cut, roles.teacher.outputs(cut.view()), m)
        (whole, parts), (whole_t, parts_t) = ((x[:, 0], x[:, 1:]) for x in (student, teacher))
        terms = {
            "localizability": self.told_apart(parts, parts_t),
            "composability": 1 - torch.cosine_similarity(heads.compose(parts), whole_t, dim=-1),
            "decomposability": (1 - torch.cosine_similarity(heads.decompose(whole), parts_t, dim=-1)).mean(1),
        }
        batch.note(**terms)
        return sum(getattr(self, name) * value for name, value in terms.items())

    def told_apart(self, parts: Tensor, parts_t: Tensor) -> Tensor:
        """[N, m, d] of student and teacher -> [N] -log share of the part itself among the parts of its text,
        on average.
        """
        a, b = F.normalize(parts, dim=-1), F.normalize(parts_t, dim=-1)
        own = torch.eye(a.shape[1], dtype=torch.bool, device=a.device)
        alike = (b @ b.mT > self.prune) & ~own
        near = (a @ b.mT / self.temperature).masked_fill(alike, -torch.inf)
        return near.logsumexp(-1).sub(near.diagonal(dim1=1, dim2=2)).mean(1)

    def exchanged(self, cut: Batch, roles) -> Batch:
        """The regions with some tokens exchanged for any others."""
        ids, words, draws = cut.ids.clone(), len(roles.renderer.tokenizer), []
        for i, (g, n) in enumerate(zip(cut.group.tolist(), cut.lengths.long().tolist(), strict=True)):
            region = i % (1 + self.parts_of_whole)
            draws.append(
                torch.rand(2, n, generator=roles.clock.rng("exchange", str(cut.rows[g]["id"]), region))
            )
        which, what = torch.cat(draws, 1).to(ids.device)
        ids[cut.supervised] = torch.where(which < self.noise, (what * words).long(), ids[cut.supervised])
        return cut.view(ids=ids)


def long_enough(batch: Batch, m: int) -> list[int]:
    """Sequences of m parts at least: of one token each, of two where nothing precedes them (the first cannot
    be asked).
    """
    parents, sizes = batch.parent.tolist(), batch.sizes
    return [
        n
        for n, s in enumerate(batch.completion.tolist())
        if sizes[s] >= m * (1 if parents[s] >= 0 and sizes[parents[s]] else 2)
    ]


def regions(batch: Batch, m: int, level: int, clock: Clock) -> Batch | None:
    """Of each sequence a stretch of 1/2^level of it and its m parts, each read after what the sequence
    continues: 1 + m sequences for one. None where no sequence is long enough."""
    pieces, parents, sizes, sequences = (
        batch.segments(),
        batch.parent.tolist(),
        batch.sizes,
        long_enough(batch, m),
    )
    if not sequences:
        return None
    source: list[Tensor] = []
    supervised: list[Tensor] = []
    parent: list[int] = []
    places: dict[int, int] = {}  # a segment that is continued -> where it stands now

    def put(tokens: Tensor, marks: Tensor, under: int) -> int:
        source.append(tokens)
        supervised.append(marks)
        parent.append(under)
        return len(parent) - 1

    def above(s: int) -> int:
        if s >= 0 and s not in places:
            places[s] = put(pieces[s], torch.zeros(sizes[s], dtype=torch.bool), above(parents[s]))
        return places.get(s, -1)

    completion: list[int] = []
    for n in sequences:
        s = int(batch.completion[n])
        under = above(parents[s])
        first = 0 if parents[s] >= 0 and sizes[parents[s]] else 1  # tokens that nothing precedes
        size = max(m * (1 + first), sizes[s] >> level)
        row = str(batch.rows[int(batch.group[n])]["id"])
        start = int(torch.randint(sizes[s] - size + 1, (), generator=clock.rng("region", row, sizes[s])))
        bounds = [start + size * j // m for j in range(m + 1)]
        for a, b in [(start, start + size), *zip(bounds, bounds[1:], strict=False)]:
            completion.append(put(pieces[s][a:b], torch.arange(b - a) >= first, under))
    at, device = torch.cat(source), batch.ids.device
    segment = torch.repeat_interleave(torch.arange(len(parent)), torch.tensor([len(x) for x in source]))
    return Batch(
        ids=batch.labels[at],
        labels=batch.labels[at],
        supervised=torch.cat(supervised).to(device),
        segment=segment.to(device),
        parent=torch.tensor(parent, device=device),
        completion=torch.tensor(completion, device=device),
        group=batch.group[torch.tensor(sequences, device=device)].repeat_interleave(1 + m),
        rows=batch.rows,
        altered=True,
    )


def means(cut: Batch, outputs: Any, m: int) -> Tensor:
    """[N, 1 + m, d] the embedding of each whole and of its m parts."""
    hidden = outputs.hidden.float()
    total = hidden.new_zeros(len(cut.completion), hidden.shape[1]).index_add(0, cut.owner, hidden)
    return (total / cut.lengths[:, None]).view(-1, 1 + m, hidden.shape[1])
