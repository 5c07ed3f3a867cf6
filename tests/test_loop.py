"""The loop's promises: how a batch is split changes nothing, a killed run goes on bit for bit, faults are told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import luthier
from conftest import PAIRS, SUMS, UNPAIRED
from luthier import guards, store
from luthier.clock import Clock
from luthier.loop import Fit, draw
from luthier.method import RecipeError


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(str(store.checkpoints(Path(folder))[-1] / "tensors.safetensors"))


def near(a, b, atol) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=atol) for k in a)


# ------------------------------------------------------------------------------------------ how a batch is split


@pytest.mark.parametrize("objective, data", [("sft", SUMS), ("dpo", PAIRS)])
def test_accumulation_changes_nothing(base, tmp_path, objective, data):
    """8 rows at once = 4 x 2 = 8 x 1; rows of very different length, so that means of means would differ."""
    base |= {"objective": objective, "data": data, "optim": {"name": "sgd", "max_grad_norm": 0}, "learning_rate": 0.05, "max_steps": 3}
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


def test_two_processes_are_one(base, tmp_path):
    """Two gloo processes of 2 rows = one process of 4 rows."""
    base |= {"optim": {"name": "sgd", "max_grad_norm": 0}, "learning_rate": 0.05, "max_steps": 3}
    one = luthier.tune(base, folder=tmp_path / "one")
    (tmp_path / "recipe.json").write_text(json.dumps(base | {"per_device_train_batch_size": 2}))
    script = tmp_path / "two.py"
    script.write_text(
        textwrap.dedent("""
        import json, sys, torch
        torch.set_num_threads(1)
        import luthier
        luthier.tune(json.load(open(sys.argv[1])), folder=sys.argv[2])
    """)
    )
    port = str(29500 + os.getpid() % 1000)
    env = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "1",
    }
    command = [sys.executable, str(script), str(tmp_path / "recipe.json"), str(tmp_path / "two")]
    both = [subprocess.Popen(command, env=env | {"RANK": r, "LOCAL_RANK": r}, stderr=subprocess.PIPE) for r in "01"]
    errors = [p.communicate(timeout=120)[1].decode() for p in both]
    assert [p.returncode for p in both] == [0, 0], errors
    assert luthier.Report.read(tmp_path / "two").losses == pytest.approx(one.losses, abs=1e-5)
    assert near(weights(tmp_path / "one"), weights(tmp_path / "two"), 1e-5)


def test_every_row_once_an_epoch():
    rows = [{"id": i} for i in range(10)]
    clock = Clock(seed=3)
    seen = []
    for clock.step in range(7):  # two epochs of ten rows, three at a time: the last step takes what is left
        seen += [r["id"] for r in draw(rows, clock, 3, stop_at=20)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]


def test_plain_loop_of_transformers_is_ours(base, tmp_path, tiny):
    """The first loss equals the model's own loss on the same rows, prompts masked by -100."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    report = luthier.tune(base | {"max_steps": 1, "per_device_train_batch_size": len(SUMS)}, folder=tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    ids = [(tokenizer(r["prompt"]).input_ids, tokenizer(r["completion"]).input_ids + [tokenizer.eos_token_id]) for r in SUMS]
    wide = max(len(p) + len(c) for p, c in ids)
    inputs = torch.tensor([p + c + [0] * (wide - len(p + c)) for p, c in ids])
    labels = torch.tensor([[-100] * len(p) + c + [-100] * (wide - len(p + c)) for p, c in ids])
    mask = torch.tensor([[1] * len(p + c) + [0] * (wide - len(p + c)) for p, c in ids])
    with torch.no_grad():
        want = float(model(input_ids=inputs, attention_mask=mask, labels=labels).loss)
    assert report.losses[0] == pytest.approx(want, abs=1e-5)


# ------------------------------------------------------------------------------------------ killed and resumed

KILLED = """
import json, os, signal, sys, torch
torch.set_num_threads(1)
import luthier
from luthier.loop import Fit
after = int(sys.argv[3])
step = Fit.step
def stepping(self):
    if self.roles.clock.step == after: os.kill(os.getpid(), signal.SIGKILL)
    return step(self)
Fit.step = stepping
luthier.tune(json.load(open(sys.argv[1])), folder=sys.argv[2])
"""
RECIPES = {
    "sft": {"tuner": "lora"},
    "full": {"tuner": "full"},
    "dpo": {"tuner": "lora", "objective": "dpo", "data": PAIRS},
    "dpo-start": {"tuner": "full", "objective": "dpo", "data": PAIRS},
    "kto": {"tuner": "lora", "objective": "kto", "data": UNPAIRED},
    "grpo": {
        "tuner": "lora", "objective": "grpo", "num_iterations": 2, "learning_rate": 1e-2,
        "live": [{"name": "rollout", "n": 4, "max_new_tokens": 4, "old": True}, {"name": "score", "reward": "exact_match"}],
    },
    "mezo": {"tuner": "lora", "estimator": "mezo"},
    "sam": {"tuner": "full", "estimator": "sam"},
    "lisa": {"tuner": {"name": "lisa", "n_layers": 1, "interval": 2}},
    "prompt": {"tuner": "prompt"},
    "stages": {"tuner": "lora", "stages": [{"name": "ifd", "share": 0.9}]},
    "dropout": {"tuner": {"name": "lora", "lora_dropout": 0.3}},
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_killed_and_resumed_is_uninterrupted(base, tmp_path, name):
    """kill -9 at a step drawn from the test's name, then the same command: every tensor and every loss bit for bit."""
    recipe = base | {"max_steps": 7} | RECIPES[name]
    whole = luthier.tune(recipe, folder=tmp_path / "whole")
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    (tmp_path / "killed.py").write_text(KILLED)
    after = 1 + sum(map(ord, name)) % 6
    dead = subprocess.run([sys.executable, "killed.py", "recipe.json", "broken", str(after)], cwd=tmp_path, capture_output=True)
    assert dead.returncode == -signal.SIGKILL, dead.stderr.decode()[-2000:]
    assert not (tmp_path / "broken" / "report.json").exists()
    resumed = luthier.tune(recipe, folder=tmp_path / "broken")
    assert resumed.losses == whole.losses
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


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
    from luthier.architectures.causal import Causal

    base |= {"optim": {"name": "sgd", "max_grad_norm": 0}, "learning_rate": 0.05}
    want = luthier.tune(base, folder=tmp_path / "a")
    real = Causal.forward

    def small(self, model, attached, batch):
        if len(batch.rows) > 2 and torch.is_grad_enabled():
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return real(self, model, attached, batch)

    monkeypatch.setattr(Causal, "forward", small)
    got = luthier.tune(base, folder=tmp_path / "b")
    assert got.losses == pytest.approx(want.losses, abs=1e-5) and any("micro-batches of 2" in n for n in got.notes)
    assert near(weights(tmp_path / "a"), weights(tmp_path / "b"), 1e-5)


def test_a_loss_that_is_no_number_names_its_rows(base, tmp_path, monkeypatch):
    from luthier.objectives.sft import SFT

    real = SFT.loss
    monkeypatch.setattr(SFT, "loss", lambda self, roles, batch: real(self, roles, batch) * (float("nan") if roles.clock.step == 3 else 1))
    with pytest.raises(guards.Refused, match="not finite at step 3, on rows .*:"):
        luthier.tune(base, folder=tmp_path)
    assert store.load_checkpoint(store.checkpoints(tmp_path)[-1]).step == 2  # what was saved stays


def test_a_full_disk_is_a_sentence_and_the_last_checkpoint_stays(base, tmp_path, monkeypatch):
    import errno

    real = store.write_json

    def full(path, value):
        if path.name == "state.json" and value["step"] == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, value)

    monkeypatch.setattr(store, "write_json", full)
    with pytest.raises(RecipeError, match="is full .*saved before is intact"):
        luthier.tune(base, folder=tmp_path)
    assert [p.name for p in store.checkpoints(tmp_path)] == ["checkpoint-2"]
    monkeypatch.setattr(store, "write_json", real)
    assert len(luthier.tune(base, folder=tmp_path).losses) == 6


def test_an_unwritable_folder_is_a_sentence(base, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="cannot be written .*another output_dir"):
        luthier.tune(base, folder=tmp_path / "file" / "run")


def test_nothing_to_learn_is_refused(base, tmp_path):
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho", "loss": False}]}] * 8
    with pytest.raises(RecipeError, match="nothing to learn|none of 8 rows"):
        luthier.tune(base | {"data": rows, "max_bad_rows": 1}, folder=tmp_path)


def test_a_gradient_that_does_not_arrive_is_refused(base, tmp_path, monkeypatch):
    from luthier.objectives.sft import SFT

    monkeypatch.setattr(SFT, "loss", lambda self, roles, batch: roles.policy.logprobs(batch) * 0.0)
    with pytest.raises(guards.Refused, match="no gradient reaches"):
        luthier.tune(base, folder=tmp_path)


def test_a_wrong_layout_is_told_and_read_padded(base, tmp_path, monkeypatch):
    from luthier.architectures.causal import Causal

    want = luthier.tune(base, folder=tmp_path / "a")
    real = Causal.mask

    def leaky(self, model, layout, dtype):  # sequences of a row see each other
        return real(self, model, layout, dtype) if not self.packing else torch.ones_like(layout.mask()).tril()

    monkeypatch.setattr(Causal, "mask", leaky)
    got = luthier.tune(base, folder=tmp_path / "b")
    assert any("padded instead" in n for n in got.notes) and got.losses == pytest.approx(want.losses, abs=1e-4)


def test_bfloat16_is_stepped_through_masters(base, tmp_path):
    """A step too small for bfloat16 to show is not lost: the master moves on, and the weight follows."""
    luthier.tune(base | {"dtype": "bfloat16", "learning_rate": 2e-5, "max_steps": 40, "lr_scheduler_type": "constant"}, folder=tmp_path)
    saved = store.load_checkpoint(store.checkpoints(tmp_path)[-1])
    masters = {k: s["master"]["weight"] for k, s in saved.state.items()}
    assert all(m.dtype == torch.float32 for m in masters.values())
    assert all(torch.equal(saved.tensors[f"{k}.weight"], m.bfloat16()) for k, m in masters.items())


def test_rows_of_one_step_do_not_depend_on_history():
    assert Fit.__dataclass_fields__["held"].default is None
    rows = [{"id": i} for i in range(50)]
    at = Clock(seed=1, step=5)
    assert draw(rows, at, 4) == draw(rows, Clock(seed=1, step=5), 4) != draw(rows, Clock(seed=2, step=5), 4)
