"""latentseek: the gradient of the states, no weight moves, and more answers are right."""

from __future__ import annotations

import torch

from helpers.decoding import By
from luthier.methods.decoders.search.latentseek import LatentSeek

PROMPT = [20, 21, 22]
HOW = {"seeds": [0], "max_new_tokens": 6, "stop": [1]}


def decoder(function, **settings):
    return LatentSeek(reward=By(function), share=1.0, **settings)


def test_no_weight_moves(tiny_roles):
    model = tiny_roles.policy.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    decoder(lambda text: 0.0, iterations=3).generate(tiny_roles, [{}], [PROMPT], **HOW)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_gradient_is_that_of_softmax(tiny_roles):
    """-R * (onehot - softmax) W, and nothing without a reward."""
    search = decoder(len)
    states = search.states(tiny_roles, PROMPT, [23, 24]).requires_grad_(True)
    weight = tiny_roles.policy.model.get_output_embeddings().weight.detach()
    logits = states.detach() @ weight.T
    onehot = torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    for reward in (-1.0, 0.0):
        (gradient,) = torch.autograd.grad(search.loss(tiny_roles, states, reward), states)
        expected = -reward * (onehot - logits.softmax(-1)) @ weight
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)


def test_the_states_are_those_of_the_greedy_answer(tiny_roles):
    ((answer,),) = tiny_roles.policy.generate([PROMPT], temperature=0.0, **HOW)
    search = decoder(len)
    states = search.states(tiny_roles, PROMPT, answer)
    assert search.head(tiny_roles, states).argmax(-1).tolist() == answer


def test_more_answers_are_right(tiny_roles):
    """A verifier that is not content with the greedy answer: a text with another beginning is found."""
    renderer = tiny_roles.renderer
    rows, right = [], []
    for first in range(20, 28):
        prompt = [first, 21, 22]
        ((greedy,),) = tiny_roles.policy.generate([prompt], temperature=0.0, **HOW)
        refused = renderer.answer(greedy)
        search = decoder(lambda text, refused=refused: float(text != refused), iterations=10, rate=0.3)
        ((found,),) = search.generate(tiny_roles, [{}], [prompt], **HOW)
        rows.append(prompt)
        right.append(renderer.answer(found) != refused)
    assert sum(right) >= 3


def test_a_right_answer_is_left_as_it_is(tiny_roles):
    plain = tiny_roles.policy.generate([PROMPT], temperature=0.0, **HOW)
    assert decoder(lambda text: 1.0).generate(tiny_roles, [{}], [PROMPT], **HOW) == plain
