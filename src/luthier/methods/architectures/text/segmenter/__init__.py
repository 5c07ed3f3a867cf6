"""SaT: an encoder that says of every token whether a sentence ends with it; so texts are cut into sentences
(Segment Any Text, Frohmann et al., 2024).

A `text` row is all that is needed: its line breaks are taken out and predicted, which is pretraining on texts
of the web as much as tuning on sentences, one a line. A head with two classes stands on every token, so `sft`
is the cross-entropy of each; the end of a text is not predicted, it is one. Attention is a band: through
`layers` layers no token sees more than `lookahead` tokens ahead, each layer its share (rounded down), so a
text can be cut while it is still being written. The encoder may lose its upper layers (`layers`), for speed.

Stage `sentence_noise` writes texts without punctuation and case beside the clean ones, evaluator
`segmentation` measures F1 at a threshold and writes the sentences. Adaptation to a style is `tuner: lora`
from a trained segmenter. Departs: two classes and a softmax in place of one logit and a sigmoid, which is the
same function of their difference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from luthier.errors import RecipeError
from luthier.methods.architectures._base import (
    ENTROPY,
    FIXED_TARGETS,
    HIDDEN,
    LABEL_HEAD,
    LOGPROBS,
    TOPK,
    Architecture,
)
from luthier.methods.architectures.text.classifier.heads import SINGLE, outputs_of
from luthier.methods.architectures.text.segmenter.renderer import LABELS
from luthier.model.batch import Batch, pad
from luthier.model.language_model import as_mask
from luthier.registry import Capability, architecture

if TYPE_CHECKING:
    from luthier.methods.architectures.text.segmenter.renderer import SegmentRenderer
    from luthier.model.network import Network
    from luthier.model.outputs import Outputs

BOUNDARIES = Capability(
    "boundaries", says="a head that marks the ends of sentences (architecture `segmenter`)"
)
LOOKAHEAD = 48  # tokens, of the paper's networks


@architecture(
    paper="arXiv:2406.16678",
    row="segment-any-text",
    provides=[LOGPROBS, ENTROPY, TOPK, HIDDEN, FIXED_TARGETS, LABEL_HEAD, BOUNDARIES],
    use_when="an encoder is to cut texts into sentences, or into other pieces that stand one a line; name it"
    " for a checkpoint that is no segmenter yet.",
    costs="padded batches, and a mask of every pair of places.",
    covers="line breaks of texts taken out and predicted token by token; a band of attention, so that a logit"
    " does not depend on tokens beyond the lookahead; fewer layers of an encoder; a share of the texts, or a"
    " copy of each, without punctuation and case; overlapping blocks whose probabilities are averaged, and"
    " sentences that are the text again when joined; F1 at a threshold that is set and at the best one for"
    " the held-out rows; low-rank adaptation from few sentences.",
    omits="a threshold that is chosen on the sentences of an adaptation and carried to others by itself; the"
    " auxiliary head that predicts punctuation, and pretraining on texts of 85 languages; noise"
    " of social media other than case and marks; limited lookahead for networks without a padded 4-D mask;"
    " the authors' checkpoints, whose type is their own.",
    tests=[
        "methods/architectures/text/test_segmenter.py::test_no_token_beyond_the_lookahead_is_seen",
        "methods/architectures/text/test_segmenter.py::test_sentences_joined_are_the_text",
        "methods/architectures/text/test_segmenter.py::test_noise_teaches_what_needs_no_punctuation",
        "methods/architectures/text/test_segmenter.py::test_few_sentences_adapt_by_low_rank",
    ],
)
class Segmenter(Architecture):
    """AutoModelForTokenClassification with the classes "inside" and "end". `hidden` are its logits [T, 2]."""

    # how many tokens ahead a token sees through the whole stack; by default as in the checkpoint, or else 48
    lookahead: Annotated[int, Field(ge=0)] | None = None
    layers: Annotated[int, Field(ge=1)] | None = None  # how many layers are left of the encoder; None: all
    separator: str = " "  # what a line break is replaced by; "" for languages without spaces

    def suits(self, config: Any) -> bool:
        names = config.architectures or ()
        own = [*getattr(config, "label2id", {})] == list(LABELS)
        return own and any(name.endswith("ForTokenClassification") for name in names)

    def auto_class(self) -> Any:
        from transformers import AutoModelForTokenClassification

        return AutoModelForTokenClassification

    def load(self, path: str, **kwargs: Any) -> Network:
        labels = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
        if self.layers is not None:
            kwargs["num_hidden_layers"] = self.layers
        model: Any = super().load(path, num_labels=2, **labels, **kwargs)
        if self.lookahead is not None:
            model.config.lookahead = self.lookahead
        elif getattr(model.config, "lookahead", None) is None:
            model.config.lookahead = LOOKAHEAD
        return model

    def check_network(self, model: Network) -> None:
        """Raises RecipeError for a network of fewer layers than `layers`, or one that reads no band."""
        depth = model.config.num_hidden_layers
        ids = torch.arange(8, device=next(model.parameters()).device)[None] % model.config.vocab_size
        with torch.no_grad():
            whole, cut = self.logits(model, ids, ahead=0), self.logits(model, ids[:, :4], ahead=0)
        if not torch.allclose(whole[:, :4], cut, rtol=1e-2, atol=1e-3):
            raise RecipeError(
                f"architecture 'segmenter': {type(model).__name__} ({depth} layers) does not attend as a mask"
                " of pairs says, so nothing limits its lookahead; use an encoder such as BERT or XLM-R"
            )

    def renderer(self, tokenizer: Any, config: Any, **how: Any) -> SegmentRenderer:
        from luthier.methods.architectures.text.segmenter.renderer import SegmentRenderer

        return SegmentRenderer(tokenizer, self.separator, **how)

    def forward(self, model: Network, attached, batch: Batch) -> Outputs:
        if attached.rewrites_inputs:
            raise ValueError("a segmenter does not support soft prompts")
        pieces, parents = batch.segments(), batch.parents
        roots = [parents[s] for s in batch.completion.tolist()]
        attached.announce_rows(batch, batch.row[roots])
        ids, real = pad([batch.ids[pieces[s]] for s in roots], padding_of(model))
        logits = self.logits(model, ids, real)
        values = []
        for r, s in enumerate(batch.completion.tolist()):
            values.append(logits[r, : len(pieces[s])][batch.supervised[pieces[s]]])
        return outputs_of(torch.cat(values).float(), SINGLE, batch)

    def plain(self, model: Network, attached, batch: Batch) -> Tensor:
        pieces, parents, values = batch.segments(), batch.parents, []
        for s in batch.completion.tolist():
            attached.announce_rows(batch, batch.row[[parents[s]]])
            logits = self.logits(model, batch.ids[pieces[parents[s]]][None])[0]
            values.append(logits[batch.supervised[pieces[s]]])
        return outputs_of(torch.cat(values).float(), SINGLE, batch).logprobs

    def logits(
        self, model: Network, ids: Tensor, real: Tensor | None = None, ahead: int | None = None
    ) -> Tensor:
        """[R, W] tokens, of which `real` [R, W] are no padding -> [R, W, 2]. ahead: tokens that a layer sees
        ahead; by default its share of the lookahead.
        """
        if ahead is None:
            ahead = int(model.config.lookahead) // int(model.config.num_hidden_layers)
        width = ids.shape[1]
        may = (
            torch.ones(width, width, dtype=torch.bool, device=ids.device).tril(ahead).expand(len(ids), -1, -1)
        )
        if real is not None:
            may = may & real.bool()[:, None, :]
        itself = torch.eye(width, dtype=torch.bool, device=ids.device)  # padding, too: no NaN
        return model(input_ids=ids, attention_mask=as_mask(model, (may | itself)[:, None])).logits


def padding_of(model: Network) -> int:
    token = model.config.pad_token_id
    return 0 if token is None else token
