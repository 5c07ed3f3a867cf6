"""Private synthetic text: a model is tuned on labelled rows with differential privacy, writes rows of its
own, and these alone train what is wanted.

The first run learns texts from their labels (stage `label_prefix`) with estimator `dp_sgd`, a LoRA by
default: few parameters lose least to the noise. The second runs the recipe on texts that the first model
wrote (stage `label_texts`), without privacy, since what follows from a private model is as private as it is;
rows of the first are read only to measure (Kurakin et al., 2023). The budget stands in the first run's log
and card.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any

from pydantic import Field

from luthier.methods.plans._base import Plan
from luthier.registry import plan


@plan(
    paper="arXiv:2306.01684",
    row="dp-synthetic-text",
    use_when="labelled rows are private and others are to train on them, again and again, with any method:"
    " give them texts that were written under differential privacy.",
    costs="a private run, with a backward pass for each row, and a sampled text for each new row.",
    covers="DP fine-tuning on prefixes, conditional sampling, a classifier on the texts alone. Clipping,"
    " noise and the accountant are those of `dp_sgd`, whose tests show them.",
    omits="a public model whose pretraining data was deduplicated against the private rows: the user's to"
    " choose; prompt tuning beside LoRA is `tuner: prompt` in `writer`; hyperparameters of the classifier"
    " are searched on the texts by `luthier search`.",
    tests=[
        "methods/plans/sequences/test_private_texts.py::test_private_rows_meet_the_private_run_alone",
        "methods/stages/curate/test_label_prefix.py::test_the_prefix_carries_no_loss",
        "methods/estimators/private/test_dp_sgd.py::test_the_update_is_the_sum_of_clipped_row_gradients",
        "methods/estimators/private/test_dp_sgd.py::test_noise_has_the_spread_that_is_accounted_for",
        "methods/estimators/private/test_dp_sgd.py::test_epsilon_is_that_of_other_accountants",
    ],
)
class PrivateTexts(Plan):
    """Two runs. The second is the plan's result."""

    epsilon: Annotated[float, Field(gt=0)] = 4.0  # that the first run spends at most
    n: Annotated[int, Field(ge=1)] = 1000  # texts of each label
    # the labels, public; empty: the names that the rows have
    labels: list[str] = field(default_factory=list)
    domain: str = ""  # stands before each label
    max_new_tokens: Annotated[int, Field(ge=1)] = 256  # of a text
    # changes of the recipe for the first run, e.g. max_steps
    writer: dict[str, Any] = field(default_factory=lambda: {"tuner": "lora"})

    def recipes(self, recipe):
        prefix = {"name": "label_prefix", "domain": self.domain}
        private: dict[str, Any] = {
            "objective": "sft",
            "architecture": "auto",
            "evaluate": ["loss"],
            "estimator": {"name": "dp_sgd", "target_epsilon": self.epsilon},
            **self.writer,
        }
        first = yield recipe.but(stages=[*(recipe.stages or ()), prefix], **private)
        write = {
            "name": "label_texts",
            "writer": str(first.folder),
            "n": self.n,
            "labels": self.labels,
            "domain": self.domain,
            "max_new_tokens": self.max_new_tokens,
        }
        report = yield recipe.but(stages=[write])
        spent = first.stats.get("epsilon")
        report.notes.append(
            f"trained on {self.n} written texts of each label; the private rows were read by"
            f" {first.folder} alone, within epsilon {self.epsilon:g}" + (f" ({spent})" if spent else "")
        )
        return report
