"""Zero-shot classification by questions: the area under the ROC curve of the probability of "yes", over the
texts of a question.
"""

from collections import defaultdict

import torch
from torch import Tensor

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.evaluators._base import Evaluator, batches
from luthier.methods.formats._base import COMPLETIONS
from luthier.registry import Metric, evaluator


@evaluator(
    metrics=[
        Metric("auc", "ROC AUC", better="higher"),
        Metric("auc_ensemble", "ROC AUC, descriptions averaged", better="higher"),
    ],
    paper="arXiv:2104.04670",
    row="meta-tuning",
    requires=[COMPLETIONS, LOGPROBS],
    use_when="rows come from stage `yes_no` and you measure zero-shot classification.",
    costs="one forward pass over the held-out rows.",
)
class YesNoAUC(Evaluator):
    """`auc`: mean over questions of the area under the ROC curve of P(yes) / (P(yes) + P(no));
    `auc_ensemble`: the same with the scores of all descriptions of a label averaged first. Rows come from
    stage `yes_no`.
    """

    batch_size: int | None = None  # rows read at once; by default 16, and more where they are short
    answers: tuple[str, str] = ("yes", "no")  # the two possible completions

    def run(self, roles, rows, folder, when):
        prompts = [
            {**r, "completions": [*self.answers], "truth": r["completions"][0] == self.answers[0]}
            for r in rows
            if "question" in r
        ]
        scored = []
        for batch in batches(roles, prompts, self.batch_size):
            yes = batch.sums(roles.policy.logprobs(batch)).view(-1, 2).softmax(-1)[:, 0].tolist()
            scored += [(r, y) for r, y in zip(batch.rows, yes, strict=True)]
        questions, labels = defaultdict(list), defaultdict(lambda: defaultdict(list))
        for row, yes in scored:
            questions[row.get("task", ""), row["question"]].append((yes, row["truth"]))
            labels[row.get("task", ""), row.get("asked")][row["id"].rsplit("/", 1)[0]].append(
                (yes, row["truth"])
            )
        single = [auc(*map(torch.tensor, zip(*pairs, strict=True))) for pairs in questions.values()]
        joint = [
            [(sum(y for y, _ in ps) / len(ps), ps[0][1]) for ps in of.values()] for of in labels.values()
        ]
        ensemble = [auc(*map(torch.tensor, zip(*pairs, strict=True))) for pairs in joint]
        out = {}
        for name, values in (("auc", single), ("auc_ensemble", ensemble)):
            defined = [v for v in values if v is not None]
            out |= {name: sum(defined) / len(defined)} if defined else {}
        return out


def auc(scores: Tensor, truth: Tensor) -> float | None:
    """Area under the ROC curve; ties count a half. None where all truths are alike."""
    up, down = scores[truth], scores[~truth]
    if not len(up) or not len(down):
        return None
    gap = up[:, None] - down
    return float(((gap > 0).float() + 0.5 * (gap == 0).float()).mean())
