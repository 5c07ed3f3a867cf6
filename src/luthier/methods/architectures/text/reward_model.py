"""Reward models: a model with a scalar head, which gives a value for a text and for each of its steps.

The value of a token is the head's output at its position; a completion's reward is the value of its last
supervised token. Selected by name (`architecture: reward_model`), for any checkpoint that transformers loads
as a sequence classifier; it is saved as one with a single label, as TRL's reward models are. Padded on the
right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from luthier.methods.architectures._base import FIXED_TARGETS, SOFT_PROMPTS, VALUES, Architecture
from luthier.model.batch import Batch, pad
from luthier.model.language_model import path, soft_first
from luthier.registry import architecture
from luthier.text.encode import Renderer

if TYPE_CHECKING:
    from luthier.model.network import Network


class Values:
    """A reward model's values of a batch."""

    def __init__(self, values: Tensor):
        self.values = self.checked_values = values  # [T] in fp32, one for each supervised token


@architecture(
    provides=[VALUES, FIXED_TARGETS, SOFT_PROMPTS],
    use_when="the model is to give a number for a text, with objectives `reward` or `process_reward`.",
    costs="padded batches.",
)
class RewardModel(Architecture):
    """AutoModelForSequenceClassification with one label, on a decoder."""

    def suits(self, config: Any) -> bool:
        return False  # never guessed: the same checkpoint may be a classifier or a language model

    def auto_class(self) -> Any:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

    def renderer(self, tokenizer, config, **how):
        return Renderer(tokenizer, **how)

    def load(self, path: str, **kwargs: Any) -> Network:
        model = super().load(path, num_labels=1, **kwargs)
        config = model.config.get_text_config()
        if config.pad_token_id is None:  # the network itself finds a text's end by what is not padding
            ends = config.eos_token_id
            config.pad_token_id = ends[0] if isinstance(ends, list) else ends
        return model

    def forward(self, model: Network, attached: Any, batch: Batch) -> Values:
        pieces = batch.segments()
        places = [torch.cat([pieces[p] for p in path(batch, s)]) for s in batch.completion.tolist()]
        values = scored(
            model, soft_first(model, attached, *pad([batch.ids[p] for p in places]), of=(batch, batch.group))
        ).squeeze(-1)
        at = torch.full_like(batch.ids, -1)
        # a completion ends its row
        for r, (s, p) in enumerate(zip(batch.completion.tolist(), places, strict=True)):
            first = r * values.shape[1] + attached.virtual + len(p) - len(pieces[s])
            at[pieces[s]] = first + torch.arange(len(pieces[s]), device=at.device)
        return Values(values.flatten()[at[batch.targets]])

    def plain(self, model: Network, attached: Any, batch: Batch) -> Tensor:
        pieces, out = batch.segments(), []
        for s in batch.completion.tolist():
            places = torch.cat([pieces[p] for p in path(batch, s)])
            values = scored(
                model, soft_first(model, attached, batch.ids[places][None], of=(batch, batch.row[[s]]))
            )[0, attached.virtual :, 0]
            out.append(values[-len(pieces[s]) :][batch.supervised[pieces[s]]])
        return torch.cat(out)


def scored(model: Network, inputs: dict[str, Any]) -> Tensor:
    """[R, W, outputs] what the head says at every place, caught where it says it. Raises ValueError where
    there is no such head.
    """
    head = getattr(model, "score", None)
    if head is None:
        raise ValueError(f"{type(model).__name__} has no head named score that is applied to every token")
    caught: list[Tensor] = []
    hook = head.register_forward_hook(lambda module, args, output: caught.append(output))
    try:
        model(**inputs, use_cache=False)
    finally:
        hook.remove()
    return caught[0].float()
