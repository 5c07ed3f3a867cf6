"""HoneyBee: fine-tuning in stages, each on new instructions about what the last one still gets wrong.

Each stage an instructor writes and a verifier checks rows about every topic (stage `topic_instructions`);
the model is tuned on them from where the last stage ended; its error on held-out rows of each topic
(evaluator `by_source`, column `source`) decides how many rows the topic gets next. Departs: errors are
measured by accuracy or loss against held-out answers, where the paper has another model rate free answers.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field

from luthier.methods.plans._base import Plan
from luthier.recipe.read import name_of
from luthier.registry import Range, plan


@plan(
    paper="arXiv:2310.08511",
    row="honeybee-matsci",
    use_when="rows of a field are few, two models can write and check more, and held-out rows of each topic"
    " say where the tuned model is weak.",
    costs="in each stage, writing and checking `budget` rows, and a run.",
    covers="stages that go on from each other, budgets of topics by measured error, verified rows.",
    omits="an evaluator that scores free answers, MatSci-NLP with its low-resource mode, and the authors'"
    " 52,000 rows.",
    tests=[
        "methods/plans/rounds/test_honeybee.py::test_stages_go_on_and_weak_topics_get_more",
        "methods/plans/rounds/test_honeybee.py::test_budgets_follow_errors",
        "methods/plans/rounds/test_honeybee.py::test_rows_below_the_threshold_on_any_axis_leave",
    ],
)
class HoneyBee(Plan):
    """`rounds` times topic_instructions and the recipe's objective, each from the last one's end."""

    topics: list[str] = field(default_factory=lambda: ["numbers"])  # as in the rows' column `source`
    rounds: Annotated[int, Field(ge=1), Range(1, 4)] = 3  # number of stages
    budget: Annotated[int, Field(ge=1), Range(8, 1000, log=True)] = 32  # new rows of a stage, over all topics
    writer: Any = None  # who instructs: as of stage `topic_instructions`; null: the policy
    verifier: Any = None  # who verifies; null: the writer
    least: Annotated[float, Field(ge=0, le=100)] = 95.0  # rating on every axis
    max_new_tokens: Annotated[int, Field(ge=1)] = 512  # of a reply
    # what is an error: the share of wrong held-out answers, or their loss
    error: Literal["accuracy", "loss"] = "accuracy"

    def __post_init__(self):
        if not self.topics or len(set(self.topics)) < len(self.topics):
            raise ValueError("topics: name each topic once, and at least one")

    def recipes(self, recipe):
        errors = dict.fromkeys(self.topics, 1.0)
        report, table = None, []
        for number in range(self.rounds):
            counts = budgets(errors, self.budget)
            write: dict[str, Any] = {"name": "topic_instructions", "counts": counts, "draw": number}
            write |= {"writer": self.writer, "verifier": self.verifier, "least": self.least}
            write["max_new_tokens"] = self.max_new_tokens
            evaluators = [one for one in recipe.evaluate or () if name_of(one) != "by_source"]
            changes = {"stages": [*recipe.stages, write], "evaluate": [*evaluators, "by_source"]}
            if report is not None:
                changes["init_from"] = report.folder
            report = yield recipe.but(**changes)
            table.append({"round": number, "counts": counts})
            errors = {topic: self.measured(report, topic) for topic in self.topics}
        report.stats["rounds"] = table
        return report

    def measured(self, report: Any, topic: str) -> float:
        """The error of a topic; 1 where no held-out row is of it."""
        if self.error == "loss":
            return max(0.0, float(report.after.get(f"source_loss/{topic}", 1.0)))
        return 1 - float(report.after.get(f"source_accuracy/{topic}", 0.0))


def budgets(errors: dict[str, float], total: int) -> dict[str, int]:
    """Topic -> rows, in proportion to the errors; what is left of whole numbers goes to the largest
    remainders, of equals to the larger error. All alike where there is no error.
    """
    weight = sum(errors.values())
    if weight <= 0:
        errors, weight = dict.fromkeys(errors, 1.0), float(len(errors))
    exact = {topic: total * error / weight for topic, error in errors.items()}
    out = {topic: int(share) for topic, share in exact.items()}
    order = sorted(errors, key=lambda topic: (out[topic] - exact[topic], -errors[topic]))
    for topic in order[: total - sum(out.values())]:
        out[topic] += 1
    return out
