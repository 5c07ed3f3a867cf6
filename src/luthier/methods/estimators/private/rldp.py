"""RLDP: DP-SGD in which a soft actor-critic moves the clipping thresholds and the noise as the run goes on.

The tensors of a parameter group, A and B of a LoRA layer, are clipped together to a threshold of their own,
C_i. Every `rl_interval` steps an agent sees statistics of the run and answers changes of every log C_i and of
the noise multiplier, within bounds. Its reward is the mean cosine of one step's gradient with the next one's,
which is high where signal stands out from noise, minus the share of epsilon that the interval spent.

All that the agent sees is computed from the noisy sums that the steps publish anyway, so its choices tell
nothing more of the rows. Noise that is chosen as the run goes is accounted for by a Rényi filter: one order
is fixed at the start, and steps whose divergences of this order add up to what target_epsilon is worth are
all that is spent. Departs: the paper's loss and its change, clip fractions and curvature are of the rows and
are left out; noise on C_i is sigma C_i sqrt(groups), which makes sigma the multiplier that the account needs;
the noise multiplier is common to all groups.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from luthier.errors import RecipeError
from luthier.methods.estimators._base import GRADIENT
from luthier.methods.estimators.private import _soft_actor_critic as sac
from luthier.methods.estimators.private._accountant import NOISE, epsilon_of_order, renyi_divergence
from luthier.methods.estimators.private._private import Ledger, Private, Sampling, moving
from luthier.registry import Range, estimator

if TYPE_CHECKING:
    from luthier.clock import Clock
    from luthier.train.optimizer import Chain

SHARE = 0.9  # of what is left, the most that one interval before the last one may spend
RANGE = math.log(10)  # how far a threshold may go from where it began


@estimator(
    row="rldp",
    provides=[GRADIENT],
    use_when="a private run is long enough for its clipping thresholds and noise to be adapted as it goes,"
    " instead of searched for by further runs, which would spend privacy as well.",
    costs="as `dp_sgd`, and one more copy of the gradient; the agent costs next to nothing.",
    starting_rate="as `dp_sgd`; the paper takes 5e-4 with LoRA.",
    example={"target_epsilon": 1e6, "row_grad_norm": 10.0, "rl_interval": 5},
    covers="thresholds by LoRA pair, a soft actor-critic on thresholds and noise every interval, with replay,"
    " twin critics and a tuned temperature; epsilon never above its target; with the agent off it is `dp_sgd`"
    " with per-layer clipping, where groups are single tensors.",
    omits="rewards and statistics that read losses of rows; noise by adapter; its perplexities and the count"
    " of steps to the loss of a fixed threshold.",
    tests=[
        "methods/estimators/private/test_rldp.py::test_without_the_agent_it_is_per_layer_dp_sgd",
        "methods/estimators/private/test_rldp.py::test_epsilon_stays_below_its_target",
        "methods/estimators/private/test_rldp.py::test_a_pair_is_clipped_together",
        "methods/estimators/private/test_rldp.py::test_the_agent_learns_what_pays",
    ],
)
class RLDP(Private):
    """DP-SGD with thresholds and noise that an agent moves."""

    controller: Literal["sac", "constant"] = "sac"  # constant: thresholds and noise stay as they start
    rl_interval: Annotated[int, Field(ge=1), Range(10, 200)] = 112  # steps between two decisions
    # the most by which one decision changes the log of a threshold and of the noise
    max_change: Annotated[float, Field(gt=0, le=1)] = 0.2
    epsilon_penalty: Annotated[float, Field(ge=0)] = 1.0  # weight of the epsilon spent in the reward

    def __post_init__(self):
        if self.controller == "sac" and self.noise_multiplier is not None:
            raise RecipeError(
                "estimator 'rldp': the agent chooses the noise from target_epsilon; leave out"
                " noise_multiplier, or set controller: constant"
            )

    # ------------------------------------------------------------------------------------------ thresholds

    def thresholds(self, groups, ledger):
        pairs = sorted({pair_of(name) for name in groups})
        bound = self.row_grad_norm / math.sqrt(len(pairs))
        moves = ledger.state.get("moves")
        factors = [1.0] * len(pairs) if moves is None else moves[:-1].exp().tolist()
        by_pair = {pair: bound * factor for pair, factor in zip(pairs, factors, strict=True)}
        return {name: by_pair[pair_of(name)] for name in groups}

    def spread(self, name, thresholds):
        return thresholds[name] * math.sqrt(len({pair_of(other) for other in thresholds}))

    @torch.no_grad()
    def add_clipped(self, sums, tensors, thresholds):
        grads = {name: p.grad.float() for name, p in tensors.items() if p.grad is not None}
        squares: dict[str, Any] = {}
        for name, grad in grads.items():
            squares[pair_of(name)] = squares.get(pair_of(name), 0.0) + grad.square().sum().cpu()
        for name, grad in grads.items():
            norm = squares[pair_of(name)].sqrt().clamp(min=thresholds[name])
            sums[name].add_(grad * (thresholds[name] / norm).to(grad.device))

    # ------------------------------------------------------------------------------------------ noise

    def multiplier(self, ledger, sampling):
        if self.controller == "constant":
            return super().multiplier(ledger, sampling)
        order = ledger.state.setdefault(
            "order", best_order(self.target_epsilon, sampling.rate, sampling.steps, self.target_delta)
        )
        done = len(ledger.noises())
        if done % self.rl_interval and ledger.state.get("planned") == sampling.steps:
            return float(ledger.noises()[-1])
        ledger.state["planned"] = sampling.steps
        left = self.left(ledger, sampling, order)
        ahead = max(1, sampling.steps - done)
        here = min(ahead, self.rl_interval - done % self.rl_interval)
        even = noise_of(left / ahead, sampling.rate, order)
        moves = ledger.state.get("moves")
        if moves is None or here == ahead:
            return even  # the last ones spend evenly what is left
        least = noise_of(SHARE * left / here, sampling.rate, order)
        return max(least, even * math.exp(float(moves[-1])))

    def left(self, ledger: Ledger, sampling: Sampling, order: float) -> float:
        """The divergence of this order that may still be spent."""
        budget = self.target_epsilon - epsilon_of_order(0.0, order, self.target_delta)
        spent = sum(n * renyi_divergence(sampling.rate, noise, order) for noise, n in ledger.steps())
        return budget - spent

    # ------------------------------------------------------------------------------------------ the agent

    def step(self, closure, chain, clock):
        loss = super().step(closure, chain, clock)
        if self.controller == "sac":
            ledger = Ledger.of(chain)
            self.gather(ledger, moving(chain))
            if len(ledger.noises()) % self.rl_interval == 0:
                self.decide(ledger, self.sampling(closure, clock), chain, clock)
        return loss

    @torch.no_grad()
    def gather(self, ledger: Ledger, tensors: Mapping[str, Tensor]) -> None:
        """The noisy gradient of a step, as it was published: its cosine with the last one, and its norms."""
        last = ledger.state.setdefault("last", {})
        dot, own, before = 0.0, 0.0, 0.0
        norms: dict[str, float] = {}
        for name, p in tensors.items():
            grad = p.grad.float()
            square = float(grad.square().sum())
            norms[pair_of(name)] = norms.get(pair_of(name), 0.0) + square
            own += square
            if name in last:
                dot += float((grad * last[name]).sum())
                before += float(last[name].square().sum())
            last[name] = grad.clone()
        cosine = dot / math.sqrt(own * before) if own * before else 0.0
        current = torch.tensor([cosine, *(math.log(math.sqrt(norms[k]) + 1e-12) for k in sorted(norms))])
        total = ledger.state.get("statistics", torch.zeros_like(current))
        ledger.state["statistics"] = total + current / self.rl_interval

    def decide(self, ledger: Ledger, sampling: Sampling, chain: Chain, clock: Clock) -> None:
        """Reward what was decided last, learn, and decide anew."""
        state = ledger.state
        current = state.pop("statistics")
        thresholds = self.thresholds(moving(chain), ledger)
        by_pair = {pair_of(name): bound for name, bound in thresholds.items()}
        sizes = torch.tensor([math.log(by_pair[pair]) for pair in sorted(by_pair)])
        order = state["order"]
        budget = self.target_epsilon - epsilon_of_order(0.0, order, self.target_delta)
        share = 1 - self.left(ledger, sampling, order) / budget
        done = len(ledger.noises()) / max(1, sampling.steps)
        place = torch.tensor([float(current[0]), share, done])
        observed = torch.cat([place, (current[1:] - sizes).tanh()])
        rng = clock.rng("controller", self.key())
        if "agent" not in state:
            state["agent"] = sac.fresh(len(observed), len(sizes) + 1, rng)
            state["moves"] = torch.zeros(len(sizes) + 1)
        else:
            spent = share - float(state["observed"][1])
            reward = float(current[0]) - self.epsilon_penalty * spent
            sac.remember(state["agent"], state["observed"], state["action"], reward, observed)
            for _ in range(2):
                sac.learn(state["agent"], 4, rng)
        with torch.no_grad():
            action, _ = sac.act(state["agent"], observed, rng)
        moves = state["moves"] + self.max_change * action
        moves[-1] = self.max_change * action[-1]  # of the noise: from what spends evenly
        state["moves"] = moves.clamp(-RANGE, RANGE)
        state["observed"], state["action"] = observed, action


def pair_of(name: str) -> str:
    """The parameter group of a tensor, by its name: A and B of a layer have the same one."""
    return name.rpartition(".")[0]


@lru_cache(maxsize=64)
def best_order(target: float, rate: float, steps: int, delta: float) -> float:
    """The order at which even steps need the least noise."""
    orders = [1 + 10 ** (-2 + 4.4 * i / 40) for i in range(41)]
    orders = [order for order in orders if epsilon_of_order(0.0, order, delta) < target]
    if not orders:
        raise RecipeError(f"epsilon {target:g} at delta {delta:g} cannot be had; ask for more")

    def noise(order: float) -> float:
        return noise_of((target - epsilon_of_order(0.0, order, delta)) / steps, rate, order)

    return min(orders, key=noise)


@lru_cache(maxsize=4096)
def noise_of(divergence: float, rate: float, order: float) -> float:
    """The smallest noise multiplier whose step has at most this divergence of this order, rounded up."""
    low, high = NOISE
    if divergence <= 0 or renyi_divergence(rate, high, order) > divergence:
        raise RecipeError(
            "estimator 'rldp': nothing of target_epsilon is left for these steps; ask for more, or train for"
            " fewer steps"
        )
    while high / low > 1 + 1e-4:
        middle = math.sqrt(low * high)
        if renyi_divergence(rate, middle, order) > divergence:
            low = middle
        else:
            high = middle
    return high
