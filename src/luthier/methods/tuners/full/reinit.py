"""Re-initialisation: draws the weights of the top layers anew, then trains all weights.

The top of a pretrained network is most specific to its pretraining task, which can hinder fine-tuning on few
rows: it then fails with some seeds and not with others. Layers are re-initialised by the network's own rule
(normal with its initializer range, norms at one, biases at zero; a pooler as well) when a run begins, so the
tuner itself starts as the base. The study's other stabilisers: `telly` freezes the lowest layers, transform
`layerwise_decay` slows them, `max_steps` trains longer, `optim: {name: adamw, bias_correction: false}` is the
optimizer that it warns of, and estimator `mixout` is a neighbour. Departs from the study: layers are counted
in the network's list of layers; in an encoder-decoder in that of the decoder.
"""

from __future__ import annotations

from typing import Annotated, Any, cast

import torch
from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.tuners._base import MERGE, Tuner
from luthier.methods.tuners.subset._subset import TunedWeights
from luthier.model.anatomy import layer_of
from luthier.registry import Range, tuner


@tuner(
    paper="doi:10.1016/j.patter.2023.100729",
    row="stable-ft-biomedical",
    provides=[MERGE],
    use_when="you fine-tune an encoder on a few hundred rows and some seeds fail: the top layers, most"
    " specific to pretraining, are re-initialised.",
    costs="as full fine-tuning.",
    starting_rate="start with that of `full`.",
    default_rate=2e-5,
    covers="lower layers are left as they are.",
    omits="the study's domains (vocabulary and pretraining on biomedical text), its ELECTRA models and "
    "the size of BERT-large: none is here. Pretraining of another vocabulary is not a switch but "
    "another model.",
    tests=[
        "methods/tuners/full/test_reinit.py::test_reinit_leaves_what_lies_below",
    ],
)
class Reinit(Tuner):
    """Full fine-tuning with re-initialised top layers. On small data sets one or two layers help most."""

    layers: Annotated[int, Field(ge=1), Range(1, 4)] = 1  # number of top layers that are re-initialised

    def attach(self, model):
        return ReinitializedModel(self, model)


class ReinitializedModel(TunedWeights):
    """All weights; the blocks at the top are re-initialised once, before the first step."""

    def __init__(self, settings, model):
        super().__init__(settings, model, lambda name, p: p.is_floating_point())
        order = list(dict.fromkeys(place for n in self.names if (place := layer_of(n))))
        depth = sum(stack == order[-1][0] for stack, _ in order) if order else 0
        if settings.layers > depth:
            raise RecipeError(
                f"tuner 'reinit': layers: {settings.layers}, but {type(model).__name__} has"
                f" only {depth} to re-initialize"
            )
        self.anew = [f"{stack}.{i}" for stack, i in order[-settings.layers :]]
        self.anew += [name for name, _ in model.named_modules() if name.rpartition(".")[2] == "pooler"]

    @torch.no_grad()
    def initialize(self, rows, roles):
        draw = cast(Any, self.model)._init_weights
        for place in self.anew:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(roles.clock.derive_seed("reinit", place, at=0))
                block = self.model.get_submodule(place)
                for p in block.parameters():
                    # transformers passes over what it has marked as loaded
                    p.__dict__.pop("_is_hf_initialized", None)
                for module in block.modules():
                    draw(module)
