"""Decoder-only language models: a token is predicted by the hidden state just before it.

Reads batches packed: no padding, prompts shared by their completions, a block mask on SDPA (or eager) attention.
Every layout answers alike; networks that cannot take a block mask (recurrent layers, ALiBi) are read padded.
"""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from luthier.architectures._architecture import Architecture
from luthier.architectures._generate import generate
from luthier.architectures._outputs import Outputs
from luthier.batch import Batch
from luthier.kernels.layout import Layout, lay_out
from luthier.method import architecture


@architecture(gives="logprobs entropy top hidden generate")
class Causal(Architecture):
    """Any transformers causal LM."""

    packing: bool = True  # several sequences in a row of the tensor, none sees another; false: one row each, padded
    share_prompts: bool = True  # read a prompt once for all its completions
    width: int = 256  # places in a packed row, at least; longer sequences make longer rows

    def suits(self, config: Any) -> bool:
        return any(n.endswith(("ForCausalLM", "LMHeadModel")) for n in config.architectures or ())

    def auto_class(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    def forward(self, model: nn.Module, attached, batch: Batch) -> Outputs:
        width = self.width if self.packing else 0
        layout = lay_out(batch, share=self.share_prompts and self.packing, width=width, virtual=attached.virtual)
        embed = model.get_input_embeddings()(batch.ids[layout.source])
        if attached.virtual:
            soft = attached.soft().to(embed.dtype)[layout.soft.clamp(min=0)]
            embed = torch.where((layout.soft >= 0)[..., None], soft, embed)
        said = model.base_model(
            inputs_embeds=embed,
            attention_mask=self.mask(model, layout, embed.dtype),
            position_ids=layout.position,
            use_cache=False,
        )
        at = layout.at[batch.supervised]
        if (at < 0).any():
            raise ValueError("a supervised token that nothing precedes cannot be predicted")
        return Outputs(said.last_hidden_state.flatten(0, 1)[at], self.head(model), batch.labels[batch.supervised])

    def mask(self, model: nn.Module, layout: Layout, dtype: torch.dtype) -> Any:
        """What each place may look at, in the form that the model's attention takes."""
        if not self.packing:  # right padding under a causal mask: the model's own mask will do
            return (layout.piece >= 0).long()
        config = model.config.get_text_config()
        window = getattr(config, "sliding_window", None)
        kinds = set(getattr(config, "layer_types", None) or ())

        def made(reach: int | None) -> Tensor:
            may = layout.mask(reach if reach and int(layout.position.max()) >= reach else None)
            if config._attn_implementation == "eager":
                return torch.zeros(may.shape, dtype=dtype, device=may.device).masked_fill(~may, torch.finfo(dtype).min)
            return may

        if not kinds:
            return made(window)
        reach = {"sliding_attention": window, "chunked_attention": getattr(config, "attention_chunk_size", None)}
        return {kind: made(reach.get(kind)) for kind in kinds}

    def plain(self, model: nn.Module, attached, batch: Batch) -> Tensor:
        pieces, parents = batch.segments(), batch.parent.tolist()
        out = []
        for s in batch.completion.tolist():
            path = [s]
            while parents[path[0]] >= 0:
                path.insert(0, parents[path[0]])
            places = torch.cat([pieces[p] for p in path])
            asked = batch.supervised[places].nonzero().squeeze(1)
            embed = model.get_input_embeddings()(batch.ids[places])[None]
            if attached.virtual:
                embed = torch.cat([attached.soft().to(embed.dtype)[None], embed], 1)
            logits = model(inputs_embeds=embed, use_cache=False).logits[0].float()
            logp = logits[attached.virtual + asked - 1].log_softmax(-1)
            out.append(logp.gather(1, batch.labels[places[asked], None]).squeeze(1))
        return torch.cat(out)

    def simpler(self) -> Causal | None:
        return replace(self, packing=False, share_prompts=False) if self.packing else None

    def generate(self, model: nn.Module, attached, prompts: list[list[int]], **how: Any) -> list[list[list[int]]]:
        return generate(model, attached, prompts, **how)

