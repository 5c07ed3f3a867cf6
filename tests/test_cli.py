"""The command line as a user meets it: exit codes, sentences, listings, and that it starts without loading a
network.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import luthier
from helpers.rows import SUMS
from luthier.cli import app
from luthier.cli.options import method_names, recipe_words
from luthier.model import loaded as use
from luthier.recipe import catalogue
from luthier.serve import export, inspect, source

HEAVY = ("torch", "transformers", "peft", "accelerate", "datasets", "numpy")


def luth(*words: str, **how):
    return CliRunner().invoke(app, [str(w) for w in words], **how)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "sums.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in SUMS), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(tiny, rows, tmp_path_factory):
    """A run of a few steps, made on the command line, and what was printed."""
    folder = tmp_path_factory.mktemp("runs") / "sums"
    evaluate = "evaluate=[loss, accuracy, {name: generate, n: 3, max_new_tokens: 4}]"
    said = luth(
        "tune",
        "--model",
        tiny,
        "--data",
        rows,
        "--output-dir",
        folder,
        "max_steps=6",
        "learning_rate=0.02",
        evaluate,
    )
    assert said.exit_code == 0, said.output
    return folder, said.stdout


LISTINGS = [["--help"], ["--version"], ["methods", "--json"], ["papers", "lora"], ["tune", "--help"]]
LISTING = """
import contextlib, io, json, sys
heavy, listings = json.loads(sys.argv[1])
def loaded(names):
    return [name for name in names if name in sys.modules]
import luthier
print(json.dumps(loaded([*heavy, "pydantic", "typer", "yaml"])))
from luthier.cli import app
for words in listings:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        app(words)
    print(json.dumps([words, loaded(heavy)]))
"""


def test_neither_import_nor_listings_load_a_network():
    """One after the other in one process: what one of them loads would be seen at the next, too."""
    words = json.dumps([HEAVY, LISTINGS])
    done = subprocess.run([sys.executable, "-c", LISTING, words], capture_output=True, text=True, check=True)
    imported, *listed = map(json.loads, done.stdout.splitlines())
    assert imported == []
    assert listed == [[words, []] for words in LISTINGS]


def test_python_dash_m():
    done = subprocess.run(
        [sys.executable, "-m", "luthier", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"luthier {luthier.__version__}"


def test_version_and_help():
    assert luth("--version").stdout.strip() == f"luthier {luthier.__version__}"
    said = luth("--help").stdout
    assert all(
        verb in said
        for verb in ("tune", "chat", "methods", "papers", "explain", "doctor", "inspect", "export")
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["tune", "nowhere.yaml"], "recipe file nowhere.yaml does not exist"),
        (["tune", "a.yaml", "b.yaml"], "one recipe at a time"),
        (["tune", "--tuner", "lorra", "--data", "x.jsonl"], "did you mean 'lora'"),
        (["tune", "learning_rat=1"], "did you mean 'learning_rate'"),
        (["explain", "objective.beat=1", "objective=dpo"], "has no setting 'beat'"),
        (["methods", "--kind", "tuna"], "did you mean 'tuner'"),
        (["methods", "autopet"], "there is no method 'autopet'; did you mean 'autopeft'"),
        (["methods", "lora", "--kind", "objective"], "there is no objective 'lora'"),
        (["chat", "./nowhere"], "folder ./nowhere does not exist"),
        (["chat", "./nowhere", "--decoder", "urian"], "did you mean 'urial'"),
        (["export", "./nowhere", "--output-dir", "x", "--as", "gg"], "there is no export format 'gg'"),
        (["export", "./nowhere", "--output-dir", "x", "--as", "onnx"], "optimum-cli export onnx"),
        (["export", "./nowhere", "word", "--output-dir", "x"], "'word' is no setting"),
        (["export", "./nowhere", "r=2", "--output-dir", "x"], "has no setting 'r'"),
        (["push", "./nowhere"], "luthier push RUN OWNER/NAME"),
        (["push", "./nowhere", "a/b", "merge=true"], "name it with --as"),
        (["inspect", "toy:lm", "toy:lm"], "with --data"),
    ],
)
def test_what_cannot_work_is_one_sentence_and_exit_2(words, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = luth(*words)
    assert said.exit_code == 2
    assert (
        sentence in said.stderr
        and "Traceback" not in said.stderr
        and len(said.stderr.strip().splitlines()) == 1
    )
    assert not list(tmp_path.iterdir())


def test_the_order_of_changes_does_not_matter():
    values, _ = catalogue.explain(*recipe_words(["tuner.r=3", "tuner=lora"], objective="dpo"))
    assert [v.value for v in values if v.key in ("tuner.r", "objective.name")] == [3, "dpo"]


def test_ctrl_c_says_that_it_goes_on(monkeypatch, rows):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("luthier.run.run.perform", stop)
    said = luth("tune", "--data", rows)
    assert said.exit_code == 130 and "run the same command again to continue" in said.stderr
    assert len(said.stderr.strip().splitlines()) == 1


def test_methods_as_json():
    found = json.loads(luth("methods", "--json").stdout)
    keys = {"kind", "name", "paper", "rows", "requires", "provides", "metrics", "summary"}
    assert keys == set(found[0])
    assert all(m["summary"] for m in found)
    lora = next(m for m in found if (m["kind"], m["name"]) == ("tuner", "lora"))
    assert lora["paper"] == "arXiv:2106.09685" and "low-rank" in lora["provides"]
    assert {m["kind"] for m in json.loads(luth("methods", "--kind", "tuner", "--json").stdout)} == {"tuner"}


def test_one_method_tells_its_settings():
    said = luth("methods", "autopeft").stdout
    assert (
        "serial: 16  # width of the bottleneck" in said
        and "non_linearity: relu  # nonlinearity of both bottlenecks" in said
        and "name: autopeft" in said
    )
    assert luth("methods", "dora").stdout.startswith(
        "`dora` is short for `{name: lora, use_dora: true}`.\n\nlora (tuner)\n\nUse it when "
    )
    both = luth("methods", "self_tuning").stdout
    assert "tuner: self_tuning" in both and "estimator: self_tuning" in both
    assert "In a recipe: tuner: " not in luth("methods", "self_tuning", "--kind", "estimator").stdout
    assert [m["kind"] for m in json.loads(luth("methods", "self_tuning", "--json").stdout)] == [
        "tuner",
        "estimator",
    ]


def test_papers_cover_the_catalogue():
    found = json.loads(luth("papers", "--json").stdout)
    assert len(found) == len({p["row"] for p in found}) == 322
    keys = {"row", "title", "kind", "family", "by", "coverage", "adjacent"}
    assert all(set(p) == keys and p["title"] for p in found)
    ssf = next(p for p in found if p["row"] == "ssf")
    assert ssf["by"] == ["tuner/ssf"]
    assert any(p["by"] == [] for p in found)


def test_papers_are_found_by_word_method_and_family():
    assert any(p["row"] == "ssf" for p in catalogue.papers("tuner/ssf"))
    assert all("tuners.prompt" == p["family"] for p in catalogue.papers("tuners.prompt"))
    assert catalogue.papers("NO SUCH WORD") == []


def test_every_row_of_a_declaration_is_in_the_catalogue():
    known = {p["name"] for p in catalogue.all_papers()}
    assert set(catalogue.implemented()) <= known


def test_at_a_pipe_there_are_no_colours_and_a_line_for_each():
    said = luth("methods", "--kind", "optimizer").stdout
    assert "\x1b" not in said and len(said.splitlines()) == len(catalogue.methods("optimizer"))


def test_papers_are_made_from_a_jsonl(tmp_path, monkeypatch):
    source = tmp_path / "rows.jsonl"
    source.write_text(
        json.dumps({"id": 1, "name": "n", "title": "T", "kind": "method", "family": "f", "essence": "long"})
        + "\n"
    )
    monkeypatch.setattr(catalogue, "PAPERS", tmp_path / "papers.json")
    assert catalogue.write_papers(source) == 1
    assert json.loads((tmp_path / "papers.json").read_text()) == [
        {"name": "n", "title": "T", "kind": "method", "family": "f"}
    ]


def test_explain_tells_where_each_value_came_from(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("data: x.jsonl\ntuner: {name: lora, r: 4}\nobjective: dpo\nlr: 0.01\n")
    said = luth("explain", recipe, "tuner.lora_alpha=64", "seed=3", "--json")
    values = {v["key"]: (v["value"], v["origin"]) for v in json.loads(said.stdout)}
    assert values["learning_rate"] == (0.01, "r.yaml")
    assert values["seed"] == (3, "command line")
    assert values["tuner.r"] == (4, "r.yaml") and values["tuner.name"] == ("lora", "r.yaml")
    assert values["tuner.lora_alpha"] == (64, "command line")
    assert values["tuner.lora_dropout"][1] == "default"
    assert values["objective.name"] == ("dpo", "r.yaml") and values["objective.beta"][1] == "default"
    assert values["max_bad_rows"] == (0.05, "default")
    assert "'lr' is read as 'learning_rate'" in said.stderr


def test_explain_covers_every_key():
    from dataclasses import fields

    from luthier.recipe.recipe import HIDDEN

    values, _ = catalogue.explain(None)
    assert {v.key.split(".")[0] for v in values} == {f.name for f in fields(luthier.Recipe)} - set(HIDDEN)
    assert {v.origin for v in values if v.key != "learning_rate"} == {"default"}
    assert [v.origin for v in values if v.key == "learning_rate"] == ["default: tuner lora 0.0002"]


def test_a_setting_at_the_top_is_explained_where_it_went(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("lora_rank: 3\n")
    values, told = catalogue.explain(recipe)
    assert [(v.value, v.origin) for v in values if v.key == "tuner.r"] == [(3, "r.yaml")]
    assert any("tuner.r" in t for t in told)


def test_tune_prints_rows_answers_a_table_and_the_page(finished):
    folder, said = finished
    assert "⟦" in said and "step 6/6" in said and "held-out rows " not in said.split("step 6/6")[0]
    assert f"Report: {folder / 'report.html'}" in said
    assert "\x1b" not in said
    assert json.loads((folder / "shown.json").read_text())
    again = luth("tune", folder)
    assert again.exit_code == 0 and "nothing to do" in again.stdout


def test_quiet_prints_the_folder(finished):
    folder, _ = finished
    assert luth("tune", folder, "--quiet", "output_dir=" + str(folder)).stdout.strip() == str(folder)


def test_chat_answers_once_and_in_turn(finished):
    folder, _ = finished
    once = luth("chat", folder, "--prompt", "1+1=", "--max-new-tokens", "4")
    assert once.exit_code == 0 and len(once.stdout.strip()) <= 8
    talk = luth("chat", folder, "--max-new-tokens", "4", input="1+2=\n/new\n/quit\n")
    assert talk.exit_code == 0 and "plain text completion" in talk.stdout
    assert luth("chat", folder, "--max-new-tokens", "4", input="").exit_code == 0


def test_load_asks_in_the_form_it_was_tuned_on(finished, tiny):
    # prompts were plain text, though the tokenizer has a chat template
    assert use.load(finished[0]).turns is False
    bare = use.load(tiny)
    assert bare.turns is True
    assert len(bare.generate(["1+1=", [{"role": "user", "content": "Hi"}]], max_new_tokens=3)) == 2


@pytest.mark.slow
def test_inspect_compares_on_the_same_rows(finished, tiny):
    folder, _ = finished
    found = json.loads(luth("inspect", tiny, folder, "--json").stdout)
    assert found["base"]["metrics"]["loss"] > found["tuned"]["metrics"]["loss"]
    assert found["base"]["rows"] == found["tuned"]["rows"] == found["rows"] > 0
    report = json.loads((folder / "report.json").read_text())
    assert found["tuned"]["metrics"]["loss"] == pytest.approx(report["after"]["loss"], rel=0.05)
    # few rows, of which some are held out nevertheless
    assert "|held-out rows " in luth("inspect", tiny, folder).stdout


def test_inspect_fails_where_a_condition_holds(finished, tiny):
    folder, _ = finished
    fine = luth("inspect", tiny, folder, "--fail-if", "loss > 0")
    assert fine.exit_code == 0 and "Gained: " in fine.stdout
    failed = luth("inspect", tiny, folder, "--json", "--fail-if", "loss < 0", "--fail-if", "loss > 0")
    assert failed.exit_code == 1 and json.loads(failed.stdout)["failed"] == ["loss < 0"]
    assert "luthier: loss < 0" in failed.stderr
    refused = luth("inspect", tiny, folder, "--fail-if", "loss = 0")
    assert "cannot read 'loss = 0'" in refused.output and refused.exit_code not in (0, 1)


def test_an_export_prints_how_it_is_used(finished, tmp_path):
    said = luth("export", finished[0], "merge=true", "--as", "vllm", "--output-dir", tmp_path / "out")
    assert said.exit_code == 0, said.output
    assert "merged: as the setting merge says" in said.stdout
    assert said.stdout.endswith(f"vLLM:\nvllm serve {tmp_path / 'out'}\n")


@pytest.mark.parametrize("kind", ["lora", "merged"])
def test_export_answers_like_the_tuned_model(kind, finished, tmp_path):
    folder, _ = finished
    said = luth("export", folder, "--as", kind, "--output-dir", tmp_path / kind)
    assert said.exit_code == 0, said.output
    assert "outputs match the tuned model" in said.stdout
    assert use.load(tmp_path / kind).ask("1+1=", max_new_tokens=3) is not None
    # never over what is there
    assert luth("export", folder, "--as", kind, "--output-dir", tmp_path / kind).exit_code == 2


def test_merged_export_is_plain_transformers(finished, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, _ = finished
    export.export(folder, "merged", tmp_path / "m", dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert tokenizer.chat_template
    ids = torch.tensor([tokenizer("3+4=")["input_ids"]])
    with torch.no_grad():
        plain = model(ids).logits[0, -1]
        ours = use.load(folder, dtype="float32").roles
        with ours.tuner.merged() as merged:
            assert torch.allclose(plain, merged(ids).logits[0, -1], atol=1e-4)


def test_an_export_that_answers_otherwise_is_refused(finished, tmp_path, monkeypatch):
    right = source.merge

    def wrong(loaded, to):
        right(loaded, to)
        tensors = load_file(to / "model.safetensors")
        tensors["model.norm.weight"] *= 1.2
        save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(source, "merge", wrong)
    said = luth("export", finished[0], "--output-dir", tmp_path / "m")
    assert said.exit_code == 2 and "does not match the tuned model" in said.stderr
    assert not (tmp_path / "m").exists() and not list(tmp_path.glob("*.part"))


def test_a_plain_model_has_nothing_to_export(tiny, tmp_path):
    said = luth("export", tiny, "--as", "lora", "--output-dir", tmp_path / "x")
    assert said.exit_code == 2 and "it has no tuned weights" in said.stderr


def test_a_plan_is_tuned_loaded_and_told(tiny, rows, tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        f"model: {tiny}\ndata: {rows}\nmax_steps: 1\nevaluate: [loss]\nplan: [{{}}, {{seed: 1}}]\n"
    )
    said = luth("tune", plan, "--output-dir", tmp_path / "p")
    assert said.exit_code == 0, said.output
    assert str(tmp_path / "p" / "run-1") in said.stdout
    assert use.load(tmp_path / "p").name == str(tmp_path / "p" / "run-1")


def test_doctor_says_what_is_there_and_what_is_missing(monkeypatch):
    from luthier.tools import doctor

    monkeypatch.setattr(doctor, "sandbox", lambda: {"runs programs": True})
    found = json.loads(luth("doctor", "--json").stdout)
    assert found["core"]["torch"] == torch.__version__ or found["core"]["torch"] in torch.__version__
    assert {"cpu", "cuda", "mps", "memory_gb", "free_disk_gb", "takes"} <= set(found["machine"])
    for name, extra in found["extras"].items():
        assert bool(extra["missing"]) == (extra["install"] == f"pip install 'luthier[{name}]'")
    said = luth("doctor").stdout
    assert "bfloat16" in said and "sandbox" in said


def test_a_classifier_is_loaded_with_the_head_it_was_tuned_with(tmp_path):
    """Its head is new, and an adapter does not hold its base: both must follow from the recipe's seed."""
    from transformers import BertConfig, BertForMaskedLM

    from helpers.models import make_tokenizer

    base, run = str(tmp_path / "bert"), str(tmp_path / "run")
    made = BertConfig(
        vocab_size=262, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertForMaskedLM(made).save_pretrained(base)
    tokenizer = make_tokenizer()
    tokenizer.cls_token = tokenizer.sep_token = "<|end|>"
    tokenizer.save_pretrained(base)
    rows = [
        {"text": f"{word} {i}", "label": name}
        for i in range(8)
        for word, name in (("good", "pos"), ("bad", "neg"))
    ]
    report = luthier.tune(
        model=base,
        architecture="classifier",
        data=rows,
        eval_data=0,
        max_steps=3,
        evaluate=["loss"],
        output_dir=run,
        learning_rate=0.03,
    )
    torch.manual_seed(123)
    found = inspect.inspect(run, run)
    assert (
        found["base"]["metrics"]["loss"]
        == found["tuned"]["metrics"]["loss"]
        == pytest.approx(report.after["loss"], rel=1e-3)
    )
    with pytest.raises(luthier.RecipeError, match="cannot generate text"):
        use.load(run).generate("x")


GOOD = [
    {"messages": [{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": str(i)}]}
    for i in range(200)
]


BAD = [
    b'{"messages": [{"role": "user", "cont',
    b'{"messages": "hello"}',
    b'{"messages": []}',
    b'{"messages": [{"role": "user", "content": "a\x00b"}, {"role": "assistant", "content": "c"}]}',
    b'{"messages": [{"role": "wizard", "content": "x"}, {"role": "assistant", "content": "y"}]}',
    b'{"messages": [{"role": "user", "content": "'
    + b"x" * 1_100_000
    + b'"}, {"role": "assistant", "content": "y"}]}',
    b'{"prompt": "a", "chosen": "b", "rejected": "c"}',
    '{"messages": [{"role": "user", "content": "\xe9"}, {"role": "assistant", "content": "c"}]}'.encode(
        "latin-1"
    ),
    b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}',
    b"[1, 2]",
]


def mixed(path, good, bad):
    path.write_bytes(
        b"".join(line + b"\n" for line in [*(json.dumps(r).encode() for r in GOOD[:good]), *bad])
    )
    return path


def test_bad_rows_of_every_kind(tiny, tmp_path):
    """5% may be bad (here 10 of 200); one good row less, and the run ends before it begins."""
    quick = ("max_steps=1", "evaluate=[]", "--model", tiny)
    said = luth(
        "tune", "--data", mixed(tmp_path / "a.jsonl", 190, BAD), "--output-dir", tmp_path / "a", *quick
    )
    assert said.exit_code == 0, said.output
    assert "10 of 200 rows cannot be used" in said.stdout
    listed = [json.loads(line) for line in (tmp_path / "a" / "quarantine.jsonl").read_text().splitlines()]
    assert {b["where"] for b in listed} == {f"a.jsonl:{i}" for i in range(191, 201)} and all(
        b["reason"] for b in listed
    )
    said = luth(
        "tune", "--data", mixed(tmp_path / "b.jsonl", 189, BAD), "--output-dir", tmp_path / "b", *quick
    )
    assert said.exit_code == 2 and "10 of 199 rows of" in said.stderr and "max_bad_rows=0.05" in said.stderr
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["quarantine.jsonl"]
    mixed(tmp_path / "b.jsonl", 200, [])  # mended: what was refused leaves no trace
    assert luth("tune", "--data", tmp_path / "b.jsonl", "--output-dir", tmp_path / "b", *quick).exit_code == 0
    assert not (tmp_path / "b" / "quarantine.jsonl").exists()


def test_a_refused_run_touches_nothing_of_another(tiny, tmp_path, finished):
    folder, _ = finished
    was = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    said = luth(
        "tune", "--data", mixed(tmp_path / "a.jsonl", 190, BAD), "--model", tiny, "--output-dir", folder
    )
    assert said.exit_code == 2 and "holds another run" in said.stderr
    assert was == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_prompt_is_ended_as_in_training(tiny, tmp_path, monkeypatch):
    """Questions were tuned on with a line break behind them: one that is asked without gets it."""
    rows = [{"question": r["prompt"], "answer": r["completion"]} for r in SUMS]
    luthier.tune(model=tiny, data=rows, max_steps=1, evaluate=[], output_dir=str(tmp_path / "q"))
    loaded = use.load(tmp_path / "q")
    asked = []
    monkeypatch.setattr(use.Loaded, "generate", lambda self, prompt, **how: asked.append(prompt) or "")
    loaded.ask("1+1="), loaded.ask("1+1=\\n")
    assert asked == ["1+1=\n", "1+1=\n"]


@pytest.mark.slow
def test_a_classifier_is_not_talked_to_and_not_compared_with_a_writer(tiny, tmp_path):
    data = tmp_path / "films.jsonl"
    data.write_text(
        "".join(
            json.dumps({"text": f"{w} {i}", "label": w}) + "\n" for i in range(8) for w in ("good", "bad")
        )
    )
    words = (
        "--model",
        tiny,
        "--data",
        data,
        "architecture=classifier",
        "max_steps=1",
        "--output-dir",
        tmp_path / "run",
    )
    code = f"from luthier.cli import app; app({['tune', *map(str, words)]!r})"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert said.returncode == 0 and said.stderr == ""  # nothing of other libraries
    assert (
        "⟦good⟧" in said.stdout and "luthier chat" not in said.stdout and "chat template" not in said.stdout
    )
    compared = luth("inspect", tiny, tmp_path / "run")
    assert compared.exit_code == 2 and "loaded as architecture causal" in compared.stderr
    asked = luth("export", tmp_path / "run", "--as", "lora", "--output-dir", tmp_path / "x")
    assert asked.exit_code == 2 and "--as merged" in asked.stderr
    assert luth("export", tmp_path / "run", "--output-dir", tmp_path / "x").exit_code == 0


def test_former_options_are_read_and_left_out_of_the_help(tiny):
    from luthier.cli.commands import FORMER_OPTIONS

    for command, names in FORMER_OPTIONS.items():
        listed = luth(command, "--help").stdout
        for former, name in names.items():
            assert name in listed and not re.search(rf"{former}(?![\w-])", listed)
    refused = luth("search", f"model={tiny}", "data=toy:people/new", "--over=tuner.q")
    assert refused.exit_code == 2 and "has no setting 'q'" in refused.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_of_shells(shell, monkeypatch):
    """The script asks the command line, which answers with commands and with names of methods."""
    script = luth("completion", shell)
    assert script.exit_code == 0 and "_LUTHIER_COMPLETE" in script.stdout
    words = [name for name in method_names("tuner")("lo") if name.startswith("lo")]
    assert {"lora", "loldu"} <= set(words) and "full" not in words


def test_what_bash_is_offered():
    code = "import sys; sys.argv[0] = 'luthier'; from luthier.cli import main; main()"

    def offered(words: str) -> list[str]:
        place = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        environment = {**os.environ, "_LUTHIER_COMPLETE": "complete_bash", **place}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        return done.stdout.split()

    assert offered("luthier tu") == ["tune"]
    assert "lora" in offered("luthier tune --tuner lo")
