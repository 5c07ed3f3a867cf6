"""knowledge_injection: the generator by an oracle and a constant, the runs, and fifty people at toy scale."""

from __future__ import annotations

from collections import Counter
from statistics import fmean

import pytest

import luthier
from helpers.plans import played, report
from luthier.errors import RecipeError
from luthier.methods.plans.studies.knowledge_injection import KnowledgeInjection
from luthier.recipe.recipe import Recipe
from luthier.toy import knowledge, rows
from luthier.toy.tasks._sample import same_text

PLAN = {"name": "knowledge_injection", "sets": knowledge.SETS, "epochs": [1, 30], "unrelated": "other"}


@pytest.mark.parametrize("make", [knowledge.profiles, knowledge.renames])
def test_an_oracle_knows_everything_and_a_constant_nothing(make):
    every = make(50)
    table = knowledge.facts(every)
    by_source: dict[str, list[float]] = {}
    for row in every:
        by_source.setdefault(row["source"], []).append(same_text(row, knowledge.answer(row, table)))
        assert row["completion"].strip() == row["answer"]
    assert all(fmean(scores) == 1.0 for scores in by_source.values())
    (name,) = [name for name in knowledge.SETS if name in by_source]
    assert {*by_source} == {name, *knowledge.SETS[name]}
    constant = Counter(row["answer"] for row in every).most_common(1)[0][0]
    assert fmean(same_text(row, constant) for row in every) < 0.05
    assert len({row["prompt"] for row in every}) == len(every) and make(50) == every
    with pytest.raises(ValueError, match="not 1000"):
        make(1000)


def numbers(set_: str, memorised: float, derived: float) -> dict[str, float]:
    """What a run on one set measures; of the other set it knows nothing."""
    scores = {"source_accuracy/other": 0.7}
    for name, names in knowledge.SETS.items():
        scores[f"source_accuracy/{name}"] = memorised if name == set_ else 0.0
        for one in names:
            scores[f"source_accuracy/{one}"] = derived if name == set_ else 0.0
    return scores


def test_runs_read_their_set_and_the_table_has_the_gap():
    scores = [("profiles", 0.2, 0.1), ("profiles", 1.0, 0.4), ("renames", 0.3, 0.2), ("renames", 0.9, 0.1)]
    reports = [report(f"run-{k}", **numbers(*one)) for k, one in enumerate(scores)]
    for one in reports:
        one.before = {**one.after, "source_accuracy/other": 0.8}
    asked, result = played(PLAN, Recipe.load({"max_steps": 7}), [reports])
    (runs,) = asked
    assert [list(one.stages[0]["counts"]) for one in runs] == [["profiles"]] * 2 + [["renames"]] * 2
    assert [one.num_train_epochs for one in runs] == [1, 30, 1, 30]
    assert all(one.max_steps is None and one.stages[0]["cap"] == 0 for one in runs)
    assert result.folder == "run-1"
    table = result.stats["table"]
    assert [line["gap"] for line in table] == pytest.approx([0.1, 0.6, 0.1, 0.8])
    assert table[1]["profiles_compared"] == 0.4 and table[3]["unrelated"] == pytest.approx(-0.1)
    assert (
        result.notes[1]
        == "renames, 30 epochs: 90% memorised, 10% in other questions, unrelated questions -10.0%"
    )
    reports[0].after.pop("source_accuracy/profiles")
    with pytest.raises(RecipeError, match="bring the questions of training"):
        played(PLAN, Recipe.load({}), [reports])


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(RecipeError, match="'b' is both trained on and held out"):
        KnowledgeInjection(sets={"a": ["b"], "b": []})
    with pytest.raises(RecipeError, match="variant 'short' cannot change max_steps"):
        KnowledgeInjection(variants={"short": {"max_steps": 3}})


@pytest.mark.slow
def test_fifty_people_are_memorized_in_thirty_epochs(tmp_path):
    every = knowledge.profiles(50)
    unrelated = [{**row, "source": "other"} for row in rows("people", "test", 60)]
    recipe = {
        "model": "toy:lm-small",
        "data": [row for row in every if row["source"] == "profiles"],
        "eval_data": [*every, *unrelated],
        "max_eval_samples": "all",
        "tuner": "full",
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 16,
        "evaluate": [],
        "save_steps": 10_000,
    }
    plan = {**PLAN, "sets": {"profiles": knowledge.SETS["profiles"]}}
    done = luthier.tune(recipe | {"plan": plan}, folder=tmp_path)
    one, thirty = done.stats["table"]
    assert one["memorisation"] < 0.5 and thirty["memorisation"] > 0.9
    assert thirty["gap"] > 0.1 and thirty["profiles_reworded"] < thirty["memorisation"] - 0.05
    assert thirty["unrelated"] < 0, "some of what was known is lost"
