"""ewc, si, rwalk: penalties and importances by hand, and what a run takes over from the one before."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import luthier
from helpers.optimizers import Rig
from helpers.rows import recipe_of
from luthier.processes.group import ALONE
from luthier.recipe.recipe import Recipe
from luthier.registry import build
from luthier.run import resume
from luthier.storage import checkpoints
from luthier.storage.layout import read_log

RECIPES = Path(__file__).parents[4] / "recipes"


def memories(rig) -> dict:
    """Entry -> name -> tensor."""
    out: dict = {}
    for group, state in rig.chain.state.items():
        for entry, tensors in state["consolidation"].items():
            for key, tensor in tensors.items():
                out.setdefault(entry, {})[f"{group}.{key}"] = tensor
    return out


def next_task(rig, estimator, target: float, strength: float = 0.0) -> Rig:
    """A run that starts where another ended and aims elsewhere."""
    other = Rig(estimator={"name": estimator, "strength": strength}, total=4, learning_rate=0.3)
    other.tuner.load(rig.tuner.tensors())
    state = {g: {"consolidation": s["consolidation"]} for g, s in rig.chain.state.items()}
    other.chain.load(state)
    other.target = {k: torch.full_like(t, target) for k, t in other.target.items()}
    return other


def test_the_penalty_is_the_quadratic_of_all_tasks():
    """One quadratic stands for the sum of those of two tasks: their gradients agree anywhere."""
    method = build("estimator", {"name": "ewc", "strength": 3.0})
    rig = Rig(estimator={"name": "ewc"}, total=2, learning_rate=0.3)
    closure = lambda: rig.closure()
    tasks = []
    for shift in (0.0, 1.5):
        with torch.no_grad():
            for p in rig.tuner.parameters().values():
                p += shift
        method.finish_task(closure, rig.chain, rig.clock)
        rig.closure()
        tasks.append({k: (p.grad.square(), p.detach().clone()) for k, p in rig.tuner.parameters().items()})
    with torch.no_grad():
        for p in rig.tuner.parameters().values():
            p += torch.randn(p.shape)
    own = {k: p.detach().clone().requires_grad_() for k, p in rig.tuner.parameters().items()}
    penalty = sum((3.0 / 2 * f * (own[k] - a) ** 2).sum() for task in tasks for k, (f, a) in task.items())
    penalty.backward()
    total, value = method.penalized(rig.chain, {})
    names = {f"{g.name}.{k}": g.params[k] for g in rig.chain.param_groups() for k in g.params}
    pulls = {f"{g}.{k}": t for g, params in total.items() for k, t in params.items()}
    for name, p in names.items():
        key = next(k for k, q in rig.tuner.parameters().items() if q is p)
        assert torch.allclose(pulls[name], own[key].grad, rtol=1e-4, atol=1e-5)
    assert value < penalty.item()  # a sum of quadratics is one quadratic and a constant


def test_online_ewc_holds_the_last_end():
    method = build("estimator", {"name": "ewc", "online": True, "decay": 0.5})
    rig = Rig(total=2)
    method.finish_task(rig.closure, rig.chain, rig.clock)
    first = {k: t.clone() for k, t in memories(rig)["importance"].items()}
    method.finish_task(rig.closure, rig.chain, rig.clock)
    for k, t in memories(rig)["importance"].items():
        assert torch.allclose(t, 1.5 * first[k])
    _, penalty = method.penalized(rig.chain, {})
    assert penalty == 0.0


def test_the_fisher_of_a_logistic_regression_is_the_closed_form():
    """The mean of (p - y)^2 x^2 over the rows that it reads."""
    torch.manual_seed(0)
    X, y, w = torch.randn(40, 5), (torch.rand(40) < 0.5).float(), torch.nn.Parameter(torch.randn(5))

    def closure_of(rows):
        def row_gradients():
            for x, label in rows:
                w.grad = None
                torch.nn.functional.binary_cross_entropy_with_logits(x @ w, label).backward()
                yield

        return SimpleNamespace(row_gradients=row_gradients)

    trainer = SimpleNamespace(rows=list(zip(X, y, strict=True)), rows_closure=closure_of, processes=ALONE)
    group = SimpleNamespace(name="g", params={"w": w})
    chain = SimpleNamespace(param_groups=lambda: [group])
    clock = Rig().clock
    closed = (torch.sigmoid(X @ w) - y).square()[:, None] * X.square()
    closure = SimpleNamespace(trainer=trainer)
    every = build("estimator", {"name": "ewc", "fisher_rows": 100}).fisher(closure, chain, clock)
    assert torch.allclose(every["g.w"], closed.mean(0), atol=1e-6)
    some = build("estimator", {"name": "ewc", "fisher_rows": 7}).fisher(closure, chain, clock)
    chosen = torch.randperm(40, generator=clock.rng("fisher"))[:7]
    assert torch.allclose(some["g.w"], closed[chosen].mean(0), atol=1e-6)


def test_the_path_integral_is_the_fall_of_the_loss():
    """With small steps the parts of all parameters add up to what the loss fell."""
    rig = Rig(estimator="si", total=200, learning_rate=0.02)
    before = rig.distance()
    rig.go(199)
    path = memories(rig)["path"]
    assert float(sum(t.sum() for t in path.values())) == pytest.approx(before - rig.distance(), rel=0.02)
    start = {k: t.clone() for k, t in memories(rig)["start"].items()}
    rig.go(1)
    ends = memories(rig)
    assert "path" not in ends
    for name, tensor in ends["importance"].items():
        change = (ends["anchor"][name] - start[name]).square()
        assert torch.allclose(tensor, path[name].clamp(min=0) / (change + 1e-3), rtol=0.05, atol=1e-4)


def test_importances_of_si_add_up_over_tasks():
    rig = Rig(estimator={"name": "si", "strength": 0.0}, total=4, learning_rate=0.3).go(4)
    first = {k: t.clone() for k, t in memories(rig)["importance"].items()}
    ends = rig.tuner.tensors()
    later = next_task(rig, "si", target=2.0).go(4)
    second = memories(later)
    assert all((t >= first[k]).all() for k, t in second["importance"].items())
    assert any((t > first[k] + 1e-4).any() for k, t in second["importance"].items())
    strength = 0.5 / max(float(t.max()) for t in first.values())  # steps of 0.3 stay stable
    held = next_task(rig, "si", target=2.0, strength=strength).go(4)
    far = lambda run: sum(float((t - ends[k]).square().sum()) for k, t in run.tuner.tensors().items())
    assert far(held) < far(later)


def test_rwalk_is_its_formula_step_by_step():
    """Against the paper's equations in plain tensors, for one matrix."""
    settings = {"name": "rwalk", "interval": 3, "decay": 0.7, "strength": 0.0}
    rig = Rig(estimator=settings, total=8, learning_rate=0.3)
    p = rig.model.weight
    target = next(rig.target[k] for k, q in rig.tuner.parameters().items() if q is p)
    fisher = squares = path = score = None
    origin = p.detach().clone()
    for step in range(8):
        grad, was = 2 * (p.detach() - target) / p.numel(), p.detach().clone()
        if fisher is None:
            fisher, squares, path, score = grad**2, 0 * grad, 0 * grad, 0 * grad
        rig.go(1)
        squares, path = squares + grad**2, path - grad * (p.detach() - was)
        if step in (2, 5, 7):
            score = score + path.clamp(min=0) / (fisher * (p.detach() - origin) ** 2 / 2 + 1e-3)
            fisher = 0.3 * fisher + 0.7 * squares / (3 if step < 7 else 2)
            squares, path, origin = 0 * grad, 0 * grad, p.detach().clone()
    found = memories(rig)
    name = next(k for k, t in found["fisher"].items() if t.shape == p.shape)
    assert torch.allclose(found["fisher"][name], fisher, rtol=1e-4, atol=1e-8)
    assert torch.allclose(found["score"][name], score, rtol=1e-4, atol=1e-7)
    total = torch.cat([t.flatten() for t in found["importance"].values()])
    assert float(total.min()) >= 0 and float(total.max()) <= 2
    fishers = torch.cat([t.flatten() for t in found["fisher"].values()])
    scores = torch.cat([t.flatten() for t in found["score"].values()])
    scaled = lambda t, every: (t - every.min()) / (every.max() - every.min())
    expected = scaled(fisher, fishers) + scaled(score, scores)
    assert torch.allclose(found["importance"][name], expected, rtol=1e-3, atol=1e-5)


def test_rwalk_averages_scores_of_tasks():
    rig = Rig(estimator={"name": "rwalk", "strength": 0.0}, total=4, learning_rate=0.3).go(4)
    first = {k: t.clone() for k, t in memories(rig)["score"].items()}
    later = next_task(rig, "rwalk", target=0.0).go(3)
    fresh = {k: t.clone() for k, t in memories(later)["path"].items()}
    later.go(1)
    assert fresh and all((t >= first[k] / 2 - 1e-7).all() for k, t in memories(later)["score"].items())


def test_a_run_holds_what_the_run_before_needs(shallow, tmp_path):
    """The Fisher information in the checkpoint is that of the rows; the next run starts with it and is pulled
    to where the first one ended.
    """
    ewc = {"name": "ewc", "strength": 10.0, "fisher_rows": 6}
    recipe = recipe_of(shallow) | {"max_steps": 2, "learning_rate": 1e-2, "estimator": ewc, "evaluate": []}
    luthier.tune(recipe, folder=tmp_path / "a")
    luthier.tune(recipe | {"init_from": str(tmp_path / "a")}, folder=tmp_path / "b")
    first, second = (checkpoints.load_newest(tmp_path / name).state for name in "ab")
    assert all((t >= 0).all() for s in first.values() for t in s["consolidation"]["importance"].values())
    grown = 0.0
    for group, state in first.items():
        for key, tensor in state["consolidation"]["importance"].items():
            both = second[group]["consolidation"]["importance"][key]
            assert (both >= tensor).all()
            grown += float((both - tensor).sum())
    assert grown > 0
    alone, after = ([line["ewc_penalty"] for line in read_log(tmp_path / name)] for name in "ab")
    assert alone == [0.0, 0.0] and after[0] == 0.0 and after[1] > 0


def test_a_run_from_one_without_importances_says_so(tmp_path):
    said, loaded = [], []
    method = build("estimator", "ewc")
    session = SimpleNamespace(
        methods=SimpleNamespace(estimator=method),
        recipe=SimpleNamespace(init_from=str(tmp_path)),
        warn=said.append,
    )
    trainer = SimpleNamespace(chain=SimpleNamespace(load=loaded.append), estimator=method)
    resume.take_over(session, trainer)
    assert "plain backprop" in said[0] and loaded == [{}]
    session.methods.estimator = build("estimator", "backprop")
    resume.take_over(session, trainer)
    assert len(said) == 1 and len(loaded) == 1


def test_learning_without_forgetting_compares_with_the_start_of_the_run():
    """The recipe's term is T^2 KL(before || now) at temperature 2, forward as in the paper."""
    recipe = Recipe.load(yaml.safe_load((RECIPES / "plans" / "continual" / "lwf.yaml").read_text()))
    later = recipe.but(**build("plan", recipe.plan_spec()).later)
    (_, sft), (weight, term) = later.aim().terms()
    assert (sft.name, term.name, term.temperature, weight) == ("sft", "distill", 2.0, 1.0)
    assert later.roles == {"teacher": "initial"}
    before, now = torch.randn(3, 7), torch.randn(3, 7, requires_grad=True)
    p, q = (before / 2).log_softmax(-1), (now / 2).log_softmax(-1)
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    assert torch.allclose(term.apart(p, q), expected, atol=1e-6)
