"""Masked language models (encoders): a masked token is predicted at its own position, from both sides.

A `text` row is the pretraining task: at each step a fraction of its tokens, drawn from (seed, step, row), is
masked and predicted. A prompt/completion row is a cloze: the whole completion (without special tokens) is
masked and predicted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor

from luthier.errors import RecipeError
from luthier.methods.architectures._base import ANSWER_TOKENS, ENTROPY, HIDDEN, LOGPROBS, SOFT_PROMPTS, TOPK
from luthier.model.batch import Batch, pad
from luthier.model.language_model import LanguageModel, path, picked, soft_first
from luthier.model.outputs import Outputs
from luthier.registry import Range, architecture

if TYPE_CHECKING:
    from luthier.model.network import Network


@architecture(
    paper="arXiv:1810.04805",
    provides=[LOGPROBS, ENTROPY, TOPK, HIDDEN, SOFT_PROMPTS, ANSWER_TOKENS],
    use_when="the model is an encoder (BERT, RoBERTa, ModernBERT) that is trained on masked text or on"
    " clozes.",
    costs="padded batches.",
)
class MaskedLM(LanguageModel):
    """BERT, RoBERTa, ELECTRA's generator, ModernBERT. Padded on the right."""

    # share of a text's tokens that is predicted, at least one
    mlm_probability: Annotated[float, Range(0.05, 0.5)] = 0.15
    mask_share: float = 0.8  # share of the predicted tokens that is replaced by the mask token
    # share of the predicted tokens that is replaced by a random token; the others are left unchanged
    random_share: float = 0.1

    def suits(self, config: Any) -> bool:
        from transformers.models.auto import modeling_auto as auto

        ours = {*auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()}
        others = {
            *auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
            *auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values(),
        }
        return any(n in ours - others for n in config.architectures or ())

    def auto_class(self) -> Any:
        from transformers import AutoModelForMaskedLM

        return AutoModelForMaskedLM

    def ask(self, batch: Batch, renderer, clock) -> Batch:
        """Hide the asked tokens. Which ones of a text are asked is drawn here; special tokens never are."""
        tokenizer = renderer.tokenizer
        if tokenizer.mask_token_id is None:
            raise RecipeError("the tokenizer has no mask token; use a masked language model such as BERT")
        special = torch.tensor(sorted(renderer.special))
        supervised = batch.supervised & ~torch.isin(batch.labels, special)
        ids = batch.ids.clone()
        pieces = batch.segments()
        for k, (s, g) in enumerate(zip(batch.completion.tolist(), batch.group.tolist(), strict=True)):
            row, places = batch.rows[g], pieces[s][supervised[pieces[s]]]
            if row["prompt"] != "":
                ids[places] = tokenizer.mask_token_id
                continue
            rng = clock.rng("mask", str(row.get("id", k)))
            some = places[
                torch.randperm(len(places), generator=rng)[
                    : max(1, round(len(places) * self.mlm_probability))
                ]
            ]
            supervised[places] = False
            supervised[some] = True
            fate, words = (
                torch.rand(len(some), generator=rng),
                torch.randint(len(tokenizer), (len(some),), generator=rng),
            )
            replacements = torch.where(fate < self.mask_share + self.random_share, words, ids[some])
            ids[some] = torch.where(fate < self.mask_share, tokenizer.mask_token_id, replacements)
        return batch.view(ids=ids, supervised=supervised)

    def forward(self, model: Network, attached, batch: Batch) -> Outputs:
        pieces = batch.segments()
        places = [torch.cat([pieces[p] for p in path(batch, s)]) for s in batch.completion.tolist()]
        inputs = soft_first(model, attached, *pad([batch.ids[p] for p in places]), of=(batch, batch.group))
        width = inputs["attention_mask"].shape[1]
        at = torch.full_like(batch.ids, -1)
        # a completion ends its row
        for r, (s, p) in enumerate(zip(batch.completion.tolist(), places, strict=True)):
            first = r * width + attached.virtual + len(p) - len(pieces[s])
            at[pieces[s]] = first + torch.arange(len(pieces[s]), device=at.device)
        at = at[batch.targets]
        return self.answer(model, inputs, at, batch.labels[batch.targets])

    def alone(self, model: Network, attached, batch: Batch, segment: int, own: Tensor) -> Tensor:
        pieces = batch.segments()
        places = torch.cat([pieces[s] for s in path(batch, segment)])
        inputs = soft_first(model, attached, batch.ids[places][None], of=(batch, batch.row[[segment]]))
        logits = model(**inputs).logits[0, attached.virtual :]
        return picked(logits[(places[:, None] == own).nonzero()[:, 0]], batch.labels[own])
