"""InstructMining: a rule for good rows, fitted to what a model that is tuned on them loses elsewhere.

Many random subsets are each learned in a short run, and the logarithm of the loss on fixed `target` rows is
regressed on the subset's means of indicators: lengths, perplexity, lexical diversity (MTLD), the distance to
the nearest neighbours, or any column of numbers. Terms that are not significant leave; the rows for which the
rule predicts the lowest loss stay (Cao et al., 2024). Departs: naturalness, coherence and understandability
need models of their own and are columns where you have them; the coefficients are always your model's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import field
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from luthier.data.load import load_rows
from luthier.errors import RecipeError
from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.stages._base import Stage, completion_logprobs, text_of, workspace
from luthier.methods.stages.select._embedding import embed, number, question, texts_of
from luthier.methods.stages.select._short_run import ShortRun, mean_loss, restored
from luthier.registry import Range, stage
from luthier.storage import files

WORD = re.compile(r"\w+")
MTLD = 0.72  # ratio of different words to words at which a stretch ends (McCarthy and Jarvis, 2010)
NEIGHBOURS = 6


@stage(
    example={
        "n": 3,
        "target": "toy:arithmetic/train",
        "limit": 4,
        "subsets": 5,
        "rows_of_subset": 2,
        "epochs": 1,
        "indicators": ["output_length", "perplexity"],
    },
    paper="arXiv:2307.06290",
    row="instructmining",
    requires=[COMPLETIONS, LOGPROBS],
    use_when="rows are of mixed quality, rows of what counts are at hand, and there is time for some dozens"
    " of short runs.",
    costs="`subsets` short runs, each measured on the target; the indicators of all rows.",
    covers="the fit of log loss to indicators, significant terms, the choice by the rule; indicators are"
    " columns, or lengths, perplexity, MTLD and the distance to neighbours.",
    omits="the search for the number of rows: `luthier search` over `n`.",
    tests=[
        "methods/stages/select/test_instruct_mining.py::test_the_fit_is_least_squares",
        "methods/stages/select/test_instruct_mining.py::test_planted_rows_rank_first",
        "methods/stages/select/test_instruct_mining.py::test_a_rule_of_short_runs_finds_clean_rows",
    ],
)
class InstructMining(Stage):
    """The `n` rows, or the share, of the lowest predicted loss; column `predicted_loss`."""

    target: Any = "toy:arithmetic/train"  # rows on which the loss is measured: a file, or rows
    limit: Annotated[int, Field(ge=1)] = 64  # of these at most
    # columns of numbers, or input_length, output_length, perplexity, mtld, knn
    indicators: list[str] = field(default_factory=lambda: ["output_length", "perplexity", "mtld", "knn"])
    n: Annotated[int, Field(ge=1)] | None = None  # rows that stay
    share: Annotated[float, Field(gt=0, le=1), Range(0.05, 0.5, log=True)] = 0.2  # or a share, without `n`
    subsets: Annotated[int, Field(ge=3)] = 64  # short runs
    rows_of_subset: Annotated[int, Field(ge=1)] = 256  # of each
    epochs: Annotated[int, Field(ge=1)] = 1  # of each
    rate: Annotated[float, Field(gt=0)] = 2e-4  # learning rate of each
    least: Annotated[float, Field(ge=0)] = 2.0  # size of t from which a term is significant
    encoder: str | None = None  # a sentence encoder for `knn`; null: the policy's last layer
    batch_size: Annotated[int, Field(ge=1)] = 8  # rows per pass

    def __call__(self, rows, roles):
        rows = self.usable(rows, roles)
        target = self.usable(load_rows(self.target).rows[: self.limit], roles)
        if not rows or not target:
            return []
        table = self.table(roles, rows)
        subsets, losses = self.runs(roles, rows, target)
        means = torch.stack([table[subset].mean(0) for subset in subsets])
        rule = fit(means, torch.tensor(losses, dtype=torch.float64).log(), self.least)
        scores = (rule[0] + table @ rule[1:]).tolist()
        terms = []
        for value, name in zip(rule[1:].tolist(), self.indicators, strict=True):
            if value:
                terms.append(f" {value:+.3g} {name}")
        self.warn(roles, f"log loss = {float(rule[0]):.3g}{''.join(terms)}")
        n = self.n if self.n is not None else max(1, round(self.share * len(rows)))
        chosen = torch.tensor(scores).argsort(stable=True)[:n].tolist()
        marked = []
        for row, score in zip(rows, scores, strict=True):
            marked.append({**row, "predicted_loss": score})
        return self.drop(roles, marked, chosen, f"their predicted loss is not among the {n} lowest")

    def table(self, roles: Any, rows: list[dict]) -> Tensor:
        """[N, indicators] in float64; a column of that name comes before what is computed here."""
        columns = []
        for name in self.indicators:
            if name in COMPUTED and not all(name in row for row in rows):
                columns.append(COMPUTED[name](self, roles, rows))
            else:
                columns.append([number(row, [name], self.name) for row in rows])
        return torch.tensor(columns, dtype=torch.float64).T

    def runs(self, roles: Any, rows: list[dict], target: list[dict]) -> tuple[list[list[int]], list[float]]:
        """Places of each subset, and the loss of the model that learned it; those of an earlier attempt are
        read back.
        """
        place = workspace(roles, self.name)
        path = place and place / "losses.jsonl"
        losses: list[float] = []
        if path is not None and path.is_file():
            losses = [line["loss"] for line in files.read_rows(path)]
        subsets = []
        for k in range(self.subsets):
            rng = roles.clock.rng("instruct_mining", k, at=0)
            subset = torch.randperm(len(rows), generator=rng)[: self.rows_of_subset].tolist()
            subsets.append(subset)
            if k < len(losses):
                continue
            with restored(roles):
                run = ShortRun(roles, self.rate, self.batch_size, f"{self.name} {k}")
                for epoch in range(self.epochs):
                    run.epoch([rows[i] for i in subset], epoch, self.epochs)
                losses.append(mean_loss(roles, target, self.batch_size))
            if path is not None:
                files.write_rows(path, [{"subset": i, "loss": loss} for i, loss in enumerate(losses)])
        return subsets, losses[: self.subsets]

    # ------------------------------------------------------------------------------------------ indicators

    def input_length(self, roles: Any, rows: list[dict]) -> list[float]:
        return [float(len(question(row))) for row in rows]

    def output_length(self, roles: Any, rows: list[dict]) -> list[float]:
        return [float(len(text_of(roles, row["completions"][0]))) for row in rows]

    def perplexity(self, roles: Any, rows: list[dict]) -> list[float]:
        """The logarithm: means of it are those of a loss."""
        values = []
        for answers in completion_logprobs(roles.policy, roles, rows, self.batch_size):
            values.append(-sum(answers[0]) / max(1, len(answers[0])))
        return values

    def mtld(self, roles: Any, rows: list[dict]) -> list[float]:
        return [mtld(text_of(roles, row["completions"][0])) for row in rows]

    def knn(self, roles: Any, rows: list[dict]) -> list[float]:
        """The distance to the sixth nearest row."""
        vectors = embed(roles, texts_of(roles, rows, "row"), self.encoder, self.batch_size)
        k = min(NEIGHBOURS + 1, len(rows))
        out = []
        for some in vectors.split(1024):
            out += torch.cdist(some, vectors).kthvalue(k, dim=1).values.tolist()
        return out


COMPUTED: dict[str, Callable[[InstructMining, Any, list[dict]], list[float]]] = {
    "input_length": InstructMining.input_length,
    "output_length": InstructMining.output_length,
    "perplexity": InstructMining.perplexity,
    "mtld": InstructMining.mtld,
    "knn": InstructMining.knn,
}


def mtld(text: str) -> float:
    """Words for each stretch in which the ratio of different words to words falls to 0.72; mean of both
    directions.
    """
    words = WORD.findall(text.lower())
    return (stretches(words) + stretches(words[::-1])) / 2


def stretches(words: Sequence[str]) -> float:
    if not words:
        return 0.0
    factors, start = 0.0, 0
    different: set[str] = set()
    ratio = 1.0
    for place, word in enumerate(words):
        different.add(word)
        ratio = len(different) / (place + 1 - start)
        if ratio <= MTLD:
            factors += 1
            start, ratio = place + 1, 1.0
            different = set()
    factors += (1 - ratio) / (1 - MTLD)
    return len(words) / factors if factors else float(len(words))


def least_squares(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """[N, k], [N] in float64 -> coefficients [1 + k], the constant first, and their values of t."""
    full = torch.cat([torch.ones(len(x), 1, dtype=x.dtype), x], 1)
    scale = full.abs().amax(0).clamp(min=1e-300)
    design = full / scale
    inverse = torch.linalg.pinv(design.T @ design, hermitian=True)
    coefficients = torch.linalg.lstsq(design, y[:, None], driver="gelsd").solution[:, 0]
    freedom = max(1, len(x) - full.shape[1])
    variance = (y - design @ coefficients).square().sum() / freedom
    errors = (variance * inverse.diagonal()).clamp(min=1e-300).sqrt()
    return coefficients / scale, coefficients / errors


def fit(x: Tensor, y: Tensor, least: float) -> Tensor:
    """[1 + k] coefficients by least squares; the least significant term leaves, again and again, until
    every size of t is `least` or more. At least one stays.
    """
    if not torch.isfinite(y).all():
        raise RecipeError(
            "stage 'instruct_mining': a short run ended in a loss of zero or in none; lower `rate`"
        )
    terms = list(range(x.shape[1]))
    while True:
        coefficients, t = least_squares(x[:, terms], y)
        weakest = int(t[1:].abs().argmin())
        if len(terms) == 1 or float(t[1:].abs().min()) >= least:
            break
        del terms[weakest]
    rule = torch.zeros(1 + x.shape[1], dtype=x.dtype)
    rule[0] = coefficients[0]
    for place, value in zip(terms, coefficients[1:].tolist(), strict=True):
        rule[1 + place] = value
    return rule
