"""Small modules and descents that tests of tuners of weight updates share."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from helpers.tuners import base, logprobs, put
from luthier.clock import Clock
from luthier.methods.estimators._base import gradients
from luthier.registry import build
from luthier.train.optimizer import Chain

Q = "model.layers.0.self_attn.q_proj"


class One(nn.Module):
    """A network of one linear layer, to be tuned."""

    def __init__(self, W: torch.Tensor):
        super().__init__()
        self.fc = nn.Linear(W.shape[1], W.shape[0], bias=False)
        self.fc.weight.data = W.clone()
        self.config = SimpleNamespace(
            to_dict=dict, get=lambda *a: None, _name_or_path="", model_type="custom"
        )

    def forward(self, x):
        return self.fc(x)


def descend(attached, loss, steps: int, rate: float, transform: str = "adam"):
    """A training loop on any loss; what is called after each step sees the step's number."""
    clock = Clock(seed=3, total=steps)
    chain = Chain([build("transform", transform)], attached, clock, rate)
    for clock.step in range(steps):
        attached.begin_step(clock)
        for p in attached.parameters().values():
            p.grad = None
        loss().backward()
        chain.step(gradients(chain))
        attached.end_step(clock)
        yield chain


def to_end(run) -> None:
    for _ in run:
        pass


def unfinish(folder) -> None:
    """As a kill after the last checkpoint but one would leave it."""
    import json
    import shutil

    from luthier.storage import checkpoints

    shutil.rmtree(checkpoints.paths(folder)[-1])
    (folder / "report.json").unlink()
    (folder / "run.json").write_text(
        json.dumps({**json.loads((folder / "run.json").read_text()), "finished": False})
    )


KINDS = ["llama", "gpt2"]


def numbers(made: dict) -> SimpleNamespace:
    return SimpleNamespace(
        watch=None,
        **{k: v[1] if isinstance(v, tuple) else v.clone().requires_grad_(True) for k, v in made.items()},
    )


def walk(estimator, steps: int = 4, **settings):
    """Steps of LoRA by an estimator; the attached tuner, its chain and the gradients of the last step."""
    attached, seen = put("lora", base(), **settings), {}
    clock = Clock(seed=3, total=steps)
    chain = Chain([build("transform", "adam")], attached, clock, 0.01)
    for clock.step in range(steps):

        def closure(grad: bool = True) -> float:
            for p in attached.parameters().values():
                p.grad = None
            torch.manual_seed(clock.derive_seed("noise"))
            loss = logprobs(attached).mean().neg()
            loss.backward()
            return loss.item()

        was = attached.tensors()
        build("estimator", estimator).step(closure, chain, clock)
        seen = {k: (was[k], p.grad.clone()) for k, p in attached.parameters().items()}
    return attached, chain, seen
