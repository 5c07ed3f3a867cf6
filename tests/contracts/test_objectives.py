"""The contract that every objective keeps, on every layout and with every kind of tuner."""

from __future__ import annotations

import copy
import functools
import inspect
import math
from dataclasses import fields

import pytest
import torch

from helpers.objectives import (
    average,
    batch_of,
    cast,
    contract_rows,
    gradients,
    network,
    same,
)
from helpers.rows import example_value
from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.methods.architectures.text.causal import Causal
from luthier.methods.estimators._base import gradients as chain_gradients
from luthier.methods.stages._base import OLD_LOGPROBS
from luthier.model.policy import Policy, Roles
from luthier.model.quantized import quantize
from luthier.model.quantized_linear import Quantized
from luthier.registry import Capability, Column, build, card, find, helps, names, page, requires_of
from luthier.train.optimizer import Chain

# those ask another kind of network
OBJECTIVES = [n for n in names("objective") if "values" not in card("objective", n).requires]
# those that have one, and are not only for estimators that compare values
GRADIENTS = [n for n in OBJECTIVES if "forward_only" not in card("objective", n).requires]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_finite_number_per_unit(name):
    objective, roles = build("objective", name), cast()
    batch = batch_of(contract_rows(objective))
    values = objective.loss(roles, batch)
    assert objective.unit in ("token", "sequence", "group", "batch")
    assert values.shape == (objective.count(batch),)
    assert values.dtype == torch.float32 and bool(values.isfinite().all())
    assert all(math.isfinite(s) and n >= 0 for s, n in batch.metrics.values())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_unit_is_of_a_row(name):
    objective = build("objective", name)
    for _, term in objective.terms():
        batch = batch_of(contract_rows(objective))
        rows = term.rows_of_units(batch)
        if term.unit != "batch":
            assert len(rows) == term.count(batch) and bool((rows < len(batch.rows)).all())


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradient_reaches_the_policy_and_nobody_else(name):
    objective, roles = build("objective", name), cast()
    average(objective, roles, batch_of(contract_rows(objective))).backward()
    reached = {n for n, g in gradients(roles.policy.model).items() if g.abs().sum() > 0}
    head = set() if "head" in objective.contract else {"lm_head.weight"}
    assert head | {"model.layers.0.self_attn.q_proj.weight"} <= reached
    for other in (roles.reference, roles.teacher):
        assert all(p.grad is None for p in other.parameters())


@pytest.mark.parametrize("name", GRADIENTS)
def test_accumulation_changes_nothing(name):
    objective = build("objective", name)
    if "accumulation" in objective.contract:
        pytest.skip(objective.contract["accumulation"])
    rows, found = contract_rows(objective), []
    for micro in (4, 3, 1):
        roles = cast()
        batches = [batch_of(rows[i : i + micro]) for i in range(0, 4, micro)]
        units = [sum(o.divisor(b) for b in batches) for _, o in objective.terms()]
        value = sum(
            w * o.loss(roles, b).sum() / n
            for b in batches
            for (w, o), n in zip(objective.terms(), units, strict=True)
        )
        value.backward()
        found.append((float(value.detach()), gradients(roles.policy.model)))
    for value, grads in found[1:]:
        assert value == pytest.approx(found[0][0], rel=1e-5, abs=1e-6)
        same(grads, found[0][1], atol=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_order_of_rows_does_not_matter(name):
    objective, roles = build("objective", name), cast()
    if "order" in objective.contract:
        pytest.skip(objective.contract["order"])
    rows = contract_rows(objective)
    one, other = (objective.loss(roles, batch_of(r)).sort().values for r in (rows, rows[::-1]))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


LAYOUTS = (
    Causal(share_prefixes=False),
    Causal(share_prefixes=True),
    Causal(share_prompts=False),
    Causal(packing=False, share_prompts=False),
)


def common_beginnings(rows: list[dict]) -> list[dict]:
    """The same rows, three of them with the same instruction, two with the same prompt."""
    prompts = [[5, 6, 7, *row["prompt"]] for row in rows]
    prompts[3], prompts[1] = prompts[0], rows[1]["prompt"]
    return [{**row, "prompt": prompt} for row, prompt in zip(rows, prompts, strict=True)]


@pytest.mark.parametrize("name", GRADIENTS)
def test_packing_shared_prompts_and_common_beginnings_change_nothing(name):
    objective, found = build("objective", name), []
    if "layout" in objective.contract:
        pytest.skip(objective.contract["layout"])
    for layout in LAYOUTS:
        roles = cast()
        for player in roles.policies():
            player.architecture = layout
        value = average(objective, roles, batch_of(common_beginnings(contract_rows(objective))))
        value.backward()
        found.append((float(value.detach()), gradients(roles.policy.model)))
    for value, grads in found[1:]:
        assert value == pytest.approx(found[0][0], rel=1e-5, abs=1e-6)
        most = max(float(g.abs().max()) for g in grads.values())
        same(grads, found[0][1], atol=1e-5 * max(1.0, most))


def tuned(tuner: str, net: torch.nn.Module | None = None) -> Roles:
    """The tiny network under a tuner, as a run would have it: the reference is the same network."""
    torch.manual_seed(3)  # vectors before the text can lie so far off that a clipped loss is flat
    net = network() if net is None else net
    attached = build("tuner", tuner).attach(net)
    clock = Clock()
    policy = Policy(Causal(), net, attached)
    reference = build("role", "off" if "disable_adapter" in attached.settings.provides else "start").play(
        "reference", policy
    )
    roles = cast(reference=reference)
    brought = ("memory", "part_heads", "generator", "feature_pairs", "critic")
    others = {name: getattr(roles, name) for name in brought}
    return Roles(policy, clock, roles.renderer, reference=reference, teacher=roles.teacher, **others)


@pytest.mark.parametrize("tuner", ["full", "lora", "prompt"])
@pytest.mark.parametrize("name", GRADIENTS)
def test_runs_with_every_kind_of_tuner_and_without_a_gradient(name, tuner):
    objective, roles = build("objective", name), tuned(tuner)
    rows = contract_rows(objective)
    # against the policy as it is, the value of a ratio does not tell where it leads
    if "samples" in requires_of(objective):
        rows = [{k: v for k, v in r.items() if k != "supervised"} for r in rows]
        columns = [w for w in requires_of(objective) if isinstance(w, Column) and w.per == "token"]
        for column in (OLD_LOGPROBS, *columns):
            rows = [{**r, column: example_value(column, r)} for r in rows]
    moving = roles.tuner.parameters()

    def closure(grad: bool = True) -> float:
        with torch.set_grad_enabled(grad):
            value = average(objective, roles, batch_of(rows))
        if grad:
            value.backward()
        return float(value.detach())

    closure()
    reached = {k for k, p in moving.items() if p.grad is not None and p.grad.any()}
    assert reached and all(bool(p.grad.isfinite().all()) for p in moving.values() if p.grad is not None)
    was = roles.tuner.tensors()
    build("estimator", "mezo").step(
        closure, Chain((build("transform", "momentum"),), roles.tuner, roles.clock, 1e-3), roles.clock
    )
    now = roles.tuner.tensors()
    assert all(bool(p.isfinite().all()) for p in now.values())
    assert any(not torch.equal(now[k], was[k]) for k in now)


def in_turn(tuner: str) -> list[str]:
    """One objective of each family for a tuner, another one for the next tuner."""
    families: dict[str, list[str]] = {}
    for name in GRADIENTS:
        families.setdefault(card("objective", name).module.split(".")[-2], []).append(name)
    turn = names("tuner").index(tuner)
    return [members[turn % len(members)] for members in families.values()]


@pytest.mark.slow
@pytest.mark.parametrize("tuner", names("tuner"))
def test_every_tuner_takes_two_steps_on_an_objective_of_every_family(tuner):
    spec = {"name": tuner, **find("tuner", tuner).example}
    coded = "quantized_weights" in find("tuner", tuner).requires
    for name in in_turn(tuner):
        objective = build("objective", name)
        try:
            roles = tuned(spec, copy.deepcopy(_codes()) if coded else None)
        except RecipeError as error:
            assert tuner in str(error)
            pytest.skip(str(error))
        batch = batch_of(contract_rows(objective))
        before = roles.tuner.tensors()
        chain = Chain((build("transform", "momentum"),), roles.tuner, roles.clock, 1e-2)
        for roles.clock.step in range(2):
            roles.tuner.begin_step(roles.clock)
            batch.read.clear()
            loss = average(objective, roles, batch)
            assert bool(loss.isfinite()), name
            for p in roles.tuner.parameters().values():
                p.grad = None
            loss.backward()
            chain.step(chain_gradients(chain))
            roles.tuner.end_step(roles.clock)
        after = roles.tuner.tensors()
        moved = any(k not in before or not torch.equal(t, before[k]) for k, t in after.items())
        at_its_least = "moves" in find("objective", name).contract and abs(float(loss.detach())) < 1e-6
        assert moved or at_its_least, name


@pytest.mark.parametrize("name", GRADIENTS)
def test_learns_on_a_quantized_base(name):
    objective, roles = build("objective", name), tuned("lora", copy.deepcopy(_codes()))
    average(objective, roles, batch_of(contract_rows(objective))).backward()
    grads = [p.grad for p in roles.tuner.parameters().values() if p.grad is not None]
    assert grads and all(bool(g.isfinite().all()) for g in grads) and any(bool(g.any()) for g in grads)
    assert sum(isinstance(m, Quantized) for m in roles.policy.model.modules()) == 14


@functools.cache
def _codes() -> torch.nn.Module:
    net = network()
    quantize(net, build("quantizer", "nf4"))
    return net


@pytest.mark.parametrize("name", OBJECTIVES)
def test_declaration_is_complete(name):
    cls, said = find("objective", name), card("objective", name)
    documented = helps(cls)
    assert all(documented.get(f.name) for f in fields(cls)), "every setting carries a trailing comment"
    # what a dataclass says where nobody does
    made_up = f"{cls.__name__}{inspect.signature(cls)}".replace(" -> None", "")
    assert said.summary and cls.__doc__ != made_up, "the file and the class say what they do"
    for word in said.requires:
        assert isinstance(word, Capability) and word.says, "what a sentence can explain"
    assert said.requires == cls.requires
    assert all(cls.contract.values()), "an exception has its reason"
    assert f"# {name}" in page(cls)


@pytest.mark.parametrize(
    "name, setting, value",
    [
        ("dpo", "beta", 0.0),
        ("dpo", "label_smoothing", 1.5),
        ("grpo", "epsilon", -1),
        ("grpo", "scale_rewards", "rows"),
        ("distill", "temperature", 0),
        ("distill_jsd", "beta", 1.0),
    ],
)
def test_settings_out_of_range_are_refused(name, setting, value):
    with pytest.raises(RecipeError, match=setting):
        build("objective", {"name": name, setting: value})
