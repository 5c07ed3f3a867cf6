"""Plans: what they ask for is legal and follows from the reports they get. Mergers: soups by their
arithmetic.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import luthier
from conftest import SUMS
from luthier.data.load import load_rows as load
from luthier.data.load import sample_rows
from luthier.errors import RecipeError
from luthier.methods.plans.studies.front import spread, weigh
from luthier.model import loaded as use
from luthier.recipe.recipe import Recipe
from luthier.recipe.validate import validate
from luthier.registry import build, find, helps, names
from luthier.storage import checkpoints, files
from luthier.study.statistics import hypervolume
from luthier.train.trainer import Trainer

NEEDED = {
    "preference_losses": {"objectives": ["sft", "dft"]},  # rows without pairs will do for these
    "projects": {"of": [{"learning_rate": 1e-4}]},  # settings without a default
    "sequence": {"acts": [{"objective": "sft"}, {"learning_rate": 1e-4}]},
    "greedy_soup": {"of": [{"learning_rate": 1e-4}, {"learning_rate": 1e-3}]},
}
GOALS = {"right": "exact_match", "short": {"name": "length", "scale": -0.1}}
NEEDED["front"] = {"goals": GOALS}
SAMPLES = {
    "objective": "grpo",
    "live": [{"name": "rollout", "n": 2, "max_new_tokens": 4}, {"name": "score", "reward": "exact_match"}],
}
# plans that want more of a recipe
PLAYED_ON = {"front": SAMPLES, "meet": {"stages": [{"name": "score", "reward": "exact_match"}]}}
ROWS = load(SUMS).rows


@pytest.fixture(scope="session")
def tiny(shallow) -> str:
    return shallow


def report(folder: str, **after) -> SimpleNamespace:
    return SimpleNamespace(folder=folder, before={}, after=after, metrics=after)


def played(plan, recipe, reports):
    """The recipes that a plan asks for while it is answered with these reports, and what it returns."""
    play, asked = build("plan", plan).recipes(recipe), []
    reports = iter(reports)
    try:
        asked.append(next(play))
        while True:
            answer = next(reports)
            several = isinstance(asked[-1], list) and not isinstance(answer, list)
            asked.append(play.send([answer] * len(asked[-1]) if several else answer))
    except StopIteration as end:
        return asked, end.value


@pytest.fixture
def recipe(tiny):
    return Recipe.load({"model": tiny, "tuner": "lora"})


# ------------------------------------------------------------------------------------------ contracts


@pytest.mark.parametrize("name", names("plan"))
def test_plans_survive_a_rehearsal_and_ask_for_legal_recipes(name, recipe):
    plan, recipe = {"name": name, **NEEDED.get(name, {})}, recipe.but(**PLAYED_ON.get(name, {}))
    validate(recipe.but(plan=plan), ROWS, sample_rows)
    blank = [
        SimpleNamespace(
            folder="x", **{k: defaultdict(float) for k in ("before", "after", "metrics", "stats")}, notes=[]
        )
        for _ in range(50)
    ]
    asked, _ = played(plan, recipe, blank)
    for one in (r for some in asked for r in (some if isinstance(some, list) else [some])):
        assert one.plan is None and Recipe.load(one.yaml()).fingerprint() == one.fingerprint()
        validate(one, ROWS)


@pytest.mark.parametrize("kind", ["plan", "merger"])
def test_every_setting_is_explained(kind):
    assert all(said for name in names(kind) for said in helps(find(kind, name)).values())


# ------------------------------------------------------------------------------------------ sequence


def test_each_act_goes_on_from_the_last(recipe):
    acts = [
        {"objective": "sft"},
        {"lr": 1e-3},
        {"start": {"merge": "average", "of": "all"}, "evaluate": ["loss"]},
        {},
    ]
    asked, _ = played(
        {"name": "sequence", "acts": acts}, recipe.but(start="first"), [report(f"act-{k}") for k in range(4)]
    )
    assert [r.init_from for r in asked] == [
        "first",
        "act-0",
        {"merge": "average", "of": ["act-0", "act-1"]},
        "act-2",
    ]
    assert [r.objective for r in asked] == ["sft", "sft", None, "sft"]
    assert (
        asked[1].learning_rate == 1e-3
        and asked[2].evaluate == ["loss"]
        and asked[0].learning_rate == recipe.learning_rate
    )


@pytest.mark.parametrize(
    "acts, words",
    [
        ([], "at least one run"),
        ([{"objective": "sft"}, {"tuner": "full"}], "run 1 has another tuner .* `init_from: null`"),
        ([{"objective": "sft"}, {"tuner.r": 2}], "run 1 has another tuner"),
        ([{"start": {"merge": "average", "of": "all"}}], "run 0 merges all runs before it"),
        ([{"objective": "sft"}, {"learning_rat": 1}], "no 'learning_rat'"),
        ([{"start": {"merge": "averag", "of": ["a"]}}], "no merger 'averag'"),
    ],
)
def test_impossible_acts_are_refused_before_the_first_begins(recipe, acts, words):
    with pytest.raises(RecipeError, match=words):
        validate(Recipe.load(recipe, {"plan": acts}), ROWS)


def test_another_tuner_may_begin_anew(recipe):
    validate(
        recipe.but(
            plan=[{"objective": "sft"}, {"tuner": "full", "start": None}, {"tuner": "full", "lr": 1e-5}]
        ),
        ROWS,
    )


def test_acts_run_and_merge(base, tmp_path):
    """The merge act holds the mean of what the acts before it ended with, and a later act goes on from it."""
    soup = {"start": {"merge": "average", "of": "all"}, "evaluate": ["loss"]}
    plan = [{"max_steps": 2}, {"seed": 5, "max_steps": 3}, soup, {"max_steps": 0}]
    done = luthier.tune(base | {"plan": plan, "eval_data": 0.2}, folder=tmp_path)
    assert len(done.runs) == 4
    ends = [checkpoints.load(checkpoints.paths(Path(act))[-1]).tensors for act in done.runs]
    for k, merged in ends[2].items():
        assert torch.allclose(merged, (ends[0][k] + ends[1][k]) / 2, atol=1e-7) and torch.equal(
            merged, ends[3][k]
        )
    measured = luthier.Report.read(done.runs[2])
    assert measured.losses == [] and measured.after["loss"] == measured.before["loss"]
    again = luthier.tune(base | {"plan": plan, "eval_data": 0.2}, folder=tmp_path)
    assert again.runs == done.runs and [checkpoints.paths(Path(a))[-1].stat().st_mtime for a in done.runs]


STOPPED = {
    "sequence": [{"max_steps": 2}, {"max_steps": 4, "seed": 5}, {"max_steps": 1}],
    "spin": {"name": "spin", "rounds": 3, "max_new_tokens": 4},
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", STOPPED)
def test_a_plan_stopped_in_its_second_act_goes_on_there(base, tmp_path, monkeypatch, name, overwrite):
    """Acts that are finished answer, even where the recipe overwrites; the broken one goes on from its
    checkpoint.
    """
    asked = base | {
        "tuner": "lora",
        "plan": STOPPED[name],
        "max_steps": 4,
        "eval_data": 0.2,
        "overwrite": overwrite,
    }
    asked |= {"data": SUMS[:24], "evaluate": ["loss"]}
    whole = luthier.tune(asked, folder=tmp_path / "whole")
    real, made, stops = Trainer.step, [], [True]

    def stepping(self):
        if stops and made.count(0) == 2 and made[-1] == 2:
            raise ZeroDivisionError(stops.pop())
        made.append(self.roles.clock.step)
        return real(self)

    monkeypatch.setattr(Trainer, "step", stepping)
    with pytest.raises(ZeroDivisionError):
        luthier.tune(asked, folder=tmp_path / "broken")
    failed = [tmp_path / "broken" / "failed.json", tmp_path / "broken" / "run-1" / "failed.json"]
    assert [json.loads(path.read_text())["code"] for path in failed] == ["crash", "crash"]
    before, made[:] = len(made), []
    resumed = luthier.tune(asked, folder=tmp_path / "broken")
    assert not any(path.exists() for path in failed), "it has gone on"
    # nothing finished is redone
    assert made[0] and before + len(made) <= 2 + sum(len(luthier.Report.read(a).losses) for a in whole.runs)
    assert (resumed.after, resumed.losses) == (whole.after, whole.losses)
    ends = [
        [checkpoints.load(checkpoints.paths(Path(a))[-1]).tensors for a in r.runs] for r in (whole, resumed)
    ]
    assert all(torch.equal(v, there[k]) for here, there in zip(*ends, strict=True) for k, v in here.items())
    made.clear()
    luthier.tune(asked, folder=tmp_path / "broken")
    assert bool(made) == overwrite  # finished: only then is it done anew, where asked to


def test_a_plan_and_a_single_run_do_not_share_a_folder(base, tmp_path):
    luthier.tune(base | {"max_steps": 1}, folder=tmp_path)
    planned = base | {"plan": [{"max_steps": 1}, {"max_steps": 2}]}
    with pytest.raises(RecipeError, match="holds a single run; give this plan another output_dir"):
        luthier.tune(planned, folder=tmp_path)
    luthier.tune(planned | {"overwrite": True}, folder=tmp_path)
    assert luthier.tune(planned | {"overwrite": False}, folder=tmp_path).runs


def test_a_plan_of_version_0_1_answers_from_its_own_folders(base, tmp_path, monkeypatch):
    planned = base | {"plan": [{"max_steps": 1}, {"max_steps": 2}]}
    done = luthier.tune(planned, folder=tmp_path)
    for number in range(2):
        (tmp_path / f"run-{number}").rename(tmp_path / f"act-{number}")
    monkeypatch.setattr(Trainer, "step", lambda self: pytest.fail("all of this was finished"))
    again = luthier.tune(planned, folder=tmp_path)
    assert [Path(run).name for run in again.runs] == ["act-0", "act-1"]
    assert (again.losses, again.after) == (done.losses, done.after)


# ------------------------------------------------------------------------------------------ raft


def raft(**settings):
    return {"name": "raft", "rounds": 5, "n": 4, "max_new_tokens": 4, **settings}


@pytest.mark.parametrize(
    "rewards, runs, stands",
    [
        ([0.1, 0.2, 0.3, 0.4, 0.5], 5, "r4"),
        ([0.1, 0.3, 0.3], 3, "r1"),
        ([0.4, 0.2], 2, "r0"),
        ([None] * 5, 5, "r4"),
    ],
)
def test_raft_stops_when_the_reward_no_longer_rises(recipe, rewards, runs, stands):
    reports = [
        report(f"r{k}", **({} if v is None else {"generated_reward": v})) for k, v in enumerate(rewards)
    ]
    asked, end = played(raft(), recipe.but(start="s", evaluate=["loss", "generate"]), reports)
    assert len(asked) == runs and end.folder == stands
    assert [r.init_from for r in asked] == ["s", "r0", "r1", "r2", "r3"][:runs]
    # one held-out split
    assert [r.stages[0]["draw"] for r in asked] == list(range(runs)) and len({r.seed for r in asked}) == 1
    assert [e if isinstance(e, str) else e["name"] for e in asked[0].evaluate] == ["loss", "generate"]


def test_raft_rounds_sample_score_choose_and_learn(base, tmp_path):
    """Kept rows are the best of what was drawn; two rounds draw differently, and the second from the first's
    end.
    """
    prompts = [{"prompt": r["prompt"], "answer": r["answer"]} for r in SUMS[:16]]
    plan = raft(rounds=2, n=8, max_new_tokens=3, kl_coef=0.0)
    done = luthier.tune(
        base | {"data": prompts, "plan": plan, "tuner": "full", "max_steps": 3, "eval_data": 0.25},
        folder=tmp_path,
    )
    first, second = (files.read_rows(Path(a) / "rows.jsonl") for a in done.runs)
    assert len(first) == 16 - done.stats["held_out_rows"] and all(
        len(r["completions"]) == len(r["scores"]) == 1 for r in first
    )
    assert [r["completions"] for r in first] != [r["completions"] for r in second]
    assert "generated_reward" in done.after


def test_raft_makes_a_rewarded_habit_more_frequent(base, tmp_path):
    """Reward: one letter or digit is said. A few rounds raise how often that is."""
    say = [{"prompt": f"say {k}:", "answer": list("abcdefghijklmnopqrstuvwxyz0123456789")} for k in range(40)]
    plan = raft(rounds=4, n=16, max_new_tokens=1, least=1.0)
    change = {"data": say, "plan": plan, "max_steps": 4, "learning_rate": 3e-3, "eval_data": 0.25}
    done = luthier.tune(base | change, folder=tmp_path)
    kept = [len(files.read_rows(Path(a) / "rows.jsonl")) for a in done.runs]
    assert done.after["generated_reward"] == 1.0 and kept[-1] >= kept[0]


def test_raft_of_one_sample_is_sft_on_own_samples(base, tmp_path):
    plan = raft(rounds=1, n=1, max_new_tokens=3)
    done = luthier.tune(base | {"plan": plan, "eval_data": 0.25}, folder=tmp_path / "raft")
    own = {"stages": [{"name": "rollout", "n": 1, "max_new_tokens": 3}], "eval_data": 0.25}
    plain = luthier.tune(base | own, folder=tmp_path / "sft")
    assert luthier.Report.read(done.runs[0]).losses == plain.losses


def test_a_price_on_leaving_the_base_model_wants_a_reference(recipe):
    validate(recipe.but(plan=raft(kl_coef=0.1)), ROWS)
    asked, _ = played(raft(kl_coef=0.1, rounds=1), recipe, [report("x")])
    assert [s if isinstance(s, str) else s["name"] for s in asked[0].stages] == [
        "rollout",
        "score",
        "kl_penalty",
        "best",
    ]


# ------------------------------------------------------------------------------------------ spin


def test_spin_asks_for_dpo_against_each_rounds_own_start(recipe):
    asked, _ = played(
        {"name": "spin", "rounds": 3, "beta": [0.1, 0.1, 5.0]}, recipe, [report(f"r{k}") for k in range(3)]
    )
    assert [r.init_from for r in asked] == [None, "r0", "r1"] and [
        r.stages[-1]["earlier"] for r in asked
    ] == [
        None,
        "r0",
        "r1",
    ]
    assert [r.objective["beta"] for r in asked] == [0.1, 0.1, 5.0] and all(
        r.roles["reference"] == "initial" for r in asked
    )
    with pytest.raises(RecipeError, match="beta: 1 values for 3 rounds"):
        build("plan", {"name": "spin", "beta": [0.1]})


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_spin_begins_each_round_at_log_two(base, tmp_path, tuner):
    plan = {"name": "spin", "rounds": 2, "max_new_tokens": 4}
    change = {"tuner": tuner, "plan": plan, "data": SUMS[:12], "max_steps": 6, "learning_rate": 5e-4}
    done = luthier.tune(base | change, folder=tmp_path)
    rounds = [luthier.Report.read(a) for a in done.runs]
    assert all(
        r.losses[0] == pytest.approx(math.log(2), abs=1e-5) and min(r.losses) < r.losses[0] - 1e-3
        for r in rounds
    )
    first, second = (files.read_rows(Path(r.folder) / "rows.jsonl") for r in rounds)
    assert len(first) == 12 and len(second) == 24
    assert [r["completions"] for r in second[12:]] == [r["completions"] for r in first]
    assert any(a["completions"] != b["completions"] for a, b in zip(first, second, strict=False))


def test_learning_to_prefer_what_is_said_anyway_changes_nothing(base, tmp_path):
    """Given and own answer are the same: the loss is log 2 and no weight moves."""
    from luthier.model.load import assemble
    from luthier.recipe.validate import validate

    made = Recipe.load({k: v for k, v in base.items() if k != "data"} | {"objective": "dpo"})
    roles = assemble(made, validate(made, load([{"prompt": "1+1=", "chosen": "2", "rejected": "3"}]).rows))
    roles.players["reference"] = roles.policy.as_role("reference")
    ids = roles.renderer.encode({"id": 0, "prompt": "1+1=", "completions": ["2"]}).completions[0]
    row = {"id": 0, "prompt": "1+1=", "completions": ["2", ids], "scores": [1.0, 0.0]}
    loss = build("objective", "dpo").loss(roles, roles.batch([row]))
    loss.sum().backward()
    assert float(loss.detach()) == pytest.approx(math.log(2), abs=1e-6)
    assert all(p.grad is None or float(p.grad.abs().max()) < 1e-6 for p in roles.tuner.parameters().values())


# ------------------------------------------------------------------------------------------ greedy soup


def test_a_greedy_soup_takes_what_helps(recipe):
    """From the best downwards; a run that makes the average worse stays out; the answer is the best
    average.
    """
    of = [{"learning_rate": v} for v in (1e-4, 2e-4, 3e-4, 4e-4)]
    singles = [report(f"s{k}", loss=v) for k, v in enumerate((0.5, 0.3, 0.4, 0.6))]
    answers = [singles, report("m1", loss=0.35), report("m2", loss=0.25), report("m3", loss=0.25)]
    asked, end = played({"name": "greedy_soup", "of": of}, recipe, answers)
    assert [r.init_from["of"] for r in asked[1:]] == [
        ["s1", "s2"],
        ["s1", "s0"],
        ["s1", "s0", "s3"],
    ] and end.folder == "m3"
    assert all(r.objective is None for r in asked[1:]) and [r.learning_rate for r in asked[0]] == [
        1e-4,
        2e-4,
        3e-4,
        4e-4,
    ]
    _, end = played(
        {"name": "greedy_soup", "of": of, "metric": "accuracy", "greater_is_better": True},
        recipe,
        [
            [report(f"s{k}", accuracy=v) for k, v in enumerate((0.5, 0.9, 0.4, 0.6))],
            *[report(f"m{k}", accuracy=0.7) for k in range(3)],
        ],
    )
    assert end.folder == "s1"
    with pytest.raises(RecipeError, match="decides by 'loss', and the run in s0 measured accuracy"):
        played({"name": "greedy_soup", "of": of[:2]}, recipe, [[report("s0", accuracy=1.0), report("s1")]])
    with pytest.raises(RecipeError, match="give eval_data as a file"):
        validate(recipe.but(plan={"name": "greedy_soup", "of": [{"seed": 1}, {"seed": 2}]}), ROWS)


def test_a_greedy_soup_is_never_worse_than_its_best_ingredient(base, tmp_path):
    of = [{"learning_rate": 1e-3}, {"learning_rate": 3e-3}, {"learning_rate": 3e-2}]
    done = luthier.tune(
        base | {"plan": {"name": "greedy_soup", "of": of}, "evaluate": ["loss"], "eval_data": 0.2},
        folder=tmp_path,
    )
    singles = [luthier.Report.read(a).after["loss"] for a in done.runs[:3]]
    assert len(done.runs) == 5 and done.after["loss"] <= min(singles)


# ------------------------------------------------------------------------------------------ mergers


def tensors(seed: int, dtype=torch.float32) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(4, 3, generator=rng).to(dtype), "b": torch.randn(5, generator=rng).to(dtype)}


@pytest.mark.parametrize("name", names("merger"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_one_run_or_equal_runs_changes_nothing(name, dtype):
    merger, one = build("merger", name), tensors(0, dtype)
    if "idempotent" in merger.contract:
        pytest.skip(merger.contract["idempotent"])
    for several in ([one], [one] * 2, [one] * 3, [one] * 7):
        merged = merger.merge(several, base=one)
        assert merged.keys() == one.keys() and all(
            torch.equal(merged[k], one[k]) and merged[k].dtype == dtype for k in one
        )


@pytest.mark.parametrize("name", names("merger"))
def test_runs_that_moved_other_tensors_do_not_merge(name):
    merger, one = build("merger", name), tensors(0)
    with pytest.raises(RecipeError, match="run 1 has c, run 0 has not"):
        merger.merge([one, one | {"c": torch.ones(1)}])
    with pytest.raises(RecipeError, match=r"a is \[4, 3\] in run 0 and \[3, 4\] in run 1"):
        merger.merge([one, one | {"a": torch.ones(3, 4)}])
    with pytest.raises(RecipeError, match="at least one run"):
        merger.merge([])


def test_a_soup_is_the_mean():
    several = [tensors(k) for k in range(3)]
    plain = build("merger", "average").merge(several)
    weighted = build("merger", {"name": "average", "weights": [1, 0, 3]}).merge(several)
    for k in plain:
        assert torch.allclose(plain[k], sum(s[k] for s in several) / 3, atol=1e-6)
        assert torch.allclose(weighted[k], (several[0][k] + 3 * several[2][k]) / 4, atol=1e-6)
    only = build("merger", {"name": "average", "weights": [0, 0.3, 0]}).merge(several)
    assert all(torch.equal(only[k], several[1][k]) for k in only)


def test_a_soup_of_heads_is_the_mean_of_logits():
    heads, x = (
        [tensors(k)["a"] for k in range(2)],
        torch.randn(6, 3, generator=torch.Generator().manual_seed(9)),
    )
    soup = build("merger", "average").merge([{"a": h} for h in heads])["a"]
    assert torch.allclose(x @ soup.T, (x @ heads[0].T + x @ heads[1].T) / 2, atol=1e-6)


@pytest.mark.parametrize("weights", [[], [0, 0], [-1, 2], [math.nan, 1]])
def test_impossible_weights_are_refused(weights):
    with pytest.raises(RecipeError, match="weights must be 0 or more"):
        build("merger", {"name": "average", "weights": weights})


def test_as_many_weights_as_runs():
    with pytest.raises(RecipeError, match="2 weights for 1 runs"):
        build("merger", {"name": "average", "weights": [1, 2]}).merge([tensors(0)])


# ------------------------------------------------------------------------------------------ front


def test_weights_are_spread_evenly():
    assert spread(2, 3) == [[0, 1], [0.5, 0.5], [1, 0]]
    three = spread(3, 7)
    assert three[:3] == [[1, 0, 0], [0, 1, 0], [0, 0, 1]] and all(sum(w) == pytest.approx(1) for w in three)
    assert (
        len({tuple(w) for w in three}) == 7
        and min(max(abs(a - b) for a, b in zip(three[3], t)) for t in three[:3]) > 0.3
    )


def test_goals_enter_by_margins_or_by_sums(recipe):
    pairs = {"short": {"name": "length", "scale": -1.0}, "right": "exact_match"}
    changed = weigh(recipe.but(objective={"name": "dpo", "beta": 0.2}), pairs, [0.75, 0.25])
    assert changed["objective"] == {"name": "modpo", "beta": 0.2, "weights": {"right": 0.25}}
    assert changed["stages"][-1]["name"] == "score_with" and changed["stages"][-1]["names"] == ["right"]
    rolled = weigh(recipe.but(**SAMPLES), GOALS, [0.75, 0.25])["online_stages"]
    assert (
        rolled[0]["name"] == "rollout"
        and rolled[1]["reward_weights"] == [0.75, 0.25]
        and rolled[1]["names"] == ["right", "short"]
    )
    with pytest.raises(RecipeError, match="its weight cannot be 0"):
        weigh(recipe.but(objective="dpo"), pairs, [0.0, 1.0])
    for wrong, said in (
        ({}, "wants goals"),
        ({"goals": {"one": "exact_match"}}, "two goals or more"),
        ({"goals": GOALS, "least": 0.49}, ""),
    ):
        plan = {"name": "front", **wrong}
        if said:
            with pytest.raises(RecipeError, match=said):
                next(build("plan", plan).recipes(recipe.but(objective="dpo")))
    with pytest.raises(RecipeError, match="weighs goals by objective 'modpo'"):
        next(build("plan", {"name": "front", "goals": GOALS}).recipes(recipe))


def test_a_front_is_measured_drawn_and_goes_on(tmp_path, monkeypatch):
    asked = {
        "model": "toy:lm-small",
        "data": {"path": "toy:style/short", "n": 32},
        "eval_data": {"path": "toy:style/short_test", "n": 8},
        "objective": "dpo",
        "learning_rate": 1e-3,
        "max_steps": 3,
        "tuner": "full",
        "plan": {
            "name": "front",
            "points": 3,
            "judged": 6,
            "max_new_tokens": 24,
            "goals": {
                "short": {"name": "task", "objective": "short"},
                "complete": {"name": "task", "objective": "complete"},
            },
        },
    }
    found = luthier.tune(asked, folder=tmp_path / "f")
    front = found.stats["front"]
    assert front["preferences"] == [
        pytest.approx([0.1, 0.9]),
        pytest.approx([0.5, 0.5]),
        pytest.approx([0.9, 0.1]),
    ]
    assert len({tuple(r) for r in front["reached"]}) > 1 and front["worst"] == [0, 0]
    assert front["hypervolume"] == pytest.approx(
        hypervolume([[-a for a in r] for r in front["reached"]], [0, 0])
    )
    page = (tmp_path / "f" / "report.html").read_text()
    figures = re.findall(r'<script type="application/json">(.*?)</script>', page, re.S)
    points = [json.loads(figure)["points"] for figure in figures if '"points"' in figure]
    assert "hypervolume" in page and len(points[0]) == 4 and 'src="http' not in page
    mixed = luthier.tune(
        asked | {"plan": asked["plan"] | {"between": "average"}}, folder=tmp_path / "m"
    ).stats["front"]
    ends = [use.load(front["folders"][i]).model.state_dict() for i in (0, -1)]
    first, middle, last = (use.load(folder).model.state_dict() for folder in mixed["folders"])
    assert all(torch.equal(first[n], ends[0][n]) and torch.equal(last[n], ends[1][n]) for n in first)
    assert all(
        torch.allclose(t.float(), (first[n].float() + last[n].float()) / 2, atol=1e-2)
        for n, t in middle.items()
    )
    assert any(not torch.equal(first[n], t) for n, t in middle.items())
    monkeypatch.setattr(Trainer, "run", lambda *a, **k: pytest.fail("all of this was known"))
    assert luthier.tune(asked, folder=tmp_path / "f").stats["front"] == front
