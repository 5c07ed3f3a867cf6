"""HFT: trains about half of each layer's attention, feed-forward and norm weights; the other half is frozen.

In every layer 2 of W_q, W_k, W_v, W_o are trained; of up, gate and down 1 in half of the layers and 2 in the
others; one of two norms. The half is drawn at the start of a run, and another one in the next run that starts
from it (the runs of a plan: SFT, DPO, task after task). Frozen weights have no gradient and no optimizer
state. Departs from the paper: of several random draws the one closest to the ratio in parameters is used, so
that it is half also where matrices differ in size (grouped queries, GPT-2's fused c_attn). The initial
weights are not stored, so the tuner cannot be disabled. See also merger 'half_reset'.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from luthier.methods.tuners._base import MERGE, Tuner
from luthier.methods.tuners.subset._subset import LayerwiseWeights
from luthier.model.anatomy import kind_of, layer_of
from luthier.registry import tuner

DRAWS = 32  # random halves of which the best balanced one is taken


@tuner(
    paper="arXiv:2404.18466",
    row="hft",
    provides=[MERGE],
    use_when="full fine-tuning forgets too much, and you tune in several rounds or on several tasks:"
    " half of the weights stay as they were in each round.",
    costs="about half of the gradients and optimizer state of full fine-tuning.",
    starting_rate="start with that of `full`.",
    default_rate=2e-5,
    covers="half of every layer's parameters, redrawn.",
    omits="less forgetting than full fine-tuning is not shown here yet (claim `hft_forgets_less`).",
    tests=[
        "methods/tuners/subset/test_hft.py::test_hft_moves_half_of_the_layers",
        "methods/tuners/subset/test_hft.py::test_hft_counts_as_the_paper_does",
        "methods/tuners/subset/test_hft.py::test_hft_rests_and_redraws",
        "methods/tuners/subset/test_hft.py::test_hft_with_everything_is_full_tuning",
    ],
)
class HFT(Tuner):
    """Half fine-tuning."""

    # share of the layers' weights that is trained; 1 is full fine-tuning
    ratio: Annotated[float, Field(gt=0, le=1)] = 0.5
    # whether embeddings, head and final norm are trained; they are not counted in ratio
    embeddings: bool = True

    def attach(self, model):
        return HalfTunedWeights(self, model)


class HalfTunedWeights(LayerwiseWeights):
    """A random half of every layer. The seed of the draw belongs to the state, and the next run's half
    follows from it.
    """

    def __init__(self, settings, model):
        super().__init__(settings, model)
        self.draw = torch.randint(2**62, (1,))
        self.choose()

    def memory(self):
        return {"draw": self.draw}

    def after_load(self):
        self.choose()

    def on_phase(self, clock):
        if clock.step == 0:  # a new stage
            self.draw.fill_(clock.derive_seed("hft", int(self.draw)))
            self.choose()
        return {}

    def choose(self) -> None:
        """The half that this draw makes."""
        sizes = {n: p.numel() for n, p in self.model.named_parameters() if n in self.layer}
        live = half(sizes, self.settings.ratio, torch.Generator().manual_seed(int(self.draw)))
        self.let(lambda name: name in live or (self.settings.embeddings and name not in self.layer))


def half(sizes: dict[str, int], ratio: float, rng: torch.Generator) -> set[str]:
    """Names of layers' weights -> those of about `ratio` of them, alike in attention, feed-forward and norms.

    A bias goes with its weight. Where a layer's share is no whole number, as many layers take one more as
    make it right.
    """
    units: dict[tuple, dict[str, list[str]]] = {}  # (layer, kind) -> module -> its parameters
    for name in sizes:
        module = name.removesuffix(".weight").removesuffix(".bias")
        units.setdefault((layer_of(name), kind_of(name)), {}).setdefault(module, []).append(name)
    kinds: dict[tuple, list[dict[str, list[str]]]] = {}  # alike layers of a kind
    for (_, kind), modules in units.items():
        kinds.setdefault((kind, len(modules)), []).append(modules)
    best, gap = set(), float("inf")
    for _ in range(DRAWS):
        chosen: set[str] = set()
        for (_, n), layers in kinds.items():
            whole, more = divmod(round(ratio * n * len(layers)), len(layers))
            order = torch.randperm(len(layers), generator=rng).tolist()
            for place, i in enumerate(order):
                modules = list(layers[i].values())
                picked = torch.randperm(n, generator=rng)[: whole + (place < more)].tolist()
                chosen |= {name for k in picked for name in modules[k]}
        off = abs(sum(sizes[n] for n in chosen) / max(1, sum(sizes.values())) - ratio)
        if off < gap:
            best, gap = chosen, off
    return best
