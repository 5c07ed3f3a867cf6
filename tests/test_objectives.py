"""Objectives: contracts that every one keeps, identities that follow from their formulas, and TRL as an
oracle.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from contextlib import nullcontext
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import example_value
from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.methods.architectures.text.causal import Causal
from luthier.methods.objectives.representation._features import classes
from luthier.methods.roles.features.generator import Features as Made
from luthier.methods.roles.features.memory import Features
from luthier.methods.roles.frozen.column import Column as ColumnRole
from luthier.methods.roles.networks.part_whole import Heads
from luthier.methods.stages._base import OLD_LOGPROBS
from luthier.methods.tuners._base import Untuned
from luthier.model.batch import collate
from luthier.model.policy import Policy, Roles
from luthier.model.quantized import quantize
from luthier.model.quantized_linear import Quantized
from luthier.recipe.recipe import terms
from luthier.registry import Capability, Column, build, card, find, helps, names, page, requires_of
from luthier.text.encode import Renderer
from luthier.train.optimizer import Chain

torch.set_num_threads(1)
V = 40  # tokens of the tiny vocabulary
# those ask another kind of network
OBJECTIVES = [n for n in names("objective") if "values" not in card("objective", n).requires]


# ------------------------------------------------------------------------------------------------ a tiny world


@functools.cache
def _network(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.4,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def network(seed: int = 0, off_by: float = 0.0) -> LlamaForCausalLM:
    """A small random Llama; `off_by` moves every weight a little."""
    net = copy.deepcopy(_network(seed))
    noise = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in net.parameters() if off_by else ():
            p.add_(off_by * torch.randn(p.shape, generator=noise))
    return net


def cast(**others) -> Roles:
    """Policy, reference and teacher, each a network of its own unless given."""
    policy = network()
    made = {
        "reference": network(off_by=0.05),
        "teacher": network(seed=7),
        "memory": memory(),
        "part_heads": heads(),
        "generator": generator(),
        "feature_pairs": pairs(),
    } | others
    roles = {k: role(net, k) if isinstance(net, LlamaForCausalLM) else net for k, net in made.items()}
    return Roles(Policy(Causal(), policy, Untuned(policy)), Clock(), Renderer(tokenizer()), **roles)


def heads() -> Heads:
    """As they begin, but for a little of what they will learn."""
    torch.manual_seed(9)
    made = Heads(16, 2)
    for last in (made.up[-1], made.down[-1]):
        torch.nn.init.normal_(last.weight, std=0.1)
    return made


def generator() -> Made:
    """Of answers that begin with low tokens, which are known, and with high ones, which are not."""
    torch.manual_seed(10)
    made = Made(16, [f"known {t}" for t in range(3, 37)], [f"unknown {t}" for t in range(37, V)])
    made.tokens.copy_(torch.arange(3, V))
    made.mean.copy_(0.2 * torch.randn(made.mean.shape))
    made.square.copy_(made.mean.square() + 0.01)
    return made


def memory() -> Features:
    """Random features of rows like those of the contracts: other rows that answer the same."""
    rows = batch_of([{**r, "id": f"{r['id']}-before"} for k in (3, 6) for r in make_rows(4, k=k)])
    made = Features(64, 16)
    rng, kinds = torch.Generator().manual_seed(8), classes(rows)
    made.remember(torch.arange(len(kinds)), kinds, torch.randn(len(kinds), 16, generator=rng))
    made.after_step(None)
    return made


def pairs() -> Features:
    """Random features of both networks, for answers that begin with any token."""
    made, rng = Features(3 * V, 32), torch.Generator().manual_seed(11)
    made.remember(torch.arange(3 * V), torch.arange(3 * V) % V, torch.randn(3 * V, 32, generator=rng))
    made.after_step(None)
    return made


def role(net, name: str) -> Policy:
    return Policy(Causal(), net, Untuned(net), name, nullcontext)


def tokens(n: int, rng: torch.Generator) -> list[int]:
    return torch.randint(3, V, (n,), generator=rng).tolist()


def make_rows(n: int = 4, k: int = 2, seed: int = 0, **columns) -> list[dict]:
    """n rows of k completions of different lengths and scores."""
    rng = torch.Generator().manual_seed(seed)
    out = []
    for i in range(n):
        completions = [tokens(2 + (3 * i + 2 * j) % 5, rng) for j in range(k)]
        scores = [float(x) for x in torch.randperm(k, generator=rng)]
        out.append(
            {
                "id": f"r{i}",
                "prompt": tokens(3 + i % 3, rng),
                "completions": completions,
                "scores": scores,
                **columns,
            }
        )
    return out


def encode(row: dict) -> SimpleNamespace:
    marks = row.get("supervised") or [[True] * len(c) for c in row["completions"]]
    return SimpleNamespace(prompt=row["prompt"], completions=row["completions"], supervised=marks)


def batch_of(rows: list[dict]):
    return collate(rows, encode)


def average(objective, roles: Roles, batch) -> torch.Tensor:
    """What the loop makes of a loss: the weighted sum of each term's average."""
    return sum(w * o.loss(roles, batch).sum() / o.divisor(batch) for w, o in objective.terms())


def gradients(net) -> dict[str, torch.Tensor]:
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in net.named_parameters()}


def same(a: dict, b: dict, atol: float = 1e-6) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], atol=atol, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}"
        )


# ------------------------------------------------------------------------------------------------ contracts


def marks(row, rng) -> list[list[float]]:
    """0 or 1 for each learned token."""
    learned = row.get("supervised") or [[True] * len(c) for c in row["completions"]]
    return [[float(torch.rand((), generator=rng) > 0.5) for _ in range(sum(m))] for m in learned]


def contract_rows(objective) -> list[dict]:
    """Rows with all that the objective wants; one of them has a completion that is only partly supervised."""
    rows = make_rows(4, k=6 if "contrasts" in requires_of(objective) else 3)
    rows[1]["supervised"] = [[True] * (len(c) - 1) + [j != 1] for j, c in enumerate(rows[1]["completions"])]
    for word in sorted(requires_of(objective)):
        if not isinstance(word, Column) or word in rows[0]:
            continue
        assert word.example, f"column '{word}' needs an example where it is declared"
        for place, row in enumerate(rows):
            row[word] = example_value(word, row, place)
    return rows


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
def test_gradient_reaches_the_policy_and_nobody_else(name):
    objective, roles = build("objective", name), cast()
    average(objective, roles, batch_of(contract_rows(objective))).backward()
    reached = {n for n, g in gradients(roles.policy.model).items() if g.abs().sum() > 0}
    head = set() if "head" in objective.contract else {"lm_head.weight"}
    assert head | {"model.layers.0.self_attn.q_proj.weight"} <= reached
    for other in (roles.reference, roles.teacher):
        assert all(p.grad is None for p in other.parameters())


@pytest.mark.parametrize("name", OBJECTIVES)
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


LAYOUTS = (Causal(), Causal(share_prompts=False), Causal(packing=False, share_prompts=False))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_packing_and_shared_prompts_change_nothing(name):
    objective, found = build("objective", name), []
    for layout in LAYOUTS:
        roles = cast()
        for player in roles.policies():
            player.architecture = layout
        value = average(objective, roles, batch_of(contract_rows(objective)))
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
    brought = {name: getattr(roles, name) for name in ("memory", "part_heads", "generator", "feature_pairs")}
    return Roles(policy, clock, roles.renderer, reference=reference, teacher=roles.teacher, **brought)


@pytest.mark.parametrize("tuner", ["full", "lora", "prompt"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_runs_with_every_kind_of_tuner_and_without_a_gradient(name, tuner):
    objective, roles = build("objective", name), tuned(tuner)
    rows = contract_rows(objective)
    # against the policy as it is, the value of a ratio does not tell where it leads
    if "samples" in requires_of(objective):
        rows = [{k: v for k, v in r.items() if k != "supervised"} for r in rows]
        rows = [{**r, "old_logprobs": example_value(OLD_LOGPROBS, r)} for r in rows]
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


@pytest.mark.parametrize("name", OBJECTIVES)
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


# ------------------------------------------------------------------------------------------------ identities


def pair_rows(n: int = 4) -> list[dict]:
    rows = make_rows(n, k=2)
    for i, row in enumerate(rows):
        row["scores"] = [1.0, 0.0] if i % 2 else [0.0, 1.0]
    return rows


def loss_of(spec, roles=None, rows=None) -> torch.Tensor:
    return build("objective", spec).loss(roles or cast(), batch_of(rows or pair_rows()))


def test_at_the_start_a_pair_costs_what_no_margin_costs():
    roles = cast(reference=network())
    for spec, want in (("dpo", math.log(2)), ({"name": "ipo", "beta": 0.25}, 4.0), ("hinge", 1.0)):
        torch.testing.assert_close(loss_of(spec, roles), torch.full((4,), want), atol=1e-5, rtol=0)


def test_symmetric_contrasts():
    """S-VCO: no gap to the reference is four times log 2; the two answers may change places; the terms are
    those of the paper.
    """
    rows = make_rows(3, k=6, contrasts=[0, 1])
    torch.testing.assert_close(
        loss_of("s_vco", cast(reference=network()), rows), torch.full((3,), 4 * math.log(2))
    )
    turned = [{**r, "completions": r["completions"][3:] + r["completions"][:3]} for r in rows]
    torch.testing.assert_close(loss_of("s_vco", rows=rows), loss_of("s_vco", rows=turned), atol=1e-6, rtol=0)
    roles = cast()
    batch = batch_of(rows)
    gap = batch.sums(roles.policy.logprobs(batch) - roles.reference.logprobs(batch)).view(3, 6)
    cost = lambda beta, better, worse: (
        -torch.nn.functional.logsigmoid(beta * (gap[:, better] - gap[:, worse]))
    )
    by_hand = cost(0.2, 0, 1) + cost(0.3, 1, 2) + cost(0.2, 3, 4) + cost(0.3, 4, 5)
    torch.testing.assert_close(
        loss_of({"name": "s_vco", "beta_attend": 0.2, "beta_reject": 0.3}, rows=rows),
        by_hand,
        atol=1e-5,
        rtol=1e-5,
    )


def test_label_smoothing_of_one_half_takes_no_side():
    turned = [{**r, "scores": r["scores"][::-1]} for r in pair_rows()]
    half = {"name": "dpo", "label_smoothing": 0.5}
    torch.testing.assert_close(loss_of(half), loss_of(half, rows=turned))
    assert not torch.allclose(loss_of("dpo"), loss_of("dpo", rows=turned))
    torch.testing.assert_close(loss_of({"name": "dpo", "label_smoothing": 1.0}), loss_of("dpo", rows=turned))


def test_best_and_worst_are_picked_by_score_and_ties_teach_nothing():
    rows = make_rows(3, k=4)
    rows[0]["scores"], rows[1]["scores"], rows[2]["scores"] = (
        [0.1, 0.9, -2.0, 0.5],
        [1.0] * 4,
        [3.0, 2.0, 1.0, 3.0],
    )
    picks = ((1, 2), (0, 0), (0, 2))  # best and worst
    pairs = [
        {**r, "completions": [r["completions"][i] for i in p], "scores": [1.0, 0.0]}
        for r, p in zip(rows, picks, strict=True)
    ]
    torch.testing.assert_close(loss_of("dpo", rows=rows), loss_of("dpo", rows=pairs))
    roles, tied = cast(), [rows[1]]
    loss_of("dpo", roles, tied).sum().backward()
    assert all(not g.any() for g in gradients(roles.policy.model).values())
    chosen, batch = build("objective", "chosen_sft"), batch_of(rows)
    assert chosen.count(batch) == len(rows[0]["completions"][1]) + len(rows[2]["completions"][0])
    assert chosen.count(batch_of(tied)) == 0 and chosen.loss(roles, batch_of(tied)).shape == (0,)
    build("objective", "dpo").loss(roles, batch)
    assert batch.metrics["accuracy"][1] == 2, "rows that do not tell their completions apart are not counted"


def test_metrics_of_pairs_agree():
    batch = batch_of(pair_rows())
    build("objective", "dpo").loss(cast(), batch)
    mean = {k: s / n for k, (s, n) in batch.metrics.items()}
    assert mean["margin"] == pytest.approx(mean["rewards/chosen"] - mean["rewards/rejected"], abs=1e-6)
    assert 0 <= mean["accuracy"] <= 1


def test_terms_add_up():
    roles, batch = cast(), batch_of(pair_rows())
    both = average(terms("dpo + 0.1*chosen_sft"), roles, batch)
    one, other = (average(build("objective", n), roles, batch) for n in ("dpo", "chosen_sft"))
    torch.testing.assert_close(both, one + 0.1 * other)


@pytest.mark.parametrize("name", ["kl", "distill", "distill_reverse", "distill_jsd"])
def test_a_network_is_no_distance_from_itself(name):
    roles = cast(reference=network(), teacher=network())
    values = loss_of(name, roles)
    torch.testing.assert_close(values, torch.zeros_like(values), atol=1e-6, rtol=0)


def full_logits(roles: Roles, name: str, rows: list[dict]) -> torch.Tensor:
    """[T, V] the slow way: one sequence at a time."""
    net = getattr(roles, name).model
    read = [(r["prompt"], c) for r in rows for c in r["completions"]]
    with torch.no_grad():
        return torch.cat(
            [net(torch.tensor([prompt + c])).logits[0, len(prompt) - 1 : -1] for prompt, c in read]
        )


def by_hand(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.kl_div(q.log(), p, reduction="none").sum(-1)


def test_divergences_by_hand():
    roles, rows = cast(), pair_rows()
    p, t, r = (full_logits(roles, n, rows).softmax(-1) for n in ("policy", "teacher", "reference"))
    m = 0.3 * t + 0.7 * p
    for spec, want in (
        ("kl", by_hand(p, r)),
        ("distill", by_hand(t, p)),
        ("distill_reverse", by_hand(p, t)),
        ({"name": "distill_jsd", "beta": 0.3}, 0.3 * by_hand(t, m) + 0.7 * by_hand(p, m)),
    ):
        torch.testing.assert_close(loss_of(spec, roles, rows).detach(), want, atol=1e-5, rtol=1e-4)


def test_the_teachers_top_and_the_rest():
    roles, rows = cast(), pair_rows()
    full = loss_of("distill", roles, rows)
    torch.testing.assert_close(loss_of({"name": "distill", "k": V}, roles, rows), full)
    by_k = [loss_of({"name": "distill", "k": k}, roles, rows) for k in (1, 5, V - 1)]
    torch.testing.assert_close(by_k[-1], full, atol=1e-5, rtol=1e-5)  # the rest is one token
    assert (by_k[0] <= by_k[1] + 1e-6).all() and (by_k[1] <= full + 1e-6).all(), (
        "merging outcomes loses information, never gains"
    )
    p, t = (full_logits(roles, n, rows).softmax(-1) for n in ("policy", "teacher"))
    top = t.argmax(-1, keepdim=True)
    a, b = t.gather(1, top), p.gather(1, top)
    torch.testing.assert_close(
        by_k[0].detach(), by_hand(torch.cat([a, 1 - a], 1), torch.cat([b, 1 - b], 1)), atol=1e-5, rtol=1e-4
    )


def test_temperature_keeps_the_size_of_gradients():
    roles, rows = cast(), pair_rows()
    p, t = (full_logits(roles, n, rows).div(3).softmax(-1) for n in ("policy", "teacher"))
    got = loss_of({"name": "distill", "temperature": 3.0}, roles, rows).detach()
    torch.testing.assert_close(got, 9 * by_hand(t, p), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_teach_nothing(name, scale):
    rows, roles = make_rows(2, k=3), cast()
    for row in rows:
        row["scores"] = [1.0, 1.0, 1.0]
    values = loss_of({"name": name, "beta": 0.0, "scale_rewards": scale}, roles, rows)
    values.sum().backward()
    assert not values.any() and all(not g.any() for g in gradients(roles.policy.model).values())


def test_no_reference_is_wanted_where_nobody_asks_it():
    for name in ("grpo", "dapo", "dr_grpo"):
        without, with_ = (build("objective", {"name": name, "beta": b}) for b in (0.0, 0.1))
        assert "reference" not in requires_of(without) and "reference" in requires_of(with_)
        without.loss(Roles(cast().policy, Clock(), Renderer(tokenizer())), batch_of(make_rows(2, k=3)))


def test_clipping_stops_the_gradient_where_the_ratio_has_gone_far_enough():
    rows, roles = make_rows(1, k=2), cast()
    rows[0]["scores"] = [1.0, 0.0]
    logp = roles.policy.logprobs(batch_of(rows)).detach().split([len(c) for c in rows[0]["completions"]])
    # better ones grew, worse ones shrank: beyond both bounds
    rows[0]["old_logprobs"] = [(logp[0] - 1).tolist(), (logp[1] + 1).tolist()]
    batch = batch_of(rows)
    build("objective", "dapo").loss(roles, batch).sum().backward()
    assert all(not g.any() for g in gradients(roles.policy.model).values())
    assert batch.metrics["clip_ratio"][0] == batch.metrics["clip_ratio"][1] > 0


def test_the_estimated_kl_has_the_gradient_of_the_exact_one():
    """Over every next token, weighed by the policy's own probability, as samples would be."""
    prompt, roles, found = [5, 9, 11], cast(), []
    every = [{"id": "r", "prompt": prompt, "completions": [[t] for t in range(V)], "scores": [0.0] * V}]
    likely = roles.policy.logprobs(batch_of(every)).detach().exp()
    one = [{"id": "r", "prompt": prompt, "completions": [[3]], "scores": [0.0]}]
    for term in (
        (build("objective", {"name": "dapo", "beta": 1.0}).loss(roles, batch_of(every)) * likely).sum(),
        build("objective", "kl").loss(roles, batch_of(one)).sum(),
    ):
        roles.policy.zero_grad()
        term.backward()
        found.append((float(term.detach()), gradients(roles.policy.model)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    same(found[0][1], found[1][1], atol=1e-5)


def kto_rows() -> list[dict]:
    rows = make_rows(5, k=1)
    for i, row in enumerate(rows):
        row["scores"] = [1.0 if i % 3 else -1.0]
    return rows


def test_kto_good_and_bad_mirror_each_other():
    rows = kto_rows()
    turned = [{**r, "scores": [-r["scores"][0]]} for r in rows]
    good = [loss_of("kto", rows=r) for r in (rows, turned)]
    torch.testing.assert_close(good[0] + good[1], torch.ones(5))  # 1 - s(x) and 1 - s(-x)
    weighted = loss_of({"name": "kto", "desirable_weight": 3.0, "undesirable_weight": 2.0}, rows=rows)
    is_good = torch.tensor([r["scores"][0] > 0 for r in rows])
    torch.testing.assert_close(weighted, good[0] * torch.where(is_good, 3.0, 2.0))
    # 0 is bad, too
    torch.testing.assert_close(
        loss_of("kto", rows=[{**r, "scores": [max(r["scores"][0], 0.0)]} for r in rows]), good[0]
    )
    torch.testing.assert_close(
        loss_of("kto", cast(reference=network()), rows), torch.full((5,), 0.5), atol=1e-5, rtol=0
    )


def test_kto_measures_its_drift_under_the_next_rows_prompt():
    rows, roles = make_rows(3, k=2), cast(reference=network(off_by=0.2))
    batch = batch_of(rows)
    build("objective", "kto").loss(roles, batch)
    mismatched = [
        {**r, "prompt": after["prompt"]} for r, after in zip(rows, [*rows[1:], rows[0]], strict=True)
    ]
    other = batch_of(mismatched)
    with torch.no_grad():
        want = other.sums(roles.policy.logprobs(other) - roles.reference.logprobs(other)).mean()
    assert want > 0 and batch.metrics["kl"][0] == pytest.approx(float(want), abs=1e-5)


def test_kto_alone_in_a_micro_batch_has_no_drift_to_measure():
    roles, batch = cast(reference=network(off_by=0.2)), batch_of(kto_rows()[2:3])
    assert batch.sums(roles.policy.logprobs(batch) - roles.reference.logprobs(batch)) > 0
    build("objective", "kto").loss(roles, batch)
    assert batch.metrics["kl"] == (0.0, 1)


def test_kto_refuses_a_reference_that_cannot_read():
    rows = [{**r, "cached_logprobs": [[-1.0] * len(r["completions"][0])]} for r in kto_rows()]
    with pytest.raises(RecipeError, match="let a network play it"):
        loss_of("kto", cast(reference=ColumnRole().play("reference", None)), rows)


def test_a_reference_may_be_remembered():
    roles, rows = cast(), pair_rows()
    want = loss_of("dpo", roles, rows)
    with torch.no_grad():
        told = iter(roles.reference.logprobs(batch_of(rows)).tolist())
    for row in rows:
        row["cached_logprobs"] = [[next(told) for _ in c] for c in row["completions"]]
    torch.testing.assert_close(
        loss_of("dpo", cast(reference=ColumnRole().play("reference", None)), rows), want
    )


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


# ------------------------------------------------------------------------------------------------ TRL, value and gradient


@pytest.fixture(scope="module")
def trl():
    return pytest.importorskip("trl")


@functools.cache
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {w: i for i, w in enumerate(["<pad>", "<eos>", "<bos>", *(f"w{i}" for i in range(3, V))])}
    made = Tokenizer(models.WordLevel(words, unk_token="w3"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="w3"
    )


def trainer(trl, kind: str, tmp_path, row: dict, settings: dict | None = None, **kwargs):
    """TRL's trainer of a kind around the policy's network. It only ever computes losses of batches made
    here.
    """
    from datasets import Dataset

    plain = {
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 4,
    }
    kwargs = {
        "model": network(),
        "train_dataset": Dataset.from_list([row] * 4),
        "processing_class": tokenizer(),
        **kwargs,
    }
    config = getattr(trl, f"{kind}Config")(output_dir=str(tmp_path / "out"), **plain, **(settings or {}))
    made = getattr(trl, f"{kind}Trainer")(args=config, **kwargs)
    made.model.eval()  # no dropout here; and no division by accumulation steps
    return made


def agree(objective, rows: list[dict], net, theirs: torch.Tensor, **others) -> None:
    """Our average over the batch against their loss: the number, and its gradient in every weight."""
    roles = cast(**others)
    ours = average(objective, roles, batch_of(rows))
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=2e-5, abs=2e-6)
    ours.backward()
    theirs.backward()
    same(gradients(roles.policy.model), gradients(net), atol=5e-5)  # of gradients up to 16: rounding


def test_sft_is_trls(trl, tmp_path):
    made, rows = trainer(trl, "SFT", tmp_path, {"prompt": "w3", "completion": "w4"}), make_rows(4, k=1)
    whole = [r["prompt"] + r["completions"][0] for r in rows]
    width = max(map(len, whole))
    labels = [[-100] * len(r["prompt"]) + r["completions"][0] for r in rows]
    inputs = {
        "input_ids": torch.tensor([w + [0] * (width - len(w)) for w in whole]),
        "attention_mask": torch.tensor([[1] * len(w) + [0] * (width - len(w)) for w in whole]),
        "labels": torch.tensor([x + [-100] * (width - len(x)) for x in labels]),
    }
    agree(build("objective", "sft"), rows, made.model, made.compute_loss(made.model, inputs))


def preference_inputs(rows: list[dict]) -> dict:
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    def side(row, pick):
        return row["completions"][row["scores"].index(pick(row["scores"]))]

    return DataCollatorForPreference(pad_token_id=0)(
        [{"prompt_ids": r["prompt"], "chosen_ids": side(r, max), "rejected_ids": side(r, min)} for r in rows]
    )


@pytest.mark.parametrize(
    "ours, settings",
    [
        ({"name": "dpo", "beta": 0.3}, {"loss_type": ["sigmoid"], "beta": 0.3}),
        ({"name": "ipo", "beta": 0.3}, {"loss_type": ["ipo"], "beta": 0.3}),
        ({"name": "hinge", "beta": 0.3}, {"loss_type": ["hinge"], "beta": 0.3}),
        ("dpo + 0.5*chosen_sft", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
    ],
    ids=["dpo", "ipo", "hinge", "rpo"],
)
def test_pairs_are_trls(trl, tmp_path, ours, settings):
    rows = pair_rows()
    made = trainer(
        trl,
        "DPO",
        tmp_path,
        {"prompt": "w3", "chosen": "w4", "rejected": "w5"},
        settings,
        ref_model=network(off_by=0.05),
    )
    agree(terms(ours), rows, made.model, made.compute_loss(made.model, preference_inputs(rows)))


def test_smoothed_dpo_is_trls(trl, tmp_path):
    """TRL's sigmoid loss has lost label_smoothing; its `aot` on a batch of one pair is that loss."""
    rows, settings = pair_rows(), {"loss_type": ["aot"], "label_smoothing": 0.2}
    made = trainer(
        trl,
        "DPO",
        tmp_path,
        {"prompt": "w3", "chosen": "w4", "rejected": "w5"},
        settings,
        ref_model=network(off_by=0.05),
    )
    theirs = sum(made.compute_loss(made.model, preference_inputs([r])) for r in rows) / 4
    agree(build("objective", {"name": "dpo", "label_smoothing": 0.2}), rows, made.model, theirs)


@pytest.mark.parametrize("reference_off_by, drifted", [(0.2, True), (-0.2, False)])
def test_kto_is_trls(trl, tmp_path, reference_off_by, drifted):
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    rows, reference = kto_rows(), network(off_by=reference_off_by)
    settings = {"beta": 0.5, "desirable_weight": 1.3, "undesirable_weight": 0.7}
    made = trainer(
        trl,
        "KTO",
        tmp_path,
        {"prompt": "w3", "completion": "w4", "label": True},
        settings,
        ref_model=copy.deepcopy(reference),
    )
    done = [r["completions"][0] for r in rows]
    examples = [
        {
            "prompt_ids": r["prompt"],
            "completion_ids": y,
            "KL_completion_ids": other,
            "label": r["scores"][0] > 0,
        }
        for r, y, other in zip(rows, done, [done[-1], *done[:-1]], strict=True)
    ]
    theirs = made.compute_loss(made.model, DataCollatorForUnpairedPreference(pad_token_id=0)(examples))
    agree(build("objective", {"name": "kto", **settings}), rows, made.model, theirs, reference=reference)
    batch = batch_of(rows)
    build("objective", "kto").loss(cast(reference=reference), batch)
    assert batch.metrics["kl"][0] == pytest.approx(made._metrics["eval"]["kl"][0], abs=1e-5)
    assert (batch.metrics["kl"][0] > 0) == drifted


@pytest.mark.parametrize("old", [False, True], ids=["fresh", "reused"])
@pytest.mark.parametrize(
    "ours, settings",
    [
        ({"name": "grpo"}, {"loss_type": "grpo", "beta": 0.04}),
        (
            {"name": "grpo", "beta": 0.0, "scale_rewards": "batch"},
            {"loss_type": "grpo", "beta": 0.0, "scale_rewards": "batch"},
        ),
        ({"name": "dapo"}, {"loss_type": "dapo", "epsilon_high": 0.28}),
        (
            {"name": "dapo", "beta": 0.1, "epsilon_high": None, "epsilon": 0.1},
            {"loss_type": "bnpo", "beta": 0.1, "epsilon": 0.1},
        ),
        (
            {"name": "grpo", "use_bias_correction_kl": False},
            {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": False},
        ),
        (
            {"name": "dr_grpo", "max_completion_length": 32},
            {"loss_type": "dr_grpo", "max_completion_length": 32, "scale_rewards": "none"},
        ),
    ],
    ids=lambda x: "-".join(map(str, x.values())),
)
def test_policy_gradients_are_trls(trl, tmp_path, ours, settings, old):
    """Their advantages, their reference log-probabilities and their loss, on our samples."""
    rows = make_rows(2, k=4)
    rows[0]["scores"] = [0.2, 0.9, 0.9, -1.0]
    network(off_by=0.05).save_pretrained(tmp_path / "reference")
    policy = network()
    policy.config._name_or_path = str(tmp_path / "reference")  # where TRL looks for the reference
    flat = [(r["prompt"], c, s) for r in rows for c, s in zip(r["completions"], r["scores"], strict=True)]
    prompts, completions, scores = ([x[i] for x in flat] for i in range(3))
    settings = {"num_generations": 4, **settings}
    made = trainer(
        trl,
        "GRPO",
        tmp_path,
        {"prompt": "w3"},
        settings,
        model=policy,
        reward_funcs=lambda prompts, **_: scores,
    )
    made._generate = lambda _: (prompts, completions, None, ["" for _ in flat], None, {}, None, [])
    inputs = made._generate_and_score_completions([{"prompt": "w3"} for _ in flat])
    inputs = {k: v for k, v in inputs.items() if torch.is_tensor(v)}
    if old:
        noise = torch.Generator().manual_seed(3)
        sampled = cast().policy.logprobs(batch_of(rows)).detach()
        sampled = (sampled + 0.3 * torch.randn(sampled.shape, generator=noise)).split(
            [len(c) for c in completions]
        )
        padded = torch.nn.utils.rnn.pad_sequence(list(sampled), batch_first=True)
        inputs["old_per_token_logps"] = padded
        parts = [s.tolist() for s in sampled]
        rows = [{**r, "old_logprobs": parts[4 * i : 4 * i + 4]} for i, r in enumerate(rows)]
    agree(build("objective", ours), rows, made.model, made.compute_loss(made.model, inputs))


@pytest.mark.parametrize("name, beta", [("distill", 0.0), ("distill_reverse", 1.0), ("distill_jsd", 0.3)])
def test_distillation_is_trls(trl, name, beta):
    divergence = pytest.importorskip("trl.trainer.distillation_trainer")._chunked_divergence_loss
    rows, roles = pair_rows(), cast()
    student, teacher = roles.policy.outputs(batch_of(rows)), roles.teacher.outputs(batch_of(rows))
    heads = (roles.policy.model.lm_head.weight, roles.teacher.model.lm_head.weight)
    everything = torch.ones(1, len(student.hidden), dtype=torch.long)
    theirs, *_ = divergence(
        student.hidden[None], teacher.hidden[None], *heads, everything, beta, temperature=2.0
    )
    spec = {"name": name, "temperature": 2.0, **({"beta": beta} if name == "distill_jsd" else {})}
    # the factor temperature^2 is ours, and the paper's
    agree(terms(spec), rows, roles.policy.model, 4 * theirs)
