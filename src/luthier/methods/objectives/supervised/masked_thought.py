"""Masked thought: SFT with a fraction of the reasoning tokens masked in the input.

Each supervised token is masked in the input with some probability but still predicted; the prompt is never
masked. The choice depends on the seed, the step and the row, so every epoch masks other tokens. The mask is
the tokenizer's mask token, else its padding token where that does not end a turn, else a special token that
the chat template never writes; where there is none, random tokens stand for it. The paper adds one to the
vocabulary.
"""

from typing import Annotated, Literal

import torch

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.objectives._tokens import Tokens
from luthier.methods.objectives.preference._pairs import Probability
from luthier.registry import Range, objective


@objective(
    paper="arXiv:2403.02178",
    row="masked-thought",
    requires=[COMPLETIONS, LOGPROBS],
    use_when="rows hold worked solutions, few of them, and the model should not merely copy its own"
    " last steps: parts of the reasoning are hidden in the input.",
    costs="as `sft`.",
    starting_rate="that of `sft`.",
    covers="masking with a probability that rises, by a mask token or by random tokens.",
    omits="a mask token of its own in the vocabulary; the gain on arithmetic in words, which the small models"
    " here do not show (claim `masked_thought`). With the mask token, later steps get robust to hidden steps,"
    " not to wrong ones; with random tokens to both.",
    tests=[
        "methods/objectives/supervised/test_masked_thought.py::test_masked_thought_without_masks_is_sft",
        "methods/objectives/supervised/test_masked_thought.py::test_what_is_masked_and_how_much",
        "methods/objectives/supervised/test_masked_thought.py::test_the_mask_never_ends_a_turn",
        "methods/objectives/supervised/test_masked_thought.py::test_masked_thought_reads_past_what_is_hidden_or_wrong",
    ],
)
class MaskedThought(Tokens):
    """-log p of each supervised token, given the partly masked tokens before it."""

    # share of the supervised tokens that is masked, after warm-up
    mask_probability: Annotated[Probability, Range(0.1, 0.5)] = 0.4
    warmup: Probability = 2 / 3  # share of the run over which it rises from 0
    replace: Literal["mask", "random"] = "mask"  # replace by the mask token, or by a random token

    def rate(self, clock) -> float:
        """The share that is hidden at this step."""
        return self.mask_probability * min(1.0, clock.progress / self.warmup if self.warmup else 1.0)

    def hidden(self, roles, batch):
        """[L] the tokens as they are read."""
        tokenizer, mask, ids = roles.renderer.tokenizer, roles.renderer.mask_id, batch.ids.clone()
        if mask is None and self.replace == "mask" and roles.clock.step == roles.clock.first:
            roles.warn(
                "objective 'masked_thought': the tokenizer has no mask token and no special token to spare;"
                " random tokens are used instead"
            )
        sizes = (
            torch.zeros(len(batch.rows)).index_add(0, batch.group.cpu(), batch.lengths.cpu()).long().tolist()
        )
        draws = [
            torch.rand(2, n, generator=roles.clock.rng("hide", row["id"]))
            for n, row in zip(sizes, batch.rows, strict=True)
        ]
        which, what = torch.cat(draws, 1).to(ids.device)
        other = (
            (what * len(tokenizer)).long()
            if self.replace == "random" or mask is None
            else torch.full_like(which, mask).long()
        )
        ids[batch.supervised] = torch.where(which < self.rate(roles.clock), other, ids[batch.supervised])
        return ids

    def cost(self, roles, batch):
        return -roles.policy.logprobs(batch.view(ids=self.hidden(roles, batch)))
