"""Polyhistor: one small network makes the adapters of all tasks and layers, also where layers differ in
width, as in hierarchical vision transformers.

Of task t with a trained embedding v_t, template_t is the product of two narrow matrices that linear maps make
from v_t: I_t [k, r] J_t [r, d], with d the greatest width that divides those of all layers. A layer that is
s times as wide has two kernels [s, s] of its own, and its adapter is down = kron(K, template_t) and
up = kron(K', template'_t): y + up(f(down(y))). A row's task is its column `task`; rows without one are read
by the base. Polyhistor-Lite is a smaller `rank`, with the last matrices of feed-forward blocks as
`target_modules`.

Departs: adapters have no biases; K' starts at exactly zero, so that training starts at the base model; norms
stay frozen unless `modules_to_save` names them.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from luthier.errors import RecipeError
from luthier.methods.tuners._base import DISABLE_ADAPTER
from luthier.methods.tuners.adapters._bottleneck import FUNCTIONS, Bottleneck
from luthier.methods.tuners.mixture._routed import added, unrouted
from luthier.model.linear import oriented
from luthier.registry import INTERNAL, Range, tuner


@tuner(
    example={"rank": 2, "embedding": 4},
    row="polyhistor",
    provides=[DISABLE_ADAPTER],
    use_when="several tasks share one frozen model and adapters for each would be too many numbers: what they"
    " share is a network that makes all of them, also for layers of different widths.",
    costs="a few numbers for each layer and task beside one small network; adapters are made anew at each"
    " forward pass; not mergeable.",
    starting_rate="start with that of `compacter`.",
    default_rate=1e-3,
    covers="decomposed hyper-networks from task embeddings, kernels that scale a template to the width of"
    " each layer, batches that mix tasks; Swin and other image classifiers as well as texts.",
    omits="decoders for dense predictions (segmentation, parts, saliency, normals) and the measurements on"
    " PASCAL-Context; embeddings of layers.",
    tests=[
        "methods/tuners/mixture/test_polyhistor.py::test_an_adapter_is_a_kernel_times_the_tasks_template",
        "methods/tuners/mixture/test_polyhistor.py::test_numbers_are_the_formula_and_fewer_than_adapters",
        "methods/tuners/mixture/test_polyhistor.py::test_two_tasks_on_four_stages_beat_linear_heads",
    ],
)
class Polyhistor(Bottleneck):
    """Adapters generated from task embeddings, scaled to each layer."""

    places: ClassVar[tuple[str, ...]] = ("o", "down")
    # tensors that all layers have in common
    shared: ClassVar[tuple[str, ...]] = ("task", "down_I", "down_J", "up_I", "up_J")

    # auto: the last linear modules of attention and of the feed-forward block
    target_modules: str | list[str] = "auto"
    # names of the tasks, as in the column `task` of rows; null: one adapter for all rows
    tasks: list[str] | None = None
    embedding: Annotated[int, Field(ge=1), Range(4, 64, log=True)] = 16  # width of a task's embedding
    rank: Annotated[int, Field(ge=1), Range(1, 16, log=True)] = 4  # of the templates
    # width of the templates; filled in when it is attached
    template: Annotated[int | None, INTERNAL] = None

    def __post_init__(self):
        if self.tasks is not None and len(set(self.tasks)) < max(1, len(self.tasks)):
            raise RecipeError("tuner 'polyhistor': tasks must be different names, at least one")

    def put(self, model):
        from luthier.methods.tuners._peft.chosen import chosen_modules
        from luthier.methods.tuners.mixture._generated import GeneratedModel

        widths = {oriented(module).shape[0] for module in chosen_modules(self, model).values()}
        return GeneratedModel(replace(self, template=math.gcd(*widths) if widths else None), model)

    def sizes(self, width: int) -> tuple[int, int, int]:
        """Of a layer: how many times the template's width it has; the template's width and bottleneck."""
        template = self.template or width
        return width // template, template, max(1, round(template / self.reduction_factor))

    def init(self, W):
        e, r, (scale, d, k) = self.embedding, self.rank, self.sizes(W.shape[0])
        return {
            "task": torch.randn(len(self.tasks or [""]), e),
            "down_I": torch.randn(e, k, r) / e**0.5,
            "down_J": torch.randn(e, r, d) / (e * r * d) ** 0.5,
            "up_I": torch.randn(e, d, r) / e**0.5,
            "up_J": torch.randn(e, r, k) / (e * r * k) ** 0.5,
            "down_kernel": torch.randn(scale, scale) / scale**0.5,
            "up_kernel": torch.zeros(scale, scale),
            "route": unrouted(),
        }

    def template_of(self, p: Any, task: int, name: str) -> Tensor:
        """The template of a task: of `down` [k, d], of `up` [d, k]."""
        left = torch.einsum("e,eab->ab", p.task[task], getattr(p, f"{name}_I"))
        return left @ torch.einsum("e,eab->ab", p.task[task], getattr(p, f"{name}_J"))

    def adapter(self, p: Any, task: int) -> tuple[Tensor, Tensor]:
        """down [s k, s d] and up [s d, s k] of a task in this layer."""
        down = torch.kron(p.down_kernel, self.template_of(p, task, "down"))
        return down, torch.kron(p.up_kernel, self.template_of(p, task, "up"))

    def forward(self, x, y, p, layer):
        def change(h: Tensor, task: int) -> Tensor:
            down, up = self.adapter(p, task)
            return FUNCTIONS[self.non_linearity](h @ down.T) @ up.T

        if self.tasks is None:
            return y + change(y, 0)
        return added(y, p.route, change)

    def numbers(self, widths: list[int]) -> int:
        """Trained numbers on layers of these widths."""
        template = math.gcd(*widths)
        k = max(1, round(template / self.reduction_factor))
        shared = self.embedding * (len(self.tasks or [""]) + 2 * self.rank * (template + k))
        return shared + sum(2 * (width // template) ** 2 for width in widths)
