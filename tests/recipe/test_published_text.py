"""Published pipelines for instructions, editing, plans and languages, at toy scale."""

from __future__ import annotations

from collections import Counter
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import luthier
from helpers.models import make_llama, make_tokenizer
from helpers.published import logged, tune_toy
from luthier import toy
from luthier.data.load import load_rows
from luthier.methods.evaluators.quality.offers import rates
from luthier.methods.stages.curate.motion_tokens.codec import MotionCodec
from luthier.recipe.published import find_published
from luthier.recipe.recipe import Recipe
from luthier.registry import build, names
from luthier.storage.files import read_rows


def rows_of(folder: str | Path) -> list[dict]:
    return list(read_rows(Path(folder) / "rows.jsonl"))


def mean_logprob(folder: str | Path, rows: list[dict]) -> float:
    return luthier.load(folder).logprobs(rows).mean().item()


@pytest.mark.slow
@pytest.mark.long
def test_octo_planner_merges_two_domains(tmp_path):
    """The merged adapter is better at each domain than the other domain's adapter."""
    report = tune_toy("octo-planner", tmp_path)
    first, second, merged = report.runs
    for own, other, task in ((first, second, "language/new"), (second, first, "arithmetic/new")):
        rows = load_rows({"path": f"toy:{task}", "n": 24}).rows
        alone, wrong, both = (mean_logprob(folder, rows) for folder in (own, other, merged))
        assert wrong < both and both - wrong > 0.3 * (alone - wrong), task


@pytest.mark.slow
@pytest.mark.long
def test_coedit_follows_the_instruction(tmp_path):
    words = "Red Fox Dog Sun Sea Owl Bee Tea".split()
    rows = []
    for a in words:
        for b in words:
            rows.append({"prompt": f"Make small: {a} {b}", "completion": f"{a} {b}".lower()})
            rows.append({"prompt": f"Turn round: {a} {b}", "completion": f"{b} {a}"})
    report = tune_toy("coedit", tmp_path, {"edits": rows}, {"max_steps": 60})
    model = luthier.load(report.folder)
    right = [
        model.generate(row["prompt"], max_new_tokens=12).strip() == row["completion"] for row in rows[::9]
    ]
    assert sum(right) > 0.7 * len(right)


@pytest.mark.long
def test_opt_iml_mixes_under_a_cap_and_holds_out(tmp_path):
    """No row of a dropped group is trained on, and a task counts no more than the cap: 48 to 32."""
    report = tune_toy("opt-iml", tmp_path)
    counts = Counter(row["task"] for row in rows_of(report.folder))
    assert counts.keys() == {"language", "arithmetic"}
    share = counts["language"] / counts.total()
    assert abs(share - 48 / 80) < 0.12, "not 96 to 32"
    assert logged(report.folder, "loss")[-1] < logged(report.folder, "loss")[0]


@pytest.mark.slow
@pytest.mark.long
def test_anytasktune_leaves_out_what_breaks_its_schema(tmp_path):
    """Answers that are no JSON object leave; each sub-task's model is the better one at its own rows."""
    own = load_rows({"path": "toy:tools/new", "n": 32}).rows
    broken = [{"prompt": f"Call {k}:", "completion": " not json"} for k in range(4)]
    other = [{"prompt": f"Color {k}:", "completion": f' {{"color": {k}}}'} for k in range(12)]
    report = tune_toy(
        "anytasktune", tmp_path, {"first": [*toy.rows("tools", "new", 32), *broken], "second": other}
    )
    learned = rows_of(report.runs[0])
    assert learned and not any(row["prompt"].startswith("Call ") for row in learned)
    first, second = (luthier.load(folder) for folder in report.runs)
    assert first.logprobs(own).mean() > second.logprobs(own).mean()
    assert second.logprobs(other).mean() > first.logprobs(other).mean()


@pytest.mark.slow
@pytest.mark.long
def test_a_chatbot_by_adapters_alone(tmp_path):
    """Two adapters without weights of the base, which load and answer in their own way."""
    report = tune_toy("vietnamese-lora-chat", tmp_path)
    for folder in report.runs:
        assert (Path(folder) / "adapter_model.safetensors").is_file()
        assert not (Path(folder) / "model.safetensors").exists()
    rows = load_rows({"path": "toy:language/new", "n": 16}).rows
    assert mean_logprob(report.runs[0], rows) > mean_logprob(report.runs[1], rows)


@pytest.mark.slow
@pytest.mark.long
def test_legal_texts_first(tmp_path):
    """More texts of the field before SFT: the answers are likelier than after SFT alone."""
    answers = toy.rows("language", "new", 64)
    texts = [{"text": f"{row['prompt']}{row['completion']}"} for row in answers]
    both = tune_toy("nyayaanumana-inlegalllama", tmp_path / "both", {"corpus": texts, "cases": answers})
    alone = tune_toy(
        "nyayaanumana-inlegalllama",
        tmp_path / "alone",
        {"corpus": texts, "cases": answers},
        {"plan": [{"max_steps": 1}, {}]},
    )
    test = load_rows({"path": "toy:language/new_test", "n": 24}).rows
    assert mean_logprob(both.runs[1], test) > mean_logprob(alone.runs[1], test)


@pytest.mark.long
def test_few_rows_of_the_right_length(tmp_path):
    """Of the long rows those of another length, or of none, leave both runs; chat stays in the first."""
    report = tune_toy("min-tuning-long-output", tmp_path)
    rows = find_published("min-tuning-long-output").rows["long"].toy
    good = {row["prompt"] for row in rows[:3]}
    first, second = (rows_of(folder) for folder in report.runs)
    assert {row["prompt"] for row in second} <= good
    assert {row["prompt"] for row in first if "threshold" in row} <= good and len(first) > 20


@pytest.mark.slow
@pytest.mark.long
def test_lifted_pairs_hold_in_another_field(tmp_path):
    """Words that were never trained on: lifted, their formula is likelier than unlifted."""
    pairs = find_published("nl2tl").rows["lifted"].toy
    report = tune_toy("nl2tl", tmp_path, changes={"eval_data": pairs})
    row = {"id": "r", "prompt": "valve shut until tank full", "completions": ["( v1 U t2 )"]}
    row["propositions"] = [["valve shut", "v1"], ["tank full", "t2"]]
    (lifted,) = build("stage", "lift")([row], None)
    model = luthier.load(report.runs[0])
    assert model.logprobs([lifted]).mean() > model.logprobs([row]).mean()
    assert model.logprobs([lifted]).mean() > -0.5


@pytest.mark.slow
@pytest.mark.long
def test_an_agent_offers_help_where_it_is_needed(tmp_path):
    """The agent's F1 beats that of one that always offers, and the judge's verdicts are right."""
    rows = find_published("proactive-agent").rows
    judgements, steps = rows["judgements"].toy, rows["steps"].toy
    report = tune_toy("proactive-agent", tmp_path, changes={"eval_data": judgements})
    judge, agent = (luthier.load(folder) for folder in report.runs)
    verdicts = [judge.generate(row["prompt"], max_new_tokens=8).strip() for row in judgements]
    assert verdicts == [row["completion"].strip() for row in judgements]
    outcomes = []
    for row in steps:
        need = row["completion"] != " none"
        offer = agent.generate(row["prompt"], max_new_tokens=8).strip() != "none"
        outcomes.append((need, offer, offer))
    always = [(need, True, True) for need, _, _ in outcomes]
    assert rates(outcomes)["offer_f1"] > 0.85 > rates(always)["offer_f1"]


@pytest.mark.long
def test_the_guides_stages_are_there(tmp_path):
    """Techniques that the guide names are methods here, and its recipe ends in a report for each run."""
    techniques = {
        "tuner": ("full", "lora", "hft", "pruned"),
        "objective": ("ppo", "dpo", "orpo", "sft"),
        "quantizer": ("nf4", "gptq", "awq"),
        "searcher": ("random", "bayes"),
        "stage": ("deduplicate", "decontaminate"),
        "evaluator": ("loss", "refusals", "calibration", "forgetting"),
        "exporter": ("vllm", "merged", "gguf"),
    }
    for kind, methods in techniques.items():
        assert set(methods) <= set(names(kind)), kind
    report = tune_toy("ultimate-guide-finetuning", tmp_path, changes={"evaluate": ["loss"]})
    assert len(report.runs) == 2
    assert all((Path(folder) / "report.json").is_file() for folder in report.runs)


def test_points_trains_on_the_least_surprising_fifth(roles):
    """Of 40 captions exactly the eight whose perplexity, exp of the mean loss, is lowest."""
    rows = [{"id": str(k), "prompt": "look:", "completions": [f"a {k} b {k * k}"]} for k in range(40)]
    for stage in find_published("points-vlm").recipe["plan"][0]["stages"]:
        rows = list(build("stage", stage)(rows, roles))
    every = [{"id": str(k), "prompt": "look:", "completions": [f"a {k} b {k * k}"]} for k in range(40)]
    batch = roles.batch(every)
    losses = -batch.means(roles.policy.logprobs(batch).detach())
    lowest = {str(k) for k in losses.argsort()[:8].tolist()}
    assert {row["id"] for row in rows} == lowest
    for row in rows:
        assert row["perplexity"] == pytest.approx(float(losses[int(row["id"])].exp()), rel=1e-3)


def test_the_answer_that_agrees_with_the_clip_is_chosen():
    """Of planted answers the one with the clip's words wins in every row, and rows of equal ones leave."""
    plan = find_published("videosavi").recipe["plan"]
    shows = ["a red ball rolls left", "two dogs jump", "the cup falls off the table"]
    rows = []
    for k in range(60):
        clip = shows[k % 3]
        answers = [shows[(k + 1) % 3], "nothing happens", "someone sings"]
        answers.insert(k % 4, f"in the clip {clip}")
        rows.append({"id": str(k), "prompt": "What happens?", "answer": clip, "completions": answers})
    rows.append({"id": "tie", "prompt": "Who?", "answer": "cat", "completions": ["xx", "yy"]})
    scored = build("stage", {"name": "score", "reward": [plan["reward"]]})(rows, None)
    clock = SimpleNamespace(step=0, first=0)
    roles = SimpleNamespace(clock=clock, warn=lambda sentence: None, dropped={})
    pairs = list(build("stage", {"name": "pairs", "margin": plan["margin"]})(scored, roles))
    assert len(pairs) == 60 and all(row["answer"] in row["completions"][0] for row in pairs)
    assert all(row["scores"][0] > row["scores"][1] for row in pairs)


@pytest.mark.long
def test_the_task_token_decides_the_kind_of_answer(tmp_path):
    """Behind an unseen sequence the likeliest token is one of the two answers of the task."""
    tasks = {"promoter": "A", "enhancer": "C", "splice": "G"}
    sequences = ["".join(bases) for bases in product("ACGT", repeat=3)]
    rows = []
    for sequence in sequences[::2]:
        for task, base in tasks.items():
            answer = "is" if sequence[0] == base else "no"
            rows.append({"prompt": f"{sequence}<{task}>", "completion": f"<{answer}_{task}>"})
    make_llama(num_hidden_layers=2).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    changes = {"model": str(tmp_path / "base"), "learning_rate": 1e-2, "max_steps": 40}
    report = tune_toy("omni-dna", tmp_path / "run", {"tasks": rows}, changes)
    loaded = luthier.load(report.folder)
    number = loaded.tokenizer.convert_tokens_to_ids
    for task in tasks:
        answers = {number(f"<is_{task}>"), number(f"<no_{task}>")}
        for sequence in sequences[1::6]:
            row = {"id": sequence, "prompt": f"{sequence}<{task}>", "completions": [f"<is_{task}>"]}
            prompt = torch.tensor([loaded.roles.renderer.encode(row).prompt])
            with torch.no_grad():
                assert int(loaded.model(prompt).logits[0, -1].argmax()) in answers


def test_if_wraner_reads_definitions_and_examples(tmp_path):
    """What is trained on has the definitions of its prompt's types, and an answer in their names."""
    report = luthier.tune(Recipe.load("recipe:if-wraner"), folder=tmp_path)
    definitions = find_published("if-wraner").recipe["stages"][0]["definitions"]
    for row in rows_of(report.folder):
        for name, own in row["renamed"].items():
            assert f"{name}: {definitions[own]}" in row["prompt"]
        assert {entity["type"] for entity in row["entities"]} <= row["renamed"].keys()
    assert {"entity_f1", "readable_lists"} <= report.after.keys()


@pytest.mark.long
def test_vega_labels_inputs_without_labels(tmp_path):
    """Pseudo labels are on inputs without labels alone, and are labels of the task."""
    report = tune_toy("vega-v1", tmp_path)
    pipeline, (first, second, third) = find_published("vega-v1"), report.runs
    texts = [row["prompt"] for row in pipeline.rows["unlabelled"].toy]
    assert sorted(row["prompt"] for row in rows_of(second)) == sorted(texts)
    assert {row["completions"][0].strip() for row in rows_of(second)} <= {"money", "sport"}
    for folder in (first, third):
        written = (Path(folder) / "recipe.yaml").read_text(encoding="utf-8")
        assert "the market rose" not in written, "the true labels, and no others"
    assert all(value > 0 for value in logged(third, "divergence"))


@pytest.mark.long
def test_pivotal_weights_forget_less_than_all(tmp_path):
    """Where the concepts are known better than after full tuning, less of other skills is lost."""
    concepts = find_published("dreamstyler-music").rows["concepts"].toy
    before = load_rows({"path": "toy:word_problems/test", "n": 24}).rows
    ways = {"pivotal": {"learning_rate": 2e-3, "max_steps": 40}}
    ways["full"] = {"learning_rate": 1e-3, "max_steps": 6, "tuner": "full", "add_tokens": {"train": "auto"}}
    start, learned, forgotten = mean_logprob("toy:lm-small", before), {}, {}
    for name, changes in ways.items():
        rows = {"concepts": concepts, "prior": concepts}
        folder = tune_toy("dreamstyler-music", tmp_path / name, rows, changes).folder
        learned[name] = mean_logprob(folder, load_rows(concepts).rows)
        forgotten[name] = start - mean_logprob(folder, before)
    assert learned["pivotal"] > learned["full"] + 0.2
    assert forgotten["pivotal"] < 0.6 * forgotten["full"]


@pytest.mark.long
def test_captions_and_motions_are_aligned(tmp_path):
    """A caption's own motion is likelier than the others'; both runs have one codec, and a grammar of the
    tokens' ids lets a model write nothing but a motion, which has frames.
    """
    pytest.importorskip("llguidance")
    changes = {"plan": [{"max_steps": 25}, {"max_steps": 15}]}
    report = tune_toy("motiongpt-2", tmp_path, changes=changes)
    codec, other = (Path(run) / "motion_codec.safetensors" for run in report.runs)
    assert codec.read_bytes() == other.read_bytes()
    model = luthier.load(report.folder)
    rows = [row for row in rows_of(report.runs[1]) if row["id"].endswith("/0")]
    for row in rows:
        own = model.logprobs([row]).mean()
        for another in rows:
            if another["motion_codes"] != row["motion_codes"]:
                assert own > model.logprobs([{**row, "completions": another["completions"]}]).mean()
    number = model.tokenizer.convert_tokens_to_ids
    begin, end, low, high = map(number, ("<motion_start>", "<motion_end>", "<motion_0>", "<motion_15>"))
    grammar = f"start: <[{begin}]> <[{low}-{high}]>{{1,4}} <[{end}]>"
    decoder = {"name": "structured_outputs", "grammar": grammar}
    prompts = [row["prompt"] for row in rows]
    how = {"max_new_tokens": 6, "temperature": 1.0, "seed": 0}
    for text in [
        *model.generate(prompts, decoder=decoder, **how),
        *model.generate(["A", "b"], decoder=decoder, **how),
    ]:
        ids = model.tokenizer(text, add_special_tokens=False).input_ids
        assert ids[0] == begin and ids[-1] == end and all(low <= token <= high for token in ids[1:-1])
        frames = MotionCodec.load(codec).decode_text(text)
        assert frames.shape == (4 * (len(ids) - 2), 2) and frames.isfinite().all()
