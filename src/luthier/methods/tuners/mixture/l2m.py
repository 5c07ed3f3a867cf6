"""L2M: a pool of low-rank modulators with a key each; what a prompt is about decides which one of them
changes every layer.

The query of a row is the mean embedding of its prompt's tokens in the frozen network. The key that is nearest
by cosine chooses the modulator, in training with a handicap for those that were chosen often; -cos of the
query and its key is a loss that draws keys to what they serve. A modulator is a LoRA at queries, values and
feed-forward matrices, so training on one task leaves the modulators of others as they are. A batch may mix
them: each is computed for its own rows. Where nobody says which rows are read, as outside of luthier, it is
the mean of all modulators.

Departs: the similarity is 1 + cos, which the handicap (the smallest count over the own one, both plus 1)
multiplies, so that it lowers what is popular on either side of zero; queries are of prompts, where the paper
has histories of states; no modulators that scale (IA3), and no keys of pretraining tasks without modulation.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from luthier.errors import RecipeError
from luthier.methods.tuners._base import DISABLE_ADAPTER
from luthier.methods.tuners._delta import Delta
from luthier.methods.tuners.mixture._routed import low_rank, unrouted
from luthier.model.anatomy import pattern_of
from luthier.registry import INTERNAL, Range, tuner

PARTS = ("q", "v", "qkv", "up", "gate", "gate_up", "down")


@tuner(
    example={"pool": 3, "r": 2},
    paper="arXiv:2306.14884",
    row="l2m-modulation-pool",
    provides=[DISABLE_ADAPTER],
    use_when="tasks come one after the other, nobody names them when the model is used, and what was learned"
    " must stay: the prompt itself chooses which low-rank modulator is read.",
    costs="`pool` times the numbers of LoRA, the time of one for each modulator in a batch; not mergeable.",
    starting_rate="start with that of `lora`.",
    default_rate=2e-4,
    covers="keys, queries, selection with counts and the loss of keys; modulators of low rank in every layer,"
    " untouched by the training of others; mixed batches; generation.",
    omits="modulators that scale, identity keys, decision transformers and their environments.",
    tests=[
        "methods/tuners/mixture/test_l2m.py::test_the_nearest_key_chooses",
        "methods/tuners/mixture/test_l2m.py::test_counts_spread_what_is_chosen",
        "methods/tuners/mixture/test_l2m.py::test_other_tasks_stay_bit_for_bit",
        "methods/tuners/mixture/test_l2m.py::test_keys_move_to_what_they_serve",
        "methods/tuners/mixture/test_l2m.py::test_a_mixed_batch_is_each_modulator_alone",
    ],
)
class L2M(Delta):
    """A pool of modulators that prompts choose from."""

    kinds = (nn.Linear,)

    pool: Annotated[int, Field(ge=1), Range(2, 64)] = 30  # modulators
    r: Annotated[int, Field(ge=1), Range(2, 32, log=True)] = 8  # rank of each
    alpha: Annotated[float, Field(gt=0)] | None = None  # scale of the update, before division by r; null: 2 r
    key_weight: Annotated[float, Field(ge=0)] = 1.0  # weight of the loss that draws keys to queries
    # modules to modulate; auto: queries, values and feed-forward matrices
    target_modules: str | list[str] = "auto"
    # the module whose layer also holds the keys; filled in when it is attached
    keys_at: Annotated[str | None, INTERNAL] = None
    width: Annotated[int, INTERNAL] = 0  # numbers of a key; filled in when it is attached

    def attach(self, model):
        from luthier.methods.tuners._peft.chosen import chosen_modules
        from luthier.methods.tuners.mixture._l2m_model import L2MModel

        settings = self
        if self.target_modules == "auto":
            settings = replace(self, target_modules=pattern_of(self.name, model, *PARTS))
        first = next(iter(chosen_modules(settings, model)), None)
        words = getattr(model.get_input_embeddings(), "weight", None)
        if words is None:
            raise RecipeError(
                f"tuner 'l2m' chooses by embeddings of tokens, and {type(model).__name__} reads none"
            )
        width = words.shape[1]
        attached = L2MModel(replace(settings, keys_at=first, width=width), model)
        if self.target_modules == "auto":
            attached.warnings += attached.experts_left_out("tuner 'l2m'")
        return attached

    def at(self, name):
        return self if name == self.keys_at else replace(self, keys_at=None)

    def init(self, W):
        A = torch.empty(self.pool, self.r, W.shape[1])
        for modulator in A:
            nn.init.kaiming_uniform_(modulator, a=5**0.5)
        tensors = {"A": A, "B": torch.zeros(self.pool, W.shape[0], self.r), "route": unrouted()}
        if self.keys_at is not None:
            tensors["keys"] = torch.empty(self.pool, self.width).uniform_(-1, 1)
        return tensors

    def modulator(self, p: Any, route: int) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r] of one; -1: of the mean of all, at pool * r."""
        if route >= 0:
            return p.A[route], p.B[route]
        return p.A.flatten(0, 1), p.B.transpose(0, 1).flatten(1) / self.pool

    def forward(self, x, y, p, layer):
        scale = (2 * self.r if self.alpha is None else self.alpha) / self.r
        change = low_rank(x, p.route, lambda i: self.modulator(p, i), y.shape[-1])
        if hasattr(p, "keys"):  # they have a gradient of their own, and none from here
            change = change + 0 * p.keys.sum()
        return y + scale * change

    def weight(self, W, p):
        raise NotImplementedError("tuner 'l2m' has a weight for each modulator")
