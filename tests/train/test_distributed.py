"""Several processes: they are one, they fail together, and none is left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import luthier
from helpers import walk
from helpers.ranks import ranks
from helpers.rows import SUMS, UNPAIRED, recipe_of
from helpers.runs import ROLLOUT, near, weights
from luthier.errors import RecipeError
from luthier.processes import launcher
from luthier.recipe import catalogue
from luthier.registry import describe, find
from luthier.storage import files
from luthier.train.trainer import joined_shares, share

DROPOUT = {"name": "lora", "lora_dropout": 0.3}
SGD = {"optim": {"name": "sgd", "max_grad_norm": 0}, "learning_rate": 0.05, "max_steps": 4}
FEW = {"name": "forgetting", "n": 6, "max_new_tokens": 2}
TWO_REWARDS = {"name": "score", "reward": ["exact_match", "length"]}
SHARED = {  # what two processes do together, and how near they come to one that reads the same micro-batches
    "sft": ({"tuner": "full", "eval_steps": 1, "evaluate": ["loss", "generate", FEW]}, 1e-6),
    "kto": ({"tuner": DROPOUT, "objective": "kto", "data": UNPAIRED}, 1e-6),
    "ggpo": ({"tuner": "lora", "estimator": "ggpo"}, 1e-6),
    "grpo": (
        {"tuner": DROPOUT, "objective": "grpo", "num_iterations": 2, "live": [ROLLOUT[0], TWO_REWARDS]},
        1e-4,
    ),
    "mezo": ({"tuner": "lora", "estimator": "mezo", "learning_rate": 1e-3}, 1e-3),
    "last row alone": ({"tuner": "full", "data": SUMS[:9], "max_steps": None, "num_train_epochs": 1}, 1e-5),
    "rollout of nothing": (
        {"tuner": "lora", "objective": "grpo", "live": ROLLOUT, "data": SUMS[:9], "max_steps": None},
        1e-4,
    ),
    "stages": ({"tuner": "lora", "stages": [{"name": "ifd", "share": 0.9}]}, 1e-5),
}
SAMPLE = walk.CASES[::12]


@pytest.fixture(scope="session")
def tiny(shallow) -> str:
    return shallow


@pytest.fixture(scope="module")
def start():
    with ranks() as run:
        yield run


def recipe_for(tiny, name) -> dict:
    return recipe_of(tiny) | SGD | SHARED[name][0] | {"per_device_train_batch_size": 2}


TOGETHER = """
import json, sys, torch
sys.path[:0] = sys.argv[1:]
import luthier
from helpers import walk
from luthier.processes import group
for name, recipe in json.load(open("recipes.json")).items():
    report = luthier.tune(recipe, folder=name)
    again = luthier.tune(recipe, folder=name)
    assert again.after == report.after and again.losses == report.losses
cases = [tuple(case) for case in json.load(open("cases.json"))]
processes = group.join()
outcomes = walk.outcomes(cases, 2, processes)
if processes.main:
    torch.save([tuple(outcome) for outcome in outcomes], "outcomes.pt")
"""


@pytest.fixture(scope="module")
def together(tiny, start, tmp_path_factory):
    """The folder in which two processes have run every recipe of SHARED, each twice, and the sample."""
    folder = tmp_path_factory.mktemp("two")
    files.write_json(folder / "recipes.json", {name: recipe_for(tiny, name) for name in SHARED})
    files.write_json(folder / "cases.json", SAMPLE)
    ends = start(TOGETHER, folder, *PATHS)
    assert ends.codes == [0, 0], ends.texts
    return folder


PATHS = (str(Path(walk.__file__).parents[1]), str(Path(luthier.__file__).parents[1]))


@pytest.mark.long
@pytest.mark.parametrize("name", SHARED)
def test_two_processes_are_one(tiny, together, tmp_path, name):
    """Two processes with micro-batches of 2 rows = one with two of them a step, dropout included."""
    atol = SHARED[name][1]
    one = luthier.tune(recipe_for(tiny, name) | {"gradient_accumulation_steps": 2}, folder=tmp_path / "one")
    two = luthier.Report.read(together / name)
    assert two.losses == pytest.approx(one.losses, abs=atol)
    assert two.before == pytest.approx(one.before, abs=1e-5)
    assert near(weights(tmp_path / "one"), weights(together / name), atol)
    assert (two.stats["processes"], two.stats["rows_per_step"], one.stats["processes"]) == (2, 4, 1)
    logs = [files.read_rows(folder / "metrics.jsonl") for folder in (tmp_path / "one", together / name)]
    for a, b in zip(*logs, strict=True):  # what is logged is of all rows, whoever read them
        assert a.keys() == b.keys()
        assert {k: v for k, v in b.items() if k != "seconds"} == pytest.approx(
            {k: v for k, v in a.items() if k != "seconds"}, rel=1e-3, abs=100 * atol
        )


@pytest.mark.long
def test_a_sample_of_methods_is_bit_for_bit(together):
    same_bits(SAMPLE, walk.outcomes(SAMPLE, 2), torch.load(together / "outcomes.pt"))


def same_bits(cases, one, two) -> None:
    for case, a, (losses, tensors, refusal, _) in zip(cases, one, two, strict=True):
        if refusal:
            assert f"'{case[1]}'" in refusal and "single process" in refusal
            continue
        assert losses == a.losses, case
        assert tensors.keys() == a.tensors.keys(), case
        assert all(torch.equal(tensors[k], a.tensors[k]) for k in compared(case, a)), case


def compared(case, outcome):
    """The tensors that must agree: all that are saved, or where a file says that its statistics differ, all
    that are trained.
    """
    if "processes" in find(*case).contract:
        return outcome.trained
    return outcome.tensors


@pytest.mark.slow
def test_every_objective_and_every_tuner(start, tmp_path):
    """Bit for bit with the same micro-batches; with others up to rounding, or its file says why not."""
    files.write_json(tmp_path / "recipes.json", {})
    files.write_json(tmp_path / "cases.json", walk.CASES)
    ends = start(TOGETHER, tmp_path, *PATHS, limit=400)
    assert ends.codes == [0, 0], ends.texts
    two = torch.load(tmp_path / "outcomes.pt")
    same_bits(walk.CASES, walk.outcomes(walk.CASES, 2), two)
    for case, whole, (losses, tensors, refusal, _) in zip(
        walk.CASES, walk.outcomes(walk.CASES, 4), two, strict=True
    ):
        if refusal or walk.declared(*case):
            continue
        assert losses == pytest.approx(whole.losses, rel=1e-4, abs=1e-5), case
        for name in compared(case, whole):
            ours, theirs = tensors[name].float(), whole.tensors[name].float()
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5), case


def test_rows_are_dealt_out_in_whole_micro_batches():
    rows = [{"id": i} for i in range(11)]
    for micro in (1, 2, 3):
        for count in (1, 2, 3, 4):
            shares = [share(rows, micro, index, count) for index in range(count)]
            assert joined_shares(shares, micro) == rows
            batches = [s[i : i + micro] for s in shares for i in range(0, len(s), micro)]
            assert sorted(batches, key=lambda b: b[0]["id"]) == [
                rows[i : i + micro] for i in range(0, 11, micro)
            ]


# ----------------------------------------------------------------------------------------- failing together

FAILING = """
import json, os, time
import torch, luthier
from luthier.errors import RecipeError
from luthier.methods.objectives.supervised.sft import SFT
from luthier.processes import group
from luthier.storage import checkpoints
rank, recipe = int(os.environ["RANK"]), json.load(open("recipe.json"))
loss = SFT.loss

def failing(error):
    def wrong(self, roles, batch):
        if rank == 1 and roles.clock.step == 2:
            if error is None:
                return loss(self, roles, batch) * torch.nan
            raise error
        return loss(self, roles, batch)
    return wrong

def attempt(name, changes={}, error="none", **patches):
    SFT.loss = loss if error == "none" else failing(error)
    try:
        luthier.tune(recipe | changes, folder=name)
        outcome = ["none", ""]
    except Exception as error:
        outcome = [getattr(error, "code", type(error).__name__), str(error)]
    outcomes[name] = outcome
    SFT.loss = loss

outcomes = {}
attempt("not finite", error=None)
attempt("crash", error=ZeroDivisionError("mine"))
attempt("memory", error=MemoryError())
attempt("missing rows", {"data": "rows.jsonl" if rank == 0 else "absent.jsonl"})
attempt("other settings", {"learning_rate": 2e-3} if rank else {"learning_rate": 0.0, "max_steps": -1})
attempt("same", {"tuner": "lorra"})
attempt("other rows", {"data": recipe["data"][rank:]})
attempt("first")
attempt("first", {"learning_rate": 5e-3})
save = checkpoints.save
checkpoints.save = lambda *given: 1 / 0
attempt("saving")
checkpoints.save = save
attempt("after all")
json.dump(outcomes, open(f"outcomes-{rank}.json", "w"))
"""


@pytest.fixture(scope="module")
def failing(tiny, start, tmp_path_factory):
    """Two processes in which one thing after the other goes wrong, mostly in the second one."""
    folder = tmp_path_factory.mktemp("failing")
    recipe = recipe_of(tiny) | {"tuner": "lora", "per_device_train_batch_size": 2, "max_steps": 4}
    files.write_json(folder / "recipe.json", recipe)
    files.write_rows(folder / "rows.jsonl", SUMS)
    ends = start(FAILING, folder, limit=120)
    assert ends.codes == [0, 0], ends.texts
    return folder, [files.read_json(folder / f"outcomes-{rank}.json") for rank in range(2)]


@pytest.mark.long
@pytest.mark.parametrize(
    "name, codes, sentence",
    [
        ("not finite", ["not_finite"] * 2, "the loss of 'sft' is not finite at step 2"),
        (
            "crash",
            ["crash", "ZeroDivisionError"],
            "rank 1 of 2 processes has failed: ZeroDivisionError",
        ),
        ("memory", ["out_of_memory"] * 2, "out of memory; everything saved so far is intact"),
        ("saving", ["ZeroDivisionError", "crash"], "division by zero"),
    ],
)
def test_what_one_process_fails_of_all_fail_of(failing, name, codes, sentence):
    """All of them raise it, and go on with the next run; the main one writes it down."""
    folder, outcomes = failing
    assert [outcome[name][0] for outcome in outcomes] == codes
    assert sentence in outcomes[0][name][1]
    written = files.read_json(folder / name / "failed.json")
    assert sentence in written["message"] and written["code"] in (codes[0], "crash")
    assert outcomes[0]["after all"] == ["none", ""] == outcomes[1]["after all"]


@pytest.mark.long
@pytest.mark.parametrize(
    "name, rank, sentence",
    [
        ("missing rows", 1, "absent.jsonl"),
        ("other settings", 0, "max_steps"),
        ("same", None, "lorra"),
        ("other rows", None, "rank 1 reads other rows than rank 0"),
        ("first", 0, "already holds another run"),
    ],
)
def test_a_refusal_is_everybodys(failing, name, rank, sentence):
    for own, outcome in enumerate(failing[1]):
        assert sentence in outcome[name][1]
        assert outcome[name][1].startswith("rank 0 of" if rank == 0 else "rank 1 of") == (
            rank is not None and own != rank
        )


DYING = """
import json, os, signal, sys, time
import luthier.cli
from luthier.processes import group, lifeline
from luthier.train.trainer import Trainer
lifeline.GRACE = 2.0
rank, how = int(os.environ["RANK"]), os.environ["HOW"]
step, large = Trainer.step, group.Processes._sum_bucket

def stepping(self):
    if self.roles.clock.step == 3 and str(rank) == os.environ["WHO"]:
        if how == "killed": os.kill(os.getpid(), signal.SIGKILL)
        if how == "interrupted": raise KeyboardInterrupt
    return step(self)

def summing(self, tensors):
    if how == "amid a sum" and str(rank) == os.environ["WHO"] and os.path.exists("out/checkpoint-2"):
        raise RuntimeError("no such sum")
    return large(self, tensors)

Trainer.step, group.Processes._sum_bucket = stepping, summing
luthier.cli.main()
"""
LOST = "has ended without a word"


@pytest.mark.long
@pytest.mark.parametrize(
    "how, who, codes, sentence",
    [
        ("killed", 1, [2, -9], LOST),
        ("killed", 0, [-9, 2], LOST),
        ("amid a sum", 1, [2, 1], "rank 1 of 2 processes has failed: RuntimeError: no such sum"),
        ("interrupted", 1, [2, 130], "rank 1 of 2 processes was interrupted"),
    ],
)
def test_no_process_is_left_behind(tiny, start, tmp_path, how, who, codes, sentence):
    """Whatever becomes of one process, the others end within seconds, with a sentence and no traceback; the
    same command resumes.
    """
    recipe = recipe_of(tiny) | {"tuner": "lora", "per_device_train_batch_size": 2, "data": "rows.jsonl"}
    files.write_rows(tmp_path / "rows.jsonl", SUMS)
    files.write_json(tmp_path / "recipe.yaml", recipe | {"output_dir": "out"})
    ends = start(DYING, tmp_path, "tune", "recipe.yaml", "--quiet", environment={"HOW": how, "WHO": str(who)})
    assert ends.codes == codes, ends.texts
    assert abs(ends.seconds[0] - ends.seconds[1]) < 10
    other = ends.texts[1 - who]
    assert other.startswith("luthier: ") and sentence in other and "Traceback" not in other, other
    assert sentence in files.read_json(tmp_path / "out" / "failed.json")["message"]


# ----------------------------------------------------------------------------------------- going on, starting


@pytest.mark.long
def test_another_number_of_processes_goes_on(tiny, start, together, tmp_path):
    """Stopped on one process, amid a draw, and ended on two; stopped on two, and ended on one."""
    name = "grpo"
    recipe = recipe_for(tiny, name)
    files.write_json(tmp_path / "recipe.json", recipe)
    code = "import json, luthier; luthier.tune(json.load(open('recipe.json')), folder='two', stop_at=1)"
    ends = start(code, tmp_path)
    assert ends.codes == [0, 0], ends.texts
    report = luthier.tune(recipe, folder=tmp_path / "two")
    assert any("4 rows" in note and "1 process" in note for note in report.notes)
    assert report.losses == pytest.approx(luthier.Report.read(together / name).losses, abs=1e-6)
    alone = recipe | {"gradient_accumulation_steps": 2}
    luthier.tune(alone, folder=tmp_path / "one", stop_at=1)
    files.write_json(tmp_path / "recipe.json", alone)
    code = "import json, luthier; luthier.tune(json.load(open('recipe.json')), folder='one')"
    ends = start(code, tmp_path)
    assert ends.codes == [0, 0], ends.texts
    resumed = luthier.Report.read(tmp_path / "one")
    assert resumed.losses == pytest.approx(report.losses, abs=1e-6) and resumed.stats["processes"] == 2


@pytest.mark.parametrize(
    "variable, value, sentence",
    [
        ("ACCELERATE_USE_FSDP", "true", "asks for FSDP"),
        ("FSDP_VERSION", "2", "asks for FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "asks for DeepSpeed"),
        ("PARALLELISM_CONFIG_TP_SIZE", "2", "asks for tensor parallelism"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "asks for mixed_precision: bf16, and this recipe has dtype"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "asks for mixed_precision: fp8"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "asks for gradient_accumulation_steps: 4"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "set `torch_compile: true`"),
    ],
)
def test_what_a_launcher_asks_for_is_refused(base, tmp_path, monkeypatch, variable, value, sentence):
    monkeypatch.setenv(variable, value)
    with pytest.raises(RecipeError, match=sentence) as error:
        luthier.tune(base, folder=tmp_path / "run")
    assert error.value.code == "launcher"


def test_what_a_launcher_asks_for_is_honoured():
    plain = {
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_DYNAMO_BACKEND": "NO",
        "ACCELERATE_USE_FSDP": "false",
        "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
        "PARALLELISM_CONFIG_TP_SIZE": "1",
    }
    launcher.check_sharding(plain)
    launcher.check_settings("float32", 1, False, plain)
    asking = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}
    launcher.check_settings("bfloat16", 4, False, asking)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["torch.distributed.run", "accelerate.commands.launch"])
def test_launchers(tiny, tmp_path, module):
    """Real ones: a run ends, and one whose second process is killed ends with the sentence."""
    recipe = recipe_of(tiny) | {"tuner": "lora", "per_device_train_batch_size": 2, "data": "rows.jsonl"}
    files.write_rows(tmp_path / "rows.jsonl", SUMS)
    files.write_json(tmp_path / "recipe.yaml", recipe | {"output_dir": "out"})
    launch = ["--nproc-per-node=2", "--standalone"]
    if "accelerate" in module:
        launch = ["--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no"]
        launch += ["--dynamo_backend=no", "--main_process_port=0"]
    command = [sys.executable, "-m", module, *launch]
    around = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS[1], "ACCELERATE_USE_CPU": "1"}
    options = {"cwd": tmp_path, "capture_output": True, "text": True}
    whole = subprocess.run([*command, "-m", "luthier", "tune", "recipe.yaml"], env=around, **options)
    assert whole.returncode == 0, whole.stderr
    assert "2 processes and micro-batches of 2 rows: 4 rows a step" in whole.stdout
    assert whole.stdout.count("Report:") == 1
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "dying.py").write_text(DYING)
    around |= {"HOW": "killed", "WHO": "1"}
    broken = subprocess.run([*command, "dying.py", "tune", "recipe.yaml", "--quiet"], env=around, **options)
    assert broken.returncode and f"luthier: rank 1 of 2 processes {LOST}" in broken.stderr, broken.stderr
    assert LOST in json.loads((tmp_path / "out" / "failed.json").read_text())["message"]


def test_what_depends_on_micro_batches_is_told():
    facts = describe.facts(find("objective", "kto"))
    assert any(line.startswith("- Depends on the size of micro-batches: z0 is") for line in facts)
    _, messages = catalogue.explain({"objective": "kto + 0.1*sft", "tuner": "r_amt"})
    assert sum("depends on the size of micro-batches" in message for message in messages) == 2
