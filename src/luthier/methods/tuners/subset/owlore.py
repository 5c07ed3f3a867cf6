"""OwLore: LISA with layers that have many outlier weights drawn more often.

The outlier density of a layer is the share of entries with ||X_j|| |W_ij| > outlier_ratio times their mean,
over its matrices; X is the input of a matrix on a few rows of the data, before training. The paper's other
half, low-rank steps in the drawn layers, is transform 'galore': `optim: [clip, {name: galore, rank: 256}]`.
Embeddings, head and final norm are always trained, and the optimizer state of a layer is dropped when it is
frozen. Departs from the reference: densities are measured on the user's rows, not read from a file. Fused
experts are not measured: the density of their layer is that of its other matrices. The initial weights are
not stored, so the tuner cannot be disabled.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from luthier.methods.tuners._base import MERGE, Tuner
from luthier.methods.tuners.subset.lisa import SampledLayers
from luthier.model.linear import linear_modules, oriented
from luthier.model.statistics import gather
from luthier.registry import tuner


@tuner(
    example={"init_rows": 2, "n_layers": 1},
    paper="arXiv:2405.18380",
    row="owlore",
    provides=[MERGE],
    use_when="you would use LISA but expect some layers to matter more: layers with many outlier"
    " weights are drawn more often.",
    costs="as `lisa` with `n_layers` layers, plus one pass over `init_rows` rows; with transform"
    " `galore` less optimizer state.",
    starting_rate="start with that of `full`.",
    default_rate=2e-5,
    covers="layers drawn by their outliers; with transform `galore` the paper's projected gradients.",
    omits="GaLore by itself: the recipe must name it.",
    tests=[
        "methods/tuners/subset/test_owlore.py::test_owlore_draws_by_outliers",
        "methods/tuners/subset/test_owlore.py::test_owlore_density_is_its_formula",
        "methods/tuners/subset/test_owlore.py::test_owlore_forgets_frozen_layers",
    ],
)
class OwLore(Tuner):
    """Outlier-weighed layerwise sampling."""

    changes_phase: ClassVar[bool] = True

    n_layers: Annotated[int, Field(ge=1)] = 5  # number of layers trained at once
    interval: Annotated[int, Field(ge=1)] = 50  # optimizer steps between draws
    # layers are drawn by outliers, or by depth
    prob_mode: Literal["owl", "owl_reverse", "uniform", "increasing", "decreasing"] = "owl"
    outlier_ratio: Annotated[float, Field(gt=0)] = 13.0  # an outlier is larger than this times the mean
    init_rows: Annotated[int, Field(ge=1)] = 16  # rows on which outliers are counted

    def attach(self, model):
        return OutlierSampledLayers(self, model)


class OutlierSampledLayers(SampledLayers):
    """A few layers at a time, drawn in proportion to their density of outliers."""

    def __init__(self, settings, model):
        super().__init__(settings, model)
        slope = torch.arange(1, self.depth + 1, dtype=torch.float32)
        start = {"increasing": slope, "decreasing": slope.flip(0)}.get(
            settings.prob_mode, torch.ones(self.depth)
        )
        self.p = start / start.sum()  # [depth] how likely each layer is; with owl, even until rows are seen

    def memory(self):
        return {"p": self.p}

    def initialize(self, rows, roles):
        if not self.settings.prob_mode.startswith("owl"):
            return
        modules = linear_modules(self.model)
        norms = gather("input_norms", modules, rows[: self.settings.init_rows], roles)
        D = self.density({name: (oriented(modules[name]), norm) for name, norm in norms.items()})
        if self.settings.prob_mode == "owl_reverse":
            D = D.max() + D.min() - D
        D = D + 1e-6  # a layer without outliers stays possible
        self.p.copy_(D / D.sum())

    def density(self, norms: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """module -> its weight, and [in] the norm of each input. [depth] the mean outlier density of each
        layer's matrices.
        """
        densities: list[list[float]] = [[] for _ in range(self.depth)]
        for name, (W, norm) in norms.items():
            at = self.layer.get(f"{name}.weight")
            if at is not None:
                A = W.detach().float().abs() * norm
                densities[at].append(float((A > self.settings.outlier_ratio * A.mean()).float().mean()))
        return torch.tensor([sum(d) / len(d) if d else 0.0 for d in densities])

    def drawn(self, rng):
        n = min(self.settings.n_layers, self.depth)
        return torch.multinomial(self.p, n, replacement=False, generator=rng).tolist()
