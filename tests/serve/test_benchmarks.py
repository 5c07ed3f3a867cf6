"""Public benchmarks through lm-eval: a task of our own from a local file, before and after, and what it asks
equal to what a model answers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import luthier
from helpers.models import make_llama, make_tokenizer
from luthier.cli import app
from luthier.errors import RecipeError
from luthier.serve import benchmarks

CHOICE = """\
task: stub_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}="
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
ANSWER = """\
task: stub_answer
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}="
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 3}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def stubs(tmp_path) -> Path:
    """A folder of two tasks: sums with two choices, and the same to be answered."""
    rows = []
    for a in range(6):
        for b in range(6):
            rows.append({"question": f"{a}+{b}", "choices": [str(a + b), str(a + b + 3)]})
    data = tmp_path / "sums.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for name, text in (("choice", CHOICE), ("answer", ANSWER)):
        text = text.format(data=data, cache=tmp_path / "cache")
        (tasks / f"{name}.yaml").write_text(text, encoding="utf-8")
    return tasks


def test_without_lm_eval_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(RecipeError, match=r"pip install 'luthier\[benchmarks\]'"):
        benchmarks.evaluate("toy:lm", ["arc_easy"])


@pytest.mark.long
def test_a_run_and_its_base_on_the_same_questions(stubs, base, tmp_path):
    pytest.importorskip("lm_eval")
    run = tmp_path / "run"
    luthier.tune({**base, "max_steps": 30, "learning_rate": 3e-3, "output_dir": str(run)})
    names = "stub_choice,stub_answer"
    done = CliRunner().invoke(
        app, ["evaluate", str(run), "--tasks", names, "--include", str(stubs), "--limit", "20", "--json"]
    )
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    lines = {(line["task"], line["metric"]): line for line in result["results"]}
    choice, answer = lines["stub_choice", "acc"], lines["stub_answer", "exact_match"]
    for line in (choice, answer):
        assert line["rows"] == 20 and line["low"] <= line["difference"] <= line["high"]
        assert line["difference"] == pytest.approx(line["after"] - line["before"])
    assert json.loads((run / "benchmarks.json").read_text(encoding="utf-8"))["benchmarks"] == [result]
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Public benchmarks" in page and "stub_choice acc" in page
    # what lm-eval makes of transformers' own model, and of the answers of `luthier.load`
    assert choice["after"] == pytest.approx(_by_transformers(run, stubs))
    loaded = luthier.load(run)
    right = 0
    for line in (stubs.parent / "sums.jsonl").read_text(encoding="utf-8").splitlines()[:20]:
        row = json.loads(line)
        right += loaded.generate(f"{row['question']}=", max_new_tokens=3).split("\n")[0] == row["choices"][0]
    assert answer["after"] == right / 20


def _by_transformers(run: Path, stubs: Path) -> float:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(pretrained=str(run), device="cpu", dtype="float32")
    manager = TaskManager(include_path=str(stubs))
    done = simple_evaluate(
        model=model, tasks=["stub_choice"], limit=20, task_manager=manager, bootstrap_iters=0
    )
    return done["results"]["stub_choice"]["acc,none"]


def test_names_are_checked_before_a_model_is_loaded(stubs):
    pytest.importorskip("lm_eval")
    with pytest.raises(RecipeError, match="no task 'stub_choise'; did you mean 'stub_choice'"):
        benchmarks.evaluate("nowhere", ["stub_choise"], include=stubs)


def made_with_bos(folder: Path) -> str:
    """A tiny model of 40 positions, whose tokenizer puts a token before every text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<|system|>"
    before = ("<|system|>", tokenizer.bos_token_id)
    tokenizer._tokenizer.post_processor = TemplateProcessing("<|system|> $A", special_tokens=[before])
    tokenizer.save_pretrained(folder)
    make_llama(num_hidden_layers=1, max_position_embeddings=40).save_pretrained(folder)
    return str(folder)


@pytest.mark.long
def test_what_texts_begin_with_and_what_is_cut(tmp_path):
    pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    from luthier.serve.benchmarks.adapter import Adapter

    folder = made_with_bos(tmp_path)
    ours, theirs = Adapter(luthier.load(folder)), HFLM(pretrained=folder, device="cpu", dtype="float32")
    pairs = [("two and", " two"), ("", "two"), ("<|system|>two", " four"), ("two ", "four")]
    requests = [SimpleNamespace(args=pair) for pair in pairs]
    same = zip(ours.loglikelihood(requests), theirs.loglikelihood(requests), strict=True)
    for (mine, greedy), (other, best) in same:
        assert mine == pytest.approx(other, abs=1e-4) and greedy == best
    # of what has no room the beginning is cut; a whole text begins with the token once
    assert ours.fitted([*range(50)], [7, 8, 9]) == ([*range(13, 50)], [7, 8, 9])
    assert ours.fitted([1, 2], [*range(40)]) == ([0], [*range(1, 40)])
    assert ours.fitted([], [7]) == ([ours.prefix_token_id], [7])
    text = "two and two are four. " * 4
    (whole,) = ours.loglikelihood_rolling([SimpleNamespace(args=(text,))])
    ids = ours.tok_encode(text)
    assert len(ids) > 2 * 40 and ids[0] == ours.prefix_token_id and whole < 0
    with pytest.raises(RecipeError, match="answers of 40 tokens"):
        ours.generate_until([SimpleNamespace(args=("two", {"max_gen_toks": 40}))])
    # through the run's own chat, as in training: its switches, and a typed special token stays text
    turns = [{"role": "user", "content": "<|end|>two"}]
    chat = Adapter(luthier.load(folder, chat_template_kwargs={"x": 1}), chat=True)
    assert chat.renderer.chat.options == {"x": 1}
    assert chat.tok_encode(chat.apply_chat_template(turns)) == chat.renderer.prompt({"prompt": turns})
