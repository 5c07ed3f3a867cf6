"""Classifiers of sound of transformers (AST, wav2vec 2.0, HuBERT, WavLM, Whisper's encoder, ...): a
recording, and one class of several, any number of labels, or numbers.

Labels, heads and what `sft` means are those of `classifier`. Recordings are brought to the rate of the
checkpoint's own feature extractor, several channels to their mean. Those of one length are read together and
others apart: networks with a norm over time (wav2vec 2.0) hear padding. `seconds` gives all one length.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Any, ClassVar

from pydantic import Field

from luthier.methods.architectures._base import ENTROPY, FIXED_TARGETS, HIDDEN, LABEL_HEAD, LOGPROBS, TOPK
from luthier.methods.architectures._media import MediaClassifier, processor_error
from luthier.registry import architecture
from luthier.text.media import AudioProcessor, Processor


@architecture(
    provides=[LOGPROBS, ENTROPY, TOPK, HIDDEN, FIXED_TARGETS, LABEL_HEAD],
    use_when="the model chooses classes of recordings: rows have `audio` and `label`; name it for a"
    " checkpoint without a classification head.",
    costs="recordings of one length are read together, others apart; up to 256 MB of decoded ones are kept.",
)
class AudioClassifier(MediaClassifier):
    """AutoModelForAudioClassification. `hidden` are its logits [N, classes]."""

    column: ClassVar[str] = "audios"
    noun: ClassVar[str] = "recording"

    # every recording is cut, or filled with silence, to this length; by default each keeps its own
    seconds: Annotated[float, Field(gt=0)] | None = None

    def suits(self, config: Any) -> bool:
        from transformers.models.auto import modeling_auto as auto

        names = {*auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES.values()}
        return bool(names.intersection(config.architectures or ()))

    def auto_class(self) -> Any:
        from transformers import AutoModelForAudioClassification

        return AutoModelForAudioClassification

    def processor_of(self, path: str) -> Processor:
        return recordings_of(path, self.seconds)


@lru_cache(maxsize=8)
def recordings_of(path: str, seconds: float | None) -> AudioProcessor:
    """The recordings of a model. Raises RecipeError where it has no feature extractor that works here."""
    from transformers import AutoFeatureExtractor

    try:
        processor = AutoFeatureExtractor.from_pretrained(path, trust_remote_code=False)
    except (ImportError, OSError, ValueError) as error:
        raise processor_error(path, error) from None
    return AudioProcessor(processor, seconds)
