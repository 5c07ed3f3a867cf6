"""A critic as a network of its own, as PPO's usually is: a causal model with a scalar head that trains
along, all of it.

It may begin as the reward model, or as any checkpoint that reads the policy's tokens; a head that the
checkpoint does not have says 0 at first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from luthier.errors import RecipeError
from luthier.methods.architectures.text.reward_model import RewardModel, scored
from luthier.methods.roles._base import CRITIC, Part, Role, brought
from luthier.model.batch import pad
from luthier.model.language_model import path
from luthier.recipe.model_names import resolve_model
from luthier.registry import role


@role(
    provides=[CRITIC],
    use_when="objective `ppo` needs a critic that sees more than the policy's last states tell, and a"
    " second network fits.",
    costs="a network that trains along: its weights, gradients and optimizer state, a forward and"
    " backward pass.",
)
class ValueModel(Role):
    """The head's value at the token before each one."""

    model: str = "toy:lm"  # folder of a model or Hub name, with the policy's tokenizer; toy:NAME

    def parts(self, policy):
        own = next(policy.model.parameters())
        network: Any = self.load(resolve_model(self.model), own.dtype)
        words = [len(m.get_input_embeddings().weight) for m in (network, policy.model)]
        if words[0] != words[1]:
            raise RecipeError(
                f"roles.critic: {self.model} has {words[0]} tokens and the policy {words[1]};"
                " they must have the same tokenizer"
            )
        if "score" in network.fresh:
            nn.init.zeros_(network.score.weight)
        return {"network": Critic(network.to(own.device))}

    def load(self, path: str, dtype: torch.dtype) -> Any:
        """The network with a head of one number."""
        from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoConfig

        config = AutoConfig.from_pretrained(path)
        if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            raise RecipeError(
                f"roles.critic: role 'value_model' needs a network that has a form with a scalar head, and"
                f" {config.model_type} has none in transformers"
            )
        network = RewardModel().load(path, dtype=dtype)
        if not hasattr(network, "score"):
            raise RecipeError(
                f"roles.critic: role 'value_model' needs a head that is applied to every token, and"
                f" {type(network).__name__} ({config.model_type}) has one for whole texts"
            )
        return network

    def play(self, name, policy):
        return brought(policy, name, "network")


class Critic(Part):
    """values(policy, batch) -> [T] in fp32."""

    def __init__(self, network: Any):
        super().__init__()
        self.network = network

    def values(self, policy, batch) -> Tensor:
        """[T] what is expected before each supervised token; the policy is not asked."""
        pieces = batch.segments()
        places = [torch.cat([pieces[p] for p in path(batch, s)]) for s in batch.completion.tolist()]
        ids, mask = pad([batch.ids[p] for p in places])
        values = scored(self.network, {"input_ids": ids, "attention_mask": mask}).squeeze(-1)
        at = torch.zeros_like(batch.ids)
        for r, (s, p) in enumerate(zip(batch.completion.tolist(), places, strict=True)):
            before = len(p) - len(pieces[s]) - 1 + torch.arange(len(pieces[s]), device=at.device)
            at[pieces[s]] = r * values.shape[1] + before.clamp(min=0)
        return values.flatten()[at[batch.supervised]]
