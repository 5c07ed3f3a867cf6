"""CRReLU: replaces a network's activation by max(0, x) + eps x exp(-x^2 / 2), with one trained eps at each
place, and trains all weights.

The correction of ReLU follows from a step against the entropy that an activation leaves (EAFO); eps starts at
0.01 and has no weight decay, as any single number here. The activation is named in the network's config, so
what is saved is a whole model that luthier loads again; transformers alone does not have this activation and
refuses it. Departs: activations are replaced wherever the config chooses them, a head's transform in BERT
among them; the search from other activations is not a tuner.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field

from luthier.compat.activations import CRRELU, CRReLU, add_activations
from luthier.errors import RecipeError
from luthier.methods.tuners._base import MERGE, Tuner
from luthier.methods.tuners.subset._subset import TunedWeights
from luthier.registry import Range, tuner

if TYPE_CHECKING:
    from luthier.model.network import Network

# where configs of transformers name the activation of feed-forward blocks
SETTINGS = ("hidden_act", "hidden_activation", "activation_function", "activation", "ffn_activation")


@tuner(
    paper="arXiv:2405.12954",
    row="crrelu",
    provides=[MERGE],
    contract={"starts_as_base": "another activation changes the output from the first step on"},
    use_when="you compare activations: the network's own is replaced by a corrected ReLU, and the network is"
    " tuned to it, with SFT or with preferences.",
    costs="as full fine-tuning, and one number for each activation; the network must learn to do with another"
    " activation than the one it was trained with.",
    starting_rate="start with that of `full`.",
    default_rate=2e-5,
    covers="the activation with a trained number at each place, in every network whose config names its"
    " activation, saved and loaded with it, under any objective.",
    omits="training from scratch on images, and the derivation for other activations than ReLU.",
    tests=[
        "methods/tuners/full/test_crrelu.py::test_the_activation_is_the_formula",
        "methods/tuners/full/test_crrelu.py::test_every_block_has_one_more_number_that_learns",
        "methods/tuners/full/test_crrelu.py::test_it_is_saved_and_loaded_with_the_network",
    ],
)
class CRReLUTuner(Tuner):
    """Full fine-tuning with another activation."""

    eps: Annotated[float, Field(ge=0), Range(0.001, 0.1)] = 0.01  # size of the correction at the start
    activations_only: bool = False  # train these numbers alone, and no weights

    def attach(self, model):
        names = self.swap(model)
        own = {f"{name}.eps" for name in names}
        return TunedWeights(
            self, model, lambda name, p: p.is_floating_point() and (name in own or not self.activations_only)
        )

    def swap(self, model: Network) -> list[str]:
        """Replace a network's activations and name them in its config; the names of their modules. Raises
        RecipeError where no setting of the config chooses them.
        """
        add_activations()
        kind, config = type(model), copy.deepcopy(model.config)
        name_activation(config)
        config = type(config).from_dict(config.to_dict())  # as it will be read from a file
        with torch.device("meta"):
            swapped = kind(config)
        names = [name for name, module in swapped.named_modules() if isinstance(module, CRReLU)]
        if not names:
            raise RecipeError(
                f"tuner 'crrelu': the config of {kind.__name__} does not name an activation that can be"
                " replaced"
            )
        weight = next(model.parameters())
        for name in names:
            above, _, leaf = name.rpartition(".")
            if not isinstance(model.get_submodule(name), CRReLU):  # else its number is as it was tuned
                activation = CRReLU(self.eps).to(weight.device, weight.dtype)
                setattr(model.get_submodule(above), leaf, activation.train(model.training))
        name_activation(model.config)
        return names


def name_activation(config: Any) -> None:
    """Write the activation into each setting of a config that names one."""
    from transformers.activations import ACT2FN

    text = config.get_text_config()
    for name in SETTINGS:
        value = getattr(text, name, None)
        if isinstance(value, str) and value in ACT2FN:
            setattr(text, name, CRRELU)
