"""LatentSeek: policy gradient on the hidden states of one answer, with all weights frozen.

The states behind the last layer that gave the first tokens of a greedy answer are moved by REINFORCE: Adam
on -R * sum of log softmax(head(z))[argmax], then these tokens are read off anew and the answer is written
on from there greedily, until its reward passes `threshold` or `iterations` are over (Li et al., 2025).
Gradients reach the head's input alone. Departs: the reward is any of luthier's (the authors ask the model
itself as four verifiers); rewards are meant to be at most 0, as -1 for wrong and 0 for right: with `offset`
1 is subtracted from rewards between 0 and 1.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.decoders.search._base import Search
from luthier.registry import Range, decoder


@decoder(
    paper="arXiv:2505.13308",
    row="latentseek",
    use_when="a verifier can tell at test time whether an answer is right, and greedy answers fail narrowly.",
    costs="one answer for each iteration, and a product with the head; no backward pass through the network.",
    example={"iterations": 1},
    covers="the loop over the first states with their gradient through the head alone.",
    omits="the self-reward by four prompts.",
    tests=[
        "methods/decoders/search/test_latentseek.py::test_no_weight_moves",
        "methods/decoders/search/test_latentseek.py::test_the_gradient_is_that_of_softmax",
        "methods/decoders/search/test_latentseek.py::test_more_answers_are_right",
    ],
)
class LatentSeek(Search):
    """Moves the states of an answer's beginning until the reward is high enough."""

    iterations: Annotated[int, Field(ge=0), Range(2, 20)] = 10  # answers that are tried at most
    share: Annotated[float, Field(gt=0, le=1)] = 0.2  # of the answer whose states are moved
    most: Annotated[int, Field(ge=1)] = 300  # tokens whose states are moved at most
    rate: Annotated[float, Field(gt=0), Range(0.003, 0.3, log=True)] = 0.03  # Adam's learning rate
    threshold: float = -0.2  # a higher reward ends the search
    offset: float = 1.0  # subtracted from the reward

    def generate(self, roles, rows, prompts, **how):
        if roles.policy.model.get_output_embeddings() is None or roles.policy.attached.rewrites_inputs:
            raise RecipeError("decoder 'latentseek' needs a causal language model without soft prompts")
        how = {**how, "temperature": 0.0}
        how.pop("hear", None)
        n = how.pop("n", 1)
        answers = []
        for row, prompt, seed in zip(rows, prompts, how.pop("seeds"), strict=True):
            answers.append([self.search(roles, row, list(prompt), seed, how)] * n)
        return answers

    def search(self, roles, row, prompt, seed, how) -> list[int]:
        """The best answer that was found."""
        ((answer,),) = roles.policy.generate([prompt], seeds=[seed], **how)
        best, reward = answer, self.reward_of(roles, row, answer)
        if reward > self.threshold or not self.iterations:
            return best
        states = self.states(roles, prompt, answer)
        states = states[: max(1, min(self.most, int(self.share * len(answer))))].clone().requires_grad_(True)
        optimizer = torch.optim.Adam([states], lr=self.rate)
        current = reward
        for _ in range(self.iterations):
            (states.grad,) = torch.autograd.grad(self.loss(roles, states, current), states)
            optimizer.step()
            with torch.no_grad():
                answer = self.head(roles, states).argmax(-1).tolist()
            answer = self.finish(roles, prompt, answer, seed, how)
            current = self.reward_of(roles, row, answer)
            if current > reward:
                best, reward = answer, current
            if current > self.threshold:
                break
        return best

    def loss(self, roles, states: torch.Tensor, reward: float) -> torch.Tensor:
        """-R times the log-probability of the tokens that the states [L, d] stand for."""
        logprobs = self.head(roles, states).log_softmax(-1)
        return -reward * logprobs.max(-1).values.sum()

    def finish(self, roles, prompt, begun: list[int], seed: int, how) -> list[int]:
        """An answer, written on from its beginning, which ends at its first stop token."""
        for i, token in enumerate(begun):
            if token in how.get("stop", ()):
                return begun[: i + 1]
        room = how["max_new_tokens"] - len(begun)
        if room < 1:
            return begun
        options = {**how, "max_new_tokens": room}
        ((rest,),) = roles.policy.generate([prompt + begun], seeds=[seed], **options)
        return begun + rest

    def reward_of(self, roles, row, answer) -> float:
        (score,) = self.scores(roles, row, [answer])
        return score - self.offset

    def head(self, roles, states: torch.Tensor) -> torch.Tensor:
        """[L, d] -> logits [L, V] in fp32; weights take no gradient."""
        head = roles.policy.model.get_output_embeddings()
        weight = head.weight.detach()
        logits = states.to(weight.dtype) @ weight.T
        if getattr(head, "bias", None) is not None:
            logits = logits + head.bias.detach()
        return logits.float()

    @torch.no_grad()
    def states(self, roles, prompt: list[int], answer: list[int]) -> torch.Tensor:
        """[N, d] the last layer's states, in fp32, that gave each token of the answer."""
        model = roles.policy.model
        ids = torch.tensor([prompt + answer], device=model.get_input_embeddings().weight.device)
        with roles.policy.role_context():
            hidden = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[-1]
        return hidden[0, len(prompt) - 1 : -1].float()
