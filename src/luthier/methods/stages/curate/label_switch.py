"""CrossTune's switch: a teacher that was tuned on the few true rows reads written ones, and those whose label
it does not confirm leave, or get the teacher's.

A row is confirmed where the teacher's most probable label is the row's own and has at least the probability
`least`. Departs: the threshold is a setting, and none by default.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.rewards.models.classifier import classifier
from luthier.methods.stages._base import Stage, text_of
from luthier.methods.stages.select._embedding import question
from luthier.registry import did_you_mean, stage


@stage(
    example={"model": "toy:encoder"},
    paper="arXiv:2403.12468",
    row="crosstune",
    requires=[COMPLETIONS],
    provides=[COMPLETIONS],
    contract={"gives": "it needs a teacher of the rows' own labels"},
    use_when="labelled rows were written by a model and some of their labels are wrong, and a classifier of"
    " the same labels is at hand.",
    costs="a forward pass of the teacher over each row.",
    covers="leaving out, or relabelling, what the teacher does not confirm.",
    omits="tuning the teacher: it is a run of its own.",
    tests=["methods/stages/curate/test_label_switch.py::test_wrong_labels_leave"],
)
class LabelSwitch(Stage):
    """Rows whose label a teacher confirms; with `relabel` all, under the teacher's label."""

    model: str = ""  # the teacher: folder or Hub name of a sequence classifier
    least: Annotated[float, Field(ge=0, le=1)] = 0.0  # probability with which it must be sure
    relabel: bool = False  # rows that are not confirmed stay, with the teacher's label, where it is sure
    batch_size: Annotated[int, Field(ge=1)] = 16  # texts per forward pass

    def __call__(self, rows, roles):
        rows = [row for row in rows if row.get("completions")]
        _, network = classifier(self.model)
        names = [network.config.id2label[i] for i in range(network.config.num_labels)]
        probabilities = self.read([question(row) for row in rows])
        out, chosen = [], []
        for place, row in enumerate(rows):
            text = text_of(roles, row["completions"][0])
            label = text.strip()
            if label not in names:
                raise RecipeError(
                    f"stage 'label_switch': {self.model} has no label '{label}'{did_you_mean(label, names)}"
                )
            value, best = probabilities[place].max(-1)
            sure = float(value) >= self.least
            if sure and (self.relabel or names[int(best)] == label):
                chosen.append(place)
            other = text.replace(label, names[int(best)])
            turns = not isinstance(row["completions"][0], str)
            completion = [{"role": "assistant", "content": other}] if turns else other
            out.append({**row, "completions": [completion]} if self.relabel else row)
        return self.drop(roles, out, chosen, "the teacher does not confirm their label")

    @torch.no_grad()
    def read(self, texts: list[str]) -> torch.Tensor:
        """[n, labels] the teacher's probabilities."""
        tokenizer, network = classifier(self.model)
        parts = [torch.empty(0, network.config.num_labels)]
        for i in range(0, len(texts), self.batch_size):
            inputs = tokenizer(
                texts[i : i + self.batch_size], padding=True, truncation=True, return_tensors="pt"
            )
            logits = network(**inputs.to(network.device)).logits
            parts.append(logits.float().softmax(-1).cpu())
        return torch.cat(parts)
