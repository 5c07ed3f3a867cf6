"""How well texts are cut into sentences: F1 of the places where a sentence ends, at a threshold and at the
best one for these rows, and the sentences themselves in a file.

Held-out `text` rows are read as in use: joined, in overlapping blocks whose probabilities are averaged. The
end of a text, which is always one, does not count. The best threshold is the highest F1's on the rows that
are measured, so it is an upper bound there; `threshold` takes it over on others (Segment Any Text re-tunes it
on the sentences of the adaptation).
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from luthier.methods.architectures.text.segmenter import BOUNDARIES
from luthier.methods.architectures.text.segmenter.renderer import without_breaks
from luthier.methods.architectures.text.segmenter.splitting import best_threshold, cut, end_probabilities
from luthier.methods.evaluators._base import Evaluator
from luthier.methods.formats._base import COMPLETIONS
from luthier.registry import Artifact, Metric, evaluator
from luthier.storage import files


@evaluator(
    paper="arXiv:2406.16678",
    metrics=[
        Metric("boundary_f1", "F1 of sentence ends", unit="%", better="higher", rank=4),
        Metric(
            "boundary_f1_best", "F1 of sentence ends at the best threshold", unit="%", better="higher", rank=5
        ),
        Metric("threshold", "best threshold for sentence ends", rank=6),
    ],
    artifacts=[Artifact("sentences-*.jsonl")],
    requires=[COMPLETIONS, BOUNDARIES],
    use_when="the architecture is `segmenter`.",
    costs="one forward pass over the held-out texts, about two with overlapping blocks.",
)
class Segmentation(Evaluator):
    """`boundary_f1` at `threshold`, `boundary_f1_best` and the `threshold` it needs; sentences-<when>.jsonl
    has each text's sentences.
    """

    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5  # probability from which on a sentence ends
    block: Annotated[int, Field(ge=1)] = 256  # tokens that are read at once
    stride: Annotated[int, Field(ge=1)] = 128  # tokens from block to block

    def run(self, roles, rows, folder, when):
        values, ends, sentences = [], [], []
        for row in rows:
            text, own = without_breaks(row["completions"][0], roles.policy.architecture.separator)
            if not text:
                continue
            probabilities = end_probabilities(roles, text, self.block, self.stride)
            marks = torch.zeros(len(text) - 1)
            marks[[end - 1 for end in own]] = 1
            values.append(torch.tensor(probabilities[:-1]))
            ends.append(marks)
            sentences.append({"id": row["id"], "sentences": cut(text, probabilities, self.threshold)})
        if not values:
            return {}
        files.write_rows(folder / f"sentences-{when}.jsonl", sentences)
        probabilities, marks = torch.cat(values), torch.cat(ends)
        chosen = probabilities >= self.threshold
        right = (chosen & marks.bool()).sum()
        threshold, best = best_threshold(probabilities, marks)
        total = chosen.sum() + marks.sum()
        return {
            "boundary_f1": float(2 * right / total.clamp(min=1)),
            "boundary_f1_best": best,
            "threshold": threshold,
        }
