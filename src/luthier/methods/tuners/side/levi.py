"""LEVI: a frozen network and a small one that is trained from scratch are joined at several depths, and the
answers of all depths count alike.

s is what the small network says of the raw input. At each of `depths` layers, the last of which is the end of
the network, z_l = A_l [mean h_l; s] with a linear A_l, a head of each depth answers f(z_l), and the logits
are their average (or a trained sum); the loss is that of the average. Low layers and the small network see
what the task's own rows show, high layers what pretraining has made of it; together they lean less on the
spurious features of either. The small network of texts is a table of embeddings and two layers, averaged over
the tokens; of images and spectrograms two convolutions.

Departs: states come as means over places; A_l is one linear layer with a ReLU, or none (`adapting: 0`); the
network itself stays frozen, where the paper also tunes it by LoRA; heads start at zero.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from luthier.errors import RecipeError
from luthier.methods.architectures._base import LABEL_HEAD
from luthier.methods.tuners._base import DISABLE_ADAPTER
from luthier.methods.tuners.side._readout import Reading, Readout, layers_of, width_of
from luthier.registry import Range, tuner

PATCH = 4  # of the small network of images, at most


@tuner(
    example={"depths": 2, "small": 6, "adapting": 5},
    paper="arXiv:2402.04644",
    row="levi",
    requires=[LABEL_HEAD],
    provides=[DISABLE_ADAPTER],
    contract={"starts_as_base": "its heads are new"},
    use_when="a classifier will be read on other data than it is tuned on, and pretraining has features that"
    " mislead there: several depths and a small network of its own vote.",
    costs="one forward pass of the frozen network, no backward pass through it; a small network and a head"
    " for each depth.",
    starting_rate="start with 1e-3.",
    default_rate=1e-3,
    covers="a scratch network of texts, images or spectrograms, adapting layers at evenly spread depths,"
    " heads whose logits are averaged or summed with trained weights; linear probing as its smallest form.",
    omits="LoRA in the pretrained network, ratings and generated answers (T5), adapting layers over single"
    " tokens.",
    tests=[
        "methods/tuners/side/test_levi.py::test_its_smallest_form_is_linear_probing",
        "methods/tuners/side/test_levi.py::test_the_answer_is_the_average_of_the_depths",
        "methods/tuners/side/test_levi.py::test_out_of_distribution_it_beats_full_tuning_and_the_small_network",
    ],
)
class Levi(Readout):
    """An ensemble of depths of a frozen network with a small network."""

    depths: Annotated[int, Field(ge=1), Range(1, 6)] = 3  # layers that have a head, the last one among them
    # width of the small network; 0: there is none
    small: Annotated[int, Field(ge=0), Range(8, 128, log=True)] = 64
    # width of the adapting layers; 0: heads read states and the small network as they are
    adapting: Annotated[int, Field(ge=0), Range(8, 256, log=True)] = 64
    # how the depths' logits are joined: their mean, or a sum with trained weights
    ensemble: Literal["average", "sum"] = "average"

    def tensors(self, model):
        width, layers, labels = width_of(model, self.name), len(layers_of(model)), model.config.num_labels
        if self.depths > layers:
            raise RecipeError(
                f"tuner 'levi': depths {self.depths} is more than the {layers} layers of"
                f" {type(model).__name__}"
            )
        trained = self.small_network(model)
        joined = width + self.small
        read = self.adapting or joined
        if self.adapting:
            trained["adapt"] = torch.randn(self.depths, self.adapting, joined) / joined**0.5
            trained["adapt_bias"] = torch.zeros(self.depths, self.adapting)
        trained["heads"] = torch.zeros(self.depths, labels, read)
        trained["biases"] = torch.zeros(self.depths, labels)
        if self.ensemble == "sum":
            trained["weights"] = torch.full((self.depths,), 1 / self.depths)
        return trained, {}

    # --- the small network

    def small_network(self, model: Any) -> dict[str, Tensor]:
        """Its tensors: a table or a kernel that reads the input, and two layers."""
        w = self.small
        if not w:
            return {}
        name, config = model.main_input_name, model.config
        if name == "input_ids":
            first = torch.randn(config.get_text_config().vocab_size, w)
        elif name == "pixel_values":
            patch = min(PATCH, getattr(config, "patch_size", PATCH))
            first = torch.randn(w, config.num_channels, patch, patch) / patch
        elif hasattr(config, "num_mel_bins"):
            first = torch.randn(w, 1, PATCH, PATCH) / PATCH
        else:
            raise RecipeError(f"tuner 'levi' has no small network that reads {name}; set small: 0")
        inner = {"inner": torch.randn(w, w) * (2 / w) ** 0.5, "inner_bias": torch.zeros(w)}
        outer = {"outer": torch.randn(w, w) * (2 / w) ** 0.5, "outer_bias": torch.zeros(w)}
        return {"first": first, **inner, **outer}

    def view(self, reading: Reading, p: Any) -> Tensor:
        """[R, small] what the small network says."""
        if p.first.ndim == 2:
            places = F.embedding(reading.inputs, p.first)
        else:
            images = reading.inputs.float()
            images = images[:, None] if images.ndim == 3 else images
            places = F.conv2d(images, p.first, stride=p.first.shape[-1]).flatten(2).transpose(1, 2)
        inner = F.relu(F.linear(places, p.inner, p.inner_bias))
        return F.relu(F.linear(reading.mean(inner), p.outer, p.outer_bias))

    # --- the ensemble

    def views(self, reading: Reading, p: Any) -> list[Tensor]:
        """[R, read] what the head of each depth reads."""
        assert reading.last is not None
        count = len(reading.states)
        at = [count * (i + 1) // self.depths - 1 for i in range(self.depths - 1)]
        states = [*(reading.states[i] for i in at), reading.last]
        beside = [self.view(reading, p)] if self.small else []
        views = []
        for depth, state in enumerate(states):
            joined = torch.cat([reading.mean(state), *beside], 1)
            if self.adapting:
                joined = F.relu(F.linear(joined, p.adapt[depth], p.adapt_bias[depth]))
            views.append(joined)
        return views

    def answers(self, reading, p):
        views = torch.stack(self.views(reading, p))  # [depths, R, read]
        logits = torch.einsum("lrd,lcd->lrc", views, p.heads) + p.biases[:, None]
        if self.ensemble == "average":
            return logits.mean(0)
        return torch.einsum("l,lrc->rc", p.weights, logits)
