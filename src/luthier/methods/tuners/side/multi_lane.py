"""MULTI-LANE: every task has a lane of its own beside a frozen network, and all lanes answer together, so no
row has to be given to a task and no task touches what another has learned.

A lane has S selectors, prompts for the first layers and the part of the head with its classes. Its state c
starts as the class token. Layer by layer the frozen states X (normed, without the class token) are
summarized, softmax(selectors X' / sqrt(d)) X, and c attends to itself, to these S tokens and to the lane's
keys and values by the layer's own frozen matrices; the summary is then dropped, and the next layer's states
are summarized anew. A head reads c / |c|. In training a row goes through the lane of its task alone, and only
lanes with rows train; else all lanes that have learned anything answer side by side, each for its own
classes. The classes of other lanes have no part in the loss of a row (De Min et al., 2024).

Of one class the logits of all other classes are far below, of several labels they are 0 and without gradient.
With plan `continual` each run trains the next lane, which starts as a copy of the last one.

Departs: selectors enter each layer as they are, where the authors' go through its norms and feed-forward
network; the class token is no part of the summary; only c asks in attention, since nothing else of the
sequence is read again; lanes are computed one after the other, so that the logits of an older one stay bit
for bit. Also for decoders with a classification head, whose class token is the last one; lanes have no rotary
positions.
"""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from luthier.errors import RecipeError
from luthier.methods.architectures._base import LABEL_HEAD
from luthier.methods.tuners._base import DISABLE_ADAPTER
from luthier.methods.tuners.side._readout import Readout, width_of
from luthier.registry import Range, did_you_mean, tuner

if TYPE_CHECKING:
    from luthier.model.network import Network

EVERYTHING = "all"  # the one lane where no tasks are named


@tuner(
    example={"selectors": 3, "num_virtual_tokens": 2},
    paper="arXiv:2405.15633",
    row="multi-lane",
    requires=[LABEL_HEAD],
    provides=[DISABLE_ADAPTER],
    contract={"starts_as_base": "its heads are new"},
    use_when="classes, or labels of which a row may have several, come task by task to a frozen vision"
    " transformer, no row of earlier tasks can be kept, and an input does not say which task it is of.",
    costs="in training one more pass of `selectors` + 1 tokens beside the frozen one; in inference one for"
    " each task; not mergeable.",
    starting_rate="the paper takes 0.03 with Adam and a cosine.",
    default_rate=1e-2,
    covers="selectors, summaries of every layer that are dropped and replaced, prompts of the first layers,"
    " lanes of tasks side by side, normed heads, single classes and several labels; ViT, its kin, and"
    " decoders with a head.",
    omits="the asymmetric loss, a penalty that keeps prompts orthogonal, choosing a lane by the nearest key,"
    " token merging; networks with norms behind their sublayers (BERT) or fused attention matrices; mean"
    " average precision as a metric; COCO, VOC and their numbers.",
    tests=[
        "methods/tuners/side/test_multi_lane.py::test_a_later_task_leaves_older_logits_bit_for_bit",
        "methods/tuners/side/test_multi_lane.py::test_a_summary_of_single_patches_is_the_frozen_network",
        "methods/tuners/side/test_multi_lane.py::test_cost_grows_linearly_with_the_lanes",
        "methods/tuners/side/test_multi_lane.py::test_two_tasks_of_several_labels",
    ],
)
class MultiLane(Readout):
    """A lane of selectors and prompts for each task, beside a frozen network."""

    # classes of each task, by name; left out: one task has them all
    tasks: dict[str, list[str]] = field(default_factory=dict)
    column: str = "source"  # column that names the task of a row that is trained on
    selectors: Annotated[int, Field(ge=1), Range(1, 64, log=True)] = 20  # tokens of a summary
    # keys and values of a lane in each layer that has them
    num_virtual_tokens: Annotated[int, Field(ge=1), Range(1, 64, log=True)] = 20
    prompt_layers: Annotated[int, Field(ge=0)] = 5  # the first layers that have them
    copy_last: bool = True  # whether a new lane starts as a copy of the one before it

    def __post_init__(self):
        owner: dict[str, str] = {}
        for task, labels in self.tasks.items():
            if not labels:
                raise RecipeError(f"tuner 'multi_lane': task '{task}' has no classes")
            for label in labels:
                if label in owner:
                    raise RecipeError(
                        f"tuner 'multi_lane': '{label}' is a class of {owner[label]} and of {task}; it can be"
                        " one of one task"
                    )
                owner[label] = task

    def attach(self, model):
        from luthier.methods.tuners.side._multi_lane_model import MultiLaneModel

        self.check_labels(model)
        trained, fixed = self.tensors(model)
        model.fresh = []  # the network's own head is read no more
        return MultiLaneModel(self, model, trained, fixed, self.labels_of(model))

    def labels_of(self, model: Any) -> dict[str, list[int]]:
        """The places of each task's classes among the network's labels. Raises RecipeError where one is
        unknown or belongs to no task.
        """
        places = {str(name).strip(): int(i) for i, name in model.config.id2label.items()}
        if not self.tasks:
            return {EVERYTHING: sorted(places.values())}
        labels: dict[str, list[int]] = {}
        for task, names in self.tasks.items():
            for name in names:
                if name.strip() not in places:
                    raise RecipeError(
                        f"tuner 'multi_lane': no row has the class '{name}'{did_you_mean(name, places)}"
                    )
            labels[task] = [places.pop(name.strip()) for name in names]
        if places:
            raise RecipeError(
                f"tuner 'multi_lane': class '{next(iter(places))}' is of no task; add it to tasks"
            )
        return labels

    def tensors(self, model: Network) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """'place of the lane.slot' -> the tensors that train; which lanes have learned anything."""
        from luthier.methods.tuners.side._multi_lane_model import frozen_layers

        width, layers = width_of(model, self.name), frozen_layers(model)
        prompted = min(self.prompt_layers, len(layers))
        trained = {}
        labels = self.labels_of(model)
        for lane, names in enumerate(labels.values()):
            trained[f"{lane}.selectors"] = rows_apart(self.selectors, width)
            for slot in ("keys", "values"):
                prompts = [rows_apart(self.num_virtual_tokens, layer.k_width) for layer in layers[:prompted]]
                if prompts:
                    trained[f"{lane}.{slot}"] = torch.stack(prompts)
            trained[f"{lane}.head"] = torch.zeros(len(names), width)
            trained[f"{lane}.bias"] = torch.zeros(len(names))
        # without tasks there is nothing to wait for
        return trained, {"learned": torch.full((len(labels),), not self.tasks)}


def rows_apart(count: int, width: int) -> Tensor:
    """[count, width], orthogonal where they can be."""
    return nn.init.orthogonal_(torch.empty(count, width))
