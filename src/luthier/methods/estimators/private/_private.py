"""What private estimators share: rows that are drawn one by one, gradients of single rows clipped, noise on
their sum, and an account of what that spends.

A step reads each row with the same probability, by a draw of its own (Poisson sampling), so the number of
rows differs from step to step; the sum of their clipped gradients is divided by the number that is expected.
The noise is on every trainable tensor, whether a row reached it or not. All that follows, the optimizer and
the weights, is computed from these noisy sums alone. What is promised holds for the weights and for whatever
is done with them, for neighbouring data that differ by one row; it does not hold for the log of a run, whose
losses are those of the rows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.methods.estimators._base import Estimator, gradients
from luthier.methods.estimators.private._accountant import composed_epsilon, noise_for
from luthier.registry import family, submethods

if TYPE_CHECKING:
    from luthier.train.optimizer import Chain

LEDGER = "private"  # under this name the account lies in the state of the first parameter group


@dataclass(frozen=True)
class Sampling:
    """How rows enter the steps of a run."""

    rate: float  # probability of each row
    expected: float  # rows of a step, on average
    steps: int  # of the whole run


@dataclass
class Ledger:
    """What a run has spent; lies in the optimizer's state, so that a run that goes on continues it."""

    state: dict[str, Any]

    @classmethod
    def of(cls, chain: Chain) -> Ledger:
        first = chain.param_groups()[0].name
        return cls(chain.state.setdefault(first, {}).setdefault(LEDGER, {}))

    def noises(self) -> Tensor:
        """[steps] the noise multiplier of each step so far."""
        return self.state.get("noise", torch.zeros(0, dtype=torch.float64))

    def steps(self) -> tuple[tuple[float, int], ...]:
        """(noise multiplier, how many steps) so far."""
        values, counts = self.noises().unique(return_counts=True)
        return tuple(zip(values.tolist(), counts.tolist(), strict=True))

    def spend(self, noise: float) -> None:
        """Enter one step."""
        self.state["noise"] = torch.cat([self.noises(), torch.tensor([noise], dtype=torch.float64)])


@family
class Private(Estimator):
    """Family: clipped gradients of rows, with noise."""

    private: ClassVar[bool] = True

    # the most that the weights may tell of whether a row was there, at the end of the run; sets the noise
    target_epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 8.0
    # with which probability it may be more; well below 1 / number of rows
    target_delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    # standard deviation of the noise over the clipping norm; null: the smallest that keeps target_epsilon
    noise_multiplier: Annotated[float | None, Field(gt=0)] = None
    row_grad_norm: Annotated[float, Field(gt=0)] = 1.0  # the norm that the gradient of a row is clipped to
    # the gradient of a row as one vector, or each tensor by itself, to row_grad_norm / sqrt(tensors)
    clipping: Literal["flat", "per_layer"] = "flat"
    # file with a secret, from which draws and noise follow as well; without it who knows the recipe's seed
    # can compute the noise
    key_file: str = ""

    # ------------------------------------------------------------------------------------------ refusals

    def chain_warnings(self, chain):
        sentences = []
        if not self.key_file:
            sentences.append(
                f"estimator '{self.name}': the noise follows from the seed, so the promise holds only against"
                " those who do not know it; set `key_file` to a file with a secret before you publish weights"
            )
        for transform in chain:
            if getattr(transform, "max_grad_norm", 0):
                sentences.append(
                    f"estimator '{self.name}' has clipped the gradients of rows: max_grad_norm"
                    f" {transform.max_grad_norm:g} of the optimizer clips their noisy sum once more; set it"
                    " to 0"
                )
        return sentences

    def suits(self, objective):
        for _, term in objective.terms():
            for promise in ("accumulation", "order"):
                if reason := term.contract.get(promise):
                    raise RecipeError(
                        f"estimator '{self.name}' needs an objective in which each row is by itself, not"
                        f" '{term.name}': {reason}"
                    )

    def suits_recipe(self, recipe, methods):
        self.key()
        for stage in (*methods.stages, *methods.online_stages):
            if stage.row_by_row:
                continue
            raise RecipeError(
                f"estimator '{self.name}' promises privacy for rows as its steps read them, which stage"
                f" '{stage.name}' would process before; process the rows in a run of its own, each by itself"
            )
        for tuner in (methods.tuner, *submethods(methods.tuner)):
            if getattr(tuner, "changes_phase", False):
                raise RecipeError(
                    f"estimator '{self.name}' accounts for one set of trainable parameters, but tuner"
                    f" '{tuner.name}' changes which ones are trainable during training; use another tuner"
                )
            if reads_rows(tuner):
                raise RecipeError(
                    f"estimator '{self.name}' promises that rows are read by its steps alone, but tuner"
                    f" '{tuner.name}' starts from rows of its own choice; use another tuner or start"
                )
        for name, role in methods.roles.items():
            if role.starts_from_rows:
                raise RecipeError(
                    f"estimator '{self.name}' promises that rows are read by its steps alone, but role"
                    f" '{role.name}' (roles.{name}) starts from rows of its own choice"
                )
        if recipe.num_iterations > 1:
            raise RecipeError(f"estimator '{self.name}' draws rows for each step: num_iterations must be 1")
        if recipe.compares_evaluations:
            raise RecipeError(
                f"estimator '{self.name}': a choice among checkpoints by their evaluation reads rows outside"
                " of its steps; leave out load_best_model_at_end and early stopping"
            )

    # ------------------------------------------------------------------------------------------ chance

    def key(self) -> str:
        """What draws follow from beside the seed."""
        if not self.key_file:
            return ""
        try:
            secret = Path(self.key_file).expanduser().read_bytes()
        except OSError as error:
            raise RecipeError(f"key_file: {self.key_file} cannot be read ({error.strerror})") from None
        if len(secret) < 16:
            raise RecipeError(f"key_file: {self.key_file} has fewer than 16 bytes, which can be guessed")
        return hashlib.blake2b(secret, digest_size=16).hexdigest()

    def draw(self, count, per_step, clock):
        """Every row with probability per_step / count."""
        chance = torch.rand(count, generator=clock.rng("poisson", self.key()), dtype=torch.float64)
        return (chance < per_step / max(1, count)).nonzero()[:, 0].tolist()

    def sampling(self, closure: Any, clock: Clock) -> Sampling:
        """A closure that has no rows is one row, which every step reads."""
        trainer = getattr(closure, "trainer", None)
        if trainer is None:
            return Sampling(1.0, 1.0, clock.total)
        expected, count = trainer.batches.per_step, len(trainer.rows)
        if self.target_delta * count >= 1:
            raise RecipeError(
                f"estimator '{self.name}': target_delta {self.target_delta:g} must be below 1 / {count:,},"
                " the number of rows, or to publish some of them whole would count as private"
            )
        return Sampling(min(1.0, expected / count), float(expected), clock.total)

    # ------------------------------------------------------------------------------------------ the step

    def multiplier(self, ledger: Ledger, sampling: Sampling) -> float:
        """The noise multiplier of this step. One that follows from target_epsilon is chosen at the start, and
        again where a run that goes on has another length.
        """
        if self.noise_multiplier is not None:
            return self.noise_multiplier
        noises = ledger.noises()
        if len(noises) and ledger.state.get("planned") == sampling.steps:
            return float(noises[-1])
        ledger.state["planned"] = sampling.steps
        left = sampling.steps - len(noises)
        return noise_for(self.target_epsilon, sampling.rate, left, self.target_delta, ledger.steps())

    def thresholds(self, groups: Mapping[str, Tensor], ledger: Ledger) -> dict[str, float]:
        """Name of a tensor -> the norm that its gradient is clipped to; empty: all of them as one vector."""
        if self.clipping == "flat":
            return {}
        return dict.fromkeys(groups, self.row_grad_norm / math.sqrt(len(groups)))

    def step(self, closure, chain, clock):
        ledger, sampling = Ledger.of(chain), self.sampling(closure, clock)
        tensors = moving(chain)
        noise = self.multiplier(ledger, sampling)
        thresholds = self.thresholds(tensors, ledger)
        sums, loss = self.clipped_sums(closure, chain, tensors, thresholds)
        for name, total in sums.items():
            rng = clock.rng("noise", self.key(), name)
            z = torch.randn(total.shape, generator=rng).to(total.device)
            total.add_(z, alpha=noise * self.spread(name, thresholds)).div_(sampling.expected)
        ledger.spend(noise)
        if note := getattr(closure, "note", None):
            spent = composed_epsilon(ledger.steps(), sampling.rate, self.target_delta)
            note({"epsilon": spent, "delta": self.target_delta, "noise_multiplier": noise})
        chain.step(self.by_group(chain, sums))
        return loss

    def spread(self, name: str, thresholds: Mapping[str, float]) -> float:
        """Standard deviation of the noise on a tensor at multiplier 1. Tensors that are clipped by
        themselves: their norms over their thresholds are one vector of norm sqrt(tensors) at most.
        """
        if not thresholds:
            return self.row_grad_norm
        return thresholds[name] * math.sqrt(len(thresholds))

    def clipped_sums(
        self, closure: Any, chain: Chain, tensors: Mapping[str, Tensor], thresholds: Mapping[str, float]
    ) -> tuple[dict[str, Tensor], float]:
        """Name -> sum of the rows' clipped gradients in fp32, over all processes; and the loss."""
        sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in tensors.items()}
        if not hasattr(closure, "row_gradients"):
            loss = closure()
            self.add_clipped(sums, tensors, thresholds)
            return sums, loss
        for _ in closure.row_gradients():
            self.add_clipped(sums, tensors, thresholds)
        processes = closure.trainer.processes
        for total in sums.values():
            total.copy_(processes.sum(total))
        return sums, closure.end(grad=False)

    @torch.no_grad()
    def add_clipped(
        self, sums: dict[str, Tensor], tensors: Mapping[str, Tensor], thresholds: Mapping[str, float]
    ) -> None:
        """Add the gradient of a row, as it lies in p.grad."""
        grads = {name: p.grad.float() for name, p in tensors.items() if p.grad is not None}
        if not grads:
            return
        norms = {name: torch.linalg.vector_norm(g) for name, g in grads.items()}
        whole = torch.linalg.vector_norm(torch.stack([n.to("cpu") for n in norms.values()]))
        for name, grad in grads.items():
            if thresholds:
                factor = thresholds[name] / norms[name].clamp(min=thresholds[name])
            else:
                factor = self.row_grad_norm / whole.clamp(min=self.row_grad_norm)
            sums[name].add_(grad * factor.to(grad.device))

    def by_group(self, chain: Chain, sums: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Group -> parameter -> gradient. Hooks of tuners that read p.grad after the step find the noisy."""
        for name, p in moving(chain).items():
            p.grad = sums[name].to(p.dtype)
        out = gradients(chain)
        for group, params in out.items():
            for key in params:
                params[key] = sums[f"{group}.{key}"]
        return out


def reads_rows(tuner: Any) -> bool:
    """May a tuner start from training rows? One that reads public rows (init_data) does not."""
    if getattr(tuner, "starts_from_rows", False):
        return True
    if not hasattr(tuner, "init_rows"):
        return False
    start = getattr(tuner, "init_lora_weights", None)
    if start is not None:
        return start in ("eva", "corda", "lora_ga") and getattr(tuner, "init_data", None) is None
    return bool(getattr(tuner, "reads", True))


def moving(chain: Chain) -> dict[str, Tensor]:
    """Name -> every tensor that moves in this step."""
    tensors = {}
    for group in chain.param_groups():
        for key, p in group.params.items():
            if p.requires_grad:
                tensors[f"{group.name}.{key}"] = p
    return tensors
