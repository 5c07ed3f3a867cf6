"""The contract that every quantizer keeps, and tuners on quantized weights."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F

import luthier
from helpers.quantizers import normal, on_codes, there_and_back
from helpers.rows import recipe_of
from helpers.tuners import base, logprobs, put, train
from luthier.errors import RecipeError
from luthier.kernels import codebook
from luthier.methods.quantizers._base import Quantizer
from luthier.methods.quantizers.codebook._book import normal_float
from luthier.model.quantized_linear import modules, numbers, quantized_module
from luthier.recipe.recipe import Recipe
from luthier.recipe.validate import dry_run
from luthier.registry import build, find, helps, names, provides_of
from luthier.storage import checkpoints

QUANTIZERS = names("quantizer")


# one matrix alone: one form
ROUND_INPUTS = {"smoothquant"}  # quantizers that change what a layer reads
SPECS = {"lq_lora": {"name": "lq_lora", "rank": 8, "num_bits_0": [4], "block_size_0": [32]}}


each = pytest.mark.parametrize("name", QUANTIZERS)


@pytest.fixture(scope="session")
def tiny(shallow) -> str:
    return shallow


@each
def test_codes_stand_for_nearly_the_weight(name):
    """Every number is near, storage is what the formula says, and what was quantized once is quantized to
    itself.
    """
    q = build("quantizer", SPECS.get(name, name))
    for shape in ((64, 512), (128, 1024)):
        W = normal(*shape) * 0.02
        codes = q.quantize(W)
        back = q.dequantize(codes, shape, torch.float32)
        assert back.shape == shape and (back - W).norm() < 0.15 * W.norm()
        stored = 8 * sum(t.numel() * t.element_size() for t in codes.values()) / W.numel()
        assert stored == pytest.approx(q.bits(shape), rel=1e-3)
        if "idempotent" not in find("quantizer", name).contract:
            again = q.dequantize(q.quantize(back), shape, torch.float32)
            assert (again - back).abs().max() < 0.02 * back.abs().max()
        assert torch.equal(q.dequantize(codes, shape, torch.bfloat16), back.bfloat16())


@each
def test_zero_and_odd_shapes(name):
    for W in (torch.zeros(8, 64), normal(7, 13), normal(1, 3)):
        back = there_and_back(SPECS.get(name, name), W)
        assert back.isfinite().all() and (back - W).norm() <= 0.2 * W.norm()


@each
def test_is_documented(name):
    cls = find("quantizer", name)
    assert (
        cls.__doc__
        and sys.modules[cls.__module__].__doc__
        and all(helps(cls).get(f.name) for f in fields(cls))
    )


@each
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_module_is_the_linear_it_stands_for(name, kind):
    """Forward, gradient of the input, second derivative, and opening."""
    linear = base(kind).get_submodule(
        "model.layers.0.mlp.up_proj" if kind == "llama" else "transformer.h.0.mlp.c_fc"
    )
    m, q = quantized_module(linear, torch.float32), build("quantizer", SPECS.get(name, name))
    W = linear.weight.detach().T if kind == "gpt2" else linear.weight.detach()
    m.take(q, q.quantize(W.contiguous()))
    x = normal(5, W.shape[1]).requires_grad_(True)
    assert (type(q).inputs is Quantizer.inputs) == (name not in ROUND_INPUTS)
    if name not in ROUND_INPUTS:
        assert torch.equal(q.inputs(x, m.codes), x)
    want = F.linear(q.inputs(x, m.codes), m.dense(), m.bias)
    assert torch.allclose(m(x), want, atol=1e-6) and m.weight.shape == linear.weight.shape
    mine, theirs = (torch.autograd.grad(y.square().sum(), x, create_graph=True)[0] for y in (m(x), want))
    assert torch.allclose(mine, theirs, atol=1e-4)
    twice = [torch.autograd.grad(g.square().sum(), x)[0] for g in (mine, theirs)]
    assert torch.allclose(*twice, rtol=1e-3, atol=1e-3)
    before = m(x).detach()
    with m.open() as weight:
        assert torch.allclose(m(x), before, atol=1e-6) and list(m.parameters())
        weight.data.add_(1)
    assert torch.equal(m(x), before) and "weight" not in dict(m.named_parameters())
    kept = {k: v.dtype for k, v in m.codes.items()}
    assert (
        m.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
        and {k: v.dtype for k, v in m.codes.items()} == kept
    )


def test_grid_points_come_back_exactly():
    scale = torch.rand(32, generator=torch.Generator().manual_seed(1)) + 0.5
    # each row a block with every level
    W = (torch.tensor(normal_float(4)).repeat(32, 4) * scale[:, None]).contiguous()
    back = there_and_back({"name": "nf4", "double_quant": False}, W)
    assert torch.allclose(back, W, atol=1e-7)


def test_expanding_by_pairs_is_expanding():
    codes = torch.randint(0, 16, (64 * 50,), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    scale = torch.rand(50)
    for dtype in (torch.float32, torch.bfloat16):
        args = codebook.pack(codes), normal_float(4), scale, dtype
        assert torch.equal(codebook.expand(*args), codebook.plain(*args))


def test_bitsandbytes_says_the_same():
    bnb = pytest.importorskip("bitsandbytes.functional")
    W, q = normal(256, 640), build("quantizer", "nf4")
    packed, state = bnb.quantize_4bit(W, blocksize=64, quant_type="nf4", compress_statistics=True)
    codes = q.quantize(W)
    assert (packed.flatten() == codes["weight"]).float().mean() > 0.9999
    assert torch.allclose(
        bnb.dequantize_4bit(packed, state), q.dequantize(codes, W.shape, torch.float32), atol=0.02
    )


ON_CODES = [
    n
    for n in names("tuner")
    if find("tuner", n).on_quantized
    and "quantized_weights" not in find("tuner", n).requires
    and n != "bitfit"
]


@pytest.mark.parametrize("name", ON_CODES)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_a_tuner_on_codes_is_the_tuner_on_their_weights(name, kind):
    """Starts as the base, learns the same, off is the base, merged answers alike, and the codes never
    change.
    """
    model, plain = on_codes(kind)
    kept = {n: {k: v.clone() for k, v in m.codes.items()} for n, m in modules(model).items()}
    try:
        twin = put(name, plain)
    except RecipeError as error:
        pytest.skip(str(error))
    attached = put(name, model)
    assert torch.allclose(logprobs(attached), logprobs(twin), atol=1e-5)
    untuned = logprobs(attached)
    with torch.enable_grad():
        train(attached), train(twin)
    tuned = logprobs(attached)
    assert torch.allclose(tuned, logprobs(twin), atol=1e-3) and not torch.allclose(tuned, untuned, atol=1e-4)
    if "disable_adapter" in provides_of(attached.settings) and name != "prompt":
        with attached.off():
            assert (
                torch.allclose(logprobs(attached), untuned, atol=1e-6)
                or "starts_as_base" in find("tuner", name).contract
            )
    if "merge" in provides_of(attached.settings):
        with attached.merged():
            assert torch.allclose(logprobs(attached), tuned, atol=2e-5)
    assert torch.equal(logprobs(attached), tuned)
    assert all(
        torch.equal(v, kept[n.removesuffix(".base_layer")][k])
        for n, m in modules(model).items()
        for k, v in m.codes.items()
    )
    assert not any(n.endswith("base_layer.weight") for n, _ in model.named_parameters())


def test_nothing_dense_is_kept_for_backward():
    """A forward under lora saves no tensor of a weight's size."""
    model, _ = on_codes()
    attached = put("lora", model)
    sizes = {m.size for m in modules(model).values()}
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(tuple(t.shape)) or t, lambda t: t):
        logprobs(attached).sum()
    assert seen and not {s for s in seen} & (sizes | {s[::-1] for s in sizes})


def test_gradients_of_weights_that_are_codes():
    """What lora_sb starts from: the same directions on codes as on the weights they stand for."""
    from helpers.tuners import as_roles

    model, plain = on_codes()
    a, b = put("lora_sb", model, r=4, first_step=1e-2), put("lora_sb", plain, r=4, first_step=1e-2)
    for x in (a, b):
        x.initialize([{}], as_roles(x))
    assert torch.allclose(logprobs(a), logprobs(b), atol=1e-4)


def test_merging_into_codes_is_refused():
    model, _ = on_codes()
    for name in ("lora", "ssf"):
        attached = put(name, on_codes()[0])
        with pytest.raises(ValueError, match="cannot be changed in place"):
            attached.peft.merge_adapter()


@pytest.mark.parametrize("tuner", ["full", "lisa"])
def test_tuners_of_whole_weights_are_refused(tuner, tiny):
    with pytest.raises(RecipeError, match="trains the base model's weights.*'lora'"):
        dry_run(Recipe.load({"model": tiny, "tuner": tuner, "quantization": "nf4"}))


@pytest.mark.parametrize("spec", ["nf4", "int8"])
def test_in_a_run(spec, tiny, tmp_path):
    """Quantized as it is read, learns, resumes bit for bit, loads with the same base, exports merged, is told
    what that costs.
    """
    recipe = {
        **recipe_of(tiny),
        "dtype": "float32",
        "tuner": {"name": "lora", "r": 4},
        "quantization": spec,
        "max_steps": 8,
        "save_steps": 4,
        "learning_rate": 1e-2,
    }
    whole = luthier.tune(**recipe, output_dir=str(tmp_path / "whole"))
    assert sum(whole.losses[-2:]) < sum(whole.losses[:2]) and any(
        f"quantized to {spec}" in s for s in whole.notes
    )
    last = checkpoints.load(checkpoints.paths(tmp_path / "whole")[-1])
    shutil.rmtree(checkpoints.paths(tmp_path / "whole")[-1])
    (tmp_path / "whole" / "report.json").unlink()
    state = tmp_path / "whole" / "run.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "finished": False}))
    luthier.tune(**recipe, output_dir=str(tmp_path / "whole"))
    again = checkpoints.load(checkpoints.paths(tmp_path / "whole")[-1])
    assert all(torch.equal(v, again.tensors[k]) for k, v in last.tensors.items())
    loaded = luthier.load(tmp_path / "whole")
    assert numbers(loaded.model) > 0 and loaded.generate("1+1=", max_new_tokens=2) is not None
    half = luthier.load(tmp_path / "whole", dtype="bfloat16")
    for (name, m), other in zip(modules(loaded.model).items(), modules(half.model).values(), strict=True):
        assert all(torch.equal(v, other.codes[k]) for k, v in m.codes.items()), name
        assert other.compute == torch.bfloat16
    assert {p.dtype for p in half.model.get_input_embeddings().parameters()} == {torch.bfloat16}
    from luthier.serve.export import export

    sentence = export(tmp_path / "whole", "merged", tmp_path / "merged")
    assert "requantized" in sentence and "KL" in sentence
    rows = [{"id": "0", "prompt": "1+2=", "completions": ["3"]}]
    assert torch.allclose(
        luthier.load(tmp_path / "merged", dtype="float32").logprobs(rows), loaded.logprobs(rows), atol=1e-4
    )
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    export(tmp_path / "whole", "lora", tmp_path / "adapter")
    assert torch.allclose(
        luthier.load(tmp_path / "adapter", dtype="float32").logprobs(rows), loaded.logprobs(rows), atol=1e-4
    )


def test_qlora_learns_as_lora_does(base, tmp_path):
    """Within 2% of the loss of LoRA on the unquantized base."""
    recipe = {
        **base,
        "tuner": {"name": "lora", "r": 8},
        "learning_rate": 1e-2,
        "max_steps": 30,
        "lr_scheduler_type": "constant",
    }
    plain = luthier.tune(**recipe, output_dir=str(tmp_path / "plain"))
    coded = luthier.tune(**recipe, load_in_4bit=True, output_dir=str(tmp_path / "coded"))
    tail = lambda r: sum(r.losses[-10:])
    assert tail(plain) < 0.8 * sum(plain.losses[:10]) and tail(coded) < 1.02 * tail(plain) + 0.02


@pytest.mark.parametrize(
    "spec, tuner",
    [
        ({"name": "gptq", "group_size": 16, "init_rows": 8}, {"name": "lora", "r": 4}),
        (
            {"name": "lq_lora", "rank": 4, "target_bits": 3.5, "fisher": True, "init_rows": 4},
            {"name": "lora", "r": 4, "init_lora_weights": "lq"},
        ),
        (
            {"name": "rtn", "bits_per_weight": 2, "group_size": 16},
            {"name": "pv_tuning", "tune_rest": False, "code_lr": 0.03},
        ),
    ],
)
def test_in_a_run_that_calibrates(spec, tuner, tiny, tmp_path):
    """Learns, resumes bit for bit, loads without rows as it was, goes on from its folder, is exported."""
    pytest.importorskip("scipy")
    recipe = {
        **recipe_of(tiny),
        "dtype": "float32",
        "tuner": tuner,
        "quantization": spec,
        "max_steps": 8,
        "save_steps": 4,
        "learning_rate": 1e-2,
    }
    whole = luthier.tune(**recipe, output_dir=str(tmp_path / "whole"))
    assert sum(whole.losses[-2:]) < sum(whole.losses[:2])
    last = checkpoints.load(checkpoints.paths(tmp_path / "whole")[-1])
    shutil.rmtree(checkpoints.paths(tmp_path / "whole")[-1])
    (tmp_path / "whole" / "report.json").unlink()
    state = tmp_path / "whole" / "run.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "finished": False}))
    luthier.tune(**recipe, output_dir=str(tmp_path / "whole"))
    again = checkpoints.load(checkpoints.paths(tmp_path / "whole")[-1])
    assert all(torch.equal(v, again.tensors[k]) for k, v in last.tensors.items())
    rows = [{"id": "0", "prompt": "1+2=", "completions": ["3"]}]
    loaded = luthier.load(tmp_path / "whole")
    from luthier.serve.export import export

    assert export(tmp_path / "whole", "merged", tmp_path / "merged")
    assert torch.allclose(
        luthier.load(tmp_path / "merged", dtype="float32").logprobs(rows), loaded.logprobs(rows), atol=1e-4
    )
    if tuner["name"] == "lora":
        export(tmp_path / "whole", "lora", tmp_path / "adapter")
        assert torch.allclose(
            luthier.load(tmp_path / "adapter", dtype="float32").logprobs(rows),
            loaded.logprobs(rows),
            atol=1e-4,
        )
    further = luthier.tune(**recipe, start=str(tmp_path / "whole"), output_dir=str(tmp_path / "further"))
    assert sum(further.losses[:2]) < sum(whole.losses[:2])
