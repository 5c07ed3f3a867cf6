"""FM3's task hyper-network: a small network makes, from the embedding of a row's task and that of a place in
the model, an adapter and the scale and shift of its norm; every task has a head of its own.

z = relu(W [v_task, u_place] + b) of one hidden layer; four linear maps of z are the adapter's down [k, d] and
up [d, k] and its norm's gamma [d] and beta [d]: y + gamma norm(up f(down y)) + beta. All places share this
network (those of another width have maps of their own); they differ by u alone. A row's task is its column
`task`; rows without one are read by the base. Where the network has a head of labels, each task has a copy
of it, and a row trains that of its task alone. FM3's contrastive first stage is objective `setfit`.

Departs: the paper follows HyperFormer here; norms are not the layers' own, which stay frozen, but those of
the adapters; gamma and beta start at exactly zero, so that training starts at the base model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from luthier.errors import RecipeError
from luthier.methods.tuners._base import DISABLE_ADAPTER
from luthier.methods.tuners.adapters._bottleneck import FUNCTIONS, Bottleneck
from luthier.methods.tuners.mixture._routed import added, spread, unrouted
from luthier.model.anatomy import layer_of
from luthier.model.linear import linear_modules
from luthier.registry import INTERNAL, Range, tuner


@tuner(
    example={"embedding": 4, "hidden": 6},
    paper="arXiv:2303.12489",
    row="fm3",
    provides=[DISABLE_ADAPTER],
    use_when="several tasks with a few rows each share one frozen encoder: what they have in common is"
    " learned by one network that makes their adapters, and each has its own head.",
    costs="`hidden` times the numbers of one adapter, whatever the number of layers and tasks; adapters are"
    " made anew at each forward pass; not mergeable.",
    starting_rate="start with that of `houlsby`.",
    default_rate=1e-3,
    covers="adapters and norms out of embeddings of tasks and places, heads of tasks that others leave alone,"
    " batches that mix tasks; text and image classifiers, language models.",
    omits="image and text fused for one head; token tagging; the measurements on VQA, visual entailment, GLUE"
    " and NER.",
    tests=[
        "methods/tuners/mixture/test_hyper_adapter.py::test_adapters_are_the_hyper_network_of_task_and_place",
        "methods/tuners/mixture/test_hyper_adapter.py::test_a_task_leaves_the_heads_of_others_without_gradient",
        "methods/tuners/mixture/test_hyper_adapter.py::test_a_run_of_two_tasks_on_an_encoder_learns_both",
        "methods/objectives/representation/test_setfit.py::test_cosines_of_rows_held_out_part_by_class",
    ],
)
class HyperAdapter(Bottleneck):
    """Adapters generated for each task and place, and heads of tasks."""

    places: ClassVar[tuple[str, ...]] = ("o", "down")
    # tensors that all places of one width have in common
    shared: ClassVar[tuple[str, ...]] = ("task", "first", "first_bias", "downs", "ups", "scales", "shifts")

    # auto: the last linear modules of attention and of the feed-forward block
    target_modules: str | list[str] = "auto"
    # names of the tasks, as in the column `task` of rows; null: one task, that of all rows
    tasks: list[str] | None = None
    # width of the embeddings of tasks and places
    embedding: Annotated[int, Field(ge=1), Range(8, 128, log=True)] = 32
    hidden: Annotated[int, Field(ge=1), Range(8, 128, log=True)] = 32  # width of the hidden layer
    heads: bool = True  # a head of labels for each task, where the network has one
    # the module that is the head of labels; filled in when it is attached
    head: Annotated[str | None, INTERNAL] = None
    is_head: Annotated[bool, INTERNAL] = False  # are these settings for the head?

    def __post_init__(self):
        if self.tasks is not None and len(set(self.tasks)) < max(1, len(self.tasks)):
            raise RecipeError("tuner 'hyper_adapter': tasks must be different names, at least one")

    def put(self, model):
        from luthier.methods.tuners._peft.chosen import chosen_modules
        from luthier.methods.tuners.mixture._generated import GeneratedModel

        head = label_head(model) if self.heads else None
        names = [name for name in chosen_modules(self, model) if name != head]
        if not names:
            return GeneratedModel(self, model)
        saved = [name for name in self.modules_to_save or () if name != head]
        settings = replace(
            self,
            head=head,
            target_modules=names if head is None else [*names, head],
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
            modules_to_save=saved or None,
        )
        return GeneratedModel(settings, model)

    def at(self, name):
        return replace(self, is_head=self.head is not None and name == self.head)

    def init(self, W):
        tasks = len(self.tasks or [""])
        if self.is_head:
            heads, biases = W.float().repeat(tasks, 1, 1), torch.zeros(tasks, len(W))
            return {"heads": heads, "biases": biases, "route": unrouted()}
        (d, k), e, h = self.widths(W), self.embedding, self.hidden
        return {
            "task": torch.randn(tasks, e),
            "place": torch.randn(e),
            "first": torch.randn(h, 2 * e) / e**0.5,
            "first_bias": torch.zeros(h),
            "downs": torch.randn(k, d, h) / (h * d) ** 0.5,
            "ups": torch.randn(d, k, h) / (h * k) ** 0.5,
            "scales": torch.zeros(d, h),
            "shifts": torch.zeros(d, h),
            "route": unrouted(),
        }

    def adapter(self, p: Any, task: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """down [k, d], up [d, k], gamma [d] and beta [d] of a task at this place."""
        z = F.relu(F.linear(torch.cat([p.task[task], p.place]), p.first, p.first_bias))
        return p.downs @ z, p.ups @ z, p.scales @ z, p.shifts @ z

    def forward(self, x, y, p, layer):
        if self.is_head:
            return self.answers(x, y, p, layer)

        def change(h: Tensor, task: int) -> Tensor:
            down, up, gamma, beta = self.adapter(p, task)
            inner = FUNCTIONS[self.non_linearity](h @ down.T) @ up.T
            return F.layer_norm(inner, gamma.shape, gamma, beta)

        return change(y, 0) + y if self.tasks is None else added(y, p.route, change)

    def answers(self, x: Tensor, y: Tensor, p: Any, layer: Any) -> Tensor:
        """x [..., d] -> [..., classes] by the head of each place's task; y where there is none."""
        beside = 0.0 if layer.bias is None else layer.bias.to(x.dtype)
        if self.tasks is None:
            return F.linear(x, p.heads[0], p.biases[0]) + beside
        places = spread(p.route, y.shape[:-1])
        if places is None:
            return y
        for task in places.unique().tolist():
            if task >= 0:
                own = F.linear(x, p.heads[task], p.biases[task]) + beside
                y = torch.where((places == task)[..., None], own, y)
        return y


def label_head(model: Any) -> str | None:
    """The last linear module of a classifier, outside of its layers; None: the network has no labels."""
    if model.get_output_embeddings() is not None:
        return None
    labels, head = getattr(model.config, "num_labels", None), None
    for name, module in linear_modules(model).items():
        if layer_of(f"{name}.") is None and module.weight.shape[0] == labels:
            head = name
    return head
