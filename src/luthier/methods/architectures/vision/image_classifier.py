"""Image classifiers of transformers (ViT, DeiT, Swin, ResNet, ConvNeXT, ...): an image, and one class of
several, any number of labels, or numbers.

Labels, heads and what `sft` means are those of `classifier`. Images go through the checkpoint's own image
processor, without augmentation. Batch norms keep the checkpoint's statistics.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, ClassVar

from luthier.methods.architectures._base import ENTROPY, FIXED_TARGETS, HIDDEN, LABEL_HEAD, LOGPROBS, TOPK
from luthier.methods.architectures._media import MediaClassifier, processor_error
from luthier.registry import architecture
from luthier.text.media import ImageProcessor, Processor


@architecture(
    row="peft-wheat-tsvit",
    provides=[LOGPROBS, ENTROPY, TOPK, HIDDEN, FIXED_TARGETS, LABEL_HEAD],
    use_when="the model chooses classes of images: rows have `image` and `label`; name it for a checkpoint"
    " without a classification head.",
    costs="images of one shape are read together; up to 256 MB of decoded ones are kept.",
    covers="low-rank updates of queries and values, biases with the head, and adapters beside feed-forward"
    " networks of a vision transformer: each trains its own parameters and starts as the base; where seasons"
    " are shifted, low-rank updates reach what the head alone does not.",
    omits="the temporo-spatial transformer over series of satellite images, segmentation, prompts among the"
    " patches (VPT), the wheat fields of five years and F1 on a year that was held out.",
    tests=[
        "methods/architectures/vision/test_image_classifier.py::test_each_tuner_trains_its_own_part",
        "methods/architectures/vision/test_image_classifier.py::test_shifted_seasons_need_more_than_a_head",
    ],
)
class ImageClassifier(MediaClassifier):
    """AutoModelForImageClassification. `hidden` are its logits [N, classes]."""

    column: ClassVar[str] = "images"
    noun: ClassVar[str] = "image"

    def suits(self, config: Any) -> bool:
        from transformers.models.auto import modeling_auto as auto

        names = set()
        for value in auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values():
            names.update([value] if isinstance(value, str) else value)
        return bool(names.intersection(config.architectures or ()))

    def auto_class(self) -> Any:
        from transformers import AutoModelForImageClassification

        return AutoModelForImageClassification

    def processor_of(self, path: str) -> Processor:
        return images_of(path)


@lru_cache(maxsize=8)
def images_of(path: str) -> ImageProcessor:
    """The images of a model. Raises RecipeError where it has no image processor that works here."""
    from transformers import AutoImageProcessor

    try:
        return ImageProcessor(AutoImageProcessor.from_pretrained(path, trust_remote_code=False))
    except (ImportError, OSError, ValueError) as error:
        raise processor_error(path, error) from None
