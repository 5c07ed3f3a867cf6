"""EDLM: a masked language model writes all places at once, and an autoregressive one corrects what it took
for independent.

A masked diffusion model starts from masks alone and reveals some places at each of `steps`: it draws every
hidden token from its own distribution, as if they had nothing to do with each other. Where a step lies in
`window` (1: nothing is revealed yet, 0: everything is), `candidates` whole texts are drawn, and one is taken
by softmax(-E), with E = -log p_AR(text) + log p_masked(text | what is revealed): importance weights towards
the autoregressive model (Xu et al., 2024, without training). Revealed places stay, and count nothing in
the second term. With one candidate it is the plain sampler, draw for draw.

The policy is the autoregressive model, and `denoiser` the masked one. Departs: the answer has as many places
as tokens are asked for, and is cut at its first end; a masked language model that was trained at one share of
masks, as BERT, stands where one of all shares should.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.methods.decoders._base import Decoder
from luthier.model.batch import collate
from luthier.model.loaded import load
from luthier.registry import Range, decoder
from luthier.text.encoded import Encoded

_denoisers: dict[str, Any] = {}  # loaded once: a decoder is asked for every prompt


@decoder(
    paper="arXiv:2410.21357",
    row="edlm",
    use_when="a masked language model is to write in few steps, and a causal one with the same tokenizer can"
    " say which of its drafts hold together.",
    costs="a pass of the denoiser a step, and within the window one of the policy over all candidates.",
    example={"denoiser": "toy:encoder", "steps": 2},
    covers="candidates by importance weights with the autoregressive energy, in a window of the reverse"
    " process of an absorbing diffusion; one candidate is the plain sampler; many give the autoregressive"
    " distribution.",
    omits="the energy that is trained by noise contrastive estimation, the training of masked diffusion"
    " models, and the bound on perplexity.",
    tests=[
        "methods/decoders/search/test_edlm.py::test_one_candidate_is_the_plain_sampler",
        "methods/decoders/search/test_edlm.py::test_neighbours_agree_more_often",
        "methods/decoders/search/test_edlm.py::test_many_candidates_give_the_autoregressive_distribution",
    ],
)
class EDLM(Decoder):
    """Masked diffusion, corrected by the policy."""

    denoiser: str = "toy:encoder"  # the masked language model: a run, a folder or a hub name
    steps: Annotated[int, Field(ge=1), Range(4, 512, log=True)] = 128  # of the reverse process
    candidates: Annotated[int, Field(ge=1), Range(1, 32, log=True)] = 2  # texts to choose from
    # shares of hidden places between which there is a choice
    window: Annotated[list[float], Field(min_length=2, max_length=2)] = Field(default=[0.4, 0.6])

    def generate(self, roles, rows, prompts, *, seeds, max_new_tokens, n=1, **how):
        for option, idle in (("top_p", 1.0), ("top_k", 0)):
            if how.get(option, idle) != idle:
                raise RecipeError(f"decoder 'edlm' does not support {option}")
        network = self.network(roles.renderer)
        stop, answers = set(how.get("stop", ())), []
        for prompt, seed in zip(prompts, seeds, strict=True):
            models = Models(
                lambda hidden, prompt=prompt: network.logits(prompt, hidden),
                lambda texts, prompt=prompt: causal_logprobs(roles.policy, prompt, texts),
            )
            samples = []
            for sample in range(n):
                own = Clock(seed if sample == 0 else Clock(seed).derive_seed("edlm", sample))
                text = self.write(models, max_new_tokens, network.mask, own, how.get("temperature", 1.0))
                samples.append(ended(text.tolist(), stop))
            answers.append(samples)
        return answers

    def network(self, renderer: Any) -> Denoiser:
        """The denoiser, loaded once. Raises RecipeError where it fills no masks, or reads other tokens."""
        if self.denoiser not in _denoisers:
            _denoisers[self.denoiser] = load(self.denoiser)
        loaded = _denoisers[self.denoiser]
        policy, mask = loaded.roles.policy, loaded.tokenizer.mask_token_id
        if policy.architecture.name != "masked_lm" or mask is None or policy.attached.rewrites_inputs:
            raise RecipeError(
                f"decoder 'edlm': {self.denoiser} is no masked language model, which fills masks"
            )
        if loaded.tokenizer.get_vocab() != renderer.tokenizer.get_vocab():
            raise RecipeError(f"decoder 'edlm': {self.denoiser} and the policy have different tokenizers")
        return Denoiser(policy.model, mask)

    def write(self, models: Models, places: int, mask: int, clock: Clock, temperature: float = 1.0) -> Tensor:
        """[places] tokens of one text."""
        text = torch.full((places,), mask)
        low, high = self.window
        for step in range(self.steps):
            time = 1 - step / self.steps
            hidden = text == mask
            if not hidden.any():
                break
            logprobs = models.denoise(text)
            logprobs[:, mask] = -torch.inf
            logprobs = logprobs.log_softmax(-1)
            count = self.candidates if low <= time <= high else 1
            drafts = []
            for k in range(count):
                tokens = drawn(logprobs, temperature, clock.rng("edlm-tokens", step, k))
                drafts.append(torch.where(hidden, tokens, text))
            draft = drafts[0]
            if count > 1:
                every = torch.stack(drafts)
                own = logprobs.gather(1, every.T).T.masked_fill(~hidden, 0.0).sum(1)
                weights = (models.causal(every) - own).double().softmax(0)
                draft = every[int(torch.multinomial(weights, 1, generator=clock.rng("edlm-choice", step)))]
            # of hidden places each is revealed with the share of time that passes
            revealed = torch.rand(places, generator=clock.rng("edlm-reveal", step)) * (self.steps - step) < 1
            text = torch.where(hidden & revealed, draft, text)
        return text


class Models(NamedTuple):
    """What a text is drawn by."""

    denoise: Callable[[Tensor], Tensor]  # [L] tokens, some of them masks -> [L, V] logits of each place
    causal: Callable[[Tensor], Tensor]  # [k, L] whole texts -> [k] log-probabilities


class Denoiser(NamedTuple):
    """A masked language model, and its mask."""

    model: Any
    mask: int

    @torch.no_grad()
    def logits(self, prompt: Sequence[int], text: Tensor) -> Tensor:
        """[L, V] of the places of a text after a prompt."""
        ids = torch.cat([torch.tensor(prompt, dtype=torch.long), text]).to(self.model.device)
        return self.model(input_ids=ids[None]).logits[0, len(prompt) :].float().cpu()


@torch.no_grad()
def causal_logprobs(policy: Any, prompt: Sequence[int], texts: Tensor) -> Tensor:
    """[k] log-probability of each text [k, L] after a prompt."""
    completions = texts.tolist()
    supervised = [[True] * len(completion) for completion in completions]
    batch = collate([{"id": "", "prompt": ""}], lambda row: Encoded(list(prompt), completions, supervised))
    batch = batch.to(next(policy.model.parameters()).device)
    return batch.sums(policy.logprobs(batch)).float().cpu()


def drawn(logprobs: Tensor, temperature: float, rng: torch.Generator) -> Tensor:
    """A token [L] of each place; at temperature 0 the likeliest."""
    if temperature <= 0:
        return logprobs.argmax(-1)
    return torch.multinomial((logprobs / temperature).softmax(-1), 1, generator=rng).squeeze(1)


def ended(text: list[int], stop: set[int]) -> list[int]:
    """A text up to its first end."""
    for place, token in enumerate(text):
        if token in stop:
            return text[: place + 1]
    return text
