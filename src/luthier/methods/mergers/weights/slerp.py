"""SLERP: the way between two models on a sphere, tensor by tensor, which keeps the size of weights.

w(t) = sin((1 - t) omega) / sin(omega) * a + sin(t omega) / sin(omega) * b with omega the angle between two
tensors; a straight line where they are nearly colinear (Shoemake, 1985; the merging step of Lu et al.,
2024). `attention` and `mlp` are profiles over depth: values at equal distances from the first layer to the
last, with straight lines between. Two runs, or one run and its base.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from luthier.errors import RecipeError
from luthier.methods.mergers._base import BASE, Merger
from luthier.model.anatomy import layer_of
from luthier.registry import Range, merger

COLINEAR = 0.9995  # cosine from which the way is a straight line
ATTENTION, MLP = ("attn", "attention"), ("mlp", "feed_forward", "ffn")

Share = Annotated[float, Field(ge=0, le=1)]


@merger(
    paper="arXiv:2409.03444",
    row="domain-merge-recipe",
    requires=[BASE],
    contract={"idempotent": "one run is moved towards its base on purpose"},
    use_when="a model of a domain and a general instruct model, tuned from one base, are to become one.",
    costs="one pass over the tensors in float64; inference costs one model.",
    covers="the spherical way with profiles over depth for attention and MLP.",
    omits="the tree of continued pretraining, SFT and preference tuning before the merge: a plan's runs.",
    tests=[
        "methods/mergers/weights/test_changes.py::test_slerp_ends_at_its_parents",
        "methods/mergers/weights/test_changes.py::test_slerp_keeps_the_norm_and_colinear_is_a_line",
        "methods/mergers/weights/test_changes.py::test_profiles_are_interpolated_over_depth",
    ],
)
class Slerp(Merger):
    """From the first run (or the base) at t = 0 to the last at t = 1."""

    t: Annotated[float, Field(ge=0, le=1), Range(0.0, 1.0)] = 0.5  # of what no profile is for
    attention: list[Share] | None = None  # t of attention over depth, e.g. [0, 0.5, 0.3, 0.7, 1]
    mlp: list[Share] | None = None  # t of the MLP over depth

    def needs_base(self, n):
        return n != 2  # of one run the base is the other end

    def tensor_by_tensor(self):
        return not (self.attention or self.mlp)

    @torch.no_grad()
    def merge(self, several, base=None):
        names = self.alike(several)
        ends = list(several)
        if len(ends) == 1 and base is not None:
            ends = [{name: torch.as_tensor(base[name]).to(several[0][name].device) for name in names}, *ends]
        if len(ends) != 2:
            raise RecipeError(
                f"merger 'slerp' takes two runs, or one and its base model, not {len(several)} runs"
            )
        depth = 1 + max((place[1] for name in names if (place := layer_of(name))), default=0)
        out = {}
        for name in names:
            one, other = (tensors[name] for tensors in ends)
            out[name] = between(one, other, self.share(name, depth))
        return out

    def share(self, name: str, depth: int) -> float:
        """t of a tensor."""
        place = layer_of(name)
        for profile, words in ((self.attention, ATTENTION), (self.mlp, MLP)):
            if profile and place is not None and any(word in name for word in words):
                return at_depth(profile, place[1] / max(1, depth - 1))
        return self.t


def at_depth(profile: list[float], depth: float) -> float:
    """The value of a profile at a depth between 0 and 1."""
    at = depth * (len(profile) - 1)
    low = min(int(at), len(profile) - 1)
    high = min(low + 1, len(profile) - 1)
    return profile[low] + (at - low) * (profile[high] - profile[low])


def between(one: Tensor, other: Tensor, t: float) -> Tensor:
    """The tensor at t on the way from one to the other."""
    if t in (0, 1) or not one.is_floating_point():
        return (other if t == 1 else one).clone()
    a, b = one.double(), other.double()
    size = float(a.norm() * b.norm())
    cosine = float((a * b).sum()) / size if size else 1.0
    if abs(cosine) > COLINEAR:
        return torch.lerp(a, b, t).to(one.dtype)
    angle = torch.tensor(cosine, dtype=torch.float64).acos()
    way = ((1 - t) * angle).sin() / angle.sin() * a + (t * angle).sin() / angle.sin() * b
    return way.to(one.dtype)
