"""Encoder-decoder models: the encoder reads a prompt once, the decoder each of its completions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from luthier.errors import RecipeError
from luthier.methods.architectures._base import (
    ANSWER_TOKENS,
    ENTROPY,
    FIXED_TARGETS,
    GENERATE,
    HIDDEN,
    LOGPROBS,
    SOFT_PROMPTS,
    TOPK,
)
from luthier.model.batch import Batch, pad
from luthier.model.generate import EncoderDecoder, Writer, generate
from luthier.model.language_model import LanguageModel, path, picked, soft_first
from luthier.model.outputs import Outputs
from luthier.registry import architecture

if TYPE_CHECKING:
    from luthier.model.network import Network


@architecture(
    provides=[LOGPROBS, ENTROPY, TOPK, HIDDEN, GENERATE, FIXED_TARGETS, SOFT_PROMPTS, ANSWER_TOKENS],
    use_when="the model is an encoder-decoder: T5, BART and similar models. It is selected automatically.",
    costs="padded batches; the encoder reads a prompt once for all its completions.",
)
class Seq2Seq(LanguageModel):
    """T5, BART and similar models. A completion that continues another is one text for the decoder."""

    def suits(self, config: Any) -> bool:
        from transformers.models.auto import modeling_auto as auto

        ours = {*auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values()}
        return any(n in ours for n in config.architectures or ())

    def auto_class(self) -> Any:
        from transformers import AutoModelForSeq2SeqLM

        return AutoModelForSeq2SeqLM

    def renderer(self, tokenizer: Any, config: Any, **how: Any):
        return super().renderer(tokenizer, config, encoder=True, **how)

    def forward(self, model: Network, attached, batch: Batch) -> Outputs:
        pieces, parents, start = batch.segments(), batch.parent.tolist(), first_token(model)
        has_children = {*parents}
        roots = [s for s, above in enumerate(parents) if above < 0]
        leaves = [s for s, above in enumerate(parents) if above >= 0 and s not in has_children]
        ways = [path(batch, s) for s in leaves]
        places = [torch.cat([pieces[s] for s in way[1:]]) for way in ways]
        targets, _ = pad([batch.ids[p] for p in places])
        width = targets.shape[1]
        at = torch.full_like(batch.ids, -1)
        for r, p in enumerate(places):  # the decoder's place k has read k tokens and answers token k
            at[p] = r * width + torch.arange(len(p), device=at.device)
        at = at[batch.targets]
        if (at < 0).any():
            raise ValueError(
                "a supervised token lies in the prompt, which the encoder reads and does not predict"
            )
        hidden, mask = encode(
            model, attached, [batch.ids[pieces[s]] for s in roots], of=(batch, batch.row[roots])
        )
        attached.announce_rows(batch, batch.row[leaves])
        which = torch.tensor([roots.index(way[0]) for way in ways], device=at.device)
        inputs = {
            "encoder_outputs": (hidden[which],),
            "attention_mask": mask[which],
            "decoder_input_ids": torch.cat([targets.new_full((len(targets), 1), start), targets[:, :-1]], 1),
        }
        return self.answer(model, inputs, at, batch.labels[batch.targets])

    def alone(self, model: Network, attached, batch: Batch, segment: int, own: Tensor) -> Tensor:
        root, *way = path(batch, segment)
        pieces = batch.segments()
        places = torch.cat([pieces[s] for s in way])
        ids, prompt = batch.ids[places], batch.ids[pieces[root]][None]
        inputs = soft_first(model, attached, prompt, of=(batch, batch.row[[segment]]))
        begun = torch.cat([ids.new_tensor([first_token(model)]), ids[:-1]])
        logits = model(**inputs, decoder_input_ids=begun[None], use_cache=False).logits[0]
        return picked(logits[(places[:, None] == own).nonzero()[:, 0]], batch.labels[own])

    def writer(self, model: Network, attached) -> tuple[Writer, int | None]:
        writer = EncoderDecoder(model, attached, lambda ids: encode(model, attached, ids), first_token(model))
        return writer, getattr(model.config, "max_position_embeddings", None)

    def generate(
        self, model: Network, attached, prompts: list[list[int]], **how: Any
    ) -> list[list[list[int]]]:
        writer, limit = self.writer(model, attached)
        return generate(writer, prompts, limit=limit, **how)


def encode(
    model: Network, attached, prompts: list[Tensor], of: tuple[Batch, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Prompts -> the encoder's hidden states [R, W, d] and the mask [R, W] of real places; soft vectors in
    front.
    """
    inputs = soft_first(model, attached, *pad(prompts), of=of)
    return model.get_encoder()(**inputs).last_hidden_state, inputs["attention_mask"]


def first_token(model: Network) -> int:
    """The token that the decoder begins with."""
    for config in (model.config, model.generation_config):
        token = getattr(config, "decoder_start_token_id", None)
        if token is not None:
            return token
    raise RecipeError("the model's config has no decoder_start_token_id, so decoding cannot start")
