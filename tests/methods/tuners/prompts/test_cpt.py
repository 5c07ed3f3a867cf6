"""CPT: learning in context before any step, bounded changes, answers as they are, losses as by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from helpers.tuners import base, put
from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.methods.architectures.text.causal import Causal
from luthier.methods.estimators._base import gradients
from luthier.methods.tuners._base import Untuned
from luthier.methods.tuners.prompts._context import ANSWER, FORMAT, INPUT
from luthier.model.batch import collate
from luthier.registry import build
from luthier.train.optimizer import Chain

BEGIN, END = [3], [4, 5]  # what every prompt begins and ends with


def encoded(row):
    """The answer to a word is the word ten further."""
    word = row["word"]
    return SimpleNamespace(
        prompt=[*BEGIN, word, *END], completions=[[word + 10, 1]], supervised=[[True, True]]
    )


def batch(*words: int):
    return collate([{"id": word, "word": word} for word in words], encoded)


def with_context(words=(20, 21, 22), **settings) -> Any:
    attached: Any = put("cpt", **{"max_context_tokens": 40, "shots": 3, **settings})
    roles = SimpleNamespace(clock=Clock(), batch=lambda rows: collate(rows, encoded))
    attached.initialize([{"id": w, "word": w} for w in words], roles)
    return attached


def logprobs(attached, one):
    return Causal().forward(attached.model, attached, one).logprobs


@torch.no_grad()
def test_before_any_step_it_is_learning_in_context():
    attached, one = with_context(), batch(25)
    row = encoded({"word": 25})
    ids = torch.cat([attached.ids, torch.tensor([*row.prompt, *row.completions[0]])])
    first = len(ids) - 2
    z = base()(ids[None]).logits[0].log_softmax(-1)
    plain = z[torch.arange(first - 1, first + 1), ids[first:]]
    assert torch.allclose(logprobs(attached, one), plain, atol=1e-5)
    # types: the answer of each example has a number of its own
    kinds = [FORMAT, INPUT, FORMAT, FORMAT]
    assert attached.kinds.tolist() == [*kinds, 2, 2, *kinds, 3, 3, *kinds, 4, 4]
    assert len(with_context(max_context_tokens=13).ids) == 12  # a third example has no room
    with pytest.raises(RecipeError, match="no row fits in a context of 5 tokens"):
        with_context(max_context_tokens=5)


def step(attached, one, clock, chain):
    attached.begin_step(clock)
    attached.delta.grad = None
    loss = -logprobs(attached, one).mean()
    loss.backward()
    chain.step(gradients(chain))
    attached.end_step(clock)
    return float(loss.detach())


def fitted(attached, one, steps, rate):
    clock = Clock(seed=3, total=steps)
    chain = Chain([build("transform", "adam")], attached, clock, rate)
    losses = []
    for clock.step in range(steps):
        losses.append(step(attached, one, clock, chain))
    return losses


def test_changes_stay_in_their_balls_and_answers_as_they_are(tmp_path):
    attached = with_context(input_epsilon=0.8, format_epsilon=0.4)
    words = attached.model.get_input_embeddings().weight
    fitted(attached, batch(25, 26), 2, 0.1)
    norm, root = attached.delta.detach().norm(dim=-1), (32 / 2048) ** 0.5
    answers = attached.kinds >= ANSWER
    assert torch.equal(attached.soft()[answers], words[attached.ids[answers]])
    assert torch.equal(attached.delta[answers], torch.zeros(6, 32))
    for kind, epsilon in ((INPUT, 0.8), (FORMAT, 0.4)):
        of = norm[attached.kinds == kind]
        assert (of <= epsilon * root * (1 + 1e-5)).all() and (of > 0.9 * epsilon * root).all()
    # a tuner that has not read these rows takes what is saved
    attached.save(tmp_path)
    fresh: Any = put("cpt", max_context_tokens=40)
    fresh.load(fresh.read(tmp_path))
    assert fresh.virtual == 18
    assert torch.equal(logprobs(fresh, batch(25)), logprobs(attached, batch(25)))


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_losses_of_the_context_are_those_by_hand(decay):
    """One text of context and row: the gradient of the weighted losses of all its answers."""
    attached = with_context(loss_decay=decay)
    with torch.no_grad():
        attached.delta.normal_(std=0.05)
    one, row = batch(25), encoded({"word": 25})
    (-logprobs(attached, one).mean()).backward()
    own = attached.delta.grad + attached.extra_grads("prompt")["delta"]
    delta = attached.delta.detach().clone().requires_grad_()
    tail = attached.model.get_input_embeddings()(torch.tensor([*row.prompt, *row.completions[0]]))
    embeds = torch.cat([attached.with_change(delta), tail])
    ids = torch.cat([attached.ids, torch.tensor([*row.prompt, *row.completions[0]])])
    losses = F.cross_entropy(
        attached.model(inputs_embeds=embeds[None]).logits[0, :-1], ids[1:], reduction="none"
    )
    total = torch.zeros(())
    for example in range(4):
        answer = slice(6 * example + 3, 6 * example + 5)  # places that predict it
        total = total + decay ** (3 - example) * losses[answer].mean()
    (hand,) = torch.autograd.grad(total, delta)
    assert torch.allclose(own, hand, atol=1e-5)
    assert not with_context(loss_decay=0.0).extra_grads("prompt")


def test_it_learns_what_the_context_shows():
    """Above learning in context, on a network that was not trained for the task."""
    attached = with_context(input_epsilon=8.0, format_epsilon=8.0)
    net, one = attached.model, batch(20, 21, 22)
    losses = fitted(attached, one, 12, 0.05)
    assert losses[-1] < losses[0] - 0.5
    first = Causal().forward(net, attached, one).first()
    right = float((first == one.labels[one.targets]).float().mean())
    with torch.no_grad(), attached.off():
        assert torch.equal(logprobs(attached, one), logprobs(Untuned(base()), one))
    start = with_context()
    in_context = Causal().forward(start.model, start, one).first()
    assert right >= float((in_context == one.labels[one.targets]).float().mean())
