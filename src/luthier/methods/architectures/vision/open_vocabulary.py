"""Classes that have no weights: an image, or a region of one, becomes a vector, and its class is that whose
name lies nearest to it in the space of a frozen text tower (ViLD's region classifier, Gu et al., 2021).

The logits of an image are cos(e, t_i) / temperature, t_i the direction of a CLIP's text vectors of the name's
prompts; e is what an image classifier says whose head has as many outputs as the space has dimensions. The
label `background` has no text: its vector is learned, and is the bias of the head, which is left out of e.
`sft` on these logits is ViLD-text, beside objective `vild`, which draws e to a CLIP's vector of the image, it
is ViLD. `novel` names further classes that are no choice while training and all the same afterwards; adding
names changes no weight.

Departs: the regions that a detector proposes are rows, each read by itself (stage `region_embeddings` cuts
them out), so features are not shared between the regions of an image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from luthier.errors import RecipeError
from luthier.kernels.logprobs import Head
from luthier.methods.architectures._base import ENTROPY, FIXED_TARGETS, HIDDEN, LABEL_HEAD, LOGPROBS, TOPK
from luthier.methods.architectures._media import MediaRenderer
from luthier.methods.architectures.text.classifier.heads import SINGLE
from luthier.methods.architectures.vision.image_classifier import ImageClassifier
from luthier.model.outputs import Outputs
from luthier.model.two_towers import two_towers_of
from luthier.registry import architecture

if TYPE_CHECKING:
    from luthier.model.batch import Batch
    from luthier.model.network import Network

NO_CHOICE = -1e4  # logit of a class that is none; finite, so that no entropy is 0 * inf


@architecture(
    example={"embeddings": {"0": [1.0, 0.0, 0.0], "1": [0.0, 1.0, 0.0], "2": [0.0, 0.0, 1.0]}},
    paper="arXiv:2104.13921",
    row="vild",
    provides=[LOGPROBS, ENTROPY, TOPK, HIDDEN, FIXED_TARGETS, LABEL_HEAD],
    use_when="an image classifier, or the head of a detector, is to know classes by their names, also such as"
    " no row has; name it, and a CLIP whose text tower reads the names.",
    costs="as `image_classifier`; the text tower reads each name once.",
    covers="logits as cosines with text vectors of prompts, a learned vector of the background, names that"
    " are added without a change of weights; with objective `vild` and stage `region_embeddings` the"
    " distillation of a CLIP into it, on regions that are given.",
    omits="proposals, boxes and masks and their losses, features that the regions of an image share; the"
    " ensemble of two heads with a geometric mean of scores.",
    tests=[
        "methods/architectures/vision/test_open_vocabulary.py::test_logits_are_cosines_with_names",
        "methods/architectures/vision/test_open_vocabulary.py::test_adding_names_changes_no_weight",
        "methods/architectures/vision/test_open_vocabulary.py::test_novel_classes_come_with_distillation_alone",
    ],
)
class OpenVocabulary(ImageClassifier):
    """AutoModelForImageClassification with vectors for outputs. `hidden` are these vectors [N, E]."""

    clip: str | None = None  # a folder or hub name of a CLIP, whose text tower reads the names
    prompts: tuple[str, ...] = ("a photo of a {}.",)  # what is read of a name, which stands for {}; averaged
    embeddings: dict[str, list[float]] | None = None  # the vectors of names, in place of a CLIP
    novel: tuple[str, ...] = ()  # names beyond the labels of the rows, no choice while training
    background: str = "background"  # the label whose vector is learned
    temperature: Annotated[float, Field(gt=0)] = 0.01  # what cosines are divided by

    def __post_init__(self):
        if self.problem_type not in ("auto", SINGLE) or self.class_weights is not None:
            raise RecipeError(
                "architecture 'open_vocabulary': an image has one class of several, which all count alike;"
                " leave problem_type and class_weights out"
            )

    def suits(self, config: Any) -> bool:
        return False  # it is named

    # --- names

    def fit_to(self, rows: list[dict]) -> dict[str, Any]:
        """The names of the classes: the labels of the rows, then novel ones."""
        labels = [*super().fit_to(rows).get("label2id", {})]
        both = [name for name in self.novel if name in labels]
        if both:
            raise RecipeError(
                f"architecture 'open_vocabulary': '{both[0]}' is novel, and rows to train on have that"
                f" label: call it '{self.background}' there, as nobody labelled it, or take it from `novel`"
            )
        return {"names": [*labels, *self.novel]} if labels else {}

    def vectors(self, names: list[str]) -> Tensor:
        """[names, E] unit vectors; of the background zeros, since its own is learned."""
        others = [name for name in names if name != self.background]
        if self.embeddings is not None:
            missing = [name for name in others if name not in self.embeddings]
            if missing:
                raise RecipeError(
                    f"architecture 'open_vocabulary': no vector in embeddings is of '{missing[0]}'"
                )
            table = torch.tensor([self.embeddings[name] for name in others])
        elif self.clip is not None:
            table = two_towers_of(self.clip).names(others, self.prompts)
        else:
            raise RecipeError(
                "architecture 'open_vocabulary' needs to know where names lie: set clip to a CLIP that reads"
                " them, or embeddings to their vectors"
            )
        vectors = torch.zeros(len(names), table.shape[1])
        vectors[[names.index(name) for name in others]] = F.normalize(table, dim=-1)
        return vectors

    # --- the network

    def load(self, path: str, **kwargs: Any) -> Network:
        names = kwargs.pop("names", None) or self.names_in(path)
        vectors = self.vectors(names)
        numbers = [f"dimension_{i}" for i in range(vectors.shape[1])]
        model: Any = super().load(
            path,
            num_labels=len(numbers),
            id2label=dict(enumerate(numbers)),
            label2id={name: i for i, name in enumerate(numbers)},
            **kwargs,
        )
        model.config.names = names
        model.register_buffer("name_vectors", vectors, persistent=False)
        heads = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == len(numbers)]
        if not heads or heads[-1].bias is None:
            raise RecipeError(
                f"architecture 'open_vocabulary': the head of {type(model).__name__} is no linear layer with"
                " a bias, which the vector of the background would be"
            )
        model.background = (heads[-1],)  # in a tuple: it has its name already
        if any(model.get_submodule(name) is heads[-1] for name in model.fresh):
            noise = torch.randn(len(numbers), generator=torch.Generator().manual_seed(0))
            with torch.no_grad():  # a vector of zeros has no direction
                heads[-1].bias.copy_(noise / len(numbers) ** 0.5)
        return model

    def names_in(self, path: str) -> list[str]:
        """The names that a checkpoint was saved with, and novel ones. Raises RecipeError without any."""
        from transformers import AutoConfig

        names = getattr(AutoConfig.from_pretrained(path, trust_remote_code=False), "names", None)
        if not names:
            raise RecipeError(f"{path}: no rows are there that name the classes")
        return [*names, *(name for name in self.novel if name not in names)]

    def renderer(self, tokenizer: Any, config: Any, **how: Any) -> MediaRenderer:
        label2id = {name: i for i, name in enumerate(config.names)}
        return MediaRenderer(self.column, self.noun, tokenizer, label2id, SINGLE, None, **how)

    def outputs(self, model: Network, values: Tensor, batch: Batch) -> Outputs:
        net: Any = model
        names, bias = net.config.names, net.background[0].bias
        vectors = net.name_vectors.float()
        if self.background in names:
            place = torch.tensor([names.index(self.background)], device=vectors.device)
            vectors = vectors.index_copy(0, place, bias.float()[None])
        offsets = torch.zeros(len(names), device=vectors.device)
        if model.training:
            offsets[[names.index(name) for name in self.novel]] = NO_CHOICE
        cosines = Cosines(F.normalize(vectors, dim=-1), self.temperature, offsets)
        return Outputs(values - bias.float(), Head(cosines), batch.labels[batch.targets])


class Cosines(nn.Module):
    """[N, E] -> [N, names] cosines with unit vectors over a temperature, and offsets."""

    def __init__(self, vectors: Tensor, temperature: float, offsets: Tensor):
        super().__init__()
        self.vectors, self.temperature, self.offsets = vectors, temperature, offsets
        self.out_features = len(vectors)

    def forward(self, e: Tensor) -> Tensor:
        return F.normalize(e.float(), dim=-1) @ self.vectors.T / self.temperature + self.offsets
