"""Expectation-adjusted distinct n-grams: diversity of samples that does not fall because answers are longer.

Distinct n-grams over those that a uniform draw of as many would have on average, U / (V (1 - ((V-1)/V)^C)),
as a mean over n (Liu et al., 2022). Two numbers, as Kirk et al. (2024) compare SFT, best-of-n and PPO with:
within the samples of one prompt, and across prompts with one sample of each. A model can lose the first and
have the second. Departs: n-grams are of the model's tokens and V is its vocabulary; embeddings are the
policy's own last states, not a sentence transformer's, unless `encoder` names one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from luthier.methods.architectures._base import GENERATE
from luthier.methods.evaluators._base import Evaluator, keep
from luthier.methods.stages.select._embedding import embed
from luthier.registry import Metric, evaluator


@evaluator(
    metrics=[
        Metric("ead_per_prompt", "distinct n-grams within prompts (EAD)", better="higher"),
        Metric("ead_across_prompts", "distinct n-grams across prompts (EAD)", better="higher"),
        Metric("embedding_diversity", "diversity of embeddings within prompts", better="higher"),
    ],
    paper="arXiv:2310.06452",
    row="rlhf-generalisation-diversity",
    requires=[GENERATE],
    use_when="answers became longer or shorter in tuning and you ask whether they became less diverse,"
    " within one prompt or over all of them.",
    costs="`samples` answers to each of `n` prompts; with `embeddings` a forward pass over them.",
    covers="EAD over n = 1 to 5 and embedding diversity, within prompts and EAD across them.",
    omits="diversity by natural language inference; the study of SFT, best-of-n and PPO on prompts of another"
    " distribution.",
    tests=[
        "methods/evaluators/quality/test_expected_distinct.py::test_the_closed_form",
        "methods/evaluators/quality/test_expected_distinct.py::test_length_matters_less_than_to_distinct_n",
        "methods/evaluators/quality/test_expected_distinct.py::test_equal_samples_and_a_low_temperature",
    ],
)
class ExpectedDistinct(Evaluator):
    """`ead_per_prompt`, `ead_across_prompts`, and `embedding_diversity`: 1 minus the mean cosine of two
    answers to one prompt.
    """

    n: Annotated[int, Field(ge=1)] = 16  # prompts that are answered
    samples: Annotated[int, Field(ge=2)] = 8  # answers per prompt
    longest: Annotated[int, Field(ge=1)] = 5  # n-grams up to this n
    temperature: Annotated[float, Field(gt=0)] = 1.0  # sampling temperature
    max_new_tokens: Annotated[int, Field(ge=1)] = 48  # tokens per answer
    embeddings: bool = False  # is the diversity of embeddings measured, too?
    encoder: str | None = None  # folder or hub name of an encoder for them; the policy itself if not given

    def run(self, roles, rows, folder, when):
        rows = [row for row in rows if row["prompt"]][: self.n]
        if not rows:
            return {}
        written = roles.policy.generate(
            [roles.renderer.prompt(row) for row in rows],
            seeds=[roles.clock.derive_seed("expected_distinct", row["id"], at=0) for row in rows],
            n=self.samples,
            temperature=self.temperature,
            max_new_tokens=self.max_new_tokens,
            stop=roles.renderer.stop_ids,
        )
        size = len(roles.renderer.tokenizer)
        within = {}
        for row, answers in zip(rows, written, strict=True):
            within[str(row["id"])] = ead(answers, size, self.longest)
        across = []
        for k in range(self.samples):
            across.append(ead([answers[k] for answers in written], size, self.longest))
        by_metric = {"ead_per_prompt": within}
        if self.embeddings:
            by_metric["embedding_diversity"] = self.spread_of(roles, rows, written)
        keep(folder, when, **by_metric)
        metrics = {name: mean(list(by_row.values())) for name, by_row in by_metric.items()}
        return {**metrics, "ead_across_prompts": mean(across)}

    def spread_of(self, roles, rows, written) -> dict[str, float]:
        """Row id -> 1 minus the mean cosine of its samples."""
        spread = {}
        for row, answers in zip(rows, written, strict=True):
            texts = [roles.renderer.answer(ids) for ids in answers]
            spread[str(row["id"])] = cosine_diversity(embed(roles, texts, self.encoder, self.samples))
        return spread


def ead(texts: Sequence[Sequence[int]], size: int, longest: int = 5) -> float:
    """Texts as token ids and the size of the vocabulary -> expectation-adjusted distinct n-grams, the mean
    over n from 1 to `longest` of which the texts have any; 0 where they are empty.
    """
    values = []
    for n in range(1, longest + 1):
        grams: list[tuple[int, ...]] = []
        for ids in texts:
            grams += [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
        if grams:
            expected = size * (1 - ((size - 1) / size) ** len(grams))
            values.append(len(set(grams)) / expected)
    return mean(values) if values else 0.0


def cosine_diversity(vectors: Tensor) -> float:
    """Unit vectors [n, d] -> 1 minus the mean cosine of two of them."""
    one, other = torch.triu_indices(len(vectors), len(vectors), 1)
    return 1.0 - float((vectors[one] * vectors[other]).sum(1).mean())


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
