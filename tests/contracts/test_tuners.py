"""The contract that every tuner keeps. A new tuner is tested by being there; an exception to the
contract stands in the method's file, with its reason.
"""

from __future__ import annotations

import copy
import json
import shutil
import sys
from dataclasses import fields
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from peft import PeftModel
from torch import nn

from helpers.rows import SUMS
from helpers.tuners import (
    LOAD,
    SHAPES,
    SMALL,
    TUNERS,
    _shaped,
    anywhere,
    as_roles,
    asked,
    base,
    each,
    logprobs,
    plain,
    put,
    run_fresh,
    train,
)
from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.methods.estimators._base import gradients
from luthier.methods.tuners._base import Untuned
from luthier.methods.tuners._delta import Delta
from luthier.methods.tuners._peft import PeftTunedModel
from luthier.registry import build, find, helps, provides_of, tuner
from luthier.storage import checkpoints
from luthier.train.optimizer import Chain

DELTAS = [n for n in TUNERS if issubclass(find("tuner", n), Delta)]


@pytest.fixture(scope="session")
def tiny(shallow) -> str:
    return shallow


@each
@torch.no_grad()
def test_starts_as_the_base(name):
    attached, kind = anywhere(name)
    untuned = Untuned(base(kind))
    if "starts_as_base" in find("tuner", name).contract:
        pytest.skip(find("tuner", name).contract["starts_as_base"])
    assert torch.allclose(logprobs(attached), logprobs(untuned), atol=1e-6)


@each
def test_only_its_own_tensors_move(name):
    attached, _ = anywhere(name)
    own = {id(t) for t in (*attached.parameters().values(), *attached.frozen_tensors().values())}
    every = (*attached.model.named_parameters(), *attached.model.named_buffers())
    before = {n: (t, t.detach().clone()) for n, t in every if id(t) not in own}
    start, was = attached.tensors(), logprobs(attached).detach()
    train(attached)
    assert all(torch.equal(t, kept) for t, kept in before.values())
    assert any(k not in start or not torch.equal(v, start[k]) for k, v in attached.tensors().items())
    assert not torch.allclose(logprobs(attached), was, atol=1e-4)


@each
@torch.no_grad()
def test_off_is_the_base(name):
    attached, kind = anywhere(name)
    if "disable_adapter" not in provides_of(attached.settings):
        with pytest.raises(RecipeError, match="cannot be disabled"), attached.off():
            pass
        return
    with torch.enable_grad():
        train(attached)
    tuned, grads = logprobs(attached), [p.requires_grad for p in attached.parameters().values()]
    with attached.off():
        assert torch.equal(logprobs(attached), logprobs(Untuned(base(kind))))
    assert torch.equal(logprobs(attached), tuned)
    assert grads == [p.requires_grad for p in attached.parameters().values()]


@each
@torch.no_grad()
def test_merged_is_the_tuned_forward_and_is_undone_exactly(name):
    attached, _ = anywhere(name)
    with torch.enable_grad():
        train(attached)
    if "merge" not in provides_of(attached.settings):
        with pytest.raises(RecipeError, match="cannot be merged"), attached.merged():
            pass
        return
    tuned, before = logprobs(attached), {n: p.clone() for n, p in attached.model.named_parameters()}
    with attached.merged():
        assert torch.allclose(logprobs(attached), tuned, atol=2e-5)
    after = dict(attached.model.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[n], p) for n, p in before.items())
    assert torch.equal(logprobs(attached), tuned)


@each
@torch.no_grad()
def test_saved_and_read_back(name, tmp_path):
    attached, kind = anywhere(name)
    with torch.enable_grad():
        train(attached)
    attached.save(tmp_path)
    torch.manual_seed(99)
    again = build("tuner", attached.settings).attach(base(kind))
    again.load(again.read(tmp_path))
    assert torch.allclose(logprobs(again), logprobs(attached), atol=1e-6)
    kept = {k: v for k, v in attached.tensors().items() if k not in attached.memory()}
    assert all(torch.equal(v, again.tensors()[k]) for k, v in kept.items())


def test_an_adapter_says_only_what_older_readers_know(tmp_path):
    """Settings of this year at their defaults stay out; those that every reader wants are in, default or
    not.
    """
    attached = build("tuner", "lora").attach(base("llama"))
    attached.save(tmp_path)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    old = {
        "peft_type",
        "task_type",
        "r",
        "lora_alpha",
        "lora_dropout",
        "bias",
        "target_modules",
        "base_model_name_or_path",
        "use_dora",
    }
    assert (
        old <= said.keys()
        and not {"corda_config", "eva_config", "trainable_token_indices", "layer_replication"} & said.keys()
    )


def test_a_whole_model_that_was_saved_otherwise_is_noticed(tmp_path, monkeypatch):
    attached = build("tuner", "full").attach(base("llama"))
    real = type(attached.model).save_pretrained

    def lossy(self, folder, **how):
        real(copy.deepcopy(self).half(), folder, **how)

    monkeypatch.setattr(type(attached.model), "save_pretrained", lossy)
    with pytest.raises(RuntimeError, match="differs from what was saved"):
        attached.save(tmp_path)


@each
def test_bfloat16_base(name):
    attached, kind = anywhere(name)
    attached = build("tuner", attached.settings).attach(base(kind).bfloat16())
    if isinstance(attached, PeftTunedModel):
        assert all(
            p.dtype == torch.float32 for k, p in attached.parameters().items() if ".base_layer." not in k
        )
    start = logprobs(attached).detach()
    train(attached)
    assert logprobs(attached).isfinite().all() and not torch.equal(logprobs(attached), start)


@each
@torch.no_grad()
def test_tensors_go_out_and_in(name):
    attached, _ = anywhere(name)
    start, was = attached.tensors(), logprobs(attached)
    with torch.enable_grad():
        train(attached)
    tuned, now = attached.tensors(), logprobs(attached)
    with attached.using(start):
        assert torch.equal(logprobs(attached), was)
    assert torch.equal(logprobs(attached), now)
    attached.load(start)
    assert torch.equal(logprobs(attached), was)
    attached.load(tuned)
    assert torch.equal(logprobs(attached), now)
    with pytest.raises(RecipeError, match="do not fit"):
        attached.load({k: v for k, v in list(tuned.items())[1:]})


@each
def test_is_documented_and_checked(name):
    cls = find("tuner", name)
    assert cls.__doc__ and sys.modules[cls.__module__].__doc__
    assert all(helps(cls).get(f.name) for f in fields(cls)), [
        f.name for f in fields(cls) if not helps(cls).get(f.name)
    ]
    with pytest.raises(RecipeError, match="has no setting 'nonsense'"):
        build("tuner", {"name": name, "nonsense": 1})


@pytest.mark.parametrize("name", [*DELTAS, "lora", "peft"])
@pytest.mark.parametrize(
    "kind, where",
    [("gpt2", "all-linear"), ("mixtral", ["q_proj", "o_proj"]), ("llama", ["q_proj", "embed_tokens"])],
)
@torch.no_grad()
def test_modules_of_every_kind(name, kind, where, tmp_path):
    """Conv1D, layers beside fused experts, embeddings: trained, merged, saved and loaded."""
    if "modules_of_every_kind" in find("tuner", name).contract:
        pytest.skip(find("tuner", name).contract["modules_of_every_kind"])
    if (
        "embed_tokens" in where
        and name != "peft"
        and not issubclass(nn.Embedding, getattr(find("tuner", name), "kinds", nn.Embedding))
    ):
        pytest.skip("not for embeddings")
    attached = put(
        name,
        base(kind),
        **({"config": {"target_modules": where}} if name == "peft" else {"target_modules": where}),
    )
    with torch.enable_grad():
        train(attached)
    tuned = logprobs(attached)
    with attached.off():
        assert torch.equal(logprobs(attached), logprobs(Untuned(base(kind))))
    if "merge" in provides_of(attached.settings):
        with attached.merged():
            assert torch.allclose(logprobs(attached), tuned, atol=2e-5)
    assert torch.equal(logprobs(attached), tuned)
    attached.save(tmp_path)
    assert torch.allclose(
        plain(PeftModel.from_pretrained(base(kind), tmp_path).eval()), plain(attached.model), atol=1e-5
    )
    fresh = build("tuner", attached.settings).attach(base(kind))
    fresh.load(fresh.read(tmp_path))
    assert torch.equal(logprobs(fresh), tuned)


@torch.no_grad()
def test_fused_experts(tmp_path):
    attached = put(
        "lora",
        base("mixtral"),
        target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    assert any("experts" in s.name for s in attached.param_groups())
    with torch.enable_grad():
        train(attached)
    tuned = logprobs(attached)
    with attached.off():
        assert torch.equal(logprobs(attached), logprobs(Untuned(base("mixtral"))))
    before = {n: p.clone() for n, p in attached.model.named_parameters()}
    with attached.merged():
        assert torch.allclose(logprobs(attached), tuned, atol=2e-5)
    assert all(torch.equal(p, before[n]) for n, p in attached.model.named_parameters())
    attached.save(tmp_path)
    assert torch.allclose(
        plain(PeftModel.from_pretrained(base("mixtral"), tmp_path).eval()), plain(attached.model), atol=1e-5
    )
    with pytest.raises(RecipeError, match="'experts.down_prj' matches nothing"):
        put("lora", base("mixtral"), target_modules=["q_proj"], target_parameters=["experts.down_prj"])
    told = put("ssf", base("mixtral")).warnings
    assert any("fused expert" in t for t in told)
    assert not any("fused expert" in t for t in put("lora", base("mixtral")).warnings)


def test_what_matches_nothing_is_refused():
    for settings, said in [
        ({"target_modules": ["q_prj"]}, "did you mean 'q_proj'.*q_proj 2x"),
        ({"target_modules": ["q_proj", "v_prj"]}, "'v_prj' matches nothing; did you mean 'v_proj'"),
        ({"target_modules": ".*no_such"}, "the model has: "),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 7]}, "layers_to_transform 7"),
        ({"modules_to_save": ["lm_hed"]}, "modules_to_save 'lm_hed' matches nothing; did you mean 'lm_head'"),
    ]:
        for name in ("lora", "ssf"):
            with pytest.raises(RecipeError, match=said):
                put(name, **settings)


@pytest.mark.parametrize("name", ["lora", "ssf"])
def test_tied_embeddings_do_not_part_in_silence(name):
    put(name, base("tied"))
    for settings in (
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
    ):
        with pytest.raises(RecipeError, match="shares its weight with"):
            put(name, base("tied"), **settings)


@pytest.mark.parametrize("name", ["lora", "ssf"])
@torch.no_grad()
def test_where(name, tmp_path):
    """Layers, exclusions, and further modules trained whole."""
    where = {
        "target_modules": ["q_proj", "v_proj"],
        "exclude_modules": ["v_proj"],
        "layers_to_transform": [1],
    }
    attached = put(name, **where, modules_to_save=["lm_head"])
    assert [s.name for s in attached.param_groups()] == [
        "model.layers.1.self_attn.q_proj",
        "lm_head.modules_to_save.default",
    ]
    with torch.enable_grad():
        train(attached)
    with attached.off():
        assert torch.equal(logprobs(attached), logprobs(Untuned(base())))
    attached.save(tmp_path)
    assert torch.allclose(
        plain(PeftModel.from_pretrained(base(), tmp_path).eval()), plain(attached.model), atol=1e-5
    )
    again = build("tuner", attached.settings).attach(base())
    again.load(again.read(tmp_path))
    assert torch.equal(logprobs(again), logprobs(attached))


@tuner(provides="off merge")
class Reads(Delta):
    """Its rows are the main directions of what a module reads."""

    reads: ClassVar[str] = "inputs"
    init_rows: int = 1  # rows to read

    def init(self, W):
        return {"A": torch.zeros(2, W.shape[1]), "B": torch.zeros(W.shape[0], 2)}

    def start(self, W, seen):
        return {"A": torch.linalg.svd(seen, full_matrices=False)[2][:2]}

    def weight(self, W, p):
        return W + p.B @ p.A


def test_a_delta_that_starts_from_what_modules_read():
    attached = Reads(target_modules=["q_proj"]).attach(base())
    seen = []
    inner = attached.layers["model.layers.1.self_attn.q_proj"].base_layer
    hook = inner.register_forward_pre_hook(lambda m, x: seen.append(x[0].flatten(0, -2)))
    attached.initialize([{}], as_roles(attached))
    hook.remove()
    A = attached.parameters()["model.layers.1.self_attn.q_proj.A"]
    want = torch.linalg.svd(seen[0], full_matrices=False)[2][:2]
    assert torch.allclose(A.T @ A, want.T @ want, atol=1e-5)


# importing loads no tuner and changes nothing of how modules are found, until it is asked for
OURS_FIRST = """
import sys
import luthier, luthier.registry; luthier.registry.cards()
assert not [m for m in sys.modules if m.startswith('luthier.methods.')]
import peft
assert not [m for m in sys.modules if m.startswith('luthier.methods.')]
assert [f for f in sys.meta_path if type(f).__module__.startswith('luthier')] == []
assert not [m for m in peft.PeftType if m.startswith('LUTHIER')]
"""
EVERY_DELTA = """
luthier.register_peft()
from peft.utils.peft_types import PeftType
assert {'LUTHIER_SSF', 'LUTHIER_HOULSBY'} <= PeftType.__members__.keys()
"""


@pytest.mark.parametrize("first", [OURS_FIRST, "import peft; import luthier"], ids=["luthier", "peft"])
def test_a_fresh_process_loads_our_type_once_it_is_registered(first, tmp_path):
    base().save_pretrained(tmp_path / "base")
    attached = train(put("ssf"))
    attached.save(tmp_path / "adapter")
    load = LOAD.format(
        base=str(tmp_path / "base"), adapter=str(tmp_path / "adapter"), out=str(tmp_path / "out")
    )
    run_fresh(first + EVERY_DELTA + load)
    assert torch.allclose(torch.load(tmp_path / "out"), plain(attached.model), atol=1e-5)


def test_import_luthier_imports_nothing_heavy():
    code = (
        "import time, sys; t = time.time(); import luthier; print(time.time() - t, 'torch' in sys.modules,"
        " 'peft' in sys.modules)"
    )
    said = run_fresh(code)
    seconds, torch_there, peft_there = said.split()
    assert (torch_there, peft_there) == ("False", "False") and float(seconds) < 0.3


PISSA = {"name": "lora", "init_lora_weights": "pissa", "r": 4}


RUNS = [
    "lora",
    PISSA,
    "ssf",
    {"name": "lora_sb", "r": 4, "init_rows": 8},
    "lisa",
    "prompt",
    {"name": "control", "num_virtual_tokens": 4, "tuner": "lora"},
]


@pytest.mark.parametrize("spec", RUNS)
def test_in_a_run(spec, base, tmp_path):
    """Learns in the loop, goes on bit for bit after a kill, and starts again from its folder."""
    import luthier

    recipe = {
        **base,
        "tuner": spec,
        "learning_rate": 1e-2,
        "max_steps": 24,
        "save_steps": 12,
        "lr_scheduler_type": "constant",
    }
    folder = tmp_path / "whole"
    whole = luthier.tune(**recipe, output_dir=str(folder))
    assert sum(whole.losses[-4:]) < sum(whole.losses[:4])
    last = checkpoints.load(checkpoints.paths(folder)[-1])
    shutil.rmtree(checkpoints.paths(folder)[-1])
    (folder / "report.json").unlink()
    (folder / "run.json").write_text(
        json.dumps({**json.loads((folder / "run.json").read_text()), "finished": False})
    )
    luthier.tune(**recipe, output_dir=str(folder))
    again = checkpoints.load(checkpoints.paths(folder)[-1])
    assert again.step == last.step == 24 and all(
        torch.equal(v, again.tensors[k]) for k, v in last.tensors.items()
    )
    recipe |= {"max_steps": 4, "start": str(folder)}
    further = luthier.tune(**recipe, output_dir=str(tmp_path / "further"))
    assert sum(further.losses[:4]) < sum(whole.losses[:4])


MORE = {  # what a run with some tuner has besides
    "bitfit": {"tuner": {"name": "bitfit", "also": ["norms"]}},
    "cofitune": {"tuner": {"name": "cofitune", "init_rows": 4}},
    "crosstune": {"architecture": "classifier", "tuner": "crosstune"},
    # cut after half of the run
    "dsee": {"tuner": {"name": "dsee", "sparsity": 0.5, "ffn_sparsity": 0.4, "head_sparsity": 0.5}},
    "elastic": {
        "tuner": {"name": "elastic", "depth": [0.5, 1.0]},
        "estimator": "elastic",
        "objective": "sft + kl",
        "roles": {"reference": "whole"},
    },
    "peft": {"tuner": {"name": "peft", "type": "vera"}},
    "ptec": {"architecture": "classifier"},
    "pv_tuning": {"quantization": {"name": "rtn", "bits_per_weight": 2, "group_size": 16}},
    "self_tuning": {
        "data": [
            {**row, "source": "validation" if i % 4 == 0 else "train"} for i, row in enumerate(SUMS[::2])
        ],
        "eval_data": SUMS[:8],
        "objective": {"name": "by_source", "sources": ["train", "validation"]},
        "estimator": {"name": "self_tuning", "warmup": 1},
    },
    "levi": {"architecture": "classifier"},
    "multi_lane": {"architecture": "classifier"},
    "lora + ggpo": {"tuner": "lora", "estimator": "ggpo"},
    "lora + mgpo": {"tuner": "lora", "estimator": "mgpo"},
}


@pytest.mark.parametrize(
    ("steps", "cuts"), [(4, (2,)), pytest.param(6, (2, 3), marks=pytest.mark.slow)], ids=["half", "third"]
)
@pytest.mark.parametrize("name", [*TUNERS, "lora + ggpo", "lora + mgpo"])
def test_every_tuner_goes_on_bit_for_bit(name, steps, cuts, base, tmp_path):
    """Stopped after half of its steps (or a third), it ends as it would have ended."""
    import luthier

    small = (
        {k: v for k, v in SMALL.items() if k in {f.name for f in fields(find("tuner", name))}}
        if name in TUNERS
        else {}
    )
    asked = {
        **base,
        "data": SUMS[::2],
        "tuner": {"name": name, **small},
        "learning_rate": 5e-3,
        "max_steps": steps,
        "save_steps": 1,
        "save_total_limit": 9,
        "evaluate": ["loss"],
        **MORE.get(name, {}),
    }
    whole = luthier.tune(**asked, output_dir=str(tmp_path / "whole"))
    for step in cuts:
        folder = tmp_path / f"cut{step}"
        undone(tmp_path / "whole", folder, step)
        again = luthier.tune(**asked, output_dir=str(folder))
        assert any(f"resuming from checkpoint-{step}" in note for note in again.notes)
        assert again.losses == whole.losses
        ends = [checkpoints.load(checkpoints.paths(f)[-1]).tensors for f in (tmp_path / "whole", folder)]
        assert ends[0].keys() == ends[1].keys()
        assert all(torch.equal(v, ends[1][k]) for k, v in ends[0].items())


def undone(whole: Path, folder: Path, step: int) -> None:
    """A copy of a run's folder as a kill after this step leaves it."""
    shutil.copytree(whole, folder)
    for checkpoint in checkpoints.paths(folder):
        if int(checkpoint.name.rpartition("-")[2]) > step:
            shutil.rmtree(checkpoint)
    (folder / "report.json").unlink()
    (folder / "run.json").write_text(
        json.dumps({**json.loads((folder / "run.json").read_text()), "finished": False})
    )


@pytest.mark.parametrize("kind", SHAPES)
@each
def test_on_every_shape(name, kind, tmp_path):
    """Conv1D, tied embeddings, fused experts, an encoder; bfloat16 and fp32; checkpointed: the contract in
    one go.
    """
    fresh, low = lambda: copy.deepcopy(_shaped(kind)), kind == "tied"
    if low:
        fresh = lambda: copy.deepcopy(_shaped(kind)).bfloat16()
    if kind == "bert" and "soft_prompts" in find("tuner", name).requires:
        pytest.skip("soft vectors stand before text that a causal network reads")
    try:
        attached = put(name, fresh())
    except RecipeError as refusal:
        assert len(str(refusal)) > 40  # a sentence
        return
    model, untuned = attached.model, fresh()
    nothing, off = Untuned(untuned), "disable_adapter" in provides_of(attached.settings)
    with torch.no_grad():
        was = asked(untuned, nothing)
        if "starts_as_base" not in find("tuner", name).contract:
            assert torch.allclose(asked(model, attached), was, atol=0.1 if low else 2e-5)
    own = {id(p) for p in attached.parameters().values()}
    kept = [(p, p.detach().clone()) for p in model.parameters() if id(p) not in own]
    clock = Clock(seed=3, total=2)
    chain = Chain([build("transform", "adam")], attached, clock, 0.02)
    model.train()
    for clock.step in range(2):
        attached.begin_step(clock)
        for p in attached.parameters().values():
            p.grad = None
        asked(model, attached).mean().neg().backward()
        chain.step(gradients(chain))
        attached.end_step(clock)
    model.eval()
    assert all(torch.equal(p, before) for p, before in kept)
    with torch.no_grad():
        tuned = asked(model, attached)
        assert tuned.isfinite().all() and not torch.equal(tuned, was)
        if off:
            with attached.off():
                assert torch.equal(asked(model, attached), was)
        if "merge" in provides_of(attached.settings):
            with attached.merged():
                assert torch.allclose(asked(model, attached), tuned, atol=0.3 if low else 2e-5)
        attached.save(tmp_path)
        again = build("tuner", attached.settings).attach(fresh())
        again.load(again.read(tmp_path))
        assert torch.allclose(asked(again.model, again), tuned, atol=1e-6)
