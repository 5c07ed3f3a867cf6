"""Two towers, one for recordings and one for texts, whose features are compared (CLAP): a recording is of the
class whose name lies nearest.

The names of the classes are the labels of the rows, each in the words of `hypothesis_template`. Their
features stand where a classifier has a head, so that a network which has learned from sounds and captions
classifies without training, `sft` is the cross-entropy of a recording over all names, and objective
`info_nce` is the symmetric contrastive loss of CLAP. All names are read at every step, so there are classes
or few captions, not a caption for each of many recordings. Departs: recordings longer than the checkpoint
reads are cut where CLAP draws a part at random, and both directions of the loss have one temperature,
that of `logit_scale_a`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.errors import RecipeError
from luthier.methods.architectures._base import ENTROPY, FIXED_TARGETS, HIDDEN, LABEL_HEAD, LOGPROBS, TOPK
from luthier.methods.architectures._media import MediaClassifier, freeze_batch_norms, processor_error
from luthier.model.batch import pad
from luthier.registry import architecture
from luthier.text.media import AudioProcessor, Processor


@architecture(
    row="audio-language-survey",
    provides=[LOGPROBS, ENTROPY, TOPK, HIDDEN, FIXED_TARGETS, LABEL_HEAD],
    use_when="recordings are to be told apart by names in words, with CLAP: rows have `audio` and `label`.",
    costs="one pass over the recordings, and one over the names of all classes, at each step.",
    covers="the survey's two towers: zero-shot classification by names, cross-entropy over names, and with"
    " objective `info_nce` the symmetric contrastive loss; low rank and adapters in either tower.",
    omits="audio encoders in front of a language model, captioners and agents; audio-text matching, captions"
    " and masked spectrograms as losses; retrieval, captioning and question answering as measures; CLAP's"
    " fusion of long recordings; temperatures that differ by direction.",
    tests=[
        "methods/architectures/audio/test_audio_text.py::test_tones_that_are_held_out_are_named",
        "methods/architectures/audio/test_audio_text.py::test_it_compares_as_clap_does",
    ],
)
class AudioText(MediaClassifier):
    """ClapModel. `hidden` are its similarities [N, classes], times the network's temperature."""

    column: ClassVar[str] = "audios"
    noun: ClassVar[str] = "recording"

    # the words around the name of a class, which stands at {}
    hypothesis_template: str = "This is a sound of {}."

    def __post_init__(self):
        super().__post_init__()
        if self.hypothesis_template.count("{}") != 1:
            raise RecipeError("hypothesis_template needs one {} where the name of a class stands")
        if self.problem_type not in ("auto", "single_label_classification"):
            raise RecipeError("architecture 'audio_text' chooses one name of several; leave problem_type out")

    def suits(self, config: Any) -> bool:
        return "ClapModel" in (config.architectures or ())

    def auto_class(self) -> Any:
        from transformers import AutoModel

        return AutoModel

    def processor_of(self, path: str) -> Processor:
        return files_of(path)

    def fit_to(self, rows: list[dict]) -> dict[str, Any]:
        network = super().fit_to(rows)
        if network.get("problem_type", "single_label_classification") != "single_label_classification":
            raise RecipeError("architecture 'audio_text' chooses one name of several, and rows have several")
        return network

    def check_network(self, model: Any) -> None:
        if not hasattr(model, "audio_projection"):
            raise RecipeError(f"architecture 'audio_text' reads CLAP, and this is {type(model).__name__}")
        if model.config.audio_config.enable_fusion:
            raise RecipeError(
                "architecture 'audio_text': this checkpoint draws parts of long recordings at random"
                " (enable_fusion); use one without, such as laion/clap-htsat-unfused"
            )

    def forward(self, model, attached, batch):
        self.check_rows(attached)
        return super().forward(model, attached, batch)

    def plain(self, model, attached, batch):
        self.check_rows(attached)
        return super().plain(model, attached, batch)

    def check_rows(self, attached: Any) -> None:
        """Raise RecipeError for a tuner that depends on the row: a name belongs to none."""
        if attached.distinguishes_rows():
            raise RecipeError(
                f"tuner '{attached.settings.name}' depends on the row, and the names that architecture"
                " 'audio_text' reads belong to no row"
            )

    def read(self, model: Any, inputs: Tensor) -> Tensor:
        freeze_batch_norms(model)
        sounds = model.audio_projection(model.audio_model(input_features=inputs).pooler_output)
        similarity = F.normalize(sounds, dim=-1) @ self.names(model).T
        return similarity * model.logit_scale_a.exp()

    def names(self, model: Any) -> Tensor:
        """[classes, d] the features of all names, of length one."""
        classes = model.config.id2label
        words = [self.hypothesis_template.format(classes[i]) for i in sorted(classes)]
        listed = [torch.tensor(ids) for ids in model.media.texts(words)["input_ids"]]
        ids, mask = pad([ids.to(model.device) for ids in listed])
        read = model.text_model(input_ids=ids, attention_mask=mask).pooler_output
        return F.normalize(model.text_projection(read), dim=-1)


class AudioTextProcessor(AudioProcessor):
    """Recordings through a model's feature extractor, and its tokenizer, which reads names.

    texts: the tokenizer.
    """

    def __init__(self, processor: Any, texts: Any):
        super().__init__(processor, most=getattr(processor, "nb_max_samples", None))
        self.texts = texts

    def save_pretrained(self, folder: Any) -> None:
        super().save_pretrained(folder)
        self.texts.save_pretrained(folder)


@lru_cache(maxsize=8)
def files_of(path: str) -> AudioTextProcessor:
    """What reads the recordings and names of a model. Raises RecipeError where it cannot be loaded."""
    from transformers import AutoFeatureExtractor, AutoTokenizer

    try:
        extractor = AutoFeatureExtractor.from_pretrained(path, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (ImportError, OSError, ValueError) as error:
        raise processor_error(path, error) from None
    return AudioTextProcessor(extractor, tokenizer)
