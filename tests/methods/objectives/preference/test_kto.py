"""kto: good and bad mirror each other; measures its drift under the next rows prompt; alone in a micro batch
has no drift to measure; refuses a reference that cannot read.
"""

from __future__ import annotations

import copy

import pytest
import torch

from helpers.objectives import agree, batch_of, cast, loss_of, make_rows, network, pair_rows, trainer
from luthier.errors import RecipeError
from luthier.methods.roles.frozen.column import Column as ColumnRole
from luthier.registry import build


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
    with pytest.raises(RecipeError, match="use a model for the role"):
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


@pytest.mark.long
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


@pytest.mark.parametrize("name", ["kto", "bco", "apo_zero_unpaired"])
def test_scores_that_are_all_on_one_side_are_told(name):
    objective = build("objective", name)
    rows = [{"completions": ["a"], "scores": [0.9]}, {"completions": ["b"], "scores": [0.1]}]
    (sentence,) = objective.row_warnings(rows)
    assert "all 2 completions count as good" in sentence and "0.1 to 0.9" in sentence
    (sentence,) = objective.row_warnings([{"completions": ["a"], "scores": [0.0]}])
    assert "count as bad" in sentence
    assert not objective.row_warnings([*rows, {"completions": ["c"], "scores": [-0.1]}])
