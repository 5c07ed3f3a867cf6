"""Trans-LoRA: what a tuner learned on one base model is learned by another, without the data.

While the data is there, a source model is tuned on it, and once more as a discriminator, which tells inputs
of the data from those that the model writes after a few seeds (stage `origin_rows`). The recipe's own model
then writes inputs from these seeds, the discriminator selects, the tuned source answers (stage
`transfer_rows`), and the recipe is trained on these rows alone: no label of the data reaches it. Its tuner
may be another than the source's, and a chain goes on with `source_run` and `discriminator_run` (Wang et al.,
2024).

Departs: the seeds are drawn at random; the paper's were cleaned by hand.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any

from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.plans._base import Plan
from luthier.recipe.recipe import key_of
from luthier.registry import plan


@plan(
    paper="arXiv:2405.17258",
    row="trans-lora",
    use_when="a base model is replaced by a newer one and its tuners are to move along, though their data"
    " may not be kept.",
    costs="three runs; the last writes an input, and more where they are rejected, and an answer for each"
    " row.",
    covers="source, discriminator and transfer to another model, tuner and tokenizer, chains from earlier"
    " runs, and the control without the discriminator.",
    omits="seeds that are cleaned by hand, random Wikipedia text as a control, the paper's benchmarks.",
    tests=[
        "methods/plans/sequences/test_trans_lora.py::test_three_runs_and_what_each_reads",
        "methods/plans/sequences/test_trans_lora.py::test_a_tuner_moves_to_another_model_without_labels",
    ],
)
class TransLoRA(Plan):
    """Runs: the source, its discriminator, and the recipe on rows that both make. The last is the result."""

    # changes of the recipe for the source model, e.g. {model: OTHER, tuner: lora}
    source: dict[str, Any] = field(default_factory=dict)
    # further changes for the discriminator, e.g. {num_train_epochs: 1}
    discriminator: dict[str, Any] = field(default_factory=dict)
    source_run: str | None = None  # folder of a source that is tuned already, or of an earlier transfer
    discriminator_run: str | None = None  # folder of a discriminator that is tuned already
    select: bool = True  # by the discriminator; false: every written input stays
    n: Annotated[int, Field(ge=1)] = 250  # rows to learn from
    seeds: Annotated[int, Field(ge=1)] = 5  # inputs of the data that models write after
    dataset: str = "this data set"  # its name, in the discriminator's question
    temperature: Annotated[float, Field(ge=0)] = 1.0  # of written inputs
    max_new_tokens: Annotated[int, Field(ge=1)] = 256  # of an input or answer
    attempts: Annotated[int, Field(ge=1)] = 10  # written inputs at most, for each row

    def __post_init__(self):
        for name in ("source", "discriminator"):
            changes = {key_of(key) for key in getattr(self, name)}
            if reserved := sorted(changes & {"data", "stages", "plan"}):
                raise RecipeError(f"plan 'trans_lora': {name} cannot change {reserved[0]}")

    def recipes(self, recipe):
        source, discriminator = self.source_run, self.discriminator_run
        if source is None:
            report = yield recipe.but(**self.source)
            source = str(report.folder)
        written = {
            "dataset": self.dataset,
            "temperature": self.temperature,
            "max_new_tokens": self.max_new_tokens,
        }
        if self.select and discriminator is None:
            origin = {"name": "origin_rows", "seeds": self.seeds, **written}
            changes = {"evaluate": ["loss"], "eval_data": 0, **self.source, **self.discriminator}
            report = yield recipe.but(**changes, stages=[*(recipe.stages or ()), origin])
            discriminator = str(report.folder)
        transfer = {
            "name": "transfer_rows",
            "n": self.n,
            "source": source,
            "discriminator": discriminator if self.select else None,
            "attempts": self.attempts,
            **written,
        }
        seeds = {"name": "random_rows", "n": self.seeds}
        return (yield recipe.but(stages=[*(recipe.stages or ()), seeds, transfer]))
