"""Another model, frozen: a teacher, a reference of its own, a reward model."""

from __future__ import annotations

from contextlib import nullcontext

from luthier.method import RecipeError, role
from luthier.roles import Policy
from luthier.roles._role import Role
from luthier.store import resolve_model
from luthier.tuners._tuner import Untuned


@role()
class Model(Role):
    """Loaded with the policy's architecture and precision; its vocabulary must be the policy's."""

    constant = True

    model: str = "practice:lm"  # folder, hub name, or practice:NAME

    def play(self, name, policy):
        own = next(policy.model.parameters())
        network = policy.architecture.load(resolve_model(self.model), dtype=own.dtype).to(own.device).eval().requires_grad_(False)
        words = [len(m.get_input_embeddings().weight) for m in (network, policy.model)]
        if words[0] != words[1]:
            raise RecipeError(f"roles.{name}: {self.model} has {words[0]} tokens and the policy {words[1]}: they must share a tokenizer")
        return Policy(policy.architecture, network, Untuned(network), name, nullcontext)
