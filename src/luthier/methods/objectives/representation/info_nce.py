"""InfoNCE, symmetric, as CLIP and CLAP are trained: every row is to find its own answer among those of its
micro-batch, and every answer its row.

S[i, j] is the logit that row i gives to the first token, or class, of row j's answer: with architecture
`audio_text` the scaled cosine of a recording and a name. The loss of a row is half the cross-entropy of its
row of S and half that of its column. Where S is the same everywhere it is the logarithm of the number of
rows. Departs: rows with one answer are all positives of each other, and the mean over them is taken; the
papers' captions hardly repeat, and there it is the same.
"""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from luthier.methods.architectures._base import TOPK
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.objectives._base import Objective
from luthier.methods.objectives.representation._features import answered
from luthier.registry import objective


@objective(
    paper="arXiv:2103.00020",
    row="audio-language-survey",
    requires=[COMPLETIONS, TOPK],
    contract={
        "accumulation": "pairs are formed within a micro-batch; per_device_train_batch_size is how many rows"
        " are compared"
    },
    use_when="two towers learn from pairs, such as recordings and their names (architecture `audio_text`).",
    costs="compares each row with all of its micro-batch; no further forward pass.",
    starting_rate="that of `sft`.",
    covers="the symmetric contrastive loss of audio-language models; log N where all pairs look alike, and"
    " the loss of transformers' CLIP.",
    omits="negatives beyond a micro-batch or from other processes; SigLIP's pairwise sigmoid.",
    tests=[
        "methods/objectives/representation/test_info_nce.py::test_without_differences_it_is_log_n",
        "methods/objectives/representation/test_info_nce.py::test_it_is_the_loss_of_clip",
    ],
)
class InfoNCE(Objective):
    """Half the cross-entropy of rows over answers and half that of answers over rows."""

    unit = "sequence"

    # divides the scores, beside the network's own temperature
    temperature: Annotated[float, Field(gt=0)] = 1.0

    def count(self, batch):
        return len(answered(batch))

    def rows_of_units(self, batch):
        return batch.group[answered(batch)]

    def loss(self, roles, batch):
        first = batch.place == 0
        answers = batch.labels[batch.targets][first]
        candidates = answers.expand(len(first), -1)
        scores = roles.policy.outputs(batch).apply(lambda z, ids: z.gather(1, ids), candidates)
        return symmetric(scores[first].float() / self.temperature, answers)


def symmetric(scores: Tensor, answers: Tensor) -> Tensor:
    """[N, N] scores of rows and answers, [N] the answers -> [N] half of either cross-entropy."""
    positive = (answers[:, None] == answers).float()
    positive = positive / positive.sum(1, keepdim=True)
    by_row = -(scores.log_softmax(1) * positive).sum(1)
    by_answer = -(scores.log_softmax(0) * positive).sum(0)
    return (by_row + by_answer) / 2
