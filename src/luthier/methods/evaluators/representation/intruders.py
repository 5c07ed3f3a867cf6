"""Intruder dimensions: singular directions of a tuned matrix that resemble none of the untuned one.

For each matrix inside the layers, the first k left singular vectors after training are compared with all of
those before: one whose largest cosine is below `epsilon` is an intruder. Low-rank tuning is reported to
produce them where full fine-tuning to the same loss does not. Weights that are trained themselves are stored
in the run folder until the end. Merger `scale_intruders` scales them, to see what they do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from luthier.methods.evaluators._base import Evaluator
from luthier.methods.tuners._base import MERGE
from luthier.model.weight_changes import effective_rank, intruding, plain_matrices
from luthier.registry import Artifact, Metric, evaluator


@evaluator(
    metrics=[
        Metric("intruders", "intruder dimensions per matrix", better="lower"),
        Metric("change_rank", "effective rank of the update"),
    ],
    artifacts=[Artifact("before-tuning.safetensors", says="trainable weights before training")],
    paper="arXiv:2410.21228",
    row="intruder-dimensions",
    requires=[MERGE],
    use_when="you study how tuning changed the weights: low-rank tuning may add singular directions"
    " that full fine-tuning does not.",
    costs="a singular value decomposition of every matrix, before and after.",
    covers="intruder dimensions by the paper's definition, and the effective rank of each update.",
    omits="the paper's models and tasks; that intruders grow with rank and forgetting is not shown.",
    tests=[
        "methods/evaluators/representation/test_intruders.py::test_a_planted_direction_is_the_first",
        "methods/evaluators/representation/test_intruders.py::test_itself_and_a_multiple_have_none",
        "methods/evaluators/representation/test_intruders.py::test_low_rank_brings_more_of_them_than_full_tuning",
    ],
)
class Intruders(Evaluator):
    """`intruders`: their mean number per matrix; `change_rank`: the mean effective rank of a
    matrix's update.
    """

    k: Annotated[int, Field(gt=0)] = 10  # number of leading singular vectors of a matrix that are examined
    # a direction whose largest cosine with the old ones is below this is an intruder
    epsilon: Annotated[float, Field(gt=0, lt=1)] = 0.5

    def run(self, roles, rows, folder, when):
        attached, path = roles.policy.attached, Path(folder) / "before-tuning.safetensors"
        now = plain_matrices(roles.policy.model)
        if when != "after":
            if when == "before":
                save_file(
                    {name: p.detach().contiguous() for name, p in now.items() if p.requires_grad}, str(path)
                )
            return {}
        before = {name: p.detach().clone() for name, p in now.items() if not p.requires_grad}
        before |= load_file(str(path), device=str(roles.policy.model.device))
        with attached.merged() as model:
            after = plain_matrices(model)
            changed = {name: p for name, p in after.items() if not torch.equal(p, before[name])}
            turned = {n for n, m in model.named_modules() if isinstance(m, Conv1D)}  # [in, out]
            counts = []
            for n, p in changed.items():
                w0, w1 = (before[n].T, p.T) if n.rpartition(".")[0] in turned else (before[n], p)
                counts.append(len(intruding(w0, w1, self.k, self.epsilon)))
            ranks = [effective_rank(p.float() - before[n].float()) for n, p in changed.items()]
        path.unlink()
        return (
            {"intruders": sum(counts) / len(counts), "change_rank": sum(ranks) / len(ranks)}
            if counts
            else {"intruders": 0.0}
        )
