"""Decoder-only language models: each token is predicted from the hidden state of the token before it.

Batches are packed: no padding, prompts shared by their completions, what rows begin with in common read once,
block-wise attention; or, in models that do not use transformers' attention interface, a mask over packed
rows. All layouts give the same results. Models that cannot be packed (recurrent layers, ALiBi, attention by
index) use padded batches.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from luthier.errors import RecipeError
from luthier.kernels import attention, sparse_mlp
from luthier.kernels.attention_plan import plan
from luthier.kernels.layout import Layout, joined
from luthier.kernels.transfer import to_device
from luthier.methods.architectures._base import (
    ANSWER_TOKENS,
    EMBEDDINGS,
    ENTROPY,
    FIXED_TARGETS,
    GENERATE,
    HIDDEN,
    LOGPROBS,
    SOFT_PROMPTS,
    TOPK,
)
from luthier.model.anatomy import last_mlp
from luthier.model.batch import Batch
from luthier.model.dropout import has_dropout
from luthier.model.generate import Writer, decoder_writer, generate
from luthier.model.language_model import (
    LanguageModel,
    as_mask,
    distinct,
    embeddings_of,
    own_logits,
    path,
    picked,
    prefix_mask,
    soft_first,
)
from luthier.model.layout import ROWS_APART, lay_out
from luthier.model.outputs import LAYERS, Outputs
from luthier.registry import Range, architecture

if TYPE_CHECKING:
    from luthier.model.network import Network

# kinds of layers that a block mask keeps apart
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
ENDLESS = 2**31  # a row in which any batch finds room


@architecture(
    provides=[
        LOGPROBS,
        ENTROPY,
        TOPK,
        HIDDEN,
        GENERATE,
        EMBEDDINGS,
        FIXED_TARGETS,
        SOFT_PROMPTS,
        ANSWER_TOKENS,
    ],
    use_when="the model writes text from left to right: GPT, Llama, Qwen, Mistral and similar models."
    " It is selected automatically.",
    costs="packed rows: no computation on padding; prompts are read once for all their completions.",
)
class Causal(LanguageModel):
    """Any transformers causal LM."""

    # several sequences in one row of the tensor, isolated from each other; false: one row each, padded
    packing: bool = True
    share_prompts: bool = True  # read a prompt once for all its completions
    # read once what several rows begin with; auto: where that saves a tenth of the tokens, and some hundred
    share_prefixes: bool | Literal["auto"] = "auto"
    # steps of rows that begin alike (tools, documents), in an order that the seed decides: more of their
    # tokens are read once, but the rows of a step are less of a mixture
    group_by_prefix: bool = False
    # packed attention computed block by block, where the network lets it be chosen; false: by a mask
    blocks: bool = True
    # bidirectional attention over the prompt (prefix LM, non-causal decoder); completions stay causal
    prefix: bool = False
    # least number of positions in a row packed under a mask; longer sequences make longer rows
    width: int = 256
    # scale of the noise on embeddings in training (NEFTune; papers: 5)
    neftune_noise_alpha: Annotated[float, Field(ge=0), Range(1, 15)] = 0.0

    def suits(self, config: Any) -> bool:
        from transformers.models.auto import modeling_auto as auto

        ours = {*auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}
        others = {
            *auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values(),
            *auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values(),
        }
        return any(n in ours - others for n in config.architectures or ())

    def auto_class(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    # ------------------------------------------------------------------------------------------ reading

    @property
    def reading(self) -> str:
        if not self.packing:
            return super().reading
        words = "packed, attention in blocks" if self.blocks else "packed"
        if self.merges:
            words += ", common prefixes read once"
        return words

    @property
    def merges(self) -> bool:
        """May rows share what they begin with?"""
        return self.packing and self.share_prompts and self.share_prefixes is not False

    def simpler(self) -> LanguageModel | None:
        if self.merges:
            return replace(self, share_prefixes=False)
        if self.packing and self.blocks:
            return replace(self, blocks=False)
        return replace(self, packing=False, share_prompts=False) if self.packing else super().simpler()

    def crowded(self) -> Causal:
        return replace(self, width=ENDLESS, share_prefixes=self.merges)

    def forward(self, model: Network, attached, batch: Batch) -> Outputs:
        layout, inputs = self.laid_out(model, attached, batch)
        at, labels = layout.at[batch.targets], batch.labels[batch.targets]
        host = batch.host or batch
        at_host = (layout.host or layout).at
        at_host = at_host[host.targets.to(at_host.device)]  # a view may lie on the device alone
        if (at_host < 0).any():
            raise ValueError(
                "the first token of a sequence is supervised, but nothing precedes it to predict it from"
            )
        which = None
        if layout.saved:
            at_host, which = distinct(at_host, host.labels[host.targets].to(at_host.device))
            at, which = to_device({"at": at_host, "which": which}, at.device).values()
        cache = None if LAYERS.get() else attached.hidden_cache
        states = cache.states(self, model, attached, batch, fill=model.training) if cache else None
        if attached.follows_rows():
            attached.announce_rows(batch, batch.row[batch.segment[layout.source]])
        few = self.in_blocks(model) and not (attached.follows_rows() or self.own_head)
        sparing = nullcontext()
        if few:
            sparing = sparse_mlp.read_only(last_mlp(model), at_host, layout.source.numel(), at.device)
        with nullcontext() if states is None else cache.skipped(states[layout.source]), sparing:
            outputs = self.answer(model, inputs, at, labels, which)
        masks = inputs["attention_mask"]
        plans = [
            m.plan for m in (masks.values() if isinstance(masks, dict) else [masks]) if hasattr(m, "plan")
        ]
        if plans and not any(plan.used for plan in plans):
            raise ValueError(f"{type(model).__name__} does not use transformers' attention interface")
        return outputs

    def laid_out(self, model: Network, attached, batch: Batch) -> tuple[Layout, dict[str, Any]]:
        """How a batch is laid out, and what the model is handed to read it so."""
        if self.packing:
            self.check(model)
        blocks = self.in_blocks(model)
        layout = self.layout(model, attached, batch, model.training)
        inputs = self.embedded(model, attached, batch, layout)
        if self.prefix:
            self.check_prefix(model)
        # right padding: the model's own causal mask and positions will do
        if not self.packing and not self.prefix:
            return layout, inputs | {"attention_mask": (layout.piece >= 0).long()}
        masks = (self.planned if blocks else self.mask)(model, layout)
        return layout, inputs | {"attention_mask": masks, "position_ids": layout.position}

    def layout(self, model: Network, attached, batch: Batch, training: bool) -> Layout:
        """Where the tokens of a batch stand."""
        width = 0
        if self.packing:
            width = ENDLESS if self.in_blocks(model) else self.width
        merge: bool | Literal["auto"] = False
        if self.merges and self.why_rows_apart(model, attached, batch, training) is None:
            merge = self.share_prefixes
        return lay_out(
            batch,
            share=self.share_prompts and self.packing,
            width=width,
            virtual=attached.virtual,
            prefix=self.prefix,
            merge=merge,
        )

    def why_rows_apart(self, model: Network, attached, batch: Batch, training: bool) -> str | None:
        """Why equal tokens of different rows are not read alike; None where they are."""
        if ROWS_APART.get():
            return "what single rows contribute is needed"
        if batch.mixed:
            return "the embeddings of each row are mixed with others"
        if attached.distinguishes_rows():
            return "the tuner reads each row in its own way"
        if training and self.neftune_noise_alpha:
            return "noise is drawn for each row"
        if training and has_dropout(model):
            return "dropout draws for each row; without dropout they would be read once"
        return None

    def shares_prefixes(self, attached) -> bool:
        return self.merges and not (self.prefix or attached.distinguishes_rows())

    def shared_tokens(self, model: Network, attached, batch: Batch) -> tuple[int, str | None]:
        if not self.merges:
            return 0, None
        saved = self.layout(model, attached, batch, training=False).saved
        return saved, self.why_rows_apart(model, attached, batch, training=True)

    def why_not_joined(self, model: Network) -> str | None:
        if not self.in_blocks(model) or self.own_head or self.neftune_noise_alpha:
            return "the layout is not packed with block-wise attention"
        return None

    def laid_out_jointly(
        self, model: Network, batches: Sequence[Batch]
    ) -> tuple[Layout, list[int], dict[str, Any]]:
        """Several batches as one packed row: its layout, the positions of each batch in it, and what the
        model is handed to read it.
        """
        self.check(model)
        merge = False if ROWS_APART.get() or not self.merges else self.share_prefixes
        layouts = [lay_out(b, share=self.share_prompts, width=ENDLESS, merge=merge) for b in batches]
        layout = joined(layouts, [len(b.ids) for b in batches])
        ids = torch.cat([b.ids for b in batches])
        inputs = {
            "input_ids": ids[layout.source],
            "attention_mask": self.planned(model, layout),
            "position_ids": layout.position,
        }
        return layout, [x.source.shape[1] for x in layouts], inputs

    def in_blocks(self, model: Network) -> bool:
        """Is everything read as one row, attention block by block?"""
        return self.packing and self.blocks and attention.takes_plans(model)

    def check(self, model: Network) -> None:
        """Refuse to pack for a network that cannot keep sequences apart."""
        config, name = model.config.get_text_config(), type(model).__name__
        odd = {*(getattr(config, "layer_types", None) or ())} - ATTENTION
        if model._is_stateful or odd:
            kinds = ", ".join(sorted(odd)) or "recurrent"
            raise ValueError(
                f"{name} has layers ({kinds}) that carry state from one packed sequence into the next"
            )
        if "position_ids" not in inspect.signature(model.forward).parameters:
            raise ValueError(f"{name} does not accept position_ids")
        if "local" in (getattr(config, "attention_layers", None) or ()):
            raise ValueError(f"{name} attends by position in the row regardless of the mask")

    def check_prefix(self, model: Network) -> None:
        """Refuse to read from both sides with a network that cannot."""
        config, name = model.config.get_text_config(), type(model).__name__
        odd = {*(getattr(config, "layer_types", None) or ())} - {"full_attention"}
        if (
            odd
            or model._is_stateful
            or getattr(config, "sliding_window", None)
            or getattr(config, "alibi", False)
        ):
            kinds = ", ".join(sorted(odd)) or (
                "recurrent" if model._is_stateful else "sliding window or ALiBi"
            )
            raise RecipeError(
                f"architecture causal: prefix: the layers of {name} ({kinds}) cannot attend to"
                " a prompt bidirectionally"
            )

    def embedded(self, model: Network, attached, batch: Batch, layout: Layout) -> dict[str, Tensor]:
        """The tokens as the model is handed them: ids [R, W], or embeddings where soft vectors, other tokens
        or noise come in.
        """
        ids, noisy = batch.ids[layout.source], self.neftune_noise_alpha > 0 and model.training
        if not (attached.rewrites_inputs or batch.mixed or noisy):
            return {"input_ids": ids}
        table = model.get_input_embeddings()
        embed = embeddings_of(model, attached, ids, batch.prompt_places[layout.source])
        if batch.mixed:
            other, share = (x[layout.source] for x in batch.mixed)
            embed = torch.lerp(embed, table(other), share[..., None].to(embed.dtype))
        if noisy:
            embed = embed + self.noise(batch, embed.shape[-1])[layout.source].to(embed.dtype)
        if attached.virtual:
            soft = layout.soft
            # the text that they stand before
            ahead = torch.arange(soft.shape[1], device=soft.device) + attached.virtual - soft
            row = batch.row[batch.segment[layout.source.gather(1, ahead.clamp(max=soft.shape[1] - 1))]]
            vectors = attached.soft_rows(batch).to(embed.dtype)[row, soft.clamp(min=0)]
            embed = torch.where((soft >= 0)[..., None], vectors, embed)
        return {"inputs_embeds": embed}

    def noise(self, batch: Batch, width: int) -> Tensor:
        """[L, width] uniform within alpha / sqrt(length * width), length of the longest sequence a token is
        part of (arXiv:2310.05914).

        One draw a token, so it is the same in every layout; the loop seeds it by the step."""
        bound = self.neftune_noise_alpha / (batch.spans * width).sqrt()
        return (2 * torch.rand(len(batch.ids), width, device=batch.ids.device) - 1) * bound[:, None]

    def planned(self, model: Network, layout: Layout) -> Tensor | dict[str, Tensor]:
        """How attention is computed block by block, in the place of a mask."""
        dtype = model.get_input_embeddings().weight.dtype
        return self.by_kind(model, layout, lambda window, chunk: plan(layout, dtype, window, chunk).tag())

    def mask(self, model: Network, layout: Layout) -> Tensor | dict[str, Tensor]:
        """What each place may look at, in the form that the model's attention takes."""
        return self.by_kind(model, layout, lambda window, chunk: as_mask(model, layout.mask(window, chunk)))

    def by_kind(
        self, model: Network, layout: Layout, make: Callable[[int | None, int | None], Tensor]
    ) -> Tensor | dict[str, Tensor]:
        """make(window, chunk) for each kind of layer where they differ, else once. What no sequence reaches
        is left out.
        """
        config, longest = model.config.get_text_config(), int((layout.host or layout).position.max())
        window, chunk = (
            size if (size := getattr(config, name, None)) and size <= longest else None
            for name in ("sliding_window", "attention_chunk_size")
        )
        kinds = {
            "full_attention": (None, None),
            "sliding_attention": (window, None),
            "chunked_attention": (None, chunk),
        }
        used = {*(getattr(config, "layer_types", None) or ())}
        return {kind: make(*kinds[kind]) for kind in used} if used else make(window, None)

    def alone(self, model: Network, attached, batch: Batch, segment: int, own: Tensor) -> Tensor:
        pieces = batch.segments()
        way = path(batch, segment)
        places = torch.cat([pieces[s] for s in way])
        first = batch.parent.new_tensor([len(pieces[way[0]]) if len(way) > 1 else 0])
        inputs = soft_first(
            model, attached, batch.ids[places][None], of=(batch, batch.row[[segment]]), prompts=first
        )
        if self.prefix:
            order = torch.arange(attached.virtual + len(places), device=places.device)
            both = (order >= attached.virtual) & (order < attached.virtual + first)
            inputs["attention_mask"] = prefix_mask(model, torch.ones_like(both)[None], both[None])
        before = (places[:, None] == own).nonzero()[:, 0] - 1 + attached.virtual
        return picked(own_logits(model, inputs, before), batch.labels[own])

    # ------------------------------------------------------------------------------------------ writing

    def writer(self, model: Network, attached) -> tuple[Writer, int | None]:
        most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        return decoder_writer(model, attached, self.prefix), most and most - attached.virtual

    def generate(
        self, model: Network, attached, prompts: list[list[int]], **how: Any
    ) -> list[list[list[int]]]:
        writer, limit = self.writer(model, attached)
        return generate(writer, prompts, limit=limit, **how)
