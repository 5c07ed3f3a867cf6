"""A plug-and-play controller that acts through the prompt: before each token the prompt's embeddings move so
that the attribute becomes likelier, and the network itself says what comes next.

The controller is a linear classifier on the mean of the text's last hidden states, as the network without
its tuner reads it; it is fitted on every beginning of the answers of preference rows (chosen: with the
attribute). It reads the text so far and one more place, the mean embedding under the next token's
probabilities, through which its gradient reaches the prompt (as in PPLM). A step goes along the gradient of
log p(attribute) - kl * KL(moved || plain), by `strength` times the length of the prompt's embeddings and the
probability that the attribute is missing, so that a text which has it is left alone (Zheng et al., 2023).
Departs: the paper's update is not public; this is the controller of PPLM with the prompt in the place of the
cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any
from weakref import WeakKeyDictionary

import torch
from pydantic import Field
from torch import Tensor, nn

from luthier.data.load import load_rows
from luthier.errors import RecipeError
from luthier.methods.decoders._base import Decoder
from luthier.methods.decoders.arithmetic._joined import OWN_BASE, companion
from luthier.model.generate import Picker
from luthier.model.policy import Policy
from luthier.registry import Range, decoder

Ids = Sequence[int]


@decoder(
    paper="arXiv:2402.04160",
    row="rldaf-ppc-prompting",
    use_when="an attribute such as a sentiment is to be steered at test time by a classifier, and logits are"
    " not to be touched.",
    costs="five forward and two backward passes over the whole text for every token.",
    example={"n": 2},
    covers="a classifier on hidden states whose gradient moves the prompt at each token; how far that moves"
    " each token's distribution.",
    omits="the paper's own update, which is not public; attributes of more than two values; a cache.",
    tests=[
        "methods/decoders/steering/test_prompt_controller.py::test_strength_zero_is_the_plain_decoder",
        "methods/decoders/steering/test_prompt_controller.py::test_a_step_raises_the_attribute",
    ],
)
class PromptController(Decoder):
    """Moves the prompt's embeddings along the gradient of a classifier before each token."""

    data: Any = "toy:style/preference"  # preference rows, chosen with the attribute: a file, or rows
    n: Annotated[int, Field(ge=1)] = 50  # rows that the classifier is fitted on
    strength: Annotated[float, Field(ge=0), Range(0.05, 2.0, log=True)] = 0.3  # of a step
    steps: Annotated[int, Field(ge=1)] = 1  # steps before each token
    kl: Annotated[float, Field(ge=0)] = 0.01  # weight of the KL to the distribution without control

    def generate(self, roles, rows, prompts, **how):
        if not self.strength:
            return roles.policy.generate(prompts, rows=rows, **how)
        answers = []
        for texts in self.write(roles, companion(roles.policy, OWN_BASE), prompts, **how):
            answers.append([text.ids for text in texts])
        return answers

    def write(self, roles: Any, reader: Policy, prompts: Sequence[Ids], **how: Any) -> list[list[Text]]:
        """n texts of each prompt, with what the controller did at each token. reader: the network that the
        classifier reads texts with. how: as `generate` takes it.
        """
        if roles.policy.attached.changes_inputs or roles.policy.attached.rewrites_inputs:
            raise RecipeError("decoder 'prompt_controller' needs a tuner without soft prompts")
        if roles.policy.model.get_output_embeddings() is None or roles.policy.model.config.is_encoder_decoder:
            raise RecipeError("decoder 'prompt_controller' needs a causal language model")
        classifier, n = self.classifier(roles, reader), how.pop("n", 1)
        texts = []
        with roles.policy.eval_mode():
            for prompt, seed in zip(prompts, how.pop("seeds"), strict=True):
                group = Group(self, roles.policy, classifier, prompt, n)
                texts.append(group.write([(seed, k) for k in range(n)], **how))
        return texts

    def classifier(self, roles: Any, reader: Policy) -> Classifier:
        """The classifier on a network's states, fitted once."""
        fits = _classifiers.setdefault(reader.model, {})
        key = repr((reader.role, self.data, self.n))
        if key not in fits:
            fits[key] = fit(roles, reader, self.data, self.n)
        weight, bias = fits[key]
        return Classifier(reader, weight, bias)


@dataclass
class Text:
    """A text that was written under control."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # of each token under control, at temperature 1
    # of each token, KL of the distribution under control from that without it
    interventions: list[float] = field(default_factory=list)


# ------------------------------------------------------------------------------------------- the classifier


@dataclass
class Classifier:
    """p(attribute) = sigmoid(states @ weight + bias), on mean states [..., d] that the reader gives."""

    reader: Policy
    weight: Tensor
    bias: Tensor

    def log_odds(self, means: Tensor) -> Tensor:
        return means @ self.weight.to(means.device) + self.bias.to(means.device)

    @torch.no_grad()
    def probabilities(self, prompt: Ids, answers: Sequence[Ids]) -> list[float]:
        """p(attribute) of each answer."""
        out = []
        for ids in answers:
            mean = states_of(self.reader, [[*prompt, *ids]])[0, len(prompt) :].mean(0)
            out.append(float(self.log_odds(mean).sigmoid()))
        return out


# of each network, the weights and biases of its classifiers
_classifiers: WeakKeyDictionary[nn.Module, dict[str, tuple[Tensor, Tensor]]] = WeakKeyDictionary()


def fit(roles: Any, reader: Policy, data: Any, n: int) -> tuple[Tensor, Tensor]:
    """Weight and bias of the classifier that tells answers apart, of each of their beginnings."""
    states, labels, weights = [], [], []
    for prompt, chosen, rejected in preferences(roles, data, n):
        for ids, label in ((chosen, 1.0), (rejected, 0.0)):
            beginnings = running_mean(states_of(reader, [[*prompt, *ids]])[0, len(prompt) :])
            states.append(beginnings)
            labels += [label] * len(beginnings)
            weights += [1 / len(beginnings)] * len(beginnings)
    return logistic_regression(torch.cat(states), torch.tensor(labels), torch.tensor(weights))


def preferences(roles: Any, data: Any, n: int) -> list[tuple[list[int], list[int], list[int]]]:
    """(prompt, answer with the attribute, answer without it) of n rows."""
    out = []
    for row in load_rows(data).rows:
        scores = row.get("scores")
        if len(out) == n or not scores or len(set(scores)) < 2:
            continue
        encoded = roles.policy.architecture.encode(row, roles.renderer)
        best = encoded.completions[max(range(len(scores)), key=scores.__getitem__)]
        worst = encoded.completions[min(range(len(scores)), key=scores.__getitem__)]
        out.append((list(encoded.prompt), list(best), list(worst)))
    if not out:
        raise RecipeError("decoder 'prompt_controller' needs preference rows: prompt, chosen, rejected")
    return out


@torch.no_grad()
def states_of(reader: Policy, texts: Sequence[Ids]) -> Tensor:
    """[B, L, d] the last hidden states of texts of one length, in fp32."""
    ids = torch.tensor(texts, device=reader.model.get_input_embeddings().weight.device)
    with reader.eval_mode(), reader.role_context():
        output = reader.model(input_ids=ids, output_hidden_states=True, use_cache=False)
    return output.hidden_states[-1].float()


def running_mean(states: Tensor) -> Tensor:
    """[L, d] -> [L, d] the mean of each beginning."""
    counts = torch.arange(1, len(states) + 1, device=states.device)
    return states.cumsum(0) / counts[:, None]


def logistic_regression(
    states: Tensor, labels: Tensor, weights: Tensor, ridge: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """([d], []) weight and bias, in fp32, by L-BFGS from zero on standardised states [N, d]."""
    x, y = states.double(), labels.double().to(states.device)
    sizes = weights.double().to(states.device) / weights.sum()
    mean, deviation = x.mean(0), x.std(0).clamp(min=1e-6)
    x = (x - mean) / deviation
    weight = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        losses = nn.functional.binary_cross_entropy_with_logits(x @ weight + bias, y, reduction="none")
        loss = sizes @ losses + ridge * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    own = weight.detach() / deviation
    return own.float(), (bias.detach() - mean @ own).float()


# ------------------------------------------------------------------------------------------------- writing


class Group:
    """Texts of one prompt that are written together."""

    def __init__(self, settings: Any, policy: Policy, classifier: Classifier, prompt: Ids, n: int):
        self.settings, self.policy, self.classifier = settings, policy, classifier
        self.model, self.prompt = policy.model, list(prompt)
        self.device = self.model.get_input_embeddings().weight.device
        self.texts = [Text() for _ in range(n)]

    @cached_property
    def table(self) -> Tensor:
        """[V, d] embeddings as the classifier's network reads them, scaled where it scales them."""
        model = self.classifier.reader.model
        return embed(model, [list(range(model.get_input_embeddings().weight.shape[0]))])[0]

    @cached_property
    def prompt_embeddings(self) -> Tensor:
        """[P, d]"""
        return embed(self.model, [self.prompt])[0]

    def write(
        self,
        names: list[tuple[int, int]],
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        stop: Ids = (),
        **other: Any,
    ) -> list[Text]:
        """names: the (seed, sample) of each text."""
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        length = max_new_tokens if most is None else min(max_new_tokens, most - len(self.prompt) - 1)
        if length < 1:
            raise RecipeError(f"the prompt has {len(self.prompt)} tokens, which leaves none to generate")
        pick = Picker(names, length, temperature, top_p, top_k)
        which = list(range(len(names)))
        delta = torch.zeros(len(names), *self.prompt_embeddings.shape, device=self.device)
        for step in range(length):
            so_far = [self.texts[i].ids for i in which]
            delta = self.moved(delta, so_far)
            with torch.no_grad():
                plain, control = self.logprobs(torch.zeros_like(delta), so_far), self.logprobs(delta, so_far)
            gaps = (control.exp() * (control - plain)).sum(-1)
            tokens = pick(control, which, step).tolist()
            going = []
            for row, (token, gap) in enumerate(zip(tokens, gaps.tolist(), strict=True)):
                text = self.texts[which[row]]
                text.ids.append(token)
                text.logprobs.append(float(control[row, token]))
                text.interventions.append(max(0.0, gap))
                if token not in stop:
                    going.append(row)
            which, delta = [which[row] for row in going], delta[going]
            if not which:
                break
        return self.texts

    def logprobs(self, delta: Tensor, so_far: list[list[int]]) -> Tensor:
        """[B, V] of the next token, in fp32, with the prompt moved by delta [B, P, d]."""
        inputs = self.prompt_embeddings + delta.to(self.prompt_embeddings.dtype)
        if so_far[0]:
            inputs = torch.cat([inputs, embed(self.model, so_far)], 1)
        with self.policy.role_context():
            logits = self.model(inputs_embeds=inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
        return logits.float().log_softmax(-1)

    def attribute(self, soft: Tensor, so_far: list[list[int]]) -> tuple[Tensor, Tensor]:
        """([B] log-odds of the attribute, [B, d] the gradient of log p(attribute)) with the embeddings soft
        [B, d] behind the texts.
        """
        reader, soft = self.classifier.reader, soft.detach().requires_grad_(True)
        texts = embed(reader.model, [self.prompt + ids for ids in so_far])
        inputs = torch.cat([texts, soft[:, None]], 1)
        # backward within, too: a role may exchange the network's weights for a while
        with reader.eval_mode(), (reader.context or nullcontext)():
            output = reader.model(inputs_embeds=inputs, output_hidden_states=True, use_cache=False)
            states = output.hidden_states[-1][:, len(self.prompt) :].float()
            odds = self.classifier.log_odds(states.mean(1))
            (gradient,) = torch.autograd.grad(nn.functional.logsigmoid(odds).sum(), soft)
        return odds.detach(), gradient

    def moved(self, delta: Tensor, so_far: list[list[int]]) -> Tensor:
        """delta [B, P, d] after the steps of the controller."""
        with torch.no_grad():
            plain = self.logprobs(torch.zeros_like(delta), so_far)
        length = self.prompt_embeddings.float().norm()
        for _ in range(self.settings.steps):
            with torch.enable_grad():
                delta = delta.detach().requires_grad_(True)
                logprobs = self.logprobs(delta, so_far)
                soft = logprobs.exp().to(self.table.dtype) @ self.table
                odds, toward = self.attribute(soft, so_far)
                gap = (logprobs.exp() * (logprobs - plain)).sum(-1)
                value = (soft * toward).sum() - self.settings.kl * gap.sum()
                (gradient,) = torch.autograd.grad(value, delta)
            missing = (-odds).sigmoid()[:, None, None]
            direction = gradient / gradient.norm(dim=(1, 2), keepdim=True).clamp(min=1e-12)
            delta = delta.detach() + self.settings.strength * length * missing * direction
        return delta


@torch.no_grad()
def embed(model: Any, texts: Sequence[Ids]) -> Tensor:
    """[B, L, d] embeddings of texts of one length."""
    table = model.get_input_embeddings()
    return table(torch.tensor(texts, device=table.weight.device))
