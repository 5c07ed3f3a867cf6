"""Internal consistency: does a model agree with itself, and does that say when it is right?

Over samples of one question: the share of the most frequent answer and the entropy of answers. Over layers:
how often the likeliest token behind an inner layer, read by the output head, is that behind the last one.
Each with its rank correlation with being right, where a reward says that (Liang et al., 2024). Departs:
answers count as equal where they are the same words in any case; layers are read along the greedy answer.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from luthier.methods.architectures._base import GENERATE
from luthier.methods.evaluators._base import Evaluator, keep
from luthier.methods.evaluators._trajectory import spearman
from luthier.model.anatomy import layer_of
from luthier.model.outputs import Outputs
from luthier.model.policy import eval_mode
from luthier.registry import Metric, build, evaluator


@evaluator(
    metrics=[
        Metric("majority_share", "samples with the most frequent answer", unit="%"),
        Metric("answer_entropy", "entropy of answers (nats)"),
        Metric("layer_agreement", "inner layers that predict the final token", unit="%"),
        Metric("consistency_correlation", "rank correlation of majority share and accuracy", better="higher"),
        Metric("layer_correlation", "rank correlation of layer agreement and accuracy", better="higher"),
    ],
    paper="arXiv:2407.14507",
    row="internal-consistency-survey",
    requires=[GENERATE],
    use_when="you ask whether tuning made a model surer of itself, and whether agreement with itself may"
    " decide which answers are shown.",
    costs="`samples` answers to each of `n` prompts; with `layers` a greedy one and a forward pass over it.",
    covers="majority share and entropy of samples, agreement of each layer with the last, and the correlation"
    " of both with being right.",
    omits="clusters by meaning; agreement of decoding strategies; stated confidence; updates by feedback.",
    tests=[
        "methods/evaluators/quality/test_self_consistency.py::test_equal_and_different_samples",
        "methods/evaluators/quality/test_self_consistency.py::test_the_last_layer_agrees_with_itself",
        "methods/evaluators/quality/test_self_consistency.py::test_agreement_that_says_when_it_is_right",
    ],
)
class SelfConsistency(Evaluator):
    """`majority_share`, `answer_entropy`; with `layers` `layer_agreement/N` of layer N counted from the
    input and their mean without the last, `layer_agreement`; with a reward `consistency_correlation`, of
    the majority share with the mean reward of samples, and `layer_correlation`.
    """

    n: Annotated[int, Field(ge=1)] = 32  # prompts that are answered
    samples: Annotated[int, Field(ge=2)] = 8  # answers of each
    layers: bool = True  # are layers compared, too?
    reward: Any = None  # a reward that says which answers are right
    temperature: Annotated[float, Field(gt=0)] = 1.0  # sampling temperature
    max_new_tokens: Annotated[int, Field(ge=1)] = 32  # tokens per answer

    @property
    def active_requires(self):
        return self.requires | (build("reward", self.reward).requires if self.reward else frozenset())

    def run(self, roles, rows, folder, when):
        rows = [row for row in rows if row["prompt"]][: self.n]
        if not rows:
            return {}
        written = self.answers(roles, rows, self.samples, self.temperature)
        judge = build("reward", self.reward) if self.reward else None
        by_row: dict[str, dict[str, float]] = {"majority_share": {}, "answer_entropy": {}}
        right = {}
        for row, answers in zip(rows, written, strict=True):
            texts = [roles.renderer.answer(ids) for ids in answers]
            name = str(row["id"])
            by_row["majority_share"][name], by_row["answer_entropy"][name] = agreement(texts)
            if judge is not None:
                scores = judge.scores(row, texts)
                right[name] = sum(scores) / len(scores)
        metrics = {}
        if self.layers:
            lens = self.lens(roles, rows)
            by_row["layer_agreement"] = {name: mean(share[:-1]) for name, share in lens.items()}
            for k in range(min(map(len, lens.values()), default=0)):
                metrics[f"layer_agreement/{k}"] = mean([share[k] for share in lens.values()])
        by_row = {name: column for name, column in by_row.items() if column}
        keep(folder, when, **by_row)
        metrics |= {name: mean(list(column.values())) for name, column in by_row.items()}
        links = {"consistency_correlation": "majority_share", "layer_correlation": "layer_agreement"}
        for link, name in links.items():
            common = [row for row in by_row.get(name, {}) if row in right]
            pairs = torch.tensor([[by_row[name][row], right[row]] for row in common])
            value = spearman(pairs[:, 0], pairs[:, 1]) if len(common) > 2 else None
            metrics |= {} if value is None else {link: value}
        return metrics

    def answers(self, roles: Any, rows: Sequence[dict], n: int, temperature: float) -> list[list[list[int]]]:
        return roles.policy.generate(
            [roles.renderer.prompt(row) for row in rows],
            rows=rows,
            seeds=[roles.clock.derive_seed("self_consistency", row["id"], at=0) for row in rows],
            n=n,
            temperature=temperature,
            max_new_tokens=self.max_new_tokens,
            stop=roles.renderer.stop_ids,
        )

    @torch.no_grad()
    def lens(self, roles: Any, rows: Sequence[dict]) -> dict[str, list[float]]:
        """Row id -> of each layer the share of the greedy answer's tokens that it predicts as the last
        does.
        """
        norm = final_norm(roles.policy.model)
        shares = {}
        for row, ((ids,)) in zip(rows, self.answers(roles, rows, 1, 0.0), strict=True):
            text = roles.renderer.answer(ids)
            if not text or norm is None:
                continue
            batch = roles.batch([{**row, "completions": [text], "scores": [1.0]}])
            with eval_mode(roles.policy.model):
                layers = roles.policy.layers(batch)
                outputs = roles.policy.outputs(batch)
                if not torch.allclose(norm(layers[-1]), outputs.hidden, rtol=1e-2, atol=1e-3):
                    return {}  # something else stands between the last layer and the head
                shares[str(row["id"])] = agreement_of_layers([norm(h) for h in layers], outputs)
        return shares


def agreement(texts: Sequence[str]) -> tuple[float, float]:
    """Answers -> the share of the most frequent one, and the entropy of their frequencies in nats."""
    counts = Counter(" ".join(text.lower().split()) for text in texts)
    shares = [count / len(texts) for count in counts.values()]
    return max(shares), -sum(share * math.log(share) for share in shares)


def agreement_of_layers(layers: Sequence[Tensor], outputs: Outputs) -> list[float]:
    """States [T, d] behind each layer as the head reads them -> how often each predicts as the last."""
    last = Outputs(layers[-1], outputs.head, outputs.labels, outputs.role_context).first()
    shares = []
    for states in layers:
        own = Outputs(states, outputs.head, outputs.labels, outputs.role_context).first()
        shares.append(float((own == last).double().mean()))
    return shares


def final_norm(model: nn.Module) -> nn.Module | None:
    """The norm between the last layer and the head: the last one that stands in no layer."""
    norms = []
    for name, module in model.named_modules():
        if "norm" in type(module).__name__.lower() and layer_of(f"{name}.") is None:
            norms.append(module)
    return norms[-1] if norms else None


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
