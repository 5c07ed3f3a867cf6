"""Preference objectives: what their formulas imply, their reductions to each other, and the table of
docs/trl.md.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

from luthier.errors import RecipeError
from luthier.recipe.recipe import terms
from luthier.registry import build
from test_objectives import (
    agree,
    average,
    batch_of,
    cast,
    gradients,
    loss_of,
    make_rows,
    network,
    pair_rows,
    preference_inputs,
    same,
    trainer,
    trl,  # noqa: F401 (a fixture)
)

DOCS = Path(__file__).parents[1] / "docs"


# ------------------------------------------------------------------------------------------------ the table beside TRL


def table() -> list[tuple[str, str, dict, float]]:
    """(luthier's objective, TRL's trainer, its settings, what TRL's number is divided by) of each line of
    docs/trl.md.
    """
    lines = re.findall(
        r"^\| `(.+?)` \| (\w+) \| `(.+?)` \| ([\d.]+) \|$",
        (DOCS / "trl.md").read_text(encoding="utf-8"),
        re.M,
    )
    return [(ours, kind, yaml.safe_load(settings), float(x)) for ours, kind, settings, x in lines]


def objective_of(said: str):
    """A term, or terms with settings joined by +, as the table writes them."""
    parts = [re.fullmatch(r"(?:([\d.]+)\*)?(.+)", p).groups() for p in said.split(" + ")]
    made = [(yaml.safe_load(what), float(weight or 1)) for weight, what in parts]
    return terms([{**({"name": what} if isinstance(what, str) else what), "weight": w} for what, w in made])


def dpo_loss(made, rows):
    return made.compute_loss(made.model, preference_inputs(rows))


def cpo_inputs(rows):
    """TRL's tokenised rows of CPO and ORPO."""
    out = {}
    for side, pick in (("chosen", max), ("rejected", min)):
        said = [r["completions"][r["scores"].index(pick(r["scores"]))] for r in rows]
        whole = [r["prompt"] + c for r, c in zip(rows, said, strict=True)]
        width = max(map(len, whole))
        out[f"{side}_input_ids"] = torch.tensor([w + [0] * (width - len(w)) for w in whole])
        out[f"{side}_attention_mask"] = torch.tensor([[1] * len(w) + [0] * (width - len(w)) for w in whole])
        labels = [[-100] * len(r["prompt"]) + c for r, c in zip(rows, said, strict=True)]
        out[f"{side}_labels"] = torch.tensor([x + [-100] * (width - len(x)) for x in labels])
    return out


def cpo_loss(made, rows):
    return made.get_batch_loss_metrics(made.model, cpo_inputs(rows), "eval")[0]


def orpo_loss(made, rows):
    inputs = cpo_inputs(rows)
    chosen, rejected, chosen_logits, *_ = made.concatenated_forward(made.model, inputs)
    labels = F.pad(
        inputs["chosen_labels"],
        (0, chosen_logits.shape[1] + 1 - inputs["chosen_labels"].shape[1]),
        value=-100,
    )[:, 1:]
    likelihood = F.cross_entropy(chosen_logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    return likelihood - made.odds_ratio_loss(chosen, rejected)[0].mean()


def kto_loss(made, rows):
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

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
    return made.compute_loss(made.model, DataCollatorForUnpairedPreference(pad_token_id=0)(examples))


def sft_inputs(rows):
    whole = [r["prompt"] + r["completions"][0] for r in rows]
    width = max(map(len, whole))
    labels = [[-100] * len(r["prompt"]) + r["completions"][0] for r in rows]
    return {
        "input_ids": torch.tensor([w + [0] * (width - len(w)) for w in whole]),
        "attention_mask": torch.tensor([[1] * len(w) + [0] * (width - len(w)) for w in whole]),
        "labels": torch.tensor([x + [-100] * (width - len(x)) for x in labels]),
    }


def sft_loss(made, rows):
    return made.compute_loss(made.model, sft_inputs(rows))


PAIR = {"prompt": "w3", "chosen": "w4", "rejected": "w5"}
LOSSES = {
    "DPO": (dpo_loss, PAIR),
    "CPO": (cpo_loss, PAIR),
    "ORPO": (orpo_loss, PAIR),
    "SFT": (sft_loss, {"prompt": "w3", "completion": "w4"}),
    "KTO": (kto_loss, {"prompt": "w3", "completion": "w4", "label": True}),
}
EXPERIMENTAL = {"CPO", "ORPO"}


@pytest.fixture(scope="module")
def trainers(trl, tmp_path_factory):  # noqa: F811
    """TRL's trainer of a kind with settings, CPO and ORPO from where TRL keeps them now."""
    from types import SimpleNamespace

    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    more = SimpleNamespace(
        CPOConfig=CPOConfig, CPOTrainer=CPOTrainer, ORPOConfig=ORPOConfig, ORPOTrainer=ORPOTrainer
    )

    def make(kind: str, settings: dict, row: dict):
        reference = {"ref_model": network(off_by=0.05)} if kind in ("DPO", "KTO") else {}
        return trainer(
            more if kind in EXPERIMENTAL else trl,
            kind,
            tmp_path_factory.mktemp("trl"),
            row,
            settings,
            **reference,
        )

    return make


def rows_for(kind: str) -> list[dict]:
    if kind == "SFT":
        return make_rows(4, k=1)
    if kind != "KTO":
        return pair_rows()
    return [{**r, "scores": [1.0 if i % 3 else -1.0]} for i, r in enumerate(make_rows(5, k=1))]


@pytest.mark.parametrize("ours, kind, settings, x", table(), ids=lambda v: v if isinstance(v, str) else "")
def test_the_table_beside_trl(trainers, ours, kind, settings, x):
    loss, row = LOSSES[kind]
    rows, made = rows_for(kind), trainers(kind, settings, row)
    agree(objective_of(ours), rows, made.model, loss(made, rows) / x)


def test_the_table_is_whole(trl):  # noqa: F811
    theirs = set(re.findall(r"'(\w+)'", trl.DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]))
    compared = {t for _, kind, s, _ in table() if kind == "DPO" for t in s["loss_type"]}
    assert theirs and theirs <= compared


# ------------------------------------------------------------------------------------------------ reductions


DPO = {"name": "dpo", "beta": 0.3}


@pytest.mark.parametrize(
    "spec, other",
    [
        ({"name": "ld_dpo", "beta": 0.3, "ld_alpha": 1.0}, DPO),
        ({"name": "f_dpo", "beta": 0.3, "f_divergence_type": "reverse_kl"}, DPO),
        (
            {
                "name": "f_dpo",
                "beta": 0.3,
                "f_divergence_type": "alpha_divergence",
                "f_alpha_divergence_coef": 1.0 + 1e-5,
            },
            DPO,
        ),
        (
            {
                "name": "f_dpo",
                "beta": 0.3,
                "f_divergence_type": "alpha_divergence",
                "f_alpha_divergence_coef": 0.0,
            },
            {"name": "f_dpo", "beta": 0.3, "f_divergence_type": "forward_kl"},
        ),
        ({"name": "robust", "beta": 0.3, "label_smoothing": 0.0}, DPO),
        ({"name": "tdpo", "beta": 0.3, "alpha": 0.0}, DPO),
        ({"name": "modpo", "beta": 0.3}, DPO),
        ({"name": "dpo_bt", "beta": 0.3}, DPO),
        ({"name": "dpo_pl", "beta": 0.3}, DPO),
        ({"name": "lipo_softmax", "beta": 0.3, "temperature": 1e-3}, DPO),
        ({"name": "sigmoid_norm", "beta": 1e-6}, {"name": "dpo", "beta": 1e-6}),
    ],
    ids=lambda s: f"{s['name']}-{next(iter(dict(list(s.items())[2:]).values()), '')}",
)
def test_reductions(spec, other):
    found = []
    for each in (spec, other):
        roles, rows = cast(), [{**r, "rewards": {"other": [0.3, 0.1]}} for r in pair_rows()]
        values = build("objective", each).loss(roles, batch_of(rows))
        values.mean().backward()
        found.append((values.detach(), gradients(roles.policy.model)))
    torch.testing.assert_close(
        found[0][0], found[1][0], atol=1e-4 if "1e-05" in str(spec) else 1e-6, rtol=1e-4
    )
    if spec["name"] != "sigmoid_norm":
        same(found[0][1], found[1][1], atol=1e-3)


def test_weight_zero_is_the_other():
    found = []
    for said in ("dpo + 0*chosen_sft", "dpo"):
        roles = cast()
        average(terms(said), roles, batch_of(pair_rows())).backward()
        found.append(gradients(roles.policy.model))
    same(*found)
    assert [(w, o.name) for w, o in terms("0.5*orpo + dpo").terms()] == [
        (0.5, "chosen_sft"),
        (0.5, "orpo"),
        (1.0, "dpo"),
    ]


def test_a_sum_in_a_recipe_is_written_as_it_was_said():
    from luthier.recipe.recipe import Recipe

    recipe = Recipe.load({"objective": "orpo + 0.1*kl", "data": []})
    again = Recipe.load(yaml.safe_load(recipe.yaml()))
    assert [(w, o.name) for w, o in again.aim().terms()] == [(1.0, "chosen_sft"), (1.0, "orpo"), (0.1, "kl")]


def test_tied_rows_teach_nothing_whatever_the_loss():
    rows = [{**r, "scores": [1.0, 1.0], "rewards": {"other": [1.0, 2.0]}} for r in make_rows(2, k=2)]
    for name in (
        "nca_pair",
        "bco_pair",
        "apo_zero",
        "apo_down",
        "sppo",
        "aot",
        "aot_unpaired",
        "tdpo",
        "dpo_bt",
        "dpo_pl",
        "lipo_lambda",
    ):
        roles = cast()
        build("objective", name).loss(roles, batch_of(rows)).sum().backward()
        assert all(not g.any() for g in gradients(roles.policy.model).values()), name


def test_label_smoothing_limits():
    half = {"name": "cpo", "cpo_alpha": 0.0, "label_smoothing": 0.5}
    turned = [{**r, "scores": r["scores"][::-1]} for r in pair_rows()]
    torch.testing.assert_close(loss_of(half), loss_of(half, rows=turned))
    with pytest.raises(RecipeError, match="label_smoothing"):
        build("objective", {"name": "robust", "label_smoothing": 0.5})
    with pytest.raises(RecipeError, match="label_smoothing"):
        build("objective", {"name": "exo_pair", "label_smoothing": 0.0})


def test_exo_costs_nothing_where_the_policy_is_the_label():
    margin = torch.tensor([0.0, 1.0])
    made = build("objective", {"name": "exo_pair", "beta": 1.0, "label_smoothing": 0.5})
    assert float(made.cost(margin)[0]) == pytest.approx(0.0, abs=1e-7) and float(made.cost(margin)[1]) > 0.05


def test_robust_is_unbiased_under_flips():
    """Over labels that are flipped with probability e, its mean is the loss of clean labels."""
    margin, e = torch.linspace(-3, 3, 7), 0.3
    made = build("objective", {"name": "robust", "beta": 1.0, "label_smoothing": e})
    torch.testing.assert_close((1 - e) * made.cost(margin) + e * made.cost(-margin), -F.logsigmoid(margin))


# ------------------------------------------------------------------------------------------------ lists


def list_rows(k: int = 5) -> list[dict]:
    rng = torch.Generator().manual_seed(3)
    return [{**r, "scores": torch.rand(k, generator=rng).tolist()} for r in make_rows(3, k=k)]


def implicit(roles, rows, beta=0.1) -> list[torch.Tensor]:
    batch = batch_of(rows)
    s = beta * batch.sums(roles.policy.logprobs(batch) - roles.reference.logprobs(batch)).detach()
    return list(s.split([len(r["completions"]) for r in rows]))


def test_lambda_weights_by_hand():
    roles, rows = cast(), list_rows()
    want = []
    for s, row in zip(implicit(roles, rows), rows, strict=True):
        psi, order = row["scores"], s.argsort(descending=True).tolist()
        rank = {i: order.index(i) + 1 for i in range(len(psi))}
        total = 0.0
        for i in range(len(psi)):
            for j in range(len(psi)):
                if psi[i] > psi[j]:
                    gain = abs((2 ** psi[i] - 1) - (2 ** psi[j] - 1))
                    discount = abs(
                        1 / torch.log(torch.tensor(1.0 + rank[i]))
                        - 1 / torch.log(torch.tensor(1.0 + rank[j]))
                    )
                    total += float(gain * discount * F.softplus(-(s[i] - s[j])))
        want.append(total)
    torch.testing.assert_close(
        loss_of("lipo_lambda", roles, rows).detach(), torch.tensor(want), atol=1e-5, rtol=1e-5
    )


def test_a_list_of_two_is_dpo_times_its_weight():
    rows = [{**r, "scores": [0.9, 0.2]} for r in pair_rows()]
    delta = (2**0.9 - 2**0.2) * (1 / torch.tensor(2.0).log() - 1 / torch.tensor(3.0).log())
    torch.testing.assert_close(
        loss_of("lipo_lambda", rows=rows), delta * loss_of("dpo", rows=rows), atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("name", ["lipo_lambda", "dpo_bt", "dpo_pl", "lipo_softmax"])
def test_the_order_of_a_list_does_not_matter_and_equals_do_not_count(name):
    roles, rows = cast(), list_rows()
    turned = [{**r, "completions": r["completions"][::-1], "scores": r["scores"][::-1]} for r in rows]
    torch.testing.assert_close(loss_of(name, roles, rows), loss_of(name, roles, turned), atol=1e-5, rtol=1e-5)
    if name != "lipo_softmax":
        equal = loss_of(name, roles, [{**r, "scores": [0.5] * 5} for r in rows])
        torch.testing.assert_close(equal, torch.zeros(3))


def test_plackett_luce_by_hand():
    roles, rows = cast(), list_rows(4)
    want = []
    for s, row in zip(implicit(roles, rows), rows, strict=True):
        ranked = s[torch.tensor(row["scores"]).argsort(descending=True)]
        want.append(sum(float(ranked[k:].logsumexp(0) - ranked[k]) for k in range(len(ranked))))
    torch.testing.assert_close(
        loss_of("dpo_pl", roles, rows).detach(), torch.tensor(want), atol=1e-5, rtol=1e-5
    )


def test_ranking_lists_beats_random_pairs_of_them():
    """How good the five first answers of the implicit reward's ranking are, at equal updates: lists against
    random pairs of them.
    """
    from luthier.toy import bandit

    def ndcg(objective: str, pairs: bool, seed: int) -> float:
        rng = torch.Generator().manual_seed(seed)
        reward, lists = (
            torch.rand(40, generator=rng),
            torch.stack([torch.randperm(40, generator=rng)[:8] for _ in range(24)]).tolist(),
        )
        policy = bandit.Arms(torch.zeros(40))
        roles, sgd = bandit.roles_of(policy), torch.optim.SGD(policy.parameters(), lr=10.0)
        for _ in range(3):
            rows = (
                [[row[i] for i in torch.randperm(8, generator=rng)[:2]] for row in lists] if pairs else lists
            )
            sgd.zero_grad()
            bandit.average(build("objective", objective), roles, bandit.pulled(rows, reward)).backward()
            sgd.step()
        first, discount, gain = (
            policy.log_policy().detach().argsort(descending=True)[:5],
            1 / torch.arange(2.0, 7).log(),
            2**reward - 1,
        )
        return float(gain[first] @ discount / (gain.sort(descending=True).values[:5] @ discount))

    lists, pairs = (
        [ndcg(*how, seed) for seed in range(3)] for how in (("lipo_lambda", False), ("dpo", True))
    )
    assert sum(lists) > sum(pairs) + 0.1


# ------------------------------------------------------------------------------------------------ by method


def test_asft_in_closed_form():
    """-log p_w - log(1 - p_l), each side by itself: no cross-derivative, unlike DPO."""
    made = build("objective", {"name": "asft_align", "beta": 1.0})
    w, x = (
        torch.tensor(v, dtype=torch.float64, requires_grad=True)
        for v in ([-0.3, -2.0, -1e-4], [-0.01, -5.0, -0.7])
    )
    cost = made.pair(w, x)
    torch.testing.assert_close(cost, -w - (1 - x.exp()).log(), atol=1e-8, rtol=1e-8)
    (first,) = torch.autograd.grad(cost.sum(), w, create_graph=True)
    assert not first.requires_grad or not torch.autograd.grad(first.sum(), x, allow_unused=True)[0].any()
    (other,) = torch.autograd.grad(build("objective", "dpo").pair(w, x).sum(), w, create_graph=True)
    assert bool(torch.autograd.grad(other.sum(), x)[0].all())
    sure = torch.zeros(1, requires_grad=True)
    assert bool(made.pair(sure, sure).isfinite().all())


def test_asft_and_orpo_without_their_second_term_are_sft_on_the_chosen():
    for name in ("asft_align", "orpo"):
        found = []
        for objective in (
            build("objective", {"name": name, "beta": 1e-12}),
            build("objective", "chosen_sft"),
        ):
            roles = cast()
            value = average(objective, roles, batch_of(pair_rows()))
            value.backward()
            found.append((float(value.detach()), gradients(roles.policy.model)))
        assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
        same(found[0][1], found[1][1])


def test_tdpo_by_hand():
    from test_objectives import by_hand, full_logits

    roles, rows = cast(), pair_rows()
    batch = batch_of(rows)
    p, q = (full_logits(roles, who, rows).softmax(-1) for who in ("policy", "reference"))
    drift = batch.sums(by_hand(q, p)).view(-1, 2)
    ratio = batch.sums(roles.policy.logprobs(batch) - roles.reference.logprobs(batch)).detach().view(-1, 2)
    best = torch.tensor([r["scores"].index(1.0) for r in rows])
    pick = [x.gather(1, i[:, None]).squeeze(1) for x in (ratio, drift) for i in (best, 1 - best)]
    for alpha, second in ((0.5, True), (1.0, False)):
        margin = pick[0] - pick[1] - alpha * (pick[3] - pick[2])
        got = loss_of({"name": "tdpo", "beta": 0.3, "alpha": 0.5, "if_tdpo2": second}, roles, rows).detach()
        torch.testing.assert_close(got, -F.logsigmoid(0.3 * margin), atol=1e-5, rtol=1e-4)


def test_d3po_is_dpo_step_by_step():
    rows = pair_rows()
    at_start = loss_of("d3po", cast(reference=network()), rows)
    torch.testing.assert_close(at_start, torch.full_like(at_start, 0.6931472), atol=1e-5, rtol=0)
    made, batch = build("objective", {"name": "d3po", "eps": 0.999}), batch_of(rows)
    shorter = [min(len(r["completions"][0]), len(r["completions"][1])) for r in rows]
    assert made.count(batch) == sum(shorter)
    near = cast(reference=network(off_by=0.002))
    # one step a side, and no ratio near its bounds
    whole = loss_of({"name": "d3po", "eps": 0.5, "step": 100}, near, rows)
    torch.testing.assert_close(whole, loss_of("dpo", near, rows), atol=1e-5, rtol=1e-5)
    far = cast(reference=network(seed=3))
    loss = build("objective", {"name": "d3po", "eps": 1e-6}).loss(far, batch)
    loss.sum().backward()
    assert all(not g.any() for g in gradients(far.policy.model).values()), (
        "beyond the bounds a step teaches nothing"
    )


def test_bco_shifts_by_the_middle_and_needs_no_pairs():
    rows = [{**r, "scores": [1.0 if i % 2 else -1.0]} for i, r in enumerate(make_rows(4, k=1))]
    roles, batch = cast(), batch_of(rows)
    reward = 0.1 * batch.sums(roles.policy.logprobs(batch) - roles.reference.logprobs(batch)).detach()
    shift = (reward[1::2].mean() + reward[::2].mean()) / 2
    sign = torch.tensor([1.0 if i % 2 else -1.0 for i in range(4)])
    torch.testing.assert_close(
        loss_of("bco", roles, rows).detach(), -F.logsigmoid(sign * (reward - shift)), atol=1e-6, rtol=1e-5
    )


def test_rwr_between_sft_and_the_best():
    roles, rows = cast(), make_rows(3, k=3)
    batch = batch_of(rows)
    nll = -batch.sums(roles.policy.logprobs(batch)).detach()
    torch.testing.assert_close(
        loss_of({"name": "rwr", "beta": 1e6}, roles, rows).detach(), nll, atol=1e-3, rtol=1e-4
    )
    best = batch.column("scores") == 2.0
    only = loss_of({"name": "rwr", "beta": 1e-3}, roles, rows).detach()
    torch.testing.assert_close(only, torch.where(best, 3 * nll, 0.0), atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------------ on a bandit, exactly


def fitted(objective, roles, rows, weights=None, steps: int = 60) -> torch.Tensor:
    """[arms] log-policy at the minimum of the (weighted) mean loss."""
    from luthier.toy import bandit

    batch = bandit.batch_of(rows)
    optimizer = torch.optim.LBFGS(
        roles.policy.parameters(), lr=0.5, max_iter=steps, tolerance_grad=1e-10, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        values = objective.loss(roles, batch)
        value = (values if weights is None else values * weights).mean()
        value.backward()
        return value

    optimizer.step(closure)
    return roles.policy.log_policy().detach()


def test_modpo_finds_the_policy_of_the_weighted_reward():
    from luthier.toy import bandit

    base = torch.tensor([0.3, -0.2, 0.1, 0.0], dtype=torch.float64)
    own, other = (
        torch.tensor(v, dtype=torch.float64) for v in ([1.0, 0.2, -0.5, 0.4], [-0.8, 0.9, 0.1, 0.3])
    )
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    rows = [
        {
            "id": f"{i}{j}",
            "prompt": [0],
            "completions": [[i], [j]],
            "scores": [1.0, 0.0],
            "rewards": {"other": [float(other[i]), float(other[j])]},
        }
        for i, j in pairs
    ]
    likely = torch.tensor([float(torch.sigmoid(own[i] - own[j])) for i, j in pairs])
    expected = []
    for share in (0.1, 0.5, 0.9):
        roles = bandit.roles_of(bandit.Arms(base))
        made = build("objective", {"name": "modpo", "beta": 0.5, "weights": {"other": 1 - share}})
        got = fitted(made, roles, rows, likely)
        want = (base.log_softmax(-1) + (share * own + (1 - share) * other) / 0.5).log_softmax(-1)
        torch.testing.assert_close(got, want, atol=1e-2, rtol=0)
        expected.append((float(got.exp() @ own), float(got.exp() @ other)))
    assert [e[0] for e in expected] == sorted(e[0] for e in expected)
    assert [e[1] for e in expected] == sorted((e[1] for e in expected), reverse=True)
    alone = loss_of(
        {"name": "modpo", "beta": 0.2, "weights": {"other": 0.5}},
        rows=[{**r, "rewards": {"other": [0, 0]}} for r in pair_rows()],
    )
    torch.testing.assert_close(alone, loss_of({"name": "dpo", "beta": 0.4}), atol=1e-6, rtol=1e-5)
    with pytest.raises(RecipeError, match="nothing is left"):
        build("objective", {"name": "modpo", "weights": {"a": 0.6, "b": 0.4}})
    with pytest.raises(RecipeError, match="did you mean 'other'"):
        loss_of(
            {"name": "modpo", "weights": {"othr": 0.5}},
            rows=[{**r, "rewards": {"other": [0, 0]}} for r in pair_rows()],
        )


def sppo_round(base: torch.Tensor, wins: torch.Tensor, beta: float) -> torch.Tensor:
    """One exact round: every arm, weighed as the policy pulls it, regressed on how often it beats the
    policy.
    """
    from luthier.toy import bandit

    pi = base.softmax(-1)
    rates, arms = wins @ pi, len(base)
    best, worst = int(rates.argmax()), int(rates.argmin())
    rows, weights = [], []
    # a row of an arm with itself would be a tie: each arm stands beside the two extremes
    for i in range(arms):
        j = worst if i != worst else best
        scores = [1.0, 0.0] if rates[i] > rates[j] else [0.0, 1.0]
        rows.append(
            {
                "id": str(i),
                "prompt": [0],
                "completions": [[i], [j]],
                "scores": scores,
                "win_rates": [float(rates[i]), float(rates[j])],
            }
        )
        weights.append(float(pi[i]))
    roles = bandit.roles_of(bandit.Arms(base))
    return fitted(build("objective", {"name": "sppo", "beta": beta}), roles, rows, torch.tensor(weights))


def test_sppo_multiplies_by_how_often_an_answer_wins():
    base = torch.tensor([0.5, -0.3, 0.1], dtype=torch.float64)
    wins = torch.tensor([[0.5, 0.8, 0.3], [0.2, 0.5, 0.6], [0.7, 0.4, 0.5]], dtype=torch.float64)
    got = sppo_round(base, wins, beta=5.0)
    want = (base.log_softmax(-1) + (wins @ base.softmax(-1) - 0.5) / 5.0).log_softmax(-1)
    torch.testing.assert_close(got, want, atol=5e-3, rtol=0)


def test_sppo_stays_near_the_equilibrium_of_rock_paper_scissors():
    from luthier.toy import bandit

    wins = torch.tensor([[0.5, 0.0, 1.0], [1.0, 0.5, 0.0], [0.0, 1.0, 0.5]], dtype=torch.float64)
    base, mean = torch.tensor([0.6, 0.0, -0.3], dtype=torch.float64), []
    for _ in range(66):  # two times round
        base = sppo_round(base, wins, beta=1.5)
        mean.append(base.exp())
    assert float((torch.stack(mean).mean(0) - 1 / 3).abs().max()) < 0.1
    policy = bandit.Arms(torch.tensor([0.6, 0.0, -0.3], dtype=torch.float64))
    roles, adam = bandit.roles_of(policy), torch.optim.Adam(policy.parameters(), lr=0.05)
    # what is seen of it: paper beats rock
    rows = [{"id": "a", "prompt": [0], "completions": [[0], [1]], "scores": [0.0, 1.0]}]
    for _ in range(200):
        adam.zero_grad()
        bandit.average(build("objective", "dpo"), roles, rows).backward()
        adam.step()
    assert float(policy.log_policy().detach().exp()[0]) < 0.05, "DPO goes on for ever"


def test_win_rates_of_scores():
    from luthier.recipe.validate import DryRunRoles

    row = {"id": "a", "prompt": "p", "completions": ["x", "y", "z"], "scores": [2.0, 0.0, 0.0]}
    (out,) = build("stage", "win_rates")([row], DryRunRoles())
    two = float(torch.sigmoid(torch.tensor(2.0)))
    assert out["win_rates"] == pytest.approx([(0.5 + 2 * two) / 3, (1 - two + 1) / 3, (1 - two + 1) / 3])
    assert sum(out["win_rates"]) == pytest.approx(1.5)


def test_what_sees_far_and_what_does_not():
    """Where the best answers are far from what the reference says, only fresh samples and a negative gradient
    get there.
    """
    from luthier.toy import bandit

    arms = torch.arange(100.0)
    base = -((arms - 20) / 8).square() / 2
    tried = {
        "online dpo": ({"name": "dpo", "beta": 0.02}, 1),
        "reinforce": ({"name": "dr_grpo", "beta": 0.0, "max_completion_length": 1}, 1),
        "pref-ft": ("chosen_sft", None),
        "rwr": ({"name": "rwr", "beta": 0.1}, None),
        "dpo": ({"name": "dpo", "beta": 0.05}, None),
    }
    end = {}
    for where, peak in (("far", 70), ("covered", 28)):
        reward = (-((arms - peak) / 15).square() / 2).exp()
        for name, (spec, fresh) in tried.items():
            told = bandit.study(
                build("objective", spec), reward, base, steps=150, n=4, rows=16, fresh_every=fresh
            )
            end[where, name] = told.reward[-1]
            if (where, name) == ("covered", "dpo"):
                assert told.rejected[-1] < told.rejected[0] and told.kl[-1] > 0
    assert end["far", "online dpo"] > 0.8 and end["far", "reinforce"] > 0.8
    assert end["far", "pref-ft"] < 0.8 and end["far", "rwr"] < 0.8
    assert all(end["covered", name] > 0.8 for name in tried)


def test_one_step_of_each_in_closed_form():
    from luthier.toy import bandit

    rows = [{"id": "a", "prompt": [0], "completions": [[10], [30]], "scores": [1.0, 0.0]}]
    change = {}
    for spec in ("chosen_sft", "dpo"):
        policy = bandit.Arms(torch.zeros(40), width=2.0)
        bandit.average(build("objective", spec), bandit.roles_of(policy), rows).backward()
        with torch.no_grad():
            was = policy.log_policy()
            policy.weights -= 0.1 * policy.weights.grad
            change[spec] = policy.log_policy() - was
    assert (change["chosen_sft"][8:13] > 0).all(), "SFT raises all that are like the chosen one"
    assert change["dpo"][30] < 0 and change["dpo"][30] < change["dpo"][20] - 1e-3, (
        "DPO lowers the rejected one"
    )
    assert change["chosen_sft"][30] == pytest.approx(float(change["chosen_sft"][22]), abs=1e-3), (
        "SFT lowers it like any other"
    )
    want = torch.zeros(40)
    want[10], want[30] = 0.1 / 2, -0.1 / 2  # at the reference the logistic's slope is a half
    policy = bandit.Arms(torch.zeros(40))
    bandit.average(build("objective", {"name": "dpo", "beta": 0.1}), bandit.roles_of(policy), rows).backward()
    torch.testing.assert_close(-policy.weights.grad, want, atol=1e-6, rtol=0)


def test_the_sft_term_keeps_the_chosen_likely():
    """Overoptimised: many steps on few pairs of alike answers."""
    from luthier.toy import bandit

    reward, base = torch.linspace(0, 1, 30), torch.zeros(30)
    found = {
        said: bandit.study(terms(said), reward, base, steps=150, rows=6, width=4.0, seed=2).chosen
        for said in ("dpo", "dpo + 0.5*chosen_sft")
    }
    dpo, rpo = found["dpo"], found["dpo + 0.5*chosen_sft"]
    assert rpo[-1] >= rpo[0] and rpo[-1] > dpo[-1]
