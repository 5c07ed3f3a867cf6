"""Does fine-tuning teach facts, or only the questions that it was trained on? Runs of more and more epochs,
each asked the questions of training and others that need the same facts.

`sets` names sets of facts (column `source`). A run is trained on the questions of one set. It is measured on
the same questions, which is memorisation; on others that follow from the same facts, reworded, turned into
comparisons or put to use, which is generalisation; and on unrelated ones, for what is lost. Held-out rows
bring all of these: the questions of training under the name of their set. The table has each number of
epochs, with the gap between both accuracies (Wu et al., 2024).

Departs: accuracy is that of greedy answers of exactly the right tokens, where the paper lets a language model
judge long answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from statistics import fmean
from typing import Annotated, Any

from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.plans._base import Plan
from luthier.methods.plans.continual._transfer import change_of_rows
from luthier.recipe.recipe import key_of
from luthier.registry import plan

EVERY = 10**9  # rows: all that there are


@plan(
    paper="arXiv:2411.05059",
    row="finetunebench",
    use_when="rows teach new facts, or new values of known ones, and you ask whether the model can use them"
    " in questions that it was not trained on.",
    costs="a run for each set, variant and number of epochs, and all held-out rows read before and after"
    " each.",
    covers="memorisation, generalisation by kind of question, their gap and the change on unrelated questions"
    " with its interval, over epochs, for sets of new and of updated facts; variants are any changes to the"
    " recipe; a generator of people and of renamed functions at toy scale (`luthier.toy.knowledge`).",
    omits="the paper's four data sets, which its repository has; a language model as the judge of answers;"
    " training with the key word masked.",
    tests=[
        "methods/plans/studies/test_knowledge_injection.py::test_an_oracle_knows_everything_and_a_constant_noth"
        "ing",
        "methods/plans/studies/test_knowledge_injection.py::test_runs_read_their_set_and_the_table_has_the_gap",
        "methods/plans/studies/test_knowledge_injection.py::test_fifty_people_are_memorized_in_thirty_epochs",
    ],
)
class KnowledgeInjection(Plan):
    """A run for each set, variant and number of epochs. The result is the one that generalises best."""

    # values of the column in training: a set of facts -> the values of held-out questions that need them
    sets: Annotated[dict[str, list[str]], Field(min_length=1)] = field(default_factory=lambda: {"None": []})
    # numbers of epochs, each a run of its own
    epochs: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (1, 5, 10, 20, 30)
    # name of a variant -> changes to the recipe
    variants: Annotated[dict[str, dict[str, Any]], Field(min_length=1)] = field(
        default_factory=lambda: {"recipe": {}}
    )
    unrelated: str | None = None  # value of questions that need none of these facts
    column: str = "source"  # column that names the set of a row, in training and held-out rows
    metric: str = "source_accuracy"  # the score, by source; higher is better

    def __post_init__(self):
        derived = {name for names in self.sets.values() for name in names}
        if both := sorted(derived & {*self.sets}):
            raise RecipeError(f"plan 'knowledge_injection': '{both[0]}' is both trained on and held out")
        for name, changes in self.variants.items():
            for key in ("num_train_epochs", "max_steps", "stages", "evaluate"):
                if key in {key_of(one) for one in changes}:
                    raise RecipeError(f"plan 'knowledge_injection': variant '{name}' cannot change {key}")

    def recipes(self, recipe):
        cells = []
        for name in self.sets:
            for variant in self.variants:
                cells += [(name, variant, number) for number in self.epochs]
        reports = yield [self.run_of(recipe, *cell) for cell in cells]
        table, best, highest = [], reports[0], -1.0
        for cell, report in zip(cells, reports, strict=True):
            line = self.line(cell, report)
            table.append(line)
            score = line["generalisation"]
            score = line["memorisation"] if score is None else score
            if score > highest:
                best, highest = report, score
        best.stats["table"] = table
        for name in self.sets:
            best.notes.append(self.sentence([line for line in table if line["set"] == name]))
        return best

    def run_of(self, recipe: Any, name: str, variant: str, epochs: int) -> Any:
        """The recipe on one set of facts for so many epochs."""
        quotas = {"name": "quotas", "column": self.column, "counts": {name: EVERY}, "cap": 0}
        return recipe.but(
            **self.variants[variant],
            num_train_epochs=float(epochs),
            max_steps=None,
            stages=[quotas, *(recipe.stages or ())],
            evaluate=[*(recipe.evaluate or ()), {"name": "by_source", "column": self.column}],
        )

    def line(self, cell: tuple[str, str, int], report: Any) -> dict[str, Any]:
        """Of the table."""
        name, variant, epochs = cell
        line: dict[str, Any] = {"set": name, "variant": variant, "epochs": epochs}
        line["memorisation"] = memorised = self.score(report.after, name)
        scores = {one: self.score(report.after, one) for one in self.sets[name]}
        generalised = fmean(scores.values()) if scores else None
        line["generalisation"] = generalised
        line["gap"] = None if generalised is None else memorised - generalised
        line |= scores
        if self.unrelated is not None:
            before, after = (self.score(one, self.unrelated) for one in (report.before, report.after))
            line["unrelated"] = after - before
            metric = f"{self.metric}/{self.unrelated}"
            change = change_of_rows(metric, (report.folder, "before"), (report.folder, "after"))
            if change is not None:
                line |= {"unrelated low": change.low, "unrelated high": change.high}
        return line

    def score(self, metrics: Mapping[str, Any], source: str) -> float:
        """Raises RecipeError where no held-out row is of this source."""
        try:
            return float(metrics[f"{self.metric}/{source}"])
        except KeyError:
            raise RecipeError(
                f"no held-out row has {self.column} '{source}'; give each source of `eval_data` its name, and"
                " bring the questions of training too, e.g. {path: ..., source: " + source + "}"
            ) from None

    def sentence(self, lines: list[dict[str, Any]]) -> str:
        """What became of a set, at the last number of epochs of its first variant."""
        line = [one for one in lines if one["variant"] == lines[0]["variant"]][-1]
        text = f"{line['set']}, {line['epochs']} epochs: {line['memorisation']:.0%} memorised"
        if line["generalisation"] is not None:
            text += f", {line['generalisation']:.0%} in other questions"
        if "unrelated" in line:
            text += f", unrelated questions {line['unrelated']:+.1%}"
        return text
