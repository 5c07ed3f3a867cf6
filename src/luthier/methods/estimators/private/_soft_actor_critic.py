"""A small soft actor-critic (arXiv:1812.05905), all of whose state is one dict of tensors: twin critics with
slow copies, a squashed normal policy, a temperature that is tuned, and a replay buffer.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

DISCOUNT, SLOW, RATE, WIDTH = 0.99, 0.005, 3e-4, 32
Weights = dict[str, Tensor]


def fresh(states: int, actions: int, rng: Generator) -> dict[str, Any]:
    """An agent for observations [states] and actions [actions] within -1 and 1; at first it does nothing on
    average.
    """
    agent: dict[str, Any] = {"actor": layers(states, 2 * actions, rng)}
    agent["actor"]["out"].zero_()
    for name in ("q1", "q2"):
        agent[name] = layers(states + actions, 1, rng)
        agent[f"slow_{name}"] = {k: w.clone() for k, w in agent[name].items()}
    agent["log_temperature"] = {"value": torch.tensor(math.log(0.1))}
    agent["moments"] = {}
    agent["buffer"] = {
        "state": torch.zeros(0, states),
        "action": torch.zeros(0, actions),
        "reward": torch.zeros(0),
        "next": torch.zeros(0, states),
    }
    return agent


def layers(wide: int, out: int, rng: Generator) -> Weights:
    """Weights of two layers."""
    return {
        "in": torch.randn(WIDTH, wide, generator=rng) / wide**0.5,
        "in_bias": torch.zeros(WIDTH),
        "out": torch.randn(out, WIDTH, generator=rng) / WIDTH**0.5,
        "out_bias": torch.zeros(out),
    }


def through(w: Weights, x: Tensor) -> Tensor:
    """[..., wide] -> [..., out]"""
    return F.linear(torch.tanh(F.linear(x, w["in"], w["in_bias"])), w["out"], w["out_bias"])


def act(agent: dict[str, Any], state: Tensor, rng: Generator) -> tuple[Tensor, Tensor]:
    """state [..., states] -> a drawn action [..., actions] within -1 and 1, and its log-density [...]."""
    mean, log_std = through(agent["actor"], state).chunk(2, -1)
    log_std = log_std.clamp(-5, 1)
    z = torch.randn(mean.shape, generator=rng)
    raw = mean + log_std.exp() * z
    normal = -0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)
    squash = 2 * (math.log(2) - raw - F.softplus(-2 * raw))  # log(1 - tanh(raw)^2)
    return torch.tanh(raw), (normal - squash).sum(-1)


def critic(w: Weights, state: Tensor, action: Tensor) -> Tensor:
    """[..., states], [..., actions] -> [...] the value."""
    return through(w, torch.cat([state, action], -1)).squeeze(-1)


def remember(agent: dict[str, Any], state: Tensor, action: Tensor, reward: float, following: Tensor) -> None:
    """Enter what an action led to."""
    entries = {"state": state, "action": action, "reward": torch.tensor(reward), "next": following}
    for name, value in entries.items():
        agent["buffer"][name] = torch.cat([agent["buffer"][name], value[None].float()])


def learn(agent: dict[str, Any], batch: int, rng: Generator) -> None:
    """One update of critics, actor and temperature from `batch` drawn entries."""
    count = len(agent["buffer"]["reward"])
    rows = torch.randint(count, (batch,), generator=rng)
    names = ("state", "action", "reward", "next")  # a checkpoint need not keep their order
    state, action, reward, following = (agent["buffer"][name][rows] for name in names)
    temperature = agent["log_temperature"]["value"].exp()
    with torch.no_grad():
        later, density = act(agent, following, rng)
        slow = torch.minimum(
            critic(agent["slow_q1"], following, later), critic(agent["slow_q2"], following, later)
        )
        target = reward + DISCOUNT * (slow - temperature * density)
    for name in ("q1", "q2"):
        descend(agent, name, lambda w: (critic(w, state, action) - target).square().mean())

    def actor_loss(w: Weights) -> Tensor:
        own, density = act({"actor": w}, state, rng)
        value = torch.minimum(critic(agent["q1"], state, own), critic(agent["q2"], state, own))
        return (temperature * density - value).mean()

    descend(agent, "actor", actor_loss)
    with torch.no_grad():
        _, density = act(agent, state, rng)
    short = density - action.shape[-1]  # of the entropy aimed at, one nat for each action
    descend(agent, "log_temperature", lambda w: -(w["value"] * short).mean())
    for name in ("q1", "q2"):
        for key, weight in agent[f"slow_{name}"].items():
            weight.lerp_(agent[name][key], SLOW)


def descend(agent: dict[str, Any], name: str, loss: Any) -> None:
    """One step of Adam on the weights of this name."""
    with torch.enable_grad():
        weights = {k: w.detach().requires_grad_() for k, w in agent[name].items()}
        grads = torch.autograd.grad(loss(weights), list(weights.values()))
    moments = agent["moments"].setdefault(name, {"step": torch.zeros(())})
    moments["step"] = moments["step"] + 1
    step = float(moments["step"])
    for (key, weight), grad in zip(agent[name].items(), grads, strict=True):
        m = moments.setdefault(f"m_{key}", torch.zeros_like(grad)).lerp_(grad, 0.1)
        v = moments.setdefault(f"v_{key}", torch.zeros_like(grad)).lerp_(grad.square(), 0.001)
        agent[name][key] = weight.detach() - RATE * (m / (1 - 0.9**step)) / (
            (v / (1 - 0.999**step)).sqrt() + 1e-8
        )
