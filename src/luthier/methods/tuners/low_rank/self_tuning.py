"""Self-tuning networks on adapters: LoRA whose factors answer to hyperparameters, A(h) = A + rows(V_A h)
A_hyper, and B alike.

h is how far two hyperparameters have moved since the start, the logit of the dropout on what A reads and the
log of the weight decay of the adapter: the factors learn the best response to them, and estimator
`self_tuning` moves them by validation rows. With any other estimator h stays 0 and this is LoRA. When a run
ends h is a constant: merged and exported it is a plain change of weights. r: 0 takes one dense matrix in
place of the factors. Departs from the paper: its networks are gated whole; and h counts from its start, so
that at the start V plays no role.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from luthier.errors import RecipeError
from luthier.methods.tuners._base import DISABLE_ADAPTER, MERGE
from luthier.methods.tuners._delta import Delta, frozen
from luthier.registry import Capability, tuner

HYPERPARAMETERS = Capability(
    "hyperparameters", says="a tuner whose factors depend on hyperparameters (`self_tuning`)"
)

HYPER = ("dropout", "weight_decay")
DROPOUT, DECAY = 0, 1  # their places


@tuner(
    example={"r": 2},
    paper="arXiv:1903.03088",
    row="self-tuning-networks",
    provides=[DISABLE_ADAPTER, MERGE, HYPERPARAMETERS],
)
class SelfTuning(Delta):
    """LoRA that knows its hyperparameters."""

    r: Annotated[int, Field(ge=0)] = 8  # rank of the update; 0: a dense matrix
    lora_alpha: float = 16  # scale of the update, before division by r
    dropout: Annotated[float, Field(gt=0, lt=1)] = 0.1  # where the dropout starts
    weight_decay: Annotated[float, Field(gt=0)] = 1e-4  # where the weight decay of the adapter starts
    # where the spread starts in which responses are learned, in logits and logs
    sigma: Annotated[float, Field(gt=0)] = 0.5

    def attach(self, model):
        from luthier.methods.tuners.low_rank._peft_hyper import Responding

        return Responding(self, model)

    def init(self, W):
        made: dict[str, Any] = {
            "dial": frozen(torch.zeros(len(HYPER))),
            "dropping": ("seeded", torch.zeros(())),
        }
        shapes = {"A": (self.r, W.shape[1]), "B": (W.shape[0], self.r)} if self.r else {"D": tuple(W.shape)}
        for name, shape in shapes.items():
            start = torch.zeros(shape)
            made[name] = nn.init.kaiming_uniform_(start, a=5**0.5) if name == "A" else start
            made[f"{name}_hyper"], made[f"V_{name}"] = torch.zeros(shape), torch.randn(shape[0], len(HYPER))
        return made

    def change(self, p: Any) -> tuple[Tensor, ...]:
        """The factors as they answer now, scaled."""
        found = responses(p)
        return (found[0], found[1] * (self.lora_alpha / self.r)) if self.r else found

    def weight(self, W, p):
        found = self.change(p)
        return W + (found[1] @ found[0] if self.r else found[0]).to(W.dtype)

    def forward(self, x, y, p, layer):
        dial = placed(p.dial, x)
        if torch.is_grad_enabled() and float(p.dropping):
            keep = 1 - rate(self, dial.detach())[..., None]
            x = x * (torch.rand_like(x) < keep) / keep
        for n in names(p):
            x = F.linear(x, getattr(p, n)) + dial @ getattr(p, f"V_{n}").T * F.linear(
                x, getattr(p, f"{n}_hyper")
            )
        return y + (x * (self.lora_alpha / self.r) if self.r else x)

    def factors(self, p):
        found = self.change(p)
        return (found[0], found[1]) if self.r else None


def names(p: Any) -> list[str]:
    """The factors of a layer, in the order in which they are applied."""
    return [n for n in ("A", "B", "D") if hasattr(p, n)]


def responses(p: Any) -> tuple[Tensor, ...]:
    """Each factor at what the dial says: A + rows(V_A h) A_hyper."""
    return tuple(
        getattr(p, n) + (getattr(p, f"V_{n}") @ p.dial)[:, None] * getattr(p, f"{n}_hyper") for n in names(p)
    )


def placed(dial: Tensor, x: Tensor) -> Tensor:
    """The hyperparameters at each place of x [..., in]: [2] where all places answer to the same, else [...,
    2].

    dial: [2], or [R, W, 2] for x of R rows of W places, W = 1 where a row's places are all alike.
    """
    where = x.shape[:-1]
    if dial.ndim == 1 or len(where) == 2 and dial.shape[0] == where[0] and dial.shape[1] in (1, where[1]):
        return dial
    # networks that lay their rows end to end
    if len(where) == 1 and where[0] == dial.shape[0] * dial.shape[1]:
        return dial.flatten(0, 1)
    raise RecipeError(
        f"tuner 'self_tuning' needs to know which row a token is of, and a module is given {list(where)}"
        f" places of a batch of {list(dial.shape[:2])} (experts and output heads do so): leave it out with"
        " exclude_modules"
    )


def rate(settings: SelfTuning, hyper: Tensor) -> Tensor:
    """The dropout that the first hyperparameter [..., 2] stands for."""
    return torch.sigmoid(hyper[..., DROPOUT] + math.log(settings.dropout / (1 - settings.dropout)))


def decay(settings: SelfTuning, hyper: Tensor) -> Tensor:
    """The weight decay that the second stands for."""
    return settings.weight_decay * torch.exp(hyper[..., DECAY])
