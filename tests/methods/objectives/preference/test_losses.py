"""Preference objectives: what their formulas imply, their reductions to each other, and the table of
docs/trl.md.
"""

from __future__ import annotations

import os
import re

import pytest
import torch
import torch.nn.functional as F
import yaml

from helpers.objectives import (
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
)
from helpers.paths import ROOT
from luthier.errors import RecipeError
from luthier.recipe.recipe import terms
from luthier.registry import build

DOCS = ROOT / "docs"


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


@pytest.mark.long
@pytest.mark.parametrize("ours, kind, settings, x", table(), ids=lambda v: v if isinstance(v, str) else "")
def test_the_table_beside_trl(trainers, ours, kind, settings, x):
    loss, row = LOSSES[kind]
    rows, made = rows_for(kind), trainers(kind, settings, row)
    agree(objective_of(ours), rows, made.model, loss(made, rows) / x)


def test_the_table_is_whole(trl):  # noqa: F811
    theirs = set(re.findall(r"'(\w+)'", trl.DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]))
    compared = {t for _, kind, s, _ in table() if kind == "DPO" for t in s["loss_type"]}
    assert theirs and theirs <= compared


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


@pytest.mark.long
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


@pytest.mark.long
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


@pytest.mark.long
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
