"""A tuned model and what lives beside it: parts of roles, further tuners, phases, and who may play."""

from __future__ import annotations

import pytest
import torch

import luthier
from helpers.models import make_llama
from helpers.rows import PAIRS, SUMS
from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.methods.roles._base import bring
from luthier.methods.roles.averages.mean_teacher import Running
from luthier.methods.tuners._base import Untuned
from luthier.model.policy import Policy, Roles
from luthier.recipe.recipe import Recipe
from luthier.recipe.validate import validate
from luthier.registry import build
from luthier.run.run import perform
from luthier.storage import checkpoints

ROWS = [{"id": 0, "prompt": "1+1=", "completions": ["2", "no"], "scores": [1.0, 0.0]}]


PLAIN = {"learning_rate": 1e-2, "max_steps": 6, "per_device_train_batch_size": 4, "evaluate": ["loss"]}


@pytest.fixture
def base(shallow):
    return {"model": shallow, "data": SUMS[:32], **PLAIN}


def test_a_part_sees_every_moment_of_a_run_and_hides_none_of_the_tuner():
    """A tuner's hooks are called beside those of a part, and of a tuner within a tuner."""
    tuned = build("tuner", {"name": "control", "tuner": {"name": "self_tuning", "r": 2}}).attach(make_llama())
    outer, inner = tuned.components
    average = Running(tuned, 0.5)
    bring(tuned, "teacher", {"average": average})
    assert tuned.components == [outer, inner, average] and average.name == "role:teacher.average"
    assert not tuned.follows_rows()
    inner.per_row = True
    assert tuned.follows_rows(), "the tuner within hears of rows, too"
    assert tuned.state().keys() > tuned.state(parts=False).keys() > inner.state().keys()
    assert all(
        name.startswith("role:teacher.average.") for name in tuned.state().keys() - tuned.state(False).keys()
    )
    calls = []
    for component in tuned.components:
        for hook in ("on_phase", "before_step", "after_phase", "after_step", "on_rows"):
            said = {} if hook == "on_phase" else None
            object.__setattr__(
                component, hook, lambda *_, c=component, h=hook, said=said: calls.append((c, h)) or said
            )
    tuned.begin_step(Clock())
    tuned.announce_rows(None, None)
    tuned.end_step(Clock())
    for component in tuned.components:
        own = [hook for c, hook in calls if c is component]
        assert own == ["on_phase", "after_phase", "before_step", "on_rows", "after_step"]


@pytest.mark.long
def test_hyperparameters_are_tuned_beside_a_mean_teacher(base, tmp_path):
    """The role's running average hides nothing: the tuner still hears of rows."""
    rows = [{**row, "source": "validation" if i % 4 == 0 else "train"} for i, row in enumerate(SUMS[:32])]
    for reference in ("initial", "mean_teacher"):
        report = luthier.tune(
            {
                **base,
                "data": rows,
                "tuner": {"name": "self_tuning", "r": 2},
                "objective": {"name": "by_source", "sources": ["train", "validation"], "inner": "kl"},
                "estimator": {"name": "self_tuning", "warmup": 0},
                "roles": {"reference": reference},
            },
            folder=tmp_path / reference,
        )
        assert len(report.losses) == 6


@pytest.fixture
def lottery(base):
    return base | {
        "tuner": {"name": "lt_sft", "density": 0.05, "target_modules": ["q_proj", "up_proj"]},
        "objective": "sft + 0.1*kl",
        "save_steps": 1,
        "save_total_limit": 9,
    }


def tensors_at(folder, step):
    return checkpoints.load(folder / f"checkpoint-{step}").tensors


def test_an_average_follows_the_tuner_into_its_next_phase(lottery, tmp_path):
    """Half of the steps move whole weights, the rest chosen entries: the mean teacher is of what trains
    now.
    """
    made = lottery | {"roles": {"reference": {"name": "mean_teacher", "momentum": 0.5}}}
    luthier.tune(made, folder=tmp_path / "a")
    dense, sparse = tensors_at(tmp_path / "a", 3), [tensors_at(tmp_path / "a", step) for step in (4, 5, 6)]
    averages = lambda tensors: {k for k in tensors if k.startswith("role:reference.average.")}
    assert all(k.endswith("base_layer/weight") for k in averages(dense))
    assert averages(sparse[0]) and all(k.endswith("/values") for k in averages(sparse[0]))
    for key in averages(sparse[0]):
        mean = 0.0  # chosen entries begin at zero
        for tensors in sparse:
            mean = 0.5 * mean + 0.5 * tensors[key.removeprefix("role:reference.average.").replace("/", ".")]
            torch.testing.assert_close(tensors[key], mean)


@pytest.mark.long
@pytest.mark.parametrize("pause", [2, 4])
def test_a_run_with_phases_goes_on_bit_for_bit(lottery, tmp_path, pause):
    """Stopped before or after the choice, with an average that follows."""
    made = lottery | {"roles": {"reference": "mean_teacher"}}
    whole = luthier.tune(made, folder=tmp_path / "whole")
    perform(Recipe.load(made), tmp_path / "parts", stop_at=pause)
    rest = luthier.tune(made, folder=tmp_path / "parts")
    assert rest.losses == whole.losses
    a, b = tensors_at(tmp_path / "whole", 6), tensors_at(tmp_path / "parts", 6)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.long
def test_the_start_is_read_after_a_change_of_phase_and_training_goes_on(lottery, tmp_path):
    """The reference reads whole weights of the first phase while entries of the second one train."""
    report = luthier.tune(lottery | {"roles": {"reference": "initial"}}, folder=tmp_path / "a")
    values = [
        {k: v for k, v in tensors_at(tmp_path / "a", s).items() if k.endswith(".values")} for s in (4, 6)
    ]
    assert values[0] and all(not torch.equal(values[0][k], values[1][k]) for k in values[0])
    off = luthier.tune(lottery | {"roles": {"reference": "base"}}, folder=tmp_path / "b")
    assert report.losses == pytest.approx(off.losses, rel=1e-5), (
        "where tuning begins at the base, they are one"
    )


def test_an_average_begins_anew_where_entries_do():
    tuned = build("tuner", {"name": "spiel", "density": 0.01}).attach(make_llama())
    average = Running(tuned, 0.9)
    bring(tuned, "teacher", {"average": average})
    group = tuned.param_groups()[0]
    name, values = f"{group.name}.values", group.params["values"]
    with torch.no_grad():
        values.add_(1.0)
    average.after_step(Clock())
    torch.testing.assert_close(average.average[name], torch.full_like(values, 0.1).detach())
    mask = torch.arange(len(values)) < 3
    average.after_phase({name: mask})
    assert (average.average[name] == 1).equal(mask)


def test_an_average_is_of_a_plan_that_rows_decided(base, tmp_path):
    """Sensitivities give modules other tensors than they had when the role was set up."""
    made = base | {
        "tuner": {"name": "spt", "target_modules": ["q_proj", "up_proj"]},
        "objective": "sft + 0.1*kl",
        "roles": {"reference": "mean_teacher"},
    }
    assert len(luthier.tune(made, folder=tmp_path / "a").losses) == 6


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("refrence", "did you mean 'reference'"),
        ("teacher", "requires 'teacher'"),
        *(
            (name, "every recipe has this role built in")
            for name in ("clock", "batch", "policy", "warn", "tuner")
        ),
    ],
)
def test_a_role_that_nobody_asks_is_refused_before_any_compute(base, tmp_path, monkeypatch, name, sentence):
    monkeypatch.setattr("luthier.run.prepare.assemble", lambda *_, **__: pytest.fail("something was loaded"))
    made = base | {"data": PAIRS, "objective": "dpo", "roles": {name: "initial"}}
    for call in (lambda: luthier.tune(made, folder=tmp_path), lambda: validate(Recipe.load(made), ROWS)):
        with pytest.raises(RecipeError, match=sentence):
            call()
    assert not any(tmp_path.iterdir())


@pytest.mark.long
def test_a_role_of_a_plan_may_be_for_one_of_its_runs(base, tmp_path):
    made = base | {
        "data": PAIRS,
        "roles": {"reference": "initial"},
        "plan": {"name": "sequence", "acts": [{"objective": "sft"}, {"objective": "dpo"}]},
    }
    assert len(luthier.tune(made, folder=tmp_path / "a").runs) == 2
    with pytest.raises(RecipeError, match="did you mean 'reference'"):
        luthier.tune(made | {"roles": {"refrence": "initial"}}, folder=tmp_path / "b")


def test_roles_are_a_dict_beside_fixed_fields():
    model = make_llama()
    policy = Policy(build("architecture", "causal"), model, Untuned(model))
    roles = Roles(policy, Clock(), None, reference=policy.as_role("reference"), sampler=object())
    assert set(roles.players) == {"reference", "sampler"} and roles.reference is roles.players["reference"]
    assert roles.tuner is policy.attached and roles.policies() == [policy, roles.reference]
    with pytest.raises(RecipeError, match="no model has the role 'teacher'"):
        _ = roles.teacher
