"""A solution in steps, each labelled right or wrong: for process reward models."""

from luthier.methods.formats._base import BadRow, Format, opened, side, text, truth
from luthier.registry import Column, row_format

STEPS = Column(
    "steps", says="rows with the `steps` of a solution and a label for each", example=(["one", "two"],)
)


@row_format(
    provides=[STEPS],
    use_when="rows are solutions in steps with a right or wrong label each, as in PRM800K, for process"
    " reward models.",
)
class Stepwise(Format):
    """{"prompt": "2+2*3?", "completions": ["2*3=6", "2+6=9"], "labels": [true, false]}, the steps joined by
    newlines.

    `steps` and `step_labels` (one true/false a step) are kept beside the completion.
    """

    reading = "steps of a solution, each marked right or wrong in `labels`"
    objective = "process_reward"
    advice = "architecture: reward_model; stages: [mark_steps]"
    columns = ("prompt completions labels",)

    def read(self, raw):
        steps, marks = opened(raw.get("completions"), "completions"), opened(raw.get("labels"), "labels")
        if (
            not isinstance(steps, list)
            or not steps
            or not isinstance(marks, list)
            or len(steps) != len(marks)
        ):
            raise BadRow("completions and labels are not two lists of the same length")
        steps = [text({"completions": s}, "completions") for s in steps]
        marks = [truth({"labels": m}, "labels") for m in marks]
        prompt = side(raw.get("prompt"), "prompt")
        return {"prompt": prompt, "completions": ["\n".join(steps)], "steps": steps, "step_labels": marks}
