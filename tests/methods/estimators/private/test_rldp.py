"""rldp: without its agent it is dp_sgd, with it epsilon stays below its target, and the agent learns."""

from __future__ import annotations

import pytest
import torch

from helpers.optimizers import Rig, same
from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.methods.estimators.private import _soft_actor_critic as sac
from luthier.methods.estimators.private._accountant import composed_epsilon
from luthier.methods.estimators.private._private import Ledger
from luthier.registry import build


class Apart(Rig):
    """A rig whose tensors are groups of their own."""

    def __init__(self, **settings):
        super().__init__(**settings)
        own = self.tuner.all_param_groups
        kind = type(own()[0])

        def groups():
            return [kind(f"{g.name}.{k}", {"weight": p}) for g in own() for k, p in g.params.items()]

        self.tuner.all_param_groups = groups
        self.target = {k: self.target[k.removesuffix(".weight")] for k in self.tuner.parameters()}


def test_without_the_agent_it_is_per_layer_dp_sgd():
    settings = {"noise_multiplier": 0.5, "row_grad_norm": 0.2}
    ours = Apart(estimator={"name": "rldp", "controller": "constant", **settings}).go(4)
    theirs = Apart(estimator={"name": "dp_sgd", "clipping": "per_layer", **settings}).go(4)
    assert same(ours, theirs) and ours.losses == theirs.losses
    noises = [Ledger.of(rig.chain).steps() for rig in (ours, theirs)]
    assert composed_epsilon(noises[0], 1.0, 1e-5) == composed_epsilon(noises[1], 1.0, 1e-5)


@pytest.mark.parametrize("target", [0.5, 8.0])
def test_epsilon_stays_below_its_target(target):
    """Whatever the agent does, and nearly all is spent; thresholds and noise have moved."""
    rig = Rig(
        estimator={"name": "rldp", "target_epsilon": target, "rl_interval": 3, "max_change": 1.0}, total=20
    ).go(20)
    ledger = Ledger.of(rig.chain)
    assert 0.8 * target < composed_epsilon(ledger.steps(), 1.0, 1e-5) <= target
    assert len(ledger.steps()) > 3 and bool((ledger.state["moves"] != 0).all())
    assert len(ledger.state["agent"]["buffer"]["reward"]) == 5  # 6 decisions


def test_a_pair_is_clipped_together():
    """The gradients of A and B as one vector, to a threshold that belongs to both."""
    estimator = build("estimator", {"name": "rldp", "row_grad_norm": 2.0})
    tensors = {"x.A": torch.zeros(2), "x.B": torch.zeros(1), "y.A": torch.zeros(1)}
    for name, grad in {"x.A": [3.0, 0.0], "x.B": [4.0], "y.A": [0.5]}.items():
        tensors[name].grad = torch.tensor(grad)
    ledger = Ledger({"moves": torch.tensor([0.5, -0.5, 0.0])})
    thresholds = estimator.thresholds(tensors, ledger)
    bounds = 2.0 / 2**0.5 * torch.tensor([0.5, -0.5]).exp()
    assert thresholds == pytest.approx(
        {"x.A": float(bounds[0]), "x.B": float(bounds[0]), "y.A": float(bounds[1])}
    )
    sums = {name: torch.zeros_like(t) for name, t in tensors.items()}
    estimator.add_clipped(sums, tensors, thresholds)
    assert torch.allclose(sums["x.A"], bounds[0] * torch.tensor([0.6, 0.0]))
    assert torch.allclose(sums["x.B"], bounds[0] * torch.tensor([0.8]))
    assert torch.allclose(sums["y.A"], torch.tensor([0.5]))
    # over their thresholds the sums are one vector of norm sqrt(groups), which the noise is scaled by
    assert estimator.spread("x.A", thresholds) == pytest.approx(float(bounds[0]) * 2**0.5)


@pytest.mark.parametrize("best", [-0.5, 0.5])
def test_the_agent_learns_what_pays(best, monkeypatch):
    """Rewards fall with the distance from one action: its mean goes that way from zero."""
    monkeypatch.setattr(sac, "RATE", 3e-3)  # in fewer updates
    rng = Clock(seed=1).rng("controller")
    agent, state = sac.fresh(2, 1, rng), torch.tensor([0.3, -0.2])
    assert float(sac.through(agent["actor"], state)[0]) == 0.0
    for _ in range(64):
        action = torch.rand(1, generator=rng) * 2 - 1
        sac.remember(agent, state, action, -4 * float((action - best).square()), state)
    for _ in range(100):
        sac.learn(agent, 32, rng)
    assert float(torch.tanh(sac.through(agent["actor"], state)[0])) * best > 0.1


def test_the_agent_goes_on_bit_for_bit(tmp_path):
    """Its networks, buffer and decisions are in the checkpoint."""

    def make():
        return Rig(estimator={"name": "rldp", "target_epsilon": 50.0, "rl_interval": 2}, total=12)

    whole, broken = make().go(12), make().go(7).kill_and_load(tmp_path, make).go(5)
    assert same(whole, broken) and whole.losses[7:] == broken.losses


def test_a_noise_that_is_set_needs_no_agent():
    with pytest.raises(RecipeError, match="leave out noise_multiplier"):
        build("estimator", {"name": "rldp", "noise_multiplier": 1.0})
