"""Rows whose instruction is worded anew, with what a teacher would answer to the wording as it was, so that a
soft prompt learns to answer all wordings alike.

A row becomes one for each other wording: those of `templates`, and those that it has itself in the column
`paraphrases`. Beside its completions stand the teacher's k most likely tokens at every position, read under
the row's own prompt (columns of stage `teacher_top`). `objective: sft + 0.8*first` on them is then
CE(y | wording') + 0.8 KL(p(. | wording) || p(. | wording')), where with tuner `prompt` and `roles: {teacher:
base}` the first distribution is that of the model without a prompt (Sun et al., 2023). Departs: the
distribution is its k most likely tokens and all others as one; rows as they are do not stay unless
`templates` names them ("{prompt}").
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.architectures._base import TOPK
from luthier.methods.evaluators.quality.prompt_ensemble import TEMPLATES, reworded
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.roles._base import TEACHER
from luthier.methods.stages.rollout.teacher_top import TEACHER_IDS, TEACHER_LOGPROBS, TeacherTop
from luthier.registry import stage


@stage(
    paper="arXiv:2306.11270",
    row="instruction-robust-soft-prompt",
    requires=[COMPLETIONS, TEACHER, TOPK],
    provides=[TEACHER_IDS, TEACHER_LOGPROBS],
    contract={"gives": "it needs a teacher model, which the recipe names"},
    use_when="answers depend on how an instruction is worded, and should not: with `roles: {teacher: base}`,"
    " tuner `prompt` and `objective: sft + 0.8*first`.",
    costs="one forward pass of the teacher over all rows, and a row for each wording.",
    covers="likelihood under another wording and its distance from what the model says under the wording"
    " that it was tuned on, a soft prompt on a frozen network; paraphrases without the distance are `sft` on"
    " the same rows. Mean and deviation over wordings, seen and new, are evaluator `wordings`.",
    omits="that deviation over new wordings falls is not shown here; wordings written by a model, the"
    " distance between representations of wordings, and the 319 instructions of the paper.",
    tests=[
        "methods/stages/rollout/test_paraphrase_targets.py::test_the_target_is_the_own_wordings_distribution",
        "methods/stages/rollout/test_paraphrase_targets.py::test_an_equal_wording_costs_nothing",
        "methods/stages/rollout/test_paraphrase_targets.py::test_a_prompt_draws_other_wordings_to_the_own_one",
        "methods/evaluators/quality/test_wordings.py::test_mean_and_deviation_of_a_script",
    ],
)
class ParaphraseTargets(TeacherTop):
    """One row for each other wording of a prompt, with columns teacher_ids and teacher_logprobs."""

    # wordings of a prompt, {prompt} standing for it; of a conversation its last turn
    templates: list[str] = field(default_factory=lambda: list(TEMPLATES))
    # temperature of the teacher; auto: by calibration on these rows
    temperature: Annotated[float, Field(gt=0)] | Literal["auto"] = 1.0

    column: ClassVar[str] = "paraphrases"  # prompts that ask the same

    def __post_init__(self):
        if not all("{prompt}" in template for template in self.templates):
            raise RecipeError("stage 'paraphrase_targets': each of `templates` needs {prompt}")

    def __call__(self, rows, roles):
        out, alone = [], 0
        rows = super().__call__(rows, roles)
        for row in rows:
            wordings = self.wordings(row)
            alone += not wordings
            rest = {key: value for key, value in row.items() if key != self.column}
            for number, prompt in enumerate(wordings):
                out.append({**rest, "id": f"{row['id']}/{number}", "prompt": prompt})
        self.left(roles, alone, len(rows), "they have no other wording")
        return out

    def wordings(self, row: dict) -> list[Any]:
        """The prompts that ask what this row asks."""
        prompts = [reworded(row["prompt"], template) for template in self.templates]
        return [*prompts, *(row.get(self.column) or [])]
