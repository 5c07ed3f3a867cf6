"""EPT: DePT's short prompt and low-rank change of embeddings, fused by attention, and projected into
several spaces that a gate mixes.

The short prompt P asks the low-rank product A B: P' = P + softmax(P (A B)^T / sqrt(d)) A B. N bottlenecks
project it, P_k = P' + up_k(down_k(P')), and a gate g = softmax(W mean(P')) mixes them: sum g_k P_k stands
before the text. All of it depends on parameters alone, so what is stored for use are finished vectors.
Departs: the paper's text leaves the projections inside the attention and the form of the spaces open; here
the attention has none, and a space is a residual bottleneck whose `up` starts at zero, so that training
begins as prompt tuning.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from luthier.methods.architectures._base import SOFT_PROMPTS
from luthier.methods.tuners._base import DISABLE_ADAPTER, ParamGroup
from luthier.methods.tuners.prompts._decomposed import Decomposed, DecomposedPrompt
from luthier.registry import Range, tuner

if TYPE_CHECKING:
    from luthier.model.network import Network


@tuner(
    example={"num_virtual_tokens": 2},
    paper="arXiv:2405.11464",
    row="ept",
    requires=[SOFT_PROMPTS],
    provides=[DISABLE_ADAPTER],
    contract={"starts_as_base": "vectors before the text change the output from the first step on"},
    use_when="`dept` is what you want and tasks are small: the short prompt also reads its low-rank part"
    " and is projected into several spaces.",
    costs="as `dept`; the projections are computed once a batch.",
    starting_rate="as `dept`: 0.3 for the prompt and 1e-4 to 5e-4 for everything else.",
    default_rate=5e-4,
    covers="fusion by attention, spaces and their gate on DePT's decomposition; bases in 4 bits.",
    omits="projections inside the fusion's attention.",
    tests=[
        "methods/tuners/prompts/test_dept.py::test_ept_without_its_parts_is_prompt_tuning",
        "methods/tuners/prompts/test_dept.py::test_epts_gate_sums_to_one_and_leaves_uniform",
    ],
)
class EPT(Decomposed):
    """A decomposed prompt with fusion and several spaces."""

    spaces: Annotated[int, Field(ge=1), Range(1, 8)] = 2  # projections that the gate mixes
    bottleneck: Annotated[int, Field(ge=1), Range(4, 64, log=True)] = 8  # width of each projection
    fuse: bool = True  # let the prompt attend to the low-rank change

    def numbers(self, width):
        return super().numbers(width) + self.spaces * (2 * self.bottleneck * width + width)

    def attach(self, model):
        return FusedPrompt(self, model, self.vectors(model))


class FusedPrompt(DecomposedPrompt):
    """down [spaces, bottleneck, width], up [spaces, width, bottleneck] and gate [spaces, width] beside the
    decomposed prompt.
    """

    def __init__(self, settings: EPT, model: Network, vectors: Tensor):
        super().__init__(settings, model, vectors)
        width, device = self.prompt.shape[1], self.prompt.device
        shape = settings.spaces, settings.bottleneck, width
        self.down = nn.Parameter(torch.randn(shape).to(device) / math.sqrt(width))
        self.up = nn.Parameter(torch.zeros(shape, device=device).mT.contiguous())
        self.gate = nn.Parameter(torch.zeros(settings.spaces, width, device=device))

    def all_param_groups(self):
        slots = {"down": self.down, "up": self.up, "gate": self.gate}
        return [*super().all_param_groups(), ParamGroup("spaces", slots, self.settings)]

    def fused(self) -> Tensor:
        """[virtual, width] the prompt after it has read the low-rank change."""
        if not (self.settings.fuse and self.settings.r):
            return self.prompt
        change = self.change()
        scores = self.prompt @ change.T / math.sqrt(change.shape[1])
        return self.prompt + scores.softmax(-1) @ change

    def weights(self, fused: Tensor) -> Tensor:
        """[spaces] how much each counts."""
        return (self.gate @ fused.mean(0)).softmax(-1)

    def soft(self):
        fused = self.fused()
        if not len(fused):
            return fused
        hidden = torch.relu(torch.einsum("kbd,nd->knb", self.down, fused))
        projected = fused + torch.einsum("kdb,knb->knd", self.up, hidden)
        return torch.einsum("k,knd->nd", self.weights(fused), projected)
