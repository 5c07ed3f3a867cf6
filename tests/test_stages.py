"""Stages: what each says it wants, gives and takes away is so; rollouts are the same however rows are put
together.
"""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch

import luthier
from conftest import SUMS, example_value
from luthier.clock import Clock
from luthier.data.load import load_rows as load
from luthier.errors import RecipeError
from luthier.methods.rewards._base import Reward
from luthier.methods.stages._base import completion_logprobs, pick, text_of
from luthier.model.load import assemble
from luthier.recipe.capabilities import columns_of
from luthier.recipe.recipe import Recipe
from luthier.recipe.validate import validate
from luthier.registry import build, declared_words, find, helps, names, provides_of, requires_of

STAGES = names("stage")
COLUMNS = {*declared_words("Column"), "pairs"}  # what rows bring


@pytest.fixture(scope="module")
def roles(tiny):
    """Roles of a tiny model with itself, untuned, as the reference; `told` keeps what is said."""
    recipe = Recipe.load({"model": tiny, "tuner": "full", "dtype": "float32"})
    made = assemble(recipe, validate(recipe, load(SUMS).rows))
    made.reference, made.judge = made.policy.as_role("reference"), made.policy.as_role("judge")
    return made


@pytest.fixture(autouse=True)
def told(roles):
    sentences = []
    roles.warn, roles.clock.step = sentences.append, 0
    return sentences


def rows_with(columns: set[str], n: int = 6) -> list[dict]:
    """Rows with an id, a prompt and exactly these columns."""
    answers = [
        [f"{a}", "no", "maybe not"] if columns & {"scores", "pairs"} else [f"{a} is it"] for a in range(n)
    ]
    if "contexts" in columns:
        answers = [["yes", "no"] for _ in range(n)]
    wanted = columns | ({"completions", "scores"} if "pairs" in columns else set())
    rows = []
    for a in range(n):
        row = {"id": f"r{a}", "prompt": f"what is {a}?"}
        if "steps" in wanted:
            row["step_labels"] = [True, False]
        if "completions" in wanted:
            row["completions"] = answers[a]
        if "scores" in wanted:
            row["scores"] = [0.5, 0.25, -1.0]
        for name in sorted(wanted - {"completions", "scores", "pairs"}):
            row[name] = example_value(declared_words("Column")[name], row, a)
        rows.append(row)
    return rows


def small(name: str):
    """A stage with settings that make it quick."""
    return build("stage", {"name": name, **find("stage", name).example})


# ------------------------------------------------------------------------------------------ contracts


@pytest.mark.parametrize("name", STAGES)
def test_stages_give_what_they_say_and_leave_their_rows_alone(name, roles):
    stage = small(name)
    if "gives" in stage.contract:
        pytest.skip(stage.contract["gives"])
    rows = rows_with(requires_of(stage) & COLUMNS)
    kept = copy.deepcopy(rows)
    out = list(stage(rows, roles))
    assert out and rows == kept
    assert provides_of(stage) & COLUMNS <= columns_of(out) and not (
        stage.removes - provides_of(stage) - {"pairs"}
    ) & columns_of(out)
    assert all("id" in r and "prompt" in r for r in out)


@pytest.mark.parametrize("name", STAGES)
def test_stages_need_what_they_want(name, roles):
    stage = small(name)
    wanted = requires_of(stage) & COLUMNS
    for word in wanted - {"pairs"}:
        rows = [{k: v for k, v in r.items() if k != word} for r in rows_with(wanted)]
        try:
            assert not list(stage(rows, roles))  # such rows leave, or are refused
        except (RecipeError, KeyError):
            pass


@pytest.mark.parametrize("name", STAGES)
def test_stages_without_a_model_need_none(name):
    stage = small(name)
    if not stage.asks_model:
        nobody = SimpleNamespace(clock=Clock(), warn=lambda sentence: None)
        assert list(stage(rows_with(requires_of(stage) & COLUMNS), nobody))


@pytest.mark.parametrize("name", STAGES)
def test_every_setting_is_explained(name):
    assert all(helps(find("stage", name)).values())


# ------------------------------------------------------------------------------------------ rollout


def rollout(**settings):
    return build("stage", {"name": "rollout", "n": 3, "max_new_tokens": 8, **settings})


def test_rollouts_do_not_depend_on_company_or_history(roles):
    rows = rows_with(set(), 7)
    whole = {r["id"]: r["completions"] for r in rollout()(rows, roles)}
    alone = {
        r["id"]: r["completions"] for some in (rows[4:], rows[:1], rows[1:4]) for r in rollout()(some, roles)
    }
    assert whole == alone
    roles.clock.step = 1
    later = {r["id"]: r["completions"] for r in rollout()(rows, roles)}
    roles.clock.step = 0
    other = {r["id"]: r["completions"] for r in rollout(draw=1)(rows, roles)}
    assert all(whole[k] != later[k] and whole[k] != other[k] for k in whole)
    twice = [r["completions"] for r in rollout()([rows[0], rows[0]], roles)]
    assert twice[0] == whole["r0"] != twice[1]


def test_rollouts_end_with_their_stop_token_or_say_that_they_were_cut(roles, told):
    stop = roles.renderer.stop_ids
    out = rollout(n=16, max_new_tokens=40)(rows_with(set(), 8), roles)
    for row in out:
        for ids, cut in zip(row["completions"], row["truncated"], strict=True):
            assert (
                not any(t in stop for t in ids[:-1])
                and cut == (ids[-1] not in stop)
                and (not cut or len(ids) == 40)
            )
    cuts = sum(sum(r["truncated"]) for r in out)
    assert 0 < cuts < 128 and told == [
        f"stage 'rollout': {cuts} of 128 completions reached no stop token within 40 tokens"
    ]
    roles.clock.step = 5
    rollout()(rows_with(set()), roles)
    assert len(told) == 1  # a live stage says it once


def test_old_is_what_the_policy_says(roles):
    rows = rollout(old=True, batch_size=2)(rows_with(set()), roles)
    roles.policy.train()
    again = list(completion_logprobs(roles.policy, roles, rows, 6))
    roles.policy.eval()
    for row, values in zip(rows, again, strict=True):
        assert [len(v) for v in row["old_logprobs"]] == [len(c) for c in row["completions"]]
        assert row["old_logprobs"][0] == pytest.approx(values[0], abs=1e-5)
    assert (
        "old_logprobs" not in rollout()(rows_with(set()), roles)[0]
        and "old_logprobs" not in provides_of(rollout())
        and "old_logprobs" in provides_of(rollout(old=True))
    )


def test_greedy_rollouts_agree_and_settings_are_heard(roles):
    rows = rows_with(set(), 3)
    greedy = rollout(temperature=0.0)(rows, roles)
    assert all(r["completions"][0] == r["completions"][1] == r["completions"][2] for r in greedy)
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}):
        assert [r["completions"] for r in rollout(**narrow)(rows, roles)] == [
            r["completions"] for r in greedy
        ]


def test_what_was_known_of_earlier_completions_leaves(roles):
    rows = [
        {**r, "cached_logprobs": [[0.0]], "old_logprobs": [[0.0]], "rewards": {"a": [1.0]}}
        for r in rows_with({"completions", "scores", "answer"})
    ]
    out = rollout()(rows, roles)
    assert (
        not {"scores", "cached_logprobs", "old_logprobs", "rewards"} & out[0].keys()
        and out[0]["answer"] == "0"
    )


def test_rollouts_stay_within_what_a_row_may_hold(roles, told, monkeypatch):
    rows = [
        {"id": "short", "prompt": "ab"},
        {"id": "long", "prompt": "x" * 12},
        {"id": "nothing", "prompt": ""},
    ]
    monkeypatch.setattr(roles.renderer, "max_length", 12)
    out = rollout(max_new_tokens=40)(rows, roles)
    assert [r["id"] for r in out] == ["short"] and all(len(c) <= 10 for c in out[0]["completions"])
    assert told[0].startswith("stage 'rollout': 2 of 3 rows leave: the prompt of 12 tokens leaves no room")


# ------------------------------------------------------------------------------------------ score, best, pairs


class Length(Reward):
    """The longer the better."""

    name = "length"

    def scores(self, row, texts):
        return [float(len(t)) for t in texts]


def test_scores_are_of_texts_whatever_form_they_have(roles):
    ids = roles.renderer.tokenizer("7").input_ids + roles.renderer.stop_ids[:1]
    turns = [{"role": "assistant", "content": "7"}]
    row = {"id": "a", "prompt": "3+4=", "answer": "7", "completions": ["7", ids, turns, "8"]}
    assert [text_of(roles, c) for c in row["completions"]] == ["7", "7", "7", "8"]
    (out,) = build("stage", "score")([row], roles)
    assert out["scores"] == [1.0, 1.0, 1.0, 0.0] and "rewards" not in out


def test_several_rewards_add_up_by_weight(roles):
    both = [{"name": "exact_match"}, {"name": "exact_match", "ignore_case": True}]
    stage = build("stage", {"name": "score", "reward": both, "reward_weights": [1.0, 0.5]})
    row = {"id": "a", "prompt": "", "answer": "Yes", "completions": ["Yes", "yes", "no"]}
    (out,) = stage([row], roles)
    assert out["scores"] == [1.5, 0.5, 0.0]
    assert out["rewards"] == {"exact_match-0": [1.0, 0.0, 0.0], "exact_match-1": [1.0, 1.0, 0.0]}
    assert pick(out, [1])["rewards"] == {"exact_match-0": [0.0], "exact_match-1": [1.0]}
    with pytest.raises(RecipeError, match="2 weights for 1 rewards"):
        build("stage", {"name": "score", "reward_weights": [1, 2]})
    with pytest.raises(RecipeError, match="at least one reward"):
        build("stage", {"name": "score", "reward": []})


@pytest.mark.parametrize("wrong", [[1.0], [1.0, math.nan]])
def test_a_reward_that_gives_no_numbers_is_named(roles, monkeypatch, wrong):
    stage = build("stage", "score")
    monkeypatch.setattr(type(stage.reward[0]), "scores", lambda self, row, texts: wrong)
    with pytest.raises(RecipeError, match="'exact_match' gave .* of row a"):
        list(stage([{"id": "a", "prompt": "", "answer": "1", "completions": ["1", "2"]}], roles))


def test_what_belongs_to_a_completion_goes_with_it():
    row = {
        "id": "a",
        "prompt": "p",
        "completions": ["x", "y", "z"],
        "scores": [1.0, 3.0, 2.0],
        "old_logprobs": [[0.1], [0.2], [0.3]],
        "teacher": [[1.0], [2.0], [3.0]],
        "answer": ["1", "2", "3"],
        "truncated": [True, False, True],
    }
    assert pick(row, [1, 0]) == {
        "id": "a",
        "prompt": "p",
        "completions": ["y", "x"],
        "scores": [3.0, 1.0],
        "old_logprobs": [[0.2], [0.1]],
        "teacher": [[2.0], [1.0]],
        "answer": ["1", "2", "3"],
        "truncated": [False, True],
    }


def test_best_and_pairs(roles, told):
    rows = [
        {"id": 0, "prompt": "", "completions": ["a", "b", "c"], "scores": [0.0, 2.0, 1.0]},
        {"id": 1, "prompt": "", "completions": ["a", "b"], "scores": [1.0, 1.0]},
        {"id": 2, "prompt": "", "completions": ["a"], "scores": [5.0]},
    ]
    best = list(build("stage", "best")(rows, roles))
    assert [(r["completions"], r["scores"]) for r in best] == [
        (["b"], [2.0]),
        (["a"], [1.0]),
        (["a"], [5.0]),
    ] and not told
    assert [r["id"] for r in build("stage", {"name": "best", "least": 2})(rows, roles)] == [0, 2]
    pairs = list(build("stage", "pairs")(rows, roles))
    assert [(r["id"], r["completions"], r["scores"]) for r in pairs] == [(0, ["b", "a"], [2.0, 0.0])]
    assert not list(build("stage", {"name": "pairs", "margin": 2})(rows, roles))
    assert told == [
        "stage 'best': 1 of 3 rows leave: their best score is below 2.0",
        "stage 'pairs': 2 of 3 rows leave: all their completions score alike",
        "stage 'pairs': 3 of 3 rows leave: all their completions score alike (they differ by 2 or less)",
    ]


def test_the_price_of_leaving_the_reference(roles):
    """scores - kl_coef * log ratio by hand; a large coefficient decides which is best."""
    rows = rollout(n=4, max_new_tokens=3)(rows_with({"answer"}, 3), roles)
    rows = [{**r, "scores": [0.0, 1.0, 2.0, 3.0]} for r in rows]
    rng = torch.Generator().manual_seed(1)
    shift = {
        k: p.detach() + 0.05 * torch.randn(p.shape, generator=rng)
        for k, p in roles.tuner.parameters().items()
    }
    was = roles.reference
    roles.players["reference"] = roles.policy.as_role("reference", lambda: roles.tuner.using(shift))
    out = list(build("stage", {"name": "kl_penalty", "kl_coef": 50.0})(rows, roles))
    picked = list(build("stage", "best")(out, roles))
    for row, new, kept in zip(rows, out, picked, strict=True):
        hand = []
        for k in range(4):
            batch = roles.batch([pick(row, [k])])
            with torch.no_grad():
                gap = roles.policy.logprobs(batch).sum() - roles.reference.logprobs(batch).sum()
            hand.append(float(row["scores"][k] - 50 * gap))
        assert new["scores"] == pytest.approx(hand, abs=1e-2)
        assert kept["completions"] == [row["completions"][max(range(4), key=hand.__getitem__)]]
    roles.players["reference"] = was


# ------------------------------------------------------------------------------------------ ifd, remember, against_self


class Handmade:
    """A policy that says -0.5 a token after prompts that help, -3 after those that do not, -1 where there is
    no prompt.
    """

    def __init__(self, roles):
        self.architecture, self.model, self.roles = roles.policy.architecture, roles.policy.model, roles

    def logprobs(self, batch):
        prompts = [roles_text(self.roles, batch, g) for g in range(len(batch.rows))]
        cost = {"": 1.0, "help": 0.5, "more": 0.75, "harm": 3.0}
        return -torch.tensor([cost[prompts[g]] for g in batch.group[batch.owner].tolist()])


def roles_text(roles, batch, g: int) -> str:
    root = int(batch.parent[batch.completion[(batch.group == g).nonzero()[0, 0]]])
    return roles.text(batch.ids[batch.segment == root].tolist())


def test_ifd_by_its_closed_form(roles, told):
    rows = [
        {"id": i, "prompt": p, "completions": ["abc" * (i + 1)]}
        for i, p in enumerate(["help", "harm", "more", "help"])
    ]
    hand = SimpleNamespace(
        policy=Handmade(roles),
        renderer=roles.renderer,
        device=roles.device,
        clock=roles.clock,
        warn=roles.warn,
    )
    out = build("stage", {"name": "ifd", "share": 1.0, "batch_size": 3})(rows, hand)
    assert [r["id"] for r in out] == [0, 2, 3]
    assert [r["ifd"] for r in out] == pytest.approx(
        [math.exp(0.5 - 1), math.exp(0.75 - 1), math.exp(0.5 - 1)], rel=1e-5
    )
    assert [r["id"] for r in build("stage", {"name": "ifd", "share": 0.25})(rows, hand)] == [2]
    assert any("1 of 4 rows leave: their prompt does not make" in s for s in told)
    assert any("2 of 4 rows leave: they are beyond the 0.25" in s for s in told)


def test_ifd_is_the_ratio_of_two_perplexities(roles):
    """Against the model's own forward: the same answer tokens after prompt and end token, and after the end
    token.
    """
    row = {"id": 0, "prompt": "3+4=", "completions": ["seven"]}
    (out,) = build("stage", {"name": "ifd", "share": 1.0})([row], roles) or [None]
    said = roles.renderer.encode(row)
    first = [roles.renderer.tokenizer.bos_token_id or roles.renderer.stop_ids[0]]

    def surprise(prompt):
        ids = torch.tensor([prompt + said.completions[0]])
        with torch.no_grad():
            logp = roles.policy.model(ids).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
        return -logp.gather(1, ids[0, len(prompt) :, None]).mean()

    want = float((surprise(said.prompt) - surprise(first)).exp())
    assert (out["ifd"] if out else want) == pytest.approx(want, rel=1e-4) and (out is None) == (want >= 1)


def test_a_remembered_reference_is_the_start(base, tmp_path):
    from conftest import PAIRS

    base |= {"objective": "dpo", "data": PAIRS, "max_steps": 4}
    start = luthier.tune(base | {"roles": {"reference": "start"}}, folder=tmp_path / "a")
    column = luthier.tune(
        base | {"roles": {"reference": "column"}, "stages": ["remember"]}, folder=tmp_path / "b"
    )
    assert column.losses == pytest.approx(start.losses, abs=1e-5) and start.losses[0] == pytest.approx(
        math.log(2), abs=1e-5
    )


def test_long_texts_are_remembered_in_the_pieces_that_are_learned(base, tmp_path):
    rows = [{"text": "abc " * 40}] * 8
    change = {"data": rows, "max_length": 64, "stages": ["remember"], "max_steps": 2}
    luthier.tune(base | change, folder=tmp_path)
    from luthier.storage.files import read_rows

    kept = read_rows(tmp_path / "rows.jsonl")
    assert len(kept) > 8 and all(len(r["cached_logprobs"]) == 1 for r in kept)


def test_pairs_against_oneself(roles, told, tmp_path):
    from luthier.storage.files import write_rows

    rows = [{"id": "a", "prompt": "1+1=", "completions": ["3", "2"], "scores": [0.0, 1.0]}]
    rows += [{"id": "b", "prompt": "1+2=", "completions": ["3"]}]
    stage = {"name": "against_self", "max_new_tokens": 4}
    first = list(build("stage", stage)(rows, roles))
    assert (
        [r["completions"][0] for r in first] == ["2", "3"]
        and all(r["scores"] == [1.0, 0.0] for r in first)
        and "from" not in first[0]
    )
    own = rollout(n=1, max_new_tokens=4)(rows, roles)
    assert [r["completions"][1] for r in first] == [r["completions"][0] for r in own]
    write_rows(tmp_path / "rows.jsonl", [*first, {**first[0], "id": "z@before"}])
    mixed = list(build("stage", {**stage, "draw": 1, "earlier": str(tmp_path)})(rows, roles))
    assert [r["id"] for r in mixed] == ["a", "b", "a@before", "b@before"] and mixed[2][
        "completions"
    ] == first[0]["completions"]
    with pytest.raises(RecipeError, match="holds no rows.jsonl"):
        list(build("stage", {**stage, "earlier": str(tmp_path / "none")})(rows, roles))
    same = [{**r, "completions": [o["completions"][0]]} for r, o in zip(rows, own, strict=True)]
    same = [{k: v for k, v in r.items() if k != "scores"} for r in same]
    told.clear()
    list(build("stage", stage)(same, roles))
    assert (
        "stage 'against_self': 2 of 2 samples are the given answer itself: these rows teach nothing" in told
    )


def test_rows_that_leave_are_told_in_the_report(base, tmp_path):
    rows = [{"prompt": f"{a}", "answer": f"{a}", "completion": f"{a}"} for a in range(16)]
    change = {"data": rows, "stages": [{"name": "ifd", "share": 0.5}], "max_steps": 1}
    try:
        notes = luthier.tune(base | change, folder=tmp_path).notes
    except RecipeError as error:
        pytest.skip(str(error))
    assert any("stage 'ifd'" in n and "rows leave" in n for n in notes)
