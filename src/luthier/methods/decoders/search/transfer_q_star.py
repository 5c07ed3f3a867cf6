"""Transfer Q*: each token is chosen by what an already aligned model would make of it.

The policy's `k` likeliest tokens are each written on to the end by the aligned model; the reward of that
text is the token's value, and the next token follows softmax(log p_policy + value / alpha) among them
(Chakraborty et al., 2024). Where the aligned model was tuned for another reward, `aligned_reward` weighs
its texts by exp((r - r_aligned) / beta) (indirect transfer). Departs: a text that is written on ends at
max_new_tokens.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from luthier.clock import Clock
from luthier.methods.decoders.arithmetic._joined import companion
from luthier.methods.decoders.search._base import AnyReward, Search, ended
from luthier.registry import Range, decoder


@decoder(
    paper="arXiv:2405.20495",
    row="transfer-q-star",
    use_when="a model aligned with a reward (or a near one) is at hand, and the policy itself must stay as it"
    " is.",
    costs="`k` times `rollouts` texts to the end for every token that is written: for short answers.",
    example={"k": 2},
    covers="direct and indirect transfer by rollouts, with the policy's own rollouts as the baseline of"
    " controlled decoding.",
    omits="a learned value function in the place of rollouts.",
    tests=[
        "methods/decoders/search/test_transfer_q_star.py::test_greedy_values_reach_the_optimal_reward",
        "methods/decoders/search/test_transfer_q_star.py::test_large_alpha_is_the_policy",
        "methods/decoders/search/test_transfer_q_star.py::test_indirect_with_the_same_reward_is_direct",
    ],
)
class TransferQStar(Search):
    """softmax(log p + value / alpha) over the k likeliest tokens."""

    aligned: str = "policy"  # the aligned model (a run, a folder); policy: the policy itself writes on
    # reward that the aligned model was tuned for, if another than `reward`
    aligned_reward: AnyReward = None
    beta: Annotated[float, Field(gt=0)] = 1.0  # KL coefficient with which the aligned model was tuned
    k: Annotated[int, Field(ge=1), Range(3, 30)] = 10  # tokens that are tried at each place
    alpha: Annotated[float, Field(gt=0), Range(0.05, 5.0, log=True)] = 1.0  # small: the value decides alone
    rollouts: Annotated[int, Field(ge=1)] = 1  # texts that are written on for each token; one is greedy

    def generate(self, roles, rows, prompts, **how):
        self.only(how)
        who = roles.policy if self.aligned == "policy" else companion(roles.policy, self.aligned)
        how.pop("hear", None)
        answers = []
        for row, prompt, seed in zip(rows, prompts, how.pop("seeds"), strict=True):
            adjust = self.adjuster(roles, who, row, seed, how["max_new_tokens"], how.get("stop", ()))
            answers += roles.policy.generate([prompt], seeds=[seed], decoder=adjust, **how)
        return answers

    def adjuster(self, roles, who, row, seed, max_new_tokens, stop):
        """What changes the logits while one row is answered."""

        def adjust(logits, prompts, responses):
            logprobs = logits.log_softmax(-1)
            best, tokens = logprobs.topk(min(self.k, logits.shape[-1]))
            out = torch.full_like(logits, -float("inf"))
            for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
                clock = Clock(Clock(seed).derive_seed("transfer", len(response)))
                texts = [[*response, token] for token in tokens[i].tolist()]
                values = self.values(roles, who, row, prompt, texts, clock, max_new_tokens, stop)
                out[i, tokens[i]] = best[i] + torch.tensor(values, device=out.device) / self.alpha
            return out

        return adjust

    def values(self, roles, who, row, prompt, texts, clock, max_new_tokens, stop) -> list[float]:
        """What each text is worth, written on by the aligned model."""
        open_ones = [text for text in texts if not ended(text, stop, max_new_tokens)]
        finished = iter([])
        if open_ones:
            written = who.generate(
                [[*prompt, *text] for text in open_ones],
                seeds=[clock.derive_seed(*text) for text in open_ones],
                n=self.rollouts,
                max_new_tokens=max_new_tokens - len(texts[0]),
                temperature=0.0 if self.rollouts == 1 else 1.0,
                stop=stop,
            )
            finished = iter(written)
        values = []
        for text in texts:
            whole = [text]
            if not ended(text, stop, max_new_tokens):
                whole = [text + rest for rest in next(finished)]
            values.append(self.value(roles, row, whole))
        return values

    def value(self, roles, row, answers) -> float:
        """The mean reward of texts that the aligned model wrote, weighted where it was tuned for another."""
        rewards = torch.tensor(self.scores(roles, row, answers), dtype=torch.float64)
        weights = torch.zeros_like(rewards)
        if self.aligned_reward is not None:
            texts = [roles.renderer.answer(ids) for ids in answers]
            own = torch.tensor(self.aligned_reward.scores(dict(row), texts), dtype=torch.float64)
            weights = (rewards - own) / self.beta
        return float((weights.softmax(0) * rewards).sum())
