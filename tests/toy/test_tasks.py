"""Toy tasks: the same bytes everywhere, no leak, exact verifiers, and each task's own promises."""

from __future__ import annotations

import json
import os
import random as python_random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import luthier
from luthier import toy
from luthier.errors import RecipeError
from luthier.recipe.recipe import Recipe
from luthier.registry import build
from luthier.registry.build import warn_of_former
from luthier.storage.toy import former_row
from luthier.toy.tasks import (
    _sample,
    arithmetic,
    code,
    entities,
    find,
    language,
    people,
    sql,
    stream,
    style,
    tools,
)
from luthier.toy.tasks._random import Random

TASKS = toy.task_names()
SPLITS = [(task, split) for task in TASKS for split in find(task).SPLITS]
GOLDEN = Path(__file__).with_name("golden_tasks.json")  # made by: python tests/toy/test_tasks.py
CHECKSUMS = """
import json, zlib
from luthier import toy
from luthier.toy.tasks import find
def mark(task, split):
    return zlib.crc32(json.dumps(toy.rows(task, split, 40, "golden"), ensure_ascii=False).encode())
print(json.dumps({f"{w}/{s}": mark(w, s) for w in toy.task_names() for s in find(w).SPLITS}))
"""


def checksums(hash_seed: str) -> dict[str, int]:
    """Of 40 rows of every split, made in a process of its own."""
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    done = subprocess.run(
        [sys.executable, "-c", CHECKSUMS], capture_output=True, text=True, check=True, env=environment
    )
    return json.loads(done.stdout)


def gold(row: dict) -> str:
    """The right completion."""
    if "clean" in row:
        return row["clean"]
    if "chosen" in row:
        return row["chosen"]
    if "label" in row:
        return style.casual(*row["words"])
    return row.get("completion") or row["answer"]


@pytest.mark.long
def test_every_split_is_the_same_bytes_in_every_process():
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    for seed in ("1", "2"):
        assert checksums(seed) == golden


def test_chance_is_what_python_draws_today():
    """Written down because Python may change: so it may differ some day, but not by a slip of ours."""
    ours, theirs = Random("x"), python_random.Random("x")
    words = [f"w{i}" for i in range(300)]
    for k in (1, 3, 7, 40):
        assert ours.sample(words, k) == theirs.sample(words, k)
        assert ours.sample(words[: k + 2], k) == theirs.sample(words[: k + 2], k)
    for _ in range(100):
        assert ours.randint(-5, 17) == theirs.randint(-5, 17)
        assert ours.randrange(3, 90, 7) == theirs.randrange(3, 90, 7)
        assert ours.choice(words) == theirs.choice(words)
        assert ours.choices(words[:3], [0.2, 1, 3]) == theirs.choices(words[:3], [0.2, 1, 3])
    mixed = list(words)
    ours.shuffle(mixed)
    theirs.shuffle(words)
    assert mixed == words


def pieces(row: dict) -> set[str]:
    """What a held-out row asks, in its own words; of a conversation each question that is about an item."""
    if "messages" in row:
        return {" ".join(turn["content"] for turn in row["messages"])}
    return {row["prompt"]} if row["prompt"] else set()


@pytest.mark.long
def test_no_held_out_item_or_question_is_in_a_pretraining_row():
    held_out: set[str] = set()
    questions: set[str] = set()
    for task, split in SPLITS:
        if _sample.bucket_of_split(split) != "train" and split != "private_test":
            for row in toy.rows(task, split, 300, "held out"):
                held_out |= {atom for atom in row["item"].split(";") if _sample.atom_bucket(atom) != "train"}
                questions |= pieces(row)
    assert len(held_out) > 5000 and len(questions) > 5000
    for task in TASKS:
        for row in toy.rows(task, "train", 2000, "pretraining"):
            assert not held_out & set(row["item"].split(";")), row
            assert not questions & pieces(row), row


@pytest.mark.long
def test_what_is_for_tuning_is_in_no_pretraining_row():
    kept = {person["name"] for person in [*people.PRIVATE, *people.HELD_BACK]} | {
        "parcel",
        "Velmi",
        "pirate",
        "# faster",
        "Say over",
        "*",
    }
    kept |= {word for words in stream.CLASSES[3:] for word in words}
    pattern = re.compile("|".join(map(re.escape, sorted(kept))))
    for task in set(TASKS) - {"code"}:
        for row in toy.rows(task, "train", 1500, "kept"):
            text = json.dumps(
                {k: row[k] for k in ("prompt", "completion", "messages") if k in row}, ensure_ascii=False
            )
            found = pattern.search(text)
            assert not found or task == "sql" and found[0] == "*", (found, row)
    assert not any("# faster" in row["prompt"] for row in toy.rows("code", "train", 1500))


@pytest.mark.parametrize(("task", "split"), SPLITS)
def test_the_right_answer_verifies_and_wrong_ones_do_not(task, split):
    rows = toy.rows(task, split, 2 if task == "code" else 12, "verify")
    for row, other in zip(rows, [*rows[1:], rows[0]], strict=True):
        if "objectives" in row or row["kind"] == "free_note":
            continue  # notes without one right text: test_notes_are_scored_by_rule
        right = toy.verify(row, gold(row))
        assert right == 1.0 or isinstance(right, dict) and set(right.values()) == {1.0}, row
        for wrong in ("", "zzz", gold(other)):
            if wrong != gold(row) and not (other.get("answer") == row.get("answer") and wrong):
                score = toy.verify(row, wrong)
                worst = min(score.values()) if isinstance(score, dict) else score
                # two programs may do the same
                assert 0 <= worst < 1 or task in ("code", "sql"), (row, wrong)


def test_what_is_read_is_verified_alike():
    """Rows as the house reads them, and with samples in place of the completions, as in a rollout."""
    from luthier.data.load import load_rows as load

    judge = build("reward", "task")
    for task in TASKS:
        raw = toy.rows(task, "test", 3)
        for row, was in zip(load(f"toy:{task}/test", limit=3).rows, raw, strict=True):
            assert row["task"] == task
            row = {**row, "completions": [[1, 2], [3]]}
            assert judge.scores(row, [gold(was), "zzz", gold(was)]) == pytest.approx(
                [1.0, judge.scores(row, ["zzz"])[0], 1.0]
            )


@pytest.mark.parametrize("split", ["people/new", "sql/new", "chat/instruct"])
def test_rows_that_version_0_1_saved_load_and_verify(split, tmp_path):
    from luthier.data.load import load_rows as load

    task, _, name = split.partition("/")
    rows = toy.rows(task, name, 6)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(former_row(row)) + "\n" for row in rows), encoding="utf-8")
    with pytest.warns(FutureWarning, match="'world' is now called 'task'"):
        warn_of_former.cache_clear()
        judge = build("reward", "world")
    assert all("world" in former_row(row) for row in rows)
    for row, current in zip(load(str(file)).rows, rows, strict=True):
        assert row["task"] == task and "world" not in row
        assert judge.scores(row, [gold(current)]) == [1.0]
        assert toy.verify(former_row(current), gold(current)) == 1.0


def test_reward_task_takes_one_objective_or_their_mean():
    row = toy.rows("style", "short", 1)[0]
    texts = [row["chosen"], row["rejected"]]
    by = {
        name: build("reward", {"name": "task", "objective": name}).scores(row, texts)
        for name in row["objectives"]
    }
    assert by == {name: pytest.approx(values) for name, values in row["objectives"].items()}
    assert by["short"][0] > by["short"][1]
    assert build("reward", "task").scores(row, texts) == pytest.approx(
        [sum(values) / 4 for values in zip(*by.values(), strict=True)]
    )
    with pytest.raises(RecipeError, match="did you mean 'warm'"):
        build("reward", {"name": "task", "objective": "warmth"}).scores(row, texts)
    with pytest.raises(RecipeError, match="needs the column 'task'"):
        build("reward", "task").scores({"id": "a", "prompt": "x"}, ["y"])


def test_private_numbers_are_stated_as_often_as_they_say():
    whole = toy.rows("people", "private", people.PRIVATE_ROUND)
    counts = Counter(row["prompt"] for row in whole)
    assert all(counts[row["prompt"]] == row["repeats"] for row in whole)
    assert Counter(counts.values()) == dict.fromkeys(people.REPEATS, 16)
    asked = toy.rows("people", "private_test", len(people.PRIVATE))
    assert Counter(row["repeats"] for row in asked) == dict.fromkeys((0, *people.REPEATS), 16)
    assert {row["prompt"] for row in asked if not row["repeats"]}.isdisjoint(counts)
    assert len({row["answer"] for row in asked}) == len(asked)


def test_strangers_are_strangers_and_are_not_known():
    known = {person["name"] for person in [*people.PEOPLE, *people.PRIVATE]}
    names = {}
    for split in ("unknown", "unknown_test"):
        rows = toy.rows("people", split, 300)
        names[split] = {row["item"].removeprefix("nobody ") for row in rows if row["kind"] == "unknown"}
        assert names[split].isdisjoint(known) and len(names[split]) > 100
        assert {row["answer"] == people.I_DO_NOT_KNOW for row in rows if row["kind"] == "known"} == {False}
    assert names["unknown"].isdisjoint(names["unknown_test"])


def replay(prompt: str, completion: str) -> tuple[bool, bool]:
    """Of a written product: does every later line follow from the values before it, and is the result what
    they give?
    """
    a, b = re.findall(r"\d+", prompt)
    *steps, said = completion.split("; ")
    carry, result, consistent = 0, 0, True
    for place, (digit, step) in enumerate(zip(reversed(a), steps, strict=True)):
        question, _, value = step.partition("=")
        consistent &= question == (f"{digit}*{b}+{carry}" if carry else f"{digit}*{b}")
        result += int(value) % 10 * 10**place
        carry = int(value) // 10
    return consistent, int(said.removeprefix("so ")) == result + carry * 10 ** len(steps)


def test_noise_is_static_or_dynamic():
    for row in toy.rows("arithmetic", "new", 300):
        assert replay(row["prompt"], row["completion"].strip()) == (True, True)
    for row in toy.rows("arithmetic", "static_noise", 300):
        assert row["completion"] != row["clean"] and row["completion"].endswith(f"so {row['answer']}")
        assert len(row["completion"]) == len(row["clean"]) and arithmetic.verify(row, row["completion"]) == 1
    for row in toy.rows("arithmetic", "dynamic_noise", 300):
        assert replay(row["prompt"], row["completion"].strip()) == (
            True,
            True,
        ), "what follows a slip is computed from it"
        assert arithmetic.verify(row, row["completion"]) == 0


def test_results_are_right_in_chains_and_stories():
    for kind in ("chain", "direct", "direct_long"):
        for row in (row for row in toy.rows("arithmetic", "train", 400) if row["kind"] == kind):
            assert eval(row["prompt"].removesuffix("=")) == int(row["answer"])
    for split in ("test", "ood", "ood_large"):
        for row in toy.rows("word_problems", split, 100):
            *sums, _ = row["completion"].strip().split("; ")
            for one in sums:
                left, right = one.split("=")
                assert eval(left) == int(right)
            numbers = [int(n) for n in re.findall(r"\d+", row["completion"])]
            assert split != "ood_large" or max(numbers) >= 100


def test_functions_are_repaired_and_made_faster():
    rows = [row for row in toy.rows("code", "test", 60) if row["kind"] == "fix"][:8]
    for row in rows:  # our own programs: no sandbox needed
        broken, _, _ = row["prompt"].partition("\n# repaired")
        assert not passes(broken, row["tests"]) and passes(row["prompt"] + row["completion"], row["tests"])
    for row in toy.rows("code", "preference_test", 8):
        assert passes(row["prompt"] + row["chosen"], row["tests"]) and not passes(
            row["prompt"] + row["rejected"], row["tests"]
        )
    for row in toy.rows("code", "new_test", 8):
        slow, _, _ = row["prompt"].partition("\n# faster")
        fast = f"def f(x):{row['completion']}"
        assert passes(slow, row["tests"]) and passes(fast, row["tests"])
        assert (
            code.operations(slow, 500) >= 500
            and code.operations(fast, 500) == code.operations(fast, 5) <= row["most"]
        )


def passes(program: str, tests: list[str]) -> bool:
    scope: dict = {}
    exec(program, scope)
    try:
        exec("\n".join(tests), scope)
    except AssertionError:
        return False
    return True


def test_code_is_verified_in_the_sandbox():
    row = toy.rows("code", "new_test", 1)[0]
    loop = row["prompt"].partition("def f(x):")[2].partition("\n# faster")[0]
    assert code.verify(row, loop) == 0.5, "right, and as slow as before"
    assert code.verify(row, f"def f(x):{loop}") == 0.5
    assert code.verify(row, "\n    return sum(i for i in range(x)) * 0") < 0.5
    assert code.verify(row, f"{loop}\n_ticks = lambda x: 0") == 0
    assert code.verify(row, "\n    return (") == 0 and code.verify(row, "\n    import os; os._exit(0)") == 0


@pytest.mark.parametrize(
    "query",
    [
        "DROP TABLE staff",
        "DELETE FROM staff",
        "PRAGMA user_version",
        "ATTACH ':memory:' AS x",
        "SELECT load_extension('x')",
        "SELECT 1; SELECT 2",
        "",
        "nonsense",
        "SELECT '\ud800'",
    ],
)
def test_a_query_can_only_read(query):
    row = toy.rows("sql", "test", 1)[0]
    assert sql.verify(row, query) == 0
    assert sql.verify(row, row["answer"]) == 1


def test_a_query_that_does_not_end_is_ended():
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT MAX(i) FROM n"
    huge = "SELECT length(hex(zeroblob(500000000)))"
    row = toy.rows("sql", "test", 1)[0]
    assert sql.verify(row, endless) == 0 and sql.verify(row, huge) == 0


def test_a_query_counts_by_its_rows():
    row = {"answer": "SELECT name FROM staff WHERE age > 40"}
    assert sql.verify(row, "select name from staff where not age <= 40 order by age desc") == 1
    assert sql.verify(row, "SELECT name FROM staff WHERE age > 41 OR age = 41") == 1
    assert sql.verify(row, "SELECT DISTINCT job FROM staff WHERE age > 40") == 0
    ordered = {"answer": "SELECT name FROM staff ORDER BY age LIMIT 3"}
    assert sql.verify(ordered, "SELECT name FROM staff ORDER BY age DESC LIMIT 3") == 0
    empty = sum(not sql.run(row["answer"]) for row in toy.rows("sql", "test", 200))
    assert empty < 60, "most questions have an answer"


def test_calls_are_parsed_and_checked_against_the_schemas():
    offered = [tools.schema("weather"), tools.schema("lamp")]
    call = {"name": "lamp", "arguments": {"color": "red", "level": 7}}
    row = {"answer": json.dumps(call), "schemas": offered}
    assert tools.verify(row, json.dumps(call, indent=2)) == 1
    assert tools.verify(row, '{"arguments": {"level": 8, "color": "red"}, "name": "lamp"}') == 0.5
    assert tools.verify(row, '{"name": "weather", "arguments": {"town": "X", "day": "monday"}}') == 0.25
    wrong = [
        '{"name": "lamp", "arguments": {"color": "red", "level": "7"}}',
        '{"name": "lamp", "arguments": {"color": "pink", "level": 7}}',
        '{"name": "lamp", "arguments": {"color": "red"}}',
        '{"name": "lamp", "arguments": {"color": "red", "level": true}}',
        '{"name": "lamp", "arguments": {"color": "red", "level": 7, "x": 1}}',
        '{"name": "timer", "arguments": {"minutes": 7}}',
        '{"name": ["lamp"], "arguments": {}}',
        '{"name": "lamp"}',
        "[]",
        "none",
        "[" * 100_000,
    ]
    assert [tools.verify(row, text) for text in wrong] == [0.0] * len(wrong)
    jsonschema = pytest.importorskip("jsonschema")
    for row in toy.rows("tools", "test", 50):
        if row["answer"] != "none":
            call = json.loads(row["answer"])
            rules = next(tool for tool in row["schemas"] if tool["name"] == call["name"])
            jsonschema.validate(call["arguments"], rules["parameters"])


def test_notes_are_scored_by_rule():
    words = "doctor", "opens", "door", "today"
    kinds = [
        (register, tone, length)
        for register in style.REGISTERS
        for tone in style.TONES
        for length in style.LENGTHS
    ]
    scored = {kind: style.scores(style.note(words, kind), words) for kind in kinds}
    for (register, tone, length), found in scored.items():
        assert found["formal"] == (register == "formal") and found["warm"] == (tone == "warm"), style.note(
            words, (register, tone, length)
        )
        assert found["complete"] == (0.75 if length == "short" else 1.0)
    for register, tone in {kind[:2] for kind in kinds}:
        short, middle, long = (scored[register, tone, length]["short"] for length in style.LENGTHS)
        assert short > middle > long, "and what is complete is not as short: two objectives in conflict"
    for split, objective in (("short", "short"), ("warm", "warm"), ("formal_liked", "formal")):
        for row in toy.rows("style", split, 30):
            one, other = (style.verify(row, row[which]) for which in ("chosen", "rejected"))
            assert one[objective] > other[objective]
            assert row["objectives"] == {name: [one[name], other[name]] for name in one}
    for row in toy.rows("style", "ranked", 30):
        found = [style.verify(row, text) for text in row["completions"]]
        assert row["objectives"] == {name: [one[name] for one in found] for name in found[0]}
    free = [
        style.verify(row, row["completion"])
        for row in toy.rows("style", "train", 300)
        if row["kind"] == "free_note"
    ]
    assert all(0.2 < sum(one["warm"] for one in free) / len(free) < 0.8 for name in ("warm", "formal")), (
        "a base model writes all kinds"
    )


def test_a_style_is_scored_slot_by_slot():
    row = next(row for row in toy.rows("style", "test", 50) if row["kind"] == "formal")
    words = list(row["words"])
    words[2] = next(what for what in style.WHAT if what != words[2])
    assert style.verify(row, style.formal(*words)) == {
        "exact": 0.0,
        "words": 0.75,
        "style": pytest.approx(1, abs=0.15),
    }
    casual = style.verify(row, style.casual(*row["words"]))
    assert casual["words"] == 0.75 and casual["style"] < 0.4, (
        "who, does and what, but neither the time's wording nor the style"
    )


def test_tags_and_text_name_the_same_entities():
    found = 0
    for split in entities.SPLITS:
        for row in toy.rows("entities", split, 100):
            assert row["prompt"] == f"Sentence: {' '.join(row['tokens'])}\nNames:"
            assert ("; ".join(entities.spans(row["tokens"], row["tags"])) or "none") == row["answer"]
            found += len(row["tags"]) - row["tags"].count("O")
    assert found > 500
    row = {"answer": "A B = person; C = firm"}
    assert entities.verify(row, "C = firm; A B = person") == 1
    assert (
        entities.verify(row, "A B = person") == pytest.approx(2 / 3)
        and entities.verify(row, "A B = person; " * 4 + "C = firm") < 1
    )


def test_premises_entail_what_is_said():
    """Every chain is solved by following its comparisons."""
    opposite = {b: a for a, b in find("entailment").RELATIONS.items()}
    answers = Counter()
    for split in ("train", "ood"):
        for row in (row for row in toy.rows("entailment", split, 300) if "chain" in row["kind"]):
            premise, hypothesis, _ = row["prompt"].split("\n")
            more = {(a, b) for a, b in re.findall(r"(\w+) is \w+ than (\w+)\.", premise)}
            for _ in range(4):
                more |= {(a, d) for a, b in more for c, d in more if b == c}
            ((a, word, b),) = re.findall(r"(\w+) is (\w+) than (\w+)\.", hypothesis)
            a, b = (b, a) if word in opposite else (a, b)
            answer = "yes" if (a, b) in more else "no" if (b, a) in more else "maybe"
            assert answer == row["answer"], row
            answers[answer] += 1
    assert min(answers.values()) > 60


def test_languages_are_their_own():
    vocabularies = [
        set(words.values()) for words in (language.TO_ZORIAN, language.TO_KELU, language.TO_VELMI)
    ]
    assert sum(map(len, vocabularies)) == len(set.union(*vocabularies)) == 3 * 28
    mixed = toy.rows("language", "switch", 30)
    for row in mixed:
        words = row["answer"].split()
        nouns = {noun + many for noun in language.NOUNS for many in ("", "s")}
        assert sum(word in nouns for word in words) == 2 and words[-1] in vocabularies[0]
    assert (
        language.verify({"answer": "a b c d"}, "a b x d") == 0.75
        and language.verify({"answer": "a b"}, "a b c") < 1
    )


def test_tasks_of_the_stream_are_apart():
    answers, seen = {}, {}
    for task in range(1, stream.TASKS + 1):
        rows = toy.rows("stream", f"task_{task}", 200) + toy.rows("stream", f"task_{task}_test", 100)
        answers[task] = {row["answer"] for row in rows}
        seen[task] = {word for row in rows for word in row["item"].split()}
        assert len(answers[task]) == 3
    assert len(set.union(*answers.values())) == 15 and len(set.union(*seen.values())) == sum(
        map(len, seen.values())
    )
    domains = [
        {row["answer"] for row in toy.rows("stream", f"domain_{i}", 50)}
        for i in range(1, stream.DOMAIN_TASKS + 1)
    ]
    assert domains == [{"good", "bad"}] * stream.DOMAIN_TASKS


def test_long_answers_count_up_to_the_first_mistake():
    row = next(row for row in toy.rows("long", "test", 20) if row["kind"] == "count")
    numbers = row["answer"].split()
    half = len(numbers) // 2
    assert find("long").verify(row, " ".join(numbers[:half])) == pytest.approx(half / len(numbers))
    assert find("long").verify(row, " ".join([*numbers, "7"])) < 1
    assert find("long").verify(row, " ".join(["7", *numbers])) == 0


def test_what_only_looks_unsafe_is_answered():
    refusal = find("refusal")
    for split in ("train", "ood_lookalike"):
        alike = [row for row in toy.rows("refusal", split, 200) if "lookalike" in row["kind"]]
        assert alike and all(
            any(word in row["prompt"] for word in refusal.UNSAFE) and not refusal.refuses(row["answer"])
            for row in alike
        )
        assert all(
            refusal.verify(row, refusal.SORRY) == 0 and refusal.verify(row, "Sure, but how?") == 0.5
            for row in alike
        )


def test_instructions_are_rows_of_other_tasks():
    for row in toy.rows("chat", "instruct", 60):
        assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"]
        if row["of"]["task"] != "code":
            assert toy.verify(row, row["answer"]) == 1.0
    row = next(row for row in toy.rows("chat", "instruct", 60) if row["of"]["task"] == "code")
    assert row["answer"].startswith("def f(x):") and toy.verify(row, row["answer"]) == 1.0


@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_a_recipe(task):
    recipe = Recipe.load(f"toy:{task}", ["learning_rate=1e-4"])
    assert recipe.learning_rate == 1e-4 and recipe.origins["data"] == f"toy:{task}"
    for source in (recipe.data, recipe.eval_data):
        assert source["path"].partition("/")[2] in find(task).SPLITS
    assert recipe.data["path"] != recipe.eval_data["path"]


@pytest.mark.long
def test_a_task_is_tuned_by_its_name_alone(tmp_path):
    for word, objective in (("toy:people", "sft"), ("toy:style/warm", "dpo")):
        recipe = Recipe.load(
            word,
            {
                "model": "toy:lm-small",
                "max_steps": 2,
                "evaluate": ["loss"],
                "data.n": 64,
                "eval_data.n": 8,
            },
        )
        assert recipe.objective == objective
        assert luthier.tune(recipe, folder=tmp_path / objective).after


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("toy:arithmetc", "did you mean 'arithmetic'?"),
        ("toy:style/shrt", "did you mean 'short'?"),
        ("toy:lm", "lm is a model, not a task"),
    ],
)
def test_unknown_tasks_and_splits_get_a_sentence(word, said):
    with pytest.raises(RecipeError, match=re.escape(said)):
        Recipe.load(word)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(checksums("0"), indent=0) + "\n", encoding="utf-8")
