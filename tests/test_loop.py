"""The loop's promises: how a batch is split changes nothing, a killed run goes on bit for bit, faults are
told.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import luthier
from conftest import PAIRS, SUMS, UNPAIRED, recipe_of
from luthier.clock import Clock
from luthier.errors import TYPES, DiskError, NotFinite, OutOfMemory, RecipeError, Refused, from_code
from luthier.model.load import pick_dtype
from luthier.storage import checkpoints, files
from luthier.train import checks as guards
from luthier.train import memory
from luthier.train.trainer import Trainer, draw


@pytest.fixture(scope="session")
def tiny(shallow) -> str:
    return shallow


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(str(checkpoints.paths(Path(folder))[-1] / "tensors.safetensors"))


def near(a, b, atol) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=atol) for k in a)


# ------------------------------------------------------------------------------------------ how a batch is split


@pytest.mark.parametrize("objective, data", [("sft", SUMS), ("dpo", PAIRS)])
def test_accumulation_changes_nothing(base, tmp_path, objective, data):
    """8 rows at once = 4 x 2 = 8 x 1; rows of very different length, so that means of means would differ."""
    base |= {
        "objective": objective,
        "data": data,
        "optim": {"name": "sgd", "max_grad_norm": 0},
        "learning_rate": 0.05,
        "max_steps": 3,
    }
    runs = {}
    for micro in (8, 2, 1):
        change = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": 8 // micro}
        runs[micro] = luthier.tune(base | change, folder=tmp_path / str(micro))
    for micro in (2, 1):
        assert runs[micro].losses == pytest.approx(runs[8].losses, abs=1e-5)
        assert near(weights(runs[micro].folder), weights(runs[8].folder), 1e-5)


@pytest.mark.parametrize("layout", [{"packing": False}, {"share_prompts": False}, {"width": 512}])
def test_packed_is_unpacked_is_shared(base, tmp_path, layout):
    base |= {"objective": "dpo", "data": PAIRS, "max_steps": 3, "optim": {"name": "sgd", "max_grad_norm": 0}}
    plain = luthier.tune(base, folder=tmp_path / "a")
    other = luthier.tune(base | {"architecture": {"name": "causal", **layout}}, folder=tmp_path / "b")
    assert other.losses == pytest.approx(plain.losses, abs=1e-5)
    assert near(weights(tmp_path / "a"), weights(tmp_path / "b"), 1e-5)


ROLLOUT = [
    {"name": "rollout", "n": 4, "max_new_tokens": 4, "old": True},
    {"name": "score", "reward": "exact_match"},
]
SHARED = {  # what two processes are asked to do together, and how near they must come to what one does alone
    "sft": ({"tuner": "full", "eval_steps": 1, "evaluate": ["loss", "generate", "forgetting"]}, 1e-5),
    "dpo": ({"tuner": "lora", "objective": "dpo", "data": PAIRS}, 1e-5),
    "grpo": ({"tuner": "lora", "objective": "grpo", "num_iterations": 2, "live": ROLLOUT}, 1e-4),
    "mezo": ({"tuner": "lora", "estimator": "mezo", "learning_rate": 1e-3}, 1e-3),
    "last row alone": ({"tuner": "full", "data": SUMS[:9], "max_steps": None, "num_train_epochs": 1}, 1e-5),
    "rollout of nothing": (
        {"tuner": "lora", "objective": "grpo", "live": ROLLOUT, "data": SUMS[:9], "max_steps": None},
        1e-4,
    ),
    "stages": ({"tuner": "lora", "stages": [{"name": "ifd", "share": 0.9}]}, 1e-5),
}


@pytest.fixture(scope="module")
def together(tiny, tmp_path_factory):
    """The folder in which two gloo processes of 2 rows have run every recipe of SHARED, each twice: started
    once, since starting is slow.
    """
    folder = tmp_path_factory.mktemp("two")
    recipes = {name: recipe_for(tiny, name) | {"per_device_train_batch_size": 2} for name in SHARED}
    (folder / "recipes.json").write_text(json.dumps(recipes))
    (folder / "two.py").write_text(
        textwrap.dedent("""
        import json, torch
        torch.set_num_threads(1)
        import luthier
        for name, recipe in json.load(open("recipes.json")).items():
            a, b = (luthier.tune(recipe, folder=name) for _ in range(2))
            assert a.after == b.after and a.losses == b.losses
    """)
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "1",
    }
    command = [sys.executable, "two.py"]
    both = [
        subprocess.Popen(command, cwd=folder, env=env | {"RANK": r, "LOCAL_RANK": r}, stderr=subprocess.PIPE)
        for r in "01"
    ]
    errors = [p.communicate(timeout=300)[1].decode() for p in both]
    assert [p.returncode for p in both] == [0, 0], errors
    return folder


def recipe_for(tiny, name) -> dict:
    return recipe_of(tiny) | {
        "optim": {"name": "sgd", "max_grad_norm": 0},
        "learning_rate": 0.05,
        "max_steps": 4,
        **SHARED[name][0],
    }


@pytest.mark.parametrize("name", SHARED)
def test_two_processes_are_one(tiny, together, tmp_path, name):
    """Two gloo processes of 2 rows = one process of 4 rows; a finished run answers in both."""
    atol = SHARED[name][1]
    one, two = (
        luthier.tune(recipe_for(tiny, name), folder=tmp_path / "one"),
        luthier.Report.read(together / name),
    )
    assert two.losses == pytest.approx(one.losses, abs=atol) and two.before == pytest.approx(
        one.before, abs=1e-5
    )
    assert near(weights(tmp_path / "one"), weights(together / name), atol)


def test_every_row_once_an_epoch():
    rows = [{"id": i} for i in range(10)]
    clock = Clock(seed=3)
    seen = []
    for clock.step in range(7):  # two epochs of ten rows, three at a time: the last step takes what is left
        seen += [r["id"] for r in draw(rows, clock, 3, stop_at=20)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]


def test_every_row_once_an_epoch_where_a_draw_is_learned_several_times():
    rows, clock, seen = [{"id": i} for i in range(10)], Clock(seed=3), []
    for clock.step in range(8):  # four draws, two steps each
        drawn = [r["id"] for r in draw(rows, clock, 3, stop_at=10, num_iterations=2)]
        seen += drawn if clock.step % 2 == 0 else []
        assert clock.step % 2 == 0 or seen[-len(drawn) :] == drawn
    assert sorted(seen) == list(range(10))


@pytest.mark.parametrize("tuner", ["full", "lora", "prompt", "ssf", "lisa"])
def test_recomputed_activations_change_nothing(base, tmp_path, tuner):
    base |= {"tuner": tuner, "max_steps": 3}
    plain = luthier.tune(base, folder=tmp_path / "a")
    assert luthier.tune(
        base | {"gradient_checkpointing": True}, folder=tmp_path / "b"
    ).losses == pytest.approx(plain.losses, abs=1e-5)
    assert near(weights(tmp_path / "a"), weights(tmp_path / "b"), 1e-5)


@pytest.mark.parametrize("dtype, atol", [("float16", 0.01), ("bfloat16", 0.05)])
def test_half_precision_is_near(base, tmp_path, dtype, atol):
    plain = luthier.tune(base, folder=tmp_path / "a")
    assert luthier.tune(base | {"dtype": dtype}, folder=tmp_path / "b").losses == pytest.approx(
        plain.losses, rel=atol
    )


@pytest.mark.parametrize(
    "amx, avx, taken", [(0, 0, torch.float32), (1, 0, torch.bfloat16), (0, 1, torch.bfloat16)]
)
def test_auto_takes_the_precision_that_the_chip_multiplies_in(monkeypatch, amx, avx, taken):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: bool(amx))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bool(avx))
    assert (
        pick_dtype("auto", torch.device("cpu")) == taken
        and pick_dtype("float16", torch.device("cpu")) == torch.float16
    )


def test_plain_loop_of_transformers_is_ours(base, tmp_path, tiny):
    """The first loss equals the model's own loss on the same rows, prompts masked by -100."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    report = luthier.tune(base | {"max_steps": 1, "per_device_train_batch_size": len(SUMS)}, folder=tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    ids = [
        (tokenizer(r["prompt"]).input_ids, tokenizer(r["completion"]).input_ids + [tokenizer.eos_token_id])
        for r in SUMS
    ]
    wide = max(len(p) + len(c) for p, c in ids)
    inputs = torch.tensor([p + c + [0] * (wide - len(p + c)) for p, c in ids])
    labels = torch.tensor([[-100] * len(p) + c + [-100] * (wide - len(p + c)) for p, c in ids])
    mask = torch.tensor([[1] * len(p + c) + [0] * (wide - len(p + c)) for p, c in ids])
    with torch.no_grad():
        want = float(model(input_ids=inputs, attention_mask=mask, labels=labels).loss)
    assert report.losses[0] == pytest.approx(want, abs=1e-5)


# ------------------------------------------------------------------------------------------ killed and resumed

KILLED = """
import json, os, signal, sys
import luthier
from luthier.train.trainer import Trainer
after = int(sys.argv[3])
step = Trainer.step
def stepping(self):
    if self.roles.clock.step == after: os.kill(os.getpid(), signal.SIGKILL)
    return step(self)
Trainer.step = stepping
luthier.tune(json.load(open(sys.argv[1])), folder=sys.argv[2])
"""
RECIPES = {
    "sft": {"tuner": "lora"},
    "full": {"tuner": "full"},
    "dpo": {"tuner": "lora", "objective": "dpo", "data": PAIRS},
    "dpo-start": {"tuner": "full", "objective": "dpo", "data": PAIRS},
    "kto": {"tuner": "lora", "objective": "kto", "data": UNPAIRED},
    "grpo": {
        "tuner": "lora",
        "objective": "grpo",
        "num_iterations": 2,
        "learning_rate": 1e-2,
        "live": [
            {"name": "rollout", "n": 4, "max_new_tokens": 4, "old": True},
            {"name": "score", "reward": "exact_match"},
        ],
    },
    "mezo": {"tuner": "lora", "estimator": "mezo"},
    "sam": {"tuner": "full", "estimator": "sam"},
    "lisa": {"tuner": {"name": "lisa", "n_layers": 1, "interval": 2}},
    "prompt": {"tuner": "prompt"},
    "stages": {"tuner": "lora", "stages": [{"name": "ifd", "share": 0.9}]},
    "dropout": {"tuner": {"name": "lora", "lora_dropout": 0.3}},
}


@pytest.mark.parametrize("name", RECIPES)
def test_killed_and_resumed_is_uninterrupted(base, tmp_path, forks, name):
    """kill -9 at a step drawn from the test's name, then the same command: every tensor and every loss bit
    for bit.
    """
    recipe = base | {"max_steps": 7} | RECIPES[name]
    whole = luthier.tune(recipe, folder=tmp_path / "whole")
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    dead = forks(KILLED, tmp_path, "recipe.json", "broken", str(1 + sum(map(ord, name)) % 6))
    assert dead.wait() == -signal.SIGKILL, dead.said()
    assert not (tmp_path / "broken" / "report.json").exists()
    resumed = luthier.tune(recipe, folder=tmp_path / "broken")
    assert resumed.losses == whole.losses
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


MOMENTS = {  # the process dies at the first call of this, which the second process passes
    "measuring the start": "luthier.methods.evaluators.quality.generate.Generate.run",
    "a stage": "luthier.methods.stages.select.ifd.IFD.__call__",
    "writing a checkpoint": "luthier.storage.checkpoints.verify",
    "naming a checkpoint": "luthier.storage.checkpoints.paths",
    "taking the adapter away": "luthier.methods.tuners._peft.PeftTunedModel.save",
    "the report": "luthier.report.page.write_report",
}
DIES = """
import importlib, json, os, signal, sys
import luthier, luthier.run.run
*path, name = sys.argv[3].split(".")
while path:
    try:
        owner = importlib.import_module(".".join(path))
        break
    except ModuleNotFoundError:
        name = path.pop() + "." + name
*above, last = name.split(".")
for part in above: owner = getattr(owner, part)
real = getattr(owner, last)
def dying(*given, **named):
    if os.path.exists(os.path.join(sys.argv[2], "run.json")) and (last != "checkpoints" or any(p.suffix == ".part" for p in given[0].iterdir()) or given[0].joinpath("checkpoint-2").exists()):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*given, **named)
setattr(owner, last, dying)
luthier.tune(json.load(open(sys.argv[1])), folder=sys.argv[2])
"""


@pytest.fixture(scope="module")
def never_killed(tiny, tmp_path_factory):
    """A recipe, and its report where nobody killed it."""
    recipe = recipe_of(tiny) | {
        "tuner": "lora",
        "stages": ["ifd"],
        "evaluate": ["loss", "generate", "forgetting"],
    }
    return recipe, luthier.tune(recipe, folder=tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_anywhere_goes_on(never_killed, tmp_path, forks, moment):
    """Not only between steps: whatever a kill leaves half done is done again or left aside."""
    recipe, whole = never_killed
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    dead = forks(DIES, tmp_path, "recipe.json", "broken", MOMENTS[moment])
    assert dead.wait() == -signal.SIGKILL, dead.said()
    assert not (tmp_path / "broken" / "report.json").exists()
    resumed = luthier.tune(recipe, folder=tmp_path / "broken")
    assert (resumed.losses, resumed.before, resumed.after) == (whole.losses, whole.before, whole.after)
    a, b = weights(whole.folder), weights(tmp_path / "broken")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_checkpoint_half_written_is_no_checkpoint(base, tmp_path):
    luthier.tune(base, folder=tmp_path)
    whole = checkpoints.paths(tmp_path)
    for name in ("checkpoint-9.part", "checkpoint-9.old", "checkpoint-10"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-9.part" / "state.json").write_text("{}")
    assert checkpoints.paths(tmp_path) == whole


def test_another_version_going_on_is_told(base, tmp_path, monkeypatch):
    real = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self: real(self) if self.roles.clock.step < 4 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        luthier.tune(base, folder=tmp_path)
    monkeypatch.setattr(Trainer, "step", real)
    state = json.loads((tmp_path / "run.json").read_text())
    assert state["version"] == luthier.__version__
    files.write_json(tmp_path / "run.json", state | {"version": "0.0.9"})
    assert any("started by luthier 0.0.9" in n for n in luthier.tune(base, folder=tmp_path).notes)


def test_killed_from_outside_three_times_in_a_row(base, tmp_path, forks):
    """Whatever it was doing just then, checkpoints included: the end is that of a run that nobody killed."""
    recipe = base | {"tuner": "lora", "max_steps": 32, "save_steps": 1, "logging_steps": 1}
    whole = luthier.tune(recipe, folder=tmp_path / "whole")
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    code = "import json, luthier; luthier.tune(json.load(open('recipe.json')), folder='broken')"
    lines, seen = tmp_path / "broken" / "metrics.jsonl", 0
    for least in (2, 6, 12):
        running = forks(code, tmp_path)
        while running.poll() is None and seen < least:
            seen = len(lines.read_bytes().splitlines()) if lines.is_file() else 0
            time.sleep(0.001)
        running.kill()
        assert running.wait() == -signal.SIGKILL, running.said()
    resumed = luthier.tune(recipe, folder=tmp_path / "broken")
    assert resumed.losses == whole.losses and any("resuming from checkpoint-" in n for n in resumed.notes)
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert not list((tmp_path / "broken").rglob("*.part"))


def test_a_finished_run_answers_at_once_and_another_recipe_is_refused(base, tmp_path):
    first = luthier.tune(base, folder=tmp_path)
    began = time.perf_counter()
    assert luthier.tune(base, folder=tmp_path).losses == first.losses
    assert time.perf_counter() - began < 2
    with pytest.raises(RecipeError, match="holds another run.*learning_rate"):
        luthier.tune(base | {"learning_rate": 5e-3}, folder=tmp_path)
    with pytest.raises(RecipeError, match="its rows were others"):
        luthier.tune(base | {"data": SUMS[:-1]}, folder=tmp_path)
    again = luthier.tune(base | {"learning_rate": 5e-3, "overwrite": True}, folder=tmp_path)
    assert again.losses != first.losses


# ------------------------------------------------------------------------------------------ faults


def test_out_of_memory_halves_the_micro_batch(base, tmp_path, monkeypatch):
    from luthier.methods.architectures.text.causal import Causal

    base |= {"optim": {"name": "sgd", "max_grad_norm": 0}, "learning_rate": 0.05}
    want = luthier.tune(base, folder=tmp_path / "a")
    real = Causal.forward

    def small(self, model, attached, batch):
        if len(batch.rows) > 2 and torch.is_grad_enabled():
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return real(self, model, attached, batch)

    monkeypatch.setattr(Causal, "forward", small)
    got = luthier.tune(base, folder=tmp_path / "b")
    assert got.losses == pytest.approx(want.losses, abs=1e-5) and any(
        "micro-batches of 2" in n for n in got.notes
    )
    assert near(weights(tmp_path / "a"), weights(tmp_path / "b"), 1e-5)


def test_memory_that_runs_out_in_the_second_pass_of_a_step(base, tmp_path, monkeypatch):
    """SAM has climbed when it happens: it comes back, and the step is done again from where it began."""
    from luthier.methods.architectures.text.causal import Causal

    base |= {"estimator": "sam", "learning_rate": 0.05, "optim": {"name": "sgd", "max_grad_norm": 0}}
    monkeypatch.setattr(memory, "choose", lambda *given: (None, []))  # which reads rows as well
    want = luthier.tune(base, folder=tmp_path / "a")
    real, calls = Causal.forward, []

    def small(self, model, attached, batch):
        if torch.is_grad_enabled():
            calls.append(len(batch.rows))
            if len(calls) == 2:
                raise MemoryError
        return real(self, model, attached, batch)

    monkeypatch.setattr(Causal, "forward", small)
    got = luthier.tune(base, folder=tmp_path / "b")
    assert calls[:4] == [4, 4, 2, 2] and got.losses == pytest.approx(want.losses, abs=1e-5)
    assert near(weights(tmp_path / "a"), weights(tmp_path / "b"), 1e-5)


def test_memory_that_runs_out_while_weights_are_stepped_ends_in_a_sentence(base, tmp_path, monkeypatch):
    """Some sites have moved already: to do the step again would move them twice."""
    from luthier.train.optimizer import Chain

    real, pushed = Chain.step_group, []

    def full(self, group, grads):
        pushed.append(group.name)
        if len(pushed) == 40:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return real(self, group, grads)

    monkeypatch.setattr(Chain, "step_group", full)
    with pytest.raises(OutOfMemory, match="out of memory: what was saved before is intact"):
        luthier.tune(base, folder=tmp_path / "b")
    assert len(pushed) == 40
    monkeypatch.setattr(Chain, "step_group", real)
    again, whole = luthier.tune(base, folder=tmp_path / "b"), luthier.tune(base, folder=tmp_path / "a")
    assert again.losses == whole.losses


def test_completions_that_never_end_are_told(base, tmp_path, monkeypatch):
    """Every run shows its rows to the guard, as tokens; and the guard speaks where no end is learned."""
    shown, real = [], guards.check_stop_token
    monkeypatch.setattr(
        guards,
        "check_stop_token",
        lambda rows, stop, tell: shown.append((rows, stop)) or real(rows, stop, tell),
    )
    report = luthier.tune(base, folder=tmp_path)
    [(rows, stop)] = shown
    assert rows and stop == {1} and not any("teaches the model to stop" in n for n in report.notes)
    told: list[str] = []
    for row in rows:
        row.supervised[:] = [[t not in stop for t in ids] for ids in row.completions]
    real(rows, stop, told.append)
    assert told == [
        "no completion teaches the model to stop: the end of a turn is not among the supervised tokens"
    ]


def test_more_tokens_than_the_network_has_positions_for_are_refused(base, tmp_path):
    with pytest.raises(RecipeError, match="max_length: 600 tokens, and .* reads 512 at most"):
        luthier.tune(base | {"max_length": 600}, folder=tmp_path)
    with pytest.raises(RecipeError, match="reads 507 at most"):
        luthier.tune(
            base | {"max_length": 512, "tuner": {"name": "prompt", "num_virtual_tokens": 5}},
            folder=tmp_path / "soft",
        )


def test_positions_are_counted_as_the_network_counts_them():
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        RobertaConfig,
        RobertaForMaskedLM,
        T5Config,
        T5ForConditionalGeneration,
    )

    from luthier.model.load import max_positions

    small = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    assert max_positions(BertForMaskedLM(BertConfig(**small, max_position_embeddings=40))) == 40
    # it begins behind its padding
    assert max_positions(RobertaForMaskedLM(RobertaConfig(**small, max_position_embeddings=40))) == 38
    endless = T5ForConditionalGeneration(
        T5Config(vocab_size=50, d_model=16, num_layers=1, num_heads=2, d_kv=8, d_ff=16)
    )
    assert max_positions(endless) == float("inf")


def test_trackers_hear_every_number(base, tmp_path):
    tracking = pytest.importorskip("accelerate.tracking")
    heard = []

    class Ear(tracking.GeneralTracker):
        name, requires_logging_directory = "ear", False
        tracker = property(lambda self: self)

        def __init__(self, run_name, **how):
            super().__init__()
            heard.append(("begin", run_name))

        def store_init_configuration(self, values):
            heard.append(("recipe", values))

        def log(self, values, step=None, **how):
            heard.append((step, values))

        def finish(self):
            heard.append(("end", None))

    tracking.LOGGER_TYPE_TO_CLASS["ear"] = Ear
    try:
        report = luthier.tune(
            base | {"report_to": ["ear"], "evaluate": ["loss"], "eval_steps": 2, "logging_steps": 2},
            folder=tmp_path,
        )
    finally:
        del tracking.LOGGER_TYPE_TO_CLASS["ear"]
    assert heard[0] == ("begin", "luthier") and heard[1][0] == "recipe" and heard[-1] == ("end", None)
    assert (
        all(isinstance(v, (int, float, str)) for v in heard[1][1].values())
        and heard[1][1]["learning_rate"] == 1e-3
    )
    assert [(s, v["loss"]) for s, v in heard[2:-1] if "loss" in v] == list(
        zip((2, 4, 6), report.losses, strict=True)
    )
    assert [s for s, v in heard[2:-1] if "eval_loss" in v] == [0, 2, 4, 6]


def test_a_loss_that_is_no_number_names_its_rows(base, tmp_path, monkeypatch):
    from luthier.methods.objectives.supervised.sft import SFT

    real = SFT.loss
    monkeypatch.setattr(
        SFT,
        "loss",
        lambda self, roles, batch: real(self, roles, batch) * (float("nan") if roles.clock.step == 3 else 1),
    )
    with pytest.raises(NotFinite, match="not finite at step 3, on rows .*:"):
        luthier.tune(base, folder=tmp_path)
    assert checkpoints.load(checkpoints.paths(tmp_path)[-1]).step == 2  # what was saved stays
    left = files.read_json(tmp_path / "failed.json")
    assert left["code"] == "not_finite" and "at step 3" in left["message"]
    monkeypatch.setattr(SFT, "loss", real)
    assert len(luthier.tune(base, folder=tmp_path).losses) == 6
    assert not (tmp_path / "failed.json").exists(), "it has gone on"


def test_outcomes_come_back_as_their_types():
    for code, kind in TYPES.items():
        error = from_code(code, "why")
        assert type(error) is kind and str(error) == "why" and error.code == code
    assert type(from_code("of_tomorrow", "why")) is RecipeError and from_code("x", "why").code == "x"


def test_a_full_disk_is_a_sentence_and_the_last_checkpoint_stays(base, tmp_path, monkeypatch):
    import errno

    real = files.write_json

    def full(path, value):
        if path.name == "state.json" and value["step"] == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, value)

    monkeypatch.setattr(files, "write_json", full)
    with pytest.raises(DiskError, match="is full .*saved before is intact"):
        luthier.tune(base, folder=tmp_path)
    assert [p.name for p in checkpoints.paths(tmp_path)] == ["checkpoint-2"]
    monkeypatch.setattr(files, "write_json", real)
    assert len(luthier.tune(base, folder=tmp_path).losses) == 6


def test_an_unwritable_folder_is_a_sentence(base, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="cannot be written .*another output_dir"):
        luthier.tune(base, folder=tmp_path / "file" / "run")


def test_nothing_to_learn_is_refused(base, tmp_path):
    rows = [
        {
            "messages": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": "ho", "loss": False},
            ]
        }
    ] * 8
    with pytest.raises(RecipeError, match="nothing to learn|none of 8 rows"):
        luthier.tune(base | {"data": rows, "max_bad_rows": 1}, folder=tmp_path)


def test_a_gradient_that_does_not_arrive_is_refused(base, tmp_path, monkeypatch):
    from luthier.methods.objectives.supervised.sft import SFT

    monkeypatch.setattr(SFT, "loss", lambda self, roles, batch: roles.policy.logprobs(batch) * 0.0)
    with pytest.raises(Refused, match="no gradient reaches"):
        luthier.tune(base, folder=tmp_path)


def leak(monkeypatch):
    """Let the sequences of a packed row see each other."""
    from luthier.methods.architectures.text import causal

    real = causal.lay_out

    def leaky(batch, width, **how):
        made = real(batch, width=width, **how)
        return replace(made, sees=torch.ones_like(made.sees)) if width else made

    monkeypatch.setattr(causal, "lay_out", leaky)


def test_a_wrong_layout_is_told_and_read_padded(base, tmp_path, monkeypatch):
    want = luthier.tune(base, folder=tmp_path / "a")
    leak(monkeypatch)
    got = luthier.tune(base, folder=tmp_path / "b")
    assert any("padded instead" in n for n in got.notes) and got.losses == pytest.approx(
        want.losses, abs=1e-4
    )


def test_bfloat16_is_stepped_through_masters(base, tmp_path):
    """A step too small for bfloat16 to show is not lost: the master moves on, and the weight follows."""
    luthier.tune(
        base | {"dtype": "bfloat16", "learning_rate": 2e-5, "max_steps": 40, "lr_scheduler_type": "constant"},
        folder=tmp_path,
    )
    saved = checkpoints.load(checkpoints.paths(tmp_path)[-1])
    masters = {k: s["master"]["weight"] for k, s in saved.state.items()}
    assert all(m.dtype == torch.float32 for m in masters.values())
    assert all(torch.equal(saved.tensors[f"{k}.weight"], m.bfloat16()) for k, m in masters.items())


def test_rows_that_are_yet_to_be_answered_are_read_right_too(base, tmp_path, monkeypatch):
    """The layout is tried before the first rollout, which reads in it."""
    leak(monkeypatch)
    prompts = [{"prompt": r["prompt"], "answer": r["answer"]} for r in SUMS]
    report = luthier.tune(
        base | {"tuner": "lora", "objective": "grpo", "live": ROLLOUT, "data": prompts, "max_steps": 1},
        folder=tmp_path,
    )
    assert any("padded instead" in n for n in report.notes)


def test_old_checkpoints_leave(base, tmp_path):
    luthier.tune(base | {"save_steps": 1, "save_total_limit": 3}, folder=tmp_path)
    assert [p.name for p in checkpoints.paths(tmp_path)] == ["checkpoint-4", "checkpoint-5", "checkpoint-6"]


def test_a_folder_half_cleared_leaves_nothing_to_the_next_run(base, tmp_path, monkeypatch):
    other = base | {"learning_rate": 5e-3, "evaluate": ["loss", "forgetting"], "overwrite": True}
    luthier.tune(base | {"evaluate": ["loss", "forgetting"]}, folder=tmp_path / "a")
    real = Path.unlink

    def dying(self, missing_ok=False):
        if self.name == "forgetting.jsonl":
            raise KeyboardInterrupt
        real(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", dying)
    with pytest.raises(KeyboardInterrupt):
        luthier.tune(other, folder=tmp_path / "a")
    monkeypatch.setattr(Path, "unlink", real)
    files.write_json(
        tmp_path / "a" / "forgetting.jsonl",
        {"id": "old", "prompt": "", "completions": [[70, 71]], "own": True},
    )
    there, fresh = luthier.tune(other, folder=tmp_path / "a"), luthier.tune(other, folder=tmp_path / "b")
    assert (there.losses, there.after) == (fresh.losses, fresh.after)


def test_rows_of_one_step_do_not_depend_on_history():
    assert Trainer.__dataclass_fields__["drawn_rows"].default is None
    rows = [{"id": i} for i in range(50)]
    at = Clock(seed=1, step=5)
    assert draw(rows, at, 4) == draw(rows, Clock(seed=1, step=5), 4) != draw(rows, Clock(seed=2, step=5), 4)
