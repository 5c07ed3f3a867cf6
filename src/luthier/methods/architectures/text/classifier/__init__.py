"""Sequence classifiers: one class of several, any number of labels, or numbers, on a head of their own.

`problem_type` is transformers' own word. Of one class the classes are the vocabulary, so `sft` is
cross-entropy. With several labels each is a question with the answers no and yes, so `sft` is the binary
cross-entropy of all of them. In a regression the log-probability of a number is minus the squared error, so
`sft` is the mean squared error. Encoders (BERT) classify from their first token, decoders (Llama) from their
last; behind the vectors of a soft prompt a decoder still does so from the last token that is no padding, and
an encoder from the first vector, as with PEFT. The classes are those of the rows, or of a checkpoint that
already has all of them; their order is saved with the model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from luthier.errors import RecipeError
from luthier.methods.architectures._base import (
    ENTROPY,
    FIXED_TARGETS,
    HIDDEN,
    LABEL_HEAD,
    LOGPROBS,
    SOFT_PROMPTS,
    TOPK,
    Architecture,
)
from luthier.methods.architectures.text.classifier.heads import REGRESSION, Problem, outputs_of, problem_of
from luthier.methods.architectures.text.classifier.labels import class_weights_of, describe_labels
from luthier.methods.architectures.text.reward_model import scored
from luthier.model.batch import Batch, pad
from luthier.model.language_model import soft_first
from luthier.registry import architecture

if TYPE_CHECKING:
    from luthier.model.network import Network
    from luthier.model.outputs import Outputs
    from luthier.text.encode import Renderer


@architecture(
    provides=[LOGPROBS, ENTROPY, TOPK, HIDDEN, FIXED_TARGETS, LABEL_HEAD, SOFT_PROMPTS],
    use_when="the model is to choose classes or give numbers; name it for a checkpoint without a"
    " classification head.",
    costs="padded batches.",
)
class Classifier(Architecture):
    """AutoModelForSequenceClassification. `hidden` are its logits [N, classes]."""

    # auto: one class, or any number of labels where rows list several
    problem_type: Problem = "auto"
    # how much a class counts in the loss: {name: weight}, or balanced, by how often it is in the rows. Of
    # several labels it is the weight of their being there. Divided by the number of rows, or with
    # `objective: {name: sft, normalize: weights}` by their weights, as in torch
    class_weights: Literal["balanced"] | dict[str, float] | None = None

    def __post_init__(self):
        weights = self.class_weights
        if isinstance(weights, dict) and not all(w >= 0 for w in weights.values()):
            raise RecipeError("class_weights must not be negative")
        if weights is not None and self.problem_type == REGRESSION:
            raise RecipeError("class_weights are for classes, and problem_type is regression")

    @property
    def active_provides(self):
        if self.problem_type == REGRESSION:  # a number has no alternatives to choose from
            return self.provides - {ENTROPY, TOPK}
        return self.provides

    def suits(self, config: Any) -> bool:
        from transformers.models.auto import modeling_auto as auto

        recordings = {*auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES.values()}
        names = set(config.architectures or ()) - recordings
        return any(name.endswith("ForSequenceClassification") for name in names)

    def auto_class(self) -> Any:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

    def fit_to(self, rows: list[dict]) -> dict[str, Any]:
        """The classes of the rows: numbers in their order, else names in alphabetical order."""
        network = describe_labels(rows, self.problem_type)
        if network and self.class_weights is not None:
            network["class_weights"] = class_weights_of(rows, network, self.class_weights)
        return network

    def load(self, path: str, **kwargs: Any) -> Network:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        class_weights = kwargs.pop("class_weights", None)
        label2id = kwargs.get("label2id", {})
        if self.suits(config) and label2id.keys() <= config.label2id.keys():
            # a checkpoint that knows these classes keeps their order
            for name in ("num_labels", "id2label", "label2id"):
                kwargs.pop(name, None)
        elif not label2id:
            raise RecipeError(
                f"{path} has no classification head, and no rows are given that name the classes"
            )
        model = super().load(path, ignore_mismatched_sizes=True, **kwargs)
        if class_weights is not None:
            model.config.class_weights = class_weights
        config = model.config.get_text_config()
        # a decoder finds a row's last token by what is not padding
        if getattr(config, "pad_token_id", 0) is None:
            ends = config.eos_token_id
            config.pad_token_id = ends[0] if isinstance(ends, list) else ends
        return model

    def renderer(self, tokenizer: Any, config: Any, **how: Any) -> Renderer:
        from luthier.methods.architectures.text.classifier.renderer import LabelRenderer

        weights = getattr(config, "class_weights", None)
        return LabelRenderer(tokenizer, config.label2id, problem_of(config), weights, **how)

    def forward(self, model: Network, attached, batch: Batch) -> Outputs:
        pieces, parents = batch.segments(), batch.parent.tolist()
        completions = batch.segment[batch.targets].tolist()
        roots = sorted({parents[s] for s in completions})
        ids, mask = pad([batch.ids[pieces[s]] for s in roots], self.padding(model))
        inputs = soft_first(model, attached, ids, mask, of=(batch, batch.row[roots]))
        if "inputs_embeds" in inputs:
            logits = read_embeddings(model, inputs)
        else:
            logits = model(**inputs).logits
        which = torch.tensor([roots.index(parents[s]) for s in completions], device=ids.device)
        return outputs_of(logits[which].float(), problem_of(model.config), batch)

    def padding(self, model: Network) -> int:
        token = model.config.get_text_config().pad_token_id
        return 0 if token is None else token

    def plain(self, model: Network, attached, batch: Batch) -> Tensor:
        pieces, parents, out = batch.segments(), batch.parent.tolist(), []
        for s in batch.segment[batch.targets].tolist():
            ids = batch.ids[pieces[parents[s]]][None]
            inputs = soft_first(model, attached, ids, of=(batch, batch.row[[s]]))
            out.append(model(**inputs).logits)
        return outputs_of(torch.cat(out).float(), problem_of(model.config), batch).logprobs


def read_embeddings(model: Network, inputs: dict[str, Any]) -> Tensor:
    """[R, classes] logits of embeddings, padded on the right. A decoder cannot tell padding by them: what its
    head says of the last place that is none counts. Raises RecipeError for networks that need the tokens.
    """
    if model.config.is_encoder_decoder:
        raise RecipeError(
            f"{type(model).__name__} finds the end of a text by its tokens, so no soft prompt can stand"
            " before it; use an encoder or a decoder"
        )
    if not hasattr(model, "score"):
        return model(**inputs).logits
    logits = scored(model, inputs)
    last = inputs["attention_mask"].sum(1) - 1
    return logits[torch.arange(len(last), device=last.device), last]
