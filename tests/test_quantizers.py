"""Quantized bases: every quantizer keeps a contract; then each method's own check, and tuners on top."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import luthier
from conftest import recipe_of
from luthier.errors import RecipeError
from luthier.kernels import codebook
from luthier.methods.quantizers.codebook._book import dynamic_map, normal_float
from luthier.model.experts import apart, join
from luthier.model.quantized import quantize
from luthier.model.quantized_linear import modules, numbers, open_up, quantized_module
from luthier.model.quantized_load import chosen
from luthier.recipe.recipe import Recipe
from luthier.recipe.validate import dry_run
from luthier.registry import build, find, helps, names, provides_of
from luthier.storage import checkpoints
from test_tuners import base, logprobs, put, train

torch.set_num_threads(1)
QUANTIZERS = names("quantizer")
# one matrix alone: one form
SPECS = {"lq_lora": {"name": "lq_lora", "rank": 8, "num_bits_0": [4], "block_size_0": [32]}}
each = pytest.mark.parametrize("name", QUANTIZERS)
NF4 = (  # appendix E of arXiv:2305.14314
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@pytest.fixture(scope="session")
def tiny(shallow) -> str:
    return shallow


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def there_and_back(spec, W, dtype=torch.float32):
    q = build("quantizer", spec)
    return q.dequantize(q.quantize(W), tuple(W.shape), dtype)


def on_codes(kind: str = "llama", spec="nf4"):
    """A tiny network whose linear weights are codes, and the same with the weights that the codes stand
    for.
    """
    model, plain = base(kind), base(kind)
    quantize(model, build("quantizer", spec))
    for name, m in modules(model).items():
        plain.get_submodule(name).weight.data = m.weight.clone()
    return model, plain


# ---------------------------------------------------------------------------------------------- the contract


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
    want = F.linear(x, m.dense(), m.bias)
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


# ---------------------------------------------------------------------------------------------- code books


def test_nf4_is_the_published_table():
    assert torch.allclose(torch.tensor(normal_float(4)), torch.tensor(NF4), atol=1e-6)
    assert [len(normal_float(b)) for b in (2, 3, 8)] == [4, 8, 256] and all(
        0.0 in normal_float(b) for b in (2, 3, 4, 8)
    )


def test_grid_points_come_back_exactly():
    scale = torch.rand(32, generator=torch.Generator().manual_seed(1)) + 0.5
    # each row a block with every level
    W = (torch.tensor(normal_float(4)).repeat(32, 4) * scale[:, None]).contiguous()
    back = there_and_back({"name": "nf4", "double_quant": False}, W)
    assert torch.allclose(back, W, atol=1e-7)


def test_nf4_errs_less_than_fp4_and_int4_on_normal_weights():
    W = normal(256, 1024)
    error = {
        n: float((there_and_back({"name": n, "double_quant": False}, W) - W).abs().mean())
        for n in ("nf4", "fp4")
    }
    blocks = W.view(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True) / 7
    error["int4"] = float(((blocks / scale).round() * scale - blocks).abs().mean())
    assert error["nf4"] < error["int4"] and error["nf4"] < error["fp4"]


def test_double_quantization_costs_an_eighth_and_little_error():
    W = normal(512, 2048) * 0.02
    once, twice = (build("quantizer", {"name": "nf4", "double_quant": d}) for d in (False, True))
    assert once.bits(W.shape) == 4.5 and twice.bits(W.shape) == pytest.approx(4.127, abs=5e-4)
    a, b = (q.quantize(W) for q in (once, twice))
    assert torch.equal(a["weight"], b["weight"])
    from luthier.methods.quantizers.codebook._book import unsqueeze

    off = (unsqueeze(b) - a["absmax"]).abs()
    spread = (a["absmax"] - a["absmax"].mean()).abs().max()
    # half the widest gap of the map
    assert off.max() <= spread * float(dynamic_map().diff().max()) / 2 + 1e-7
    gap = (once.dequantize(a, W.shape, torch.float32) - twice.dequantize(b, W.shape, torch.float32)).norm()
    assert gap < 0.02 * W.norm()


def test_the_dynamic_map():
    table = dynamic_map()
    assert (
        len(table) == 256
        and len(table.unique()) == 256
        and table[0] == pytest.approx(-0.9929687)
        and table[-1] == 1
    )
    assert (table.abs() < 1e-3).sum() > 20  # dense toward zero


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


# ---------------------------------------------------------------------------------------------- tuners on codes

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
    from test_tuners import as_roles

    model, plain = on_codes()
    a, b = put("lora_sb", model, r=4, first_step=1e-2), put("lora_sb", plain, r=4, first_step=1e-2)
    for x in (a, b):
        x.initialize([{}], as_roles(x))
    assert torch.allclose(logprobs(a), logprobs(b), atol=1e-4)


def test_merging_into_codes_is_refused():
    model, _ = on_codes()
    for name in ("lora", "ssf"):
        attached = put(name, on_codes()[0])
        with pytest.raises(ValueError, match="takes no change"):
            attached.peft.merge_adapter()


def test_what_is_quantized():
    q = build("quantizer", "nf4")
    found = chosen(base("llama"), q)
    assert len(found) == 14 and "lm_head" not in found
    assert not any("lm_head" in n or "wte" in n for n in chosen(base("gpt2"), q))
    fewer = chosen(base("llama"), build("quantizer", {"name": "nf4", "skip_modules": ["mlp", "layers.0"]}))
    assert fewer and all(".1.self_attn." in n for n in fewer)
    with pytest.raises(RecipeError, match="did you mean 'q_proj'"):
        chosen(base("llama"), build("quantizer", {"name": "nf4", "skip_modules": ["q_prj"]}))


# ---------------------------------------------------------------------------------------------- in a recipe


def test_transformers_words():
    read = lambda **given: Recipe.load(given)
    for given, want in [
        ({"load_in_4bit": True}, {"name": "nf4"}),
        (
            {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
            {"name": "fp4", "double_quant": False},
        ),
        ({"load_in_8bit": True, "load_in_4bit": False}, {"name": "int8"}),
        ({"adapter": "qlora"}, {"name": "nf4"}),
        ({"tuner": {"name": "qlora", "r": 4}, "load_in_8bit": True}, {"name": "int8"}),
        ({"quantization": "int8", "load_in_4bit": False}, "int8"),
        ({"load_in_4bit": False, "bnb_4bit_quant_type": "nf4"}, None),
    ]:
        recipe = read(**given)
        assert recipe.quantization == want and recipe.methods()["tuner"].name == "lora", given
        assert not want or want == "int8" or any("quantiz" in t for t in recipe.warnings)
    assert read(load_in_4bit=True, bnb_4bit_compute_dtype="bfloat16").dtype == "bfloat16"
    assert Recipe.load(read(load_in_4bit=True).yaml()).fingerprint() == read(load_in_4bit=True).fingerprint()
    assert (
        read(quantization="nf4").but(**{"quantization.block_size": 32}).methods()["quantization"].block_size
        == 32
    )
    for given in (
        {"load_in_4bit": True, "load_in_8bit": True},
        {"load_in_4bit": True, "quantization": "int8"},
    ):
        with pytest.raises(RecipeError, match="give one of them"):
            read(**given)


@pytest.mark.parametrize("tuner", ["full", "lisa"])
def test_tuners_of_whole_weights_are_refused(tuner, tiny):
    with pytest.raises(RecipeError, match="trains the model's own weights.*'lora'"):
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
    assert sum(whole.losses[-2:]) < sum(whole.losses[:2]) and any(f"kept as {spec}" in s for s in whole.notes)
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


@pytest.mark.parametrize("kind", ["gpt2", "bert", "mixtral"])
def test_other_networks_are_read_into_codes(kind, tmp_path):
    """Conv1D, a classifier with a fresh head, the fused experts of a mixture, tied embeddings."""
    from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

    from luthier.model.quantized_load import loaded

    q = build("quantizer", "nf4")
    if kind == "bert":
        config = BertConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=97
        )
        torch.manual_seed(0)
        plain, cls = BertForSequenceClassification(config).eval(), AutoModelForSequenceClassification
        plain.bert.save_pretrained(tmp_path)  # no head
    else:
        plain = base(kind)
        cls = type(plain)
        plain.save_pretrained(tmp_path)
    found = {}

    def load(**said):
        model, found["info"] = cls.from_pretrained(tmp_path, output_loading_info=True, **said)
        return model

    ids = torch.arange(3, 17).reshape(2, 7)
    model = loaded(load, q, torch.float32, torch.device("cpu"))
    if kind == "mixtral":
        with torch.no_grad():
            fused = plain(ids).logits
            apart(plain)
            assert torch.allclose(plain(ids).logits, fused, atol=1e-6)
        assert sum(".experts." in n for n in modules(model)) == 2 * sum(
            m.count for m in plain.modules() if hasattr(m, "count")
        )
    missing = {k for k in found["info"]["missing_keys"]}
    assert missing == ({"classifier.weight", "classifier.bias"} if kind == "bert" else set())
    assert type(model.get_submodule("classifier")) is nn.Linear if kind == "bert" else modules(model)
    some = modules(model)
    assert set(some) == set(chosen(plain, q))
    for name, m in some.items():
        W = plain.get_submodule(name).weight.detach()
        want = q.dequantize(q.quantize((W.T if kind == "gpt2" else W).contiguous()), m.size, torch.float32)
        assert torch.equal(m.dense(), want)
    with torch.no_grad():
        for name, m in some.items():
            plain.get_submodule(name).weight.data = m.weight.contiguous()
        if kind != "bert":
            assert torch.allclose(model.eval()(ids).logits, plain(ids).logits, atol=1e-5)
        join(plain)
        open_up(model)
        assert {n: p.shape for n, p in model.named_parameters()} == {
            n: p.shape for n, p in plain.named_parameters()
        }
        assert (
            all(torch.equal(p, plain.get_parameter(n)) for n, p in model.named_parameters()) or kind == "bert"
        )


@pytest.mark.skipif(sys.platform != "linux", reason="pages of files are counted on Linux")
def test_what_was_read_of_a_checkpoint_leaves_memory(tmp_path):
    """The file may stay mapped for what is dense, and is all there when it is read again; its pages are not
    kept.
    """
    from luthier.model import quantized_load as _load

    dense = base("llama")
    dense.save_pretrained(tmp_path)
    q = build("quantizer", "nf4")
    model = _load.loaded(
        lambda **said: type(dense).from_pretrained(tmp_path, **said), q, torch.float32, torch.device("cpu")
    )
    file, kept, inside = str(tmp_path / "model.safetensors"), 0, False
    with open("/proc/self/smaps") as maps:
        for line in maps:
            inside = line.rstrip().endswith(file) if "-" in line.split()[0] else inside
            kept += int(line.split()[1]) if inside and line.startswith("Rss:") else 0
    assert kept == 0
    assert all(torch.equal(p, dense.get_parameter(n)) for n, p in model.named_parameters())


def test_some_experts_stay_as_they_are(tmp_path):
    """Skipped by the name of their matrix, whether read from a checkpoint or from a network that is there."""
    from luthier.model.quantized_load import loaded

    q = build("quantizer", {"name": "nf4", "skip_modules": ["down_proj"]})
    dense = base("mixtral")
    dense.save_pretrained(tmp_path)
    read = loaded(
        lambda **said: type(dense).from_pretrained(tmp_path, **said), q, torch.float32, torch.device("cpu")
    )
    quantize(dense, q)
    assert set(modules(read)) == set(modules(dense)) and not any("down_proj" in n for n in modules(read))
    assert all(torch.equal(p, dense.get_parameter(n)) for n, p in read.named_parameters())
    assert any(n.endswith("experts.1.down_proj.weight") for n, _ in read.named_parameters())


@torch.no_grad()
def test_tuners_beside_experts_that_are_codes():
    """A Delta moves what it moves beside dense experts; lora leaves the experts out, says so, and says what
    reaches them.
    """
    dense, coded = base("mixtral"), base("mixtral")
    quantize(coded, build("quantizer", "nf4"))
    once = copy.deepcopy(coded)
    assert {s.name for s in put("ssf", dense).param_groups()} == {
        s.name for s in put("ssf", once).param_groups()
    }
    attached = put("lora", coded, target_modules="all-linear")
    assert not any("experts" in s.name for s in attached.param_groups())
    assert any("skip_modules" in t and "fused expert weights" in t for t in attached.warnings)
    with torch.enable_grad():
        train(attached)
    tuned = logprobs(attached)
    with attached.merged():
        assert torch.allclose(logprobs(attached), tuned, atol=2e-5)
    with pytest.raises(RecipeError, match="'experts.down_proj' is quantized"):
        put("lora", copy.deepcopy(once), target_modules=["q_proj"], target_parameters=["experts.down_proj"])


# ---------------------------------------------------------------------------------------------- rounding, with and without repair


def test_codes_of_any_width_lie_side_by_side():
    from luthier.methods.quantizers.normal_float._bits import pack, unpack

    for bits in range(1, 9):
        codes = torch.randint(
            0, 2**bits, (4093,), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8
        )
        packed = pack(codes, bits)
        assert len(packed) == (4096 // 8 * bits if bits < 8 else 4093) and torch.equal(
            unpack(packed, bits, 4093), codes
        )


def test_round_to_nearest_by_its_formula():
    W = normal(4, 128)
    for bits in (2, 3, 4, 8):
        q = build("quantizer", {"name": "rtn", "bits_per_weight": bits})
        assert q.bits(W.shape) == bits + 32 / 64
        step = (W.view(-1, 64).amax(1) - W.view(-1, 64).amin(1)) / (2**bits - 1)
        error = (q.dequantize(q.quantize(W), tuple(W.shape), torch.float32) - W).view(-1, 64).abs().amax(1)
        assert (error <= step * 0.51 + 2e-3).all()


def perplexity(model) -> float:
    return float((-logprobs(put("lora", model))).mean().exp())


@torch.no_grad()
def test_eight_bits_are_enough_and_two_are_not():
    from test_tuners import base as fresh

    plain = fresh("llama")
    want = perplexity(plain)
    eight, two = (perplexity(on_codes("llama", {"name": "rtn", "bits_per_weight": b})[0]) for b in (8, 2))
    assert abs(eight - want) < 0.01 * want and abs(two - want) > 5 * abs(eight - want)


def test_gptq_errs_less_on_what_the_layer_reads():
    mix = normal(96, 96, seed=5) * torch.logspace(0, -2, 96)
    X = normal(96, 400, seed=6)
    H = (mix @ X) @ (mix @ X).T
    W = normal(32, 96, seed=7)
    for bits in (2, 3, 4):
        q = build("quantizer", {"name": "gptq", "bits_per_weight": bits, "group_size": 48})
        off = lambda codes, q=q: float(
            ((q.dequantize(codes, (32, 96), torch.float32) - W) @ mix @ X).square().sum()
        )
        assert off(q.quantize(W, H)) < 0.7 * off(q.quantize(W))
    alone = torch.eye(96) * 3  # inputs that have nothing to do with each other: nothing can be repaired
    assert torch.allclose(
        q.dequantize(q.quantize(W, alone), (32, 96), torch.float32),
        q.dequantize(q.quantize(W), (32, 96), torch.float32),
    )


# ---------------------------------------------------------------------------------------------- lq-lora


def lq(**settings):
    one = {"num_bits_0": [3], "block_size_0": [64]}
    return build("quantizer", {"name": "lq_lora", "rank": 8, "target_bits": 4, **one, **settings})


def test_lq_error_falls_until_it_stops_and_beats_plain_quantization():
    from luthier.methods.quantizers.normal_float.lq_lora import WeightedError

    W, q = normal(64, 96, seed=1), lq()
    codes, said = q.turns(W, q.forms()[0], WeightedError(None))
    assert len(said) > 1 and all(a > b for a, b in zip(said, said[1:]))
    assert float((q.dequantize(codes, (64, 96), torch.float32) - W).square().sum()) == pytest.approx(
        said[-1], rel=1e-3
    )
    form = q.forms()[0]
    plain = form.dequantize(form.quantize(W), (64, 96), torch.float32)
    assert said[-1] < 0.8 * float((plain - W).square().sum())


def test_lq_of_a_matrix_of_that_rank_is_exact():
    W, q = normal(64, 8, seed=1) @ normal(8, 96, seed=2), lq()
    assert torch.allclose(q.dequantize(q.quantize(W), (64, 96), torch.float32), W, atol=1e-3)


def test_lq_weights():
    """Even weights change nothing; uneven ones lower the error where they are large."""
    W, q = normal(64, 96, seed=1), lq()
    even = q.quantize(W, (torch.full((64,), 2.0), torch.full((96,), 3.0)))
    assert all(torch.allclose(v.float(), even[k].float(), atol=1e-4) for k, v in q.quantize(W).items())
    heavy = torch.ones(64)
    heavy[:8] = 100.0
    uneven = q.quantize(W, (heavy, torch.ones(96)))
    off = lambda codes: (q.dequantize(codes, (64, 96), torch.float32) - W)[:8].norm()
    assert off(uneven) < 0.9 * off(even)


def test_bits_are_allocated_as_the_best_of_all_allocations():
    import itertools

    pytest.importorskip("scipy")
    from luthier.methods.quantizers.normal_float.lq_lora import allocate

    errors = (
        torch.rand(4, 3, generator=torch.Generator().manual_seed(3)).sort(1, descending=True).values.tolist()
    )
    sizes = [[200.0 * (i + 1), 300.0 * (i + 1), 410.0 * (i + 1)] for i in range(4)]
    for budget in (2000, 2600, 3300, 4200):
        found = allocate(errors, sizes, budget)
        every = [
            c for c in itertools.product(range(3), repeat=4) if sum(s[k] for s, k in zip(sizes, c)) <= budget
        ]
        best = min(every, key=lambda c: sum(e[k] for e, k in zip(errors, c)))
        assert sum(e[k] for e, k in zip(errors, found)) == pytest.approx(
            sum(e[k] for e, k in zip(errors, best))
        )
    with pytest.raises(RecipeError, match="target_bits"):
        allocate(errors, sizes, 1999)


def test_lq_keeps_its_budget_over_a_network_and_trains_its_low_rank_part():
    pytest.importorskip("scipy")
    model = base("llama")
    q = build("quantizer", {"name": "lq_lora", "rank": 4, "target_bits": 3.2})
    quantize(model, q)
    some = modules(model)
    bits = sum(m.quantizer.forms()[0].bits(m.size) * m.size[0] * m.size[1] for m in some.values())
    count = numbers(model)
    assert bits <= 3.2 * count and len({m.quantizer.forms()[0] for m in some.values()}) > 1
    untuned = logprobs(put("ssf", copied(model)))
    attached = put("lora", model, init_lora_weights="lq", r=4)
    assert torch.allclose(logprobs(attached), untuned, atol=1e-4)
    layer = attached.layers["model.layers.0.self_attn.q_proj"]
    held = layer.base_layer.codes
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert torch.allclose(B @ A * layer.scaling["default"], held["L1"] @ held["L2"], atol=1e-5)
    train(attached)
    with attached.off():
        assert torch.allclose(logprobs(attached), untuned, atol=1e-5)
    with pytest.raises(RecipeError, match="r: 4"):
        put("lora", lq_model(), init_lora_weights="lq", r=8)
    with pytest.raises(RecipeError, match="wants a base split by"):
        put("lora", base("llama"), init_lora_weights="lq", r=4)


def copied(model):
    import copy

    return copy.deepcopy(model)


def lq_model():
    model = base("llama")
    quantize(model, lq(rank=4))
    return model


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


# ---------------------------------------------------------------------------------------------- pv-tuning


def lipschitz(A) -> float:
    return float(torch.linalg.eigvalsh(A.T @ A).max())


@pytest.mark.parametrize(
    "spec", [{"name": "rtn", "bits_per_weight": 2, "group_size": 16}, {"name": "vq", "nbits_per_codebook": 4}]
)
def test_a_v_step_never_raises_a_quadratic_loss(spec):
    """Toward W - gradient / L, by any share of the codes: the bound that the step minimises lies above the
    loss.
    """
    from luthier.methods.tuners.quantized.pv_tuning import recode

    q, size = build("quantizer", spec), (4, 16)
    A, target = normal(16, 16, seed=1) / 4 + torch.eye(16), normal(*size, seed=2)
    loss = lambda W: float(((W - target) @ A).square().sum()) / 2
    codes = q.quantize(normal(*size, seed=3))
    W = q.dequantize(codes, size, torch.float32)
    said, changed = [loss(W)], []
    for _ in range(60):
        grad = (W - target) @ A @ A.T
        codes = q.nearest(W, codes)
        made = recode(q, codes, size, W - grad / lipschitz(A.T), share=0.1)
        new = q.dequantize(made, size, torch.float32)
        changed.append(float((new != W).float().mean()))
        codes, W = made, new
        said.append(loss(W))
    assert all(b <= a + 1e-5 for a, b in zip(said, said[1:])) and said[-1] < 0.9 * said[0]
    assert max(changed) <= 0.1 * q.together * 1.01


def test_v_steps_end_near_the_best_codes_of_twelve_weights():
    """Coordinate descent over all codes, by brute force, is no more than 5% better."""
    from luthier.methods.tuners.quantized.pv_tuning import recode

    q, size = build("quantizer", {"name": "rtn", "bits_per_weight": 2, "group_size": 12}), (1, 12)
    A, target = normal(12, 12, seed=4) / 12 + torch.eye(12), normal(*size, seed=5)
    loss = lambda W: float(((W - target) @ A).square().sum())
    codes = q.quantize(target)
    levels = codes["low"].float() + codes["scale"].float() * torch.arange(4)
    W = q.dequantize(codes, size, torch.float32)
    for _ in range(100):  # one code at a time, so each weight's own curvature bounds the step
        codes = recode(q, codes, size, W - (W - target) @ A @ A.T / (A @ A.T).diagonal(), share=1 / 12)
        W = q.dequantize(codes, size, torch.float32)
    best = W.clone()
    for start in (W, target, -target):
        V = levels[(start[..., None] - levels).abs().argmin(-1)]
        for _ in range(20):
            for k in range(12):
                tries = [torch.cat([V[:, :k], level.view(1, 1), V[:, k + 1 :]], 1) for level in levels]
                V = min(tries, key=loss)
        best = min(best, V, key=loss)
    assert loss(W) <= 1.05 * loss(best) + 1e-6


def distil(steps: int = 40, **settings):
    """KL of a tiny network to its unquantized self before and after tuning its 2-bit codes; the tuner, and
    shares of codes changed.
    """
    from luthier.clock import Clock
    from luthier.methods.estimators._base import gradients
    from luthier.train.optimizer import Chain

    ids = torch.arange(3, 59).reshape(4, 14)
    want = base("llama")(ids).logits.detach().log_softmax(-1)
    model, _ = on_codes("llama", {"name": "rtn", "bits_per_weight": 2, "group_size": 16})
    attached = put("pv_tuning", model, tune_rest=False, **settings)
    kl = lambda: (want.exp() * (want - model(ids).logits.log_softmax(-1))).sum(-1).mean()
    clock, said, shares = Clock(seed=0, total=steps), [], []
    chain = Chain([build("transform", "adam")], attached, clock, 3e-4)
    for clock.step in range(steps):
        attached.begin_step(clock)
        for p in attached.parameters().values():
            p.grad = None
        loss = kl()
        said.append(float(loss.detach()))
        loss.backward()
        before = {n: places(m) for n, m in attached.coded.items()}
        chain.step(gradients(chain))
        attached.end_step(clock)
        shares += [float((places(m) != before[n]).float().mean()) for n, m in attached.coded.items()]
    return [*said, float(kl().detach())], attached, shares


def places(m) -> torch.Tensor:
    from luthier.methods.quantizers.normal_float._bits import unpack

    return unpack(m.codes["weight"].clone(), m.quantizer.bits_per_weight, m.size[0] * m.size[1])


def test_pv_tuning_lowers_the_loss_and_few_codes_change():
    torch.manual_seed(0)
    said, attached, shares = distil(code_lr=0.03, code_trust_ratio=0.1)
    assert said[-1] < 0.7 * said[0] and max(shares) <= 0.01 and sum(shares) > 0
    for m in attached.coded.values():  # what the codes stand for is what the network reads, bit for bit
        x = normal(3, m.size[1])
        assert torch.equal(m(x), F.linear(x, m.dense(), m.bias))
    with torch.no_grad(), attached.merged():
        assert all("weight" in m._parameters for m in attached.coded.values())
    still, *_ = distil(code_lr=0.0)
    assert said[-1] < still[-1]  # better than scales alone


def test_pv_tuning_ends_lower_than_straight_through():
    """Rounding every weight in every step, at equal steps and rates."""
    few, *_ = distil(code_lr=0.03, code_trust_ratio=0.1)
    every, *_ = distil(code_lr=0.03, max_code_change_per_step=1.0, code_trust_ratio=1e9)
    assert few[-1] < every[-1]


def test_pv_tuning_wants_codes(tiny):
    with pytest.raises(RecipeError, match="tunes a quantized base"):
        put("pv_tuning")
    with pytest.raises(RecipeError, match="requires a quantized base.*'rtn'"):
        dry_run(Recipe.load({"model": tiny, "tuner": "pv_tuning", "quantization": "nf4"}))


def test_a_teacher_of_codes(tiny, tmp_path):
    """As read from the same quantizer by hand; what looks at rows is refused for a role."""
    import luthier
    from conftest import SUMS
    from luthier.model.load import assemble
    from luthier.model.quantized_linear import Quantized
    from luthier.recipe.recipe import Recipe
    from luthier.recipe.validate import build_methods

    teacher = {"name": "model", "model": tiny, "quantization": "nf4"}
    said = {"model": tiny, "data": SUMS, "dtype": "float32", "objective": "distill", "max_steps": 2}
    recipe = Recipe.load(said | {"roles": {"teacher": teacher}})
    assert Recipe.load(recipe.yaml()).yaml() == recipe.yaml()
    p = build_methods(recipe)
    net = p.roles["teacher"].play("teacher", assemble(recipe, p).policy).model
    coded = assemble(
        r := Recipe.load(said | {"objective": "sft", "quantization": "nf4"}), build_methods(r)
    ).policy.model
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        assert torch.equal(net(ids).logits, coded(ids).logits)
    assert sum(isinstance(m, Quantized) for m in net.modules()) == 14  # 2 layers
    found = [
        luthier.tune(said, roles={"teacher": t}, folder=tmp_path / n).losses
        for n, t in (("a", teacher), ("b", {**teacher, "quantization": None}))
    ]
    assert found[0] != found[1]
    with pytest.raises(
        RecipeError, match="a role's weights become codes one by one, and quantizer 'gptq' looks at more"
    ):
        Recipe.load(said | {"roles": {"teacher": {**teacher, "quantization": "gptq"}}}).methods()
