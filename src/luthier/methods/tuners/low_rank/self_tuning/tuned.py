"""Tuner `self_tuning` on a model: a Delta whose layers depend on changing hyperparameters."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.methods.tuners._base import ParamGroup
from luthier.methods.tuners._peft import ADAPTER, DeltaLayer, PeftTunedModel, config_for
from luthier.methods.tuners.low_rank.self_tuning.maths import DECAY, HYPER, decay, names, rate


class SelfTuningModel(PeftTunedModel):
    """A Delta on a model, and the hyperparameters on which its layers depend."""

    def __init__(self, settings: Any, network: Any):
        super().__init__(settings, network, config_for(settings, network))
        where = next(iter(self.answers())).dial.device
        # moved by the estimator alone
        self.hyper = nn.Parameter(torch.zeros(len(HYPER), device=where), requires_grad=False)
        self.log_sigma = nn.Parameter(
            torch.full((len(HYPER),), math.log(settings.sigma), device=where), requires_grad=False
        )
        self.drawn: dict[str, Tensor] = {}  # row -> its noise in this step

    def answers(self) -> list[Any]:
        """The tensors of every layer."""
        return [m.adapter_params[ADAPTER] for m in self.layers.values() if isinstance(m, DeltaLayer)]

    def all_param_groups(self):
        return [
            *self.own_param_groups,
            ParamGroup("hyper", {"moved": self.hyper, "log_sigma": self.log_sigma}, None),
        ]

    def why_not_elsewhere(self):
        return "its hyperparameters are moved by estimator self_tuning"

    # --- noise, a row at a time

    @contextmanager
    def answering(self, clock: Clock, dropping: bool) -> Iterator[None]:
        """For a while every row is answered at its own draw of the hyperparameters: with dropout, or so that
        a gradient reaches them.
        """
        buffers = [(t, dict(t._buffers)) for t in self.answers()]
        self.clock, self.dropping, self.drawn = clock, dropping, {}
        for t, _ in buffers:
            t._buffers["dropping"] = torch.tensor(float(dropping))
        self.per_row = True
        try:
            yield
            if not self.drawn:
                raise RecipeError(
                    "estimator 'self_tuning' draws noise per row, but this architecture does"
                    " not tell which row a token belongs to"
                )
        finally:
            self.per_row = False
            for t, was in buffers:
                t._buffers.update(was)

    def on_rows(self, batch, rows):
        if not self.per_row:
            return
        noise = torch.stack([self.noise(str(row.get("id", i))) for i, row in enumerate(batch.rows)]).to(
            self.hyper.device
        )
        every = self.hyper + self.log_sigma.exp() * noise  # [G, hyperparameters]
        dial = (every.detach() if self.dropping else every)[rows]
        for t in self.answers():
            t._buffers["dial"] = dial if rows.ndim > 1 else dial[:, None]

    def noise(self, row: str) -> Tensor:
        """The same in every call of a step, in whatever company a row is read."""
        if row not in self.drawn:
            self.drawn[row] = torch.randn(len(HYPER), generator=self.clock.rng("self_tuning", row))
        return self.drawn[row]

    @torch.no_grad()
    def settle(self) -> None:
        """Outside of `answering`, layers answer to where the hyperparameters stand."""
        for t in self.answers():
            t.dial.copy_(self.hyper)

    # --- the term that the training loss has of its own

    def decaying(self) -> Tensor:
        """decay(h) / 2 times the squares of the factors at h, expected over the draws of h.

        Exactly: the squares are quadratic in h, and a normal weighed by an exponential is a normal that has
        moved.
        """
        hyper, variance = self.hyper.detach(), self.log_sigma.detach().mul(2).exp()
        tilt = variance * torch.eye(len(HYPER), device=hyper.device)[DECAY]
        mean, total = hyper + tilt, torch.zeros((), device=hyper.device)
        for t in self.answers():
            for n in names(t):
                still, moves, V = getattr(t, n), getattr(t, f"{n}_hyper"), getattr(t, f"V_{n}")
                first = V @ mean
                second = first.square() + V.square() @ variance
                total = (
                    total
                    + still.square().sum()
                    + ((2 * first[:, None] * still + second[:, None] * moves) * moves).sum()
                )
        return decay(self.settings, hyper + tilt / 2) / 2 * total

    def values(self) -> dict[str, float]:
        """The hyperparameters as people know them."""
        return {
            "dropout": float(rate(self.settings, self.hyper.detach())),
            "weight_decay": float(decay(self.settings, self.hyper.detach())),
        }

    def read(self, folder):
        tensors = super().read(folder)
        dial = next(v for k, v in tensors.items() if k.endswith(".dial"))
        return {**tensors, "hyper.moved": dial.detach().clone()}
