"""Tuners of subsets of a model's own weights: the contract on four kinds of network, and each method's own
check.
"""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as t
from peft import PeftModel
from torch import nn

import luthier
from conftest import recipe_of
from luthier.clock import Clock
from luthier.data.load import load_rows
from luthier.errors import RecipeError
from luthier.methods.architectures.text.causal import Causal
from luthier.methods.estimators._base import gradients
from luthier.methods.estimators.first_order.gradient_dropout import chance
from luthier.methods.evaluators.representation.rsa import correlation, cosines
from luthier.methods.tuners._base import Untuned
from luthier.methods.tuners._delta import Delta
from luthier.methods.tuners.subset.cofitune import normalised
from luthier.methods.tuners.subset.hft import half
from luthier.model.anatomy import kind_of, layer_of, part_of
from luthier.model.batch import collate
from luthier.model.policy import Policy
from luthier.recipe import model_names
from luthier.registry import build, find, provides_of
from luthier.train.optimizer import Chain

torch.set_num_threads(1)
IDS = torch.arange(3, 17).reshape(2, 7)
SIZE = dict(vocab_size=97, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, initializer_range=0.15)
LLAMA = dict(SIZE, intermediate_size=64, num_key_value_heads=2, bos_token_id=1, eos_token_id=1)
MOE = dict(
    num_experts=3,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    shared_expert_intermediate_size=24,
    decoder_sparse_step=1,
)
MADE = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**LLAMA)),
    "tied": lambda: t.LlamaForCausalLM(t.LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "gpt2": lambda: t.GPT2LMHeadModel(
        t.GPT2Config(
            n_embd=32,
            n_layer=4,
            n_head=4,
            vocab_size=97,
            n_positions=64,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
        )
    ),
    "qwen_moe": lambda: t.Qwen2MoeForCausalLM(t.Qwen2MoeConfig(**LLAMA, **MOE)),
    "bert": lambda: t.BertForMaskedLM(
        t.BertConfig(
            **SIZE,
            intermediate_size=64,
            max_position_embeddings=64,
            hidden_dropout_prob=0,
            attention_probs_dropout_prob=0,
        )
    ),
    "t5": lambda: t.T5ForConditionalGeneration(
        t.T5Config(
            vocab_size=97,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            dropout_rate=0,
            decoder_start_token_id=0,
        )
    ),
}
TUNERS = {  # name -> settings that suit a tiny network
    "hft": {},
    "lisa": {"n_layers": 1},
    "owlore": {"n_layers": 1},
    "telly": {},
    "cofitune": {"init_rows": 2},
    "part": {},
    "s2ft": {"d_ratio": 0.1, "o_ratio": 0.25},
    "apet": {"n": 200},
    "sara": {},
    "spt": {"init_rows": 2, "r": 2},
    "r_amt": {},
    "reinit": {},
}


def base(kind: str = "llama", dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = MADE[kind]()
    with torch.no_grad():
        for n, p in model.named_parameters():  # zero hides mistakes
            if n.endswith("bias"):
                p.normal_(std=0.1)
    return model.to(dtype).eval()


def put(name: str, model: nn.Module | None = None, **settings):
    torch.manual_seed(1)
    return build("tuner", {"name": name, **TUNERS.get(name, {}), **settings}).attach(
        base() if model is None else model
    )


def logits(model: nn.Module) -> torch.Tensor:
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    return model(input_ids=IDS, **more).logits


def say(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return logits(model)


def loss_of(model: nn.Module) -> torch.Tensor:
    z = logits(model).float()[:, :-1]
    return nn.functional.cross_entropy(z.flatten(0, 1), IDS[:, 1:].flatten())


def train(
    attached,
    steps: int = 3,
    rate: float = 0.02,
    transform="adam",
    first: int = 0,
    chain=None,
    total: int | None = None,
    seed: int = 3,
):
    clock = Clock(seed=seed, total=total or steps)
    made = Chain([build("transform", transform)] if transform else [], attached, clock, rate)
    made.state = chain.state if chain else made.state
    for clock.step in range(first, steps):
        attached.begin_step(clock)
        for p in attached.parameters().values():
            p.grad = None
        loss_of(attached.model).backward()
        made.step(gradients(made))
        attached.end_step(clock)
    return made


def batch(rows=None):
    rows = rows or [{"id": i, "ids": r.tolist()} for i, r in enumerate(IDS)]
    encode = lambda r: SimpleNamespace(
        prompt=r["ids"][:3], completions=[r["ids"][3:]], supervised=[[True] * 4]
    )
    return collate(rows, encode)


ROWS = [{"id": i, "ids": r.tolist()} for i, r in enumerate(IDS)]


def roles_of(attached):
    return SimpleNamespace(
        policy=Policy(Causal(), attached.model, attached), batch=batch, clock=Clock(), tuner=attached
    )


def state_bytes(tree) -> int:
    if isinstance(tree, dict):
        return sum(state_bytes(v) for v in tree.values())
    return tree.numel() * tree.element_size() if torch.is_tensor(tree) else 0


# ---------------------------------------------------------------------------------------------- the contract


ROUNDING = 2**-8  # of a number in bfloat16
# on the way to the logits of four layers: other kernels alone move them, on average, by up to four
ROUNDINGS = 8


def starts_as(untuned: torch.Tensor, start: torch.Tensor, rebuilt: bool) -> bool:
    """Bit for bit, but in bfloat16 where a method rebuilds its layers' products.

    It adds up in fp32 and rounds once; the base rounds where the processor's kernel does. Both are right, and
    they agree in all bits on some processors only.
    """
    if start.dtype is torch.float32 or not rebuilt:
        return torch.equal(start, untuned)
    gap = (start - untuned).float().abs()
    return bool(gap.mean() < ROUNDINGS * ROUNDING * untuned.float().std())


CASES = [
    ("llama", torch.float32, False),
    ("tied", torch.float32, True),
    ("gpt2", torch.float32, True),
    ("qwen_moe", torch.float32, False),
    ("bert", torch.float32, True),
    ("llama", torch.bfloat16, True),
    ("gpt2", torch.bfloat16, False),
    ("qwen_moe", torch.bfloat16, True),
    ("bert", torch.bfloat16, False),
]


@pytest.mark.parametrize("kind, dtype, checkpointing", CASES, ids=lambda v: str(v).removeprefix("torch."))
@pytest.mark.parametrize("name", TUNERS)
def test_contract(name, kind, dtype, checkpointing, tmp_path):
    """Starts as the base, moves its own only, off, merged, saved, and resumed bit for bit."""
    untuned = say(base(kind, dtype))
    attached = put(name, base(kind, dtype))
    assert starts_as(untuned, say(attached.model), issubclass(find("tuner", name), Delta))
    if checkpointing:
        attached.model.gradient_checkpointing_enable({"use_reentrant": False})
        attached.model.train()
    own = {id(p) for p in attached.parameters().values()} | {id(p) for p in attached.memory().values()}
    before = {n: (p, p.detach().clone()) for n, p in attached.model.named_parameters() if id(p) not in own}
    chain = train(attached, 2, total=4)
    state, tensors = copy.deepcopy(chain.state), attached.tensors()
    train(attached, 4, first=2, chain=chain, total=4)
    attached.model.gradient_checkpointing_disable()
    attached.model.eval()
    assert all(torch.equal(p, was) for p, was in before.values())
    tuned = say(attached.model)
    assert not torch.equal(tuned, untuned)

    again = put(name, base(kind, dtype))
    again.load(tensors)
    if checkpointing:
        again.model.gradient_checkpointing_enable({"use_reentrant": False})
        again.model.train()
    train(again, 4, first=2, chain=SimpleNamespace(state=state), total=4)
    assert all(torch.equal(v, again.tensors()[k]) for k, v in attached.tensors().items())

    if "disable_adapter" in provides_of(attached.settings):
        with attached.off():
            assert torch.equal(say(attached.model), untuned)
        assert torch.equal(say(attached.model), tuned)
    else:
        with pytest.raises(RecipeError, match="cannot be switched off"), attached.off():
            pass
    with attached.merged():
        # in bf16 a router may send a token elsewhere for a rounding
        gap = (say(attached.model) - tuned).float().abs()
        assert gap.max() < 1e-5 if dtype is torch.float32 else gap.mean() < 0.05
    assert torch.equal(say(attached.model), tuned)
    attached.save(tmp_path)
    fresh = build("tuner", attached.settings).attach(base(kind, dtype))
    fresh.load(fresh.read(tmp_path))
    assert torch.equal(say(fresh.model), tuned)


@pytest.mark.parametrize("name", TUNERS)
def test_export_as_lora(name, tmp_path):
    """Equal where there is a LoRA of it, refused in a sentence where there is none."""
    attached = put(name)
    train(attached)
    if not issubclass(find("tuner", name), Delta):
        with pytest.raises(RecipeError, match="no LoRA form"):
            attached.export_lora(tmp_path)
        return
    attached.export_lora(tmp_path)
    assert torch.allclose(
        say(PeftModel.from_pretrained(base(), tmp_path).eval()), say(attached.model), atol=1e-4
    )


def test_experts_are_part_of_their_layer():
    """Fused experts move with the layer they stand in; a method that cannot reach them says so."""
    model = base("qwen_moe")
    experts = [n for n, _ in model.named_parameters() if ".experts." in n]
    assert experts and set(experts) <= set(put("lisa", model).names)
    assert any("experts.down_proj" in n for n in put("cofitune", base("qwen_moe")).names)
    refused = t.Qwen3MoeForCausalLM(
        t.Qwen3MoeConfig(**LLAMA, **{k: v for k, v in MOE.items() if "shared" not in k})
    )
    with pytest.raises(RecipeError, match="no linear module for d_ratio .fused experts"):
        build("tuner", "s2ft").attach(refused)
    build("tuner", {"name": "s2ft", "d_ratio": 0, "o_ratio": 0.25}).attach(refused)


@pytest.mark.parametrize("kind", MADE)
def test_anatomy(kind):
    """Every layer's matrices are known by their part."""
    model = base(kind)
    parts = {
        part_of(n)
        for n, m in model.named_modules()
        if isinstance(m, (nn.Linear, t.pytorch_utils.Conv1D)) and layer_of(f"{n}.")
    }
    assert {"o", "up", "down"} <= parts and ({"q", "k", "v"} <= parts or "qkv" in parts)
    places = {p for n, _ in model.named_parameters() if (p := layer_of(n))}
    assert len(places) == 4 and {kind_of(n) for n, _ in model.named_parameters() if layer_of(n)} == {
        "attention",
        "feed-forward",
        "norm",
    }


# ---------------------------------------------------------------------------------------------- schedules of own weights


def blocks(attached) -> tuple[int, int]:
    sizes = {n: p.numel() for n, p in attached.model.named_parameters() if layer_of(n)}
    return sum(s for n, s in sizes.items() if attached.model.get_parameter(n).requires_grad), sum(
        sizes.values()
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5"])
def test_hft_moves_half_of_the_layers(kind):
    moving, every = blocks(put("hft", base(kind)))
    assert abs(moving / every - 0.5) < 0.02


def test_hft_counts_as_the_paper_does():
    """2 of 4 in attention, 1 or 2 of 3 in the feed-forward, half the layers each, 1 of 2 norms."""
    shape = {n: 1 for n, _ in base().named_parameters() if layer_of(n)}
    live = half(shape, 0.5, torch.Generator().manual_seed(0))
    of = lambda i, kind: sum(layer_of(n)[1] == i and kind_of(n) == kind for n in live)
    assert all(of(i, "attention") == 2 and of(i, "norm") == 1 for i in range(4))
    assert sorted(of(i, "feed-forward") for i in range(4)) == [1, 1, 2, 2]


def test_hft_rests_and_redraws():
    attached = put("hft", embeddings=False)
    before, clock = attached.tensors(), Clock(seed=4, total=3)
    chain = train(attached, 3, seed=4)
    moved = {k for k, v in attached.tensors().items() if not torch.equal(v, before[k])} - {"draw"}
    assert (
        moved == set(s.name + ".weight" for s in attached.param_groups())
        and {f"{n}.weight" for n in chain.state} == moved
    )
    full = train(put("full"), 3)
    assert state_bytes(chain.state) < 0.55 * state_bytes(full.state)
    other = put("hft", embeddings=False)
    train(other, 3, seed=4)
    # the same seed, the same half
    assert {s.name for s in other.param_groups()} == {s.name for s in attached.param_groups()}
    attached.begin_step(clock)  # the next stage goes on from here
    assert {s.name for s in attached.param_groups()} != {s.name for s in other.param_groups()}


def test_hft_with_everything_is_full_tuning():
    one, two = put("hft", ratio=1.0), put("full")
    train(one), train(two)
    assert all(torch.equal(v, one.tensors()[k]) for k, v in two.tensors().items())


def test_half_reset():
    attached = put("full")
    start = attached.tensors()
    train(attached)
    tuned = attached.tensors()
    reset = build("merger", "half_reset").merge([tuned], start)
    back = {k for k, v in reset.items() if torch.equal(v, start[k]) and not torch.equal(start[k], tuned[k])}
    assert all(torch.equal(v, tuned[k]) for k, v in reset.items() if k not in back)
    inside = [k for k in tuned if layer_of(k)]
    share = sum(tuned[k].numel() for k in back) / sum(tuned[k].numel() for k in inside)
    assert back <= set(inside) and abs(share - 0.5) < 0.02
    with pytest.raises(RecipeError, match="takes one run"):
        build("merger", "half_reset").merge([tuned, tuned], start)


def test_lisa_keeps_state_of_what_moves_only():
    attached = put("lisa", n_layers=1, interval=2)
    sizes = []
    for first in range(0, 8, 2):
        chain = train(attached, first + 2, first=first, total=8)
        live = {layer_of(n) for n in chain.state if layer_of(n)}
        sizes.append(state_bytes(chain.state))
        assert len(live) == 1
    moving = sum(p.numel() for s in attached.param_groups() for p in s.params.values())
    assert set(sizes) == {8 * moving} and sizes[0] < 0.5 * state_bytes(train(put("full"), 1).state)


def test_owlore_draws_by_outliers():
    model = base()
    with torch.no_grad():
        model.model.layers[2].self_attn.q_proj.weight[:, 3] = 9.0  # planted
    attached = put("owlore", model, n_layers=2, interval=1, outlier_ratio=8, init_rows=2)
    assert torch.allclose(attached.p, torch.full((4,), 0.25))
    attached.initialize(ROWS, roles_of(attached))
    assert int(attached.p.argmax()) == 2 and abs(float(attached.p.sum()) - 1) < 1e-6
    attached.p.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    counts, wanted, rng = np.zeros(4), np.zeros(4), np.random.default_rng(0)
    for step in range(4000):
        counts[attached.drawn(Clock(seed=0).rng("owlore", at=step))] += 1
        wanted[rng.choice(4, 2, replace=False, p=[0.1, 0.2, 0.3, 0.4])] += 1
    assert np.abs(counts - wanted).max() / 4000 < 4 * (2 * 0.25 / 4000) ** 0.5
    reverse = put("owlore", model, prob_mode="owl_reverse", outlier_ratio=8, init_rows=2)
    reverse.initialize(ROWS, roles_of(reverse))
    assert int(reverse.p.argmin()) == 2
    assert (
        put("owlore", prob_mode="increasing").p.diff().gt(0).all()
        and put("owlore", prob_mode="decreasing").p.diff().lt(0).all()
    )


def test_owlore_density_is_its_formula():
    attached = put("owlore", outlier_ratio=2.0)
    W, norms = attached.model.model.layers[1].mlp.up_proj.weight, torch.rand(32)
    A = (W.abs() * norms).detach()
    D = attached.density({"model.layers.1.mlp.up_proj": (W, norms)})
    assert abs(float(D[1]) - float((A > 2 * A.mean()).float().mean())) < 1e-7 and D[0] == D[2] == D[3] == 0


def test_owlore_forgets_frozen_layers():
    attached = put("owlore", n_layers=1, interval=1)
    for step in range(4):
        before = attached.tensors()
        chain = train(attached, step + 1, first=step, total=4, transform={"name": "galore", "rank": 4})
        moved = {
            layer_of(k)
            for k, v in attached.tensors().items()
            if layer_of(k) and not torch.equal(v, before[k])
        }
        assert len(moved) == 1 and {layer_of(n) for n in chain.state if layer_of(n)} == moved


def test_galore():
    """Full rank is Adam; a low rank keeps that many rows of state, and its update lies in the gradient's main
    directions.
    """
    one, two = put("full"), put("full")
    train(one, 4), train(two, 4, transform={"name": "galore", "rank": 64, "scale": 1.0})
    assert all(torch.allclose(v, two.tensors()[k], atol=1e-5) for k, v in one.tensors().items())
    three = put("full")
    start = three.tensors()
    chain = train(three, 4, transform={"name": "galore", "rank": 4, "scale": 1.0})
    name = "model.layers.0.mlp.up_proj.weight"
    assert chain.state[name]["0"]["inner"]["0"]["weight"]["m"].shape == (64, 4)
    delta = three.tensors()[f"{name}.weight"] - start[f"{name}.weight"]
    assert torch.linalg.matrix_rank(delta, rtol=1e-4) <= 4
    assert chain.state["lm_head.weight"]["0"]["inner"]["0"]["weight"]["m"].shape == (97, 32)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5"])
def test_reinit_leaves_what_lies_below(kind, tmp_path):
    made = base(kind)
    made.save_pretrained(tmp_path)
    # what is loaded is marked by transformers, which then draws nothing anew
    model = type(made).from_pretrained(tmp_path)
    attached, was = put("reinit", model), {n: p.detach().clone() for n, p in model.named_parameters()}
    attached.initialize([], SimpleNamespace(clock=Clock(seed=0, total=1)))
    top = max(
        (layer_of(n) for n in was if layer_of(n)),
        key=lambda place: (place[0].startswith("decoder"), place[1]),
    )
    same = {n for n, p in model.named_parameters() if torch.equal(p, was[n])}
    assert {n for n in was if layer_of(n) != top} <= same
    drawn = {
        n: p.detach() for n, p in model.named_parameters() if layer_of(n) == top and kind_of(n) != "norm"
    }
    assert all(not p.any() for n, p in drawn.items() if n.endswith("bias"))
    weights = [n for n in drawn if n.endswith("weight")]
    assert weights and not same & set(weights)
    if kind in ("llama", "bert"):
        assert all(p.std() == pytest.approx(0.15, rel=0.15) for n, p in drawn.items() if n in weights)
    once = {n: p.detach().clone() for n, p in model.named_parameters()}
    attached.initialize([], SimpleNamespace(clock=Clock(seed=0, total=1)))
    assert all(torch.equal(p, once[n]) for n, p in model.named_parameters())  # the clock alone decides
    with pytest.raises(RecipeError, match="layers: 9"):
        put("reinit", base(kind), layers=9)


def test_telly():
    attached = put("telly", k=2)
    model, untuned = attached.model, base()
    loss_of(model).backward()
    assert all(
        (p.grad is None) == (n.startswith(("model.embed", "model.layers.0", "model.layers.1")))
        for n, p in model.named_parameters()
    )
    train(attached)
    hidden = lambda m: m(IDS, output_hidden_states=True).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(hidden(model)[:3], hidden(untuned)[:3], strict=True))
    assert not torch.equal(hidden(model)[3], hidden(untuned)[3])
    assert {layer_of(n)[1] for n in put("telly").names if layer_of(n)} == {3}  # three quarters of four
    assert {layer_of(n)[1] for n in put("telly", k=0).names if layer_of(n)} == {
        0,
        1,
        2,
        3,
    } and "model.embed_tokens.weight" not in put("telly", k=0).names
    with pytest.raises(RecipeError, match="leaves none of the 4 layers"):
        put("telly", k=4)
    fewer = [state_bytes(train(put("telly", k=k), 1).state) for k in (0, 1, 2, 3)]
    assert fewer == sorted(fewer, reverse=True)


def test_rsa_is_pearsons_correlation_of_likenesses():
    torch.manual_seed(0)
    a, b = torch.randn(9, 5), torch.randn(9, 5)
    assert correlation(cosines(a), cosines(a)) == pytest.approx(1.0)
    pairs = [(i, j) for i in range(9) for j in range(i + 1, 9)]
    like = lambda h: [float(torch.cosine_similarity(h[i], h[j], dim=0)) for i, j in pairs]
    assert correlation(cosines(a), cosines(b)) == pytest.approx(np.corrcoef(like(a), like(b))[0, 1], abs=1e-5)


def test_rsa_sees_which_layers_changed(tiny):
    report = luthier.tune(
        **recipe_of(tiny)
        | {
            "tuner": {"name": "telly", "k": 3},
            "evaluate": ["rsa", "cost"],
            "learning_rate": 1e-2,
        },
        output_dir=None,
    )
    assert all(report.before[f"rsa/{i}"] == pytest.approx(1) for i in range(4))
    assert (
        all(report.after[f"rsa/{i}"] == pytest.approx(1) for i in range(3)) and report.after["rsa/3"] < 0.9999
    )


# ---------------------------------------------------------------------------------------------- coarse to fine


def test_cofitune_moves_the_second_quarter():
    names = put("cofitune").names
    assert names == [f"model.layers.1.mlp.{n}_proj.weight" for n in ("up", "down")]
    names = put("cofitune", base("gpt2"), layer_range=[0.5, 1.0], modules=["qkv"]).names
    assert names == [f"transformer.h.{i}.attn.c_attn.{k}" for i in (2, 3) for k in ("weight", "bias")]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_cofitune_soft_mask(kind):
    """I = 0 is the coarse method; I = 1 freezes; a row in between gets its share of the gradient."""
    coarse, fine, frozen, some = (put("cofitune", base(kind), soft_mask=m) for m in (False, True, True, True))
    for k in frozen.keep.values():
        k.zero_()
    start = frozen.tensors()
    train(coarse), train(fine), train(frozen)
    assert all(torch.equal(v, fine.tensors()[k]) for k, v in coarse.tensors().items())
    assert all(torch.equal(v, start[k]) for k, v in frozen.tensors().items())
    name, keep = next(iter(some.keep.items()))
    keep[0] = 0.25
    (
        train(some, 1, transform=None),
        train(coarse := put("cofitune", base(kind), soft_mask=False), 1, transform=None),
    )
    step = lambda a: a.tensors()[f"{name}.weight"] - start[f"{name}.weight"]
    row = (lambda x: x[:, 0]) if kind == "gpt2" else (lambda x: x[0])
    rest = (lambda x: x[:, 1:]) if kind == "gpt2" else (lambda x: x[1:])
    assert torch.allclose(row(step(some)), 0.25 * row(step(coarse)), atol=1e-7) and torch.equal(
        rest(step(some)), rest(step(coarse))
    )


def test_cofitune_importance():
    """A neuron that nothing reads has none; what is normalised lies in [0, 1)."""
    model = base()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[:, 5] = 0
    attached = put("cofitune", model)
    before = attached.tensors()
    found = attached.importance(ROWS, roles_of(attached))[("model.layers", 1)]
    assert found[0][5].abs() < 1e-9 < found[0].abs().median() and found[1].shape == (32,)
    attached.initialize(ROWS, roles_of(attached))
    keep = attached.keep["model.layers.1.mlp.up_proj.weight"]
    assert torch.allclose(keep, 1 - normalised(found[0]), atol=1e-5) and keep.min() > 0 and keep.max() <= 1
    assert all(torch.equal(v, before[k]) for k, v in attached.tensors().items() if not k.endswith("keep"))
    assert (
        all(p.grad is None for p in model.parameters())
        and not model.model.layers[1].mlp.down_proj._forward_hooks
    )


def test_cofitune_search_finds_the_planted_best():
    """With fewer runs than trying everything."""
    planted = ([0.25, 0.5], ["up", "down"])
    from luthier.recipe.recipe import Recipe

    def score(tuner) -> float:
        where, modules = tuner["layer_range"], tuner["modules"]
        inside = max(0.0, min(where[1], planted[0][1]) - max(where[0], planted[0][0]))
        hit = len(set(modules) & set(planted[1]))
        return inside / 0.25 + hit / 2 - 0.1 * len(modules) - 0.1 * (where[1] - where[0])

    play = build("plan", {"name": "cofitune", "scores": {"accuracy": 1}}).recipes(
        Recipe.load({"model": "m", "data": "d", "tuner": "cofitune"})
    )
    asked, runs = next(play), 0
    with pytest.raises(StopIteration) as end:
        while True:
            runs += len(asked)
            asked = play.send(
                [SimpleNamespace(tuner=r.tuner, after={"accuracy": score(r.tuner)}, folder="") for r in asked]
            )
    best = end.value.value.tuner
    # seven ranges by six sets
    assert (list(best["layer_range"]), list(best["modules"])) == planted and runs < 7 * 6


# ---------------------------------------------------------------------------------------------- structured slices


def permuted(model, first: dict[int, torch.Tensor], heads: dict[int, torch.Tensor]) -> nn.Module:
    """The same function with the chosen channels and key-value groups of each layer in front: S2FT's
    co-permutation.
    """
    model = copy.deepcopy(model)
    config = model.config
    size, group = (
        config.hidden_size // config.num_attention_heads,
        config.num_attention_heads // config.num_key_value_heads,
    )
    for i, layer in enumerate(model.model.layers):
        order = torch.cat(
            [
                first[i],
                torch.tensor([c for c in range(config.intermediate_size) if c not in set(first[i].tolist())]),
            ]
        )
        kv = torch.cat(
            [
                heads[i],
                torch.tensor(
                    [h for h in range(config.num_key_value_heads) if h not in set(heads[i].tolist())]
                ),
            ]
        )
        rows = lambda hs: (hs[:, None] * size + torch.arange(size)).flatten()
        q = rows((kv[:, None] * group + torch.arange(group)).flatten())
        with torch.no_grad():
            mlp, attn = layer.mlp, layer.self_attn
            mlp.up_proj.weight.copy_(mlp.up_proj.weight[order])
            mlp.gate_proj.weight.copy_(mlp.gate_proj.weight[order])
            mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, order])
            attn.q_proj.weight.copy_(attn.q_proj.weight[q])
            attn.k_proj.weight.copy_(attn.k_proj.weight[rows(kv)])
            attn.v_proj.weight.copy_(attn.v_proj.weight[rows(kv)])
            attn.o_proj.weight.copy_(attn.o_proj.weight[:, q])
    return model


def test_s2ft_is_the_leading_block_of_a_permuted_model():
    """Grouped queries included: permuting changes nothing, and what is tuned there is what is tuned here."""
    model = base()
    attached = put("s2ft", copy.deepcopy(model), d_ratio=0.25, o_ratio=0.5, v_ratio=0.5, u_ratio=0.25)
    at = lambda i, n: (
        attached.parameters and attached.layers[f"model.layers.{i}.{n}"].tensors("default").indices.long()
    )
    channels = {i: at(i, "mlp.down_proj") for i in range(4)}
    heads = {i: at(i, "self_attn.v_proj")[::8] // 8 for i in range(4)}
    assert all(torch.equal(at(i, "mlp.up_proj"), channels[i]) for i in range(4))  # coupled
    other = permuted(model, channels, heads)
    assert torch.allclose(say(other), say(model), atol=1e-5)
    for p in other.parameters():
        p.requires_grad_(False)
    slices = []
    for layer in other.model.layers:
        attn, mlp = layer.self_attn, layer.mlp
        for W, side in (
            (mlp.down_proj, "in"),
            (mlp.up_proj, "out"),
            (attn.o_proj, "in"),
            (attn.v_proj, "out"),
        ):
            k = {mlp.down_proj: 16, mlp.up_proj: 16, attn.o_proj: 16, attn.v_proj: 8}[W]
            slices.append(
                (W.weight.requires_grad_(True), (slice(None), slice(k)) if side == "in" else slice(k))
            )
    for _ in range(3):
        loss_of(other).backward()
        with torch.no_grad():
            for W, where in slices:
                W[where] -= 0.1 * W.grad[where]
                W.grad = None
    train(attached, 3, rate=0.1, transform=None)
    assert torch.allclose(say(attached.model), say(other), atol=1e-4)


def test_s2ft_with_all_of_down_is_full_tuning_of_down():
    attached, model = put("s2ft", d_ratio=1.0, o_ratio=0.0), base()
    train(attached, 3)
    full = build(
        "tuner", {"name": "cofitune", "layer_range": [0, 1], "modules": ["down"], "soft_mask": False}
    ).attach(model)
    train(full, 3)
    assert torch.allclose(say(attached.model), say(model), atol=1e-4)


@torch.no_grad()
def test_s2ft_leaves_the_rest_and_composes():
    one = put("s2ft", d_ratio=0.1, o_ratio=0.0)
    with torch.enable_grad():
        train(one)
    name, layer = next(iter(one.layers.items()))
    p, W = layer.tensors("default"), base().get_submodule(name).weight
    out = torch.ones(W.shape[1], dtype=torch.bool)
    out[p.indices.long()] = False
    with one.merged():
        now = one.model.get_submodule(name).get_base_layer().weight
        assert torch.equal(now[:, out], W[:, out]) and not torch.equal(now[:, ~out], W[:, ~out])
    for seed in range(1, 50):  # another task's channels, none of them shared
        two = put("s2ft", d_ratio=0.1, o_ratio=0.0, selection_seed=seed)
        q = two.layers[name].tensors("default")
        if not set(q.indices.tolist()) & set(p.indices.tolist()):
            break
    q.S.normal_()
    both = two.settings.at(name).weight(one.settings.at(name).weight(W, p), q)
    delta = lambda r: two.settings.at(name).weight(torch.zeros_like(W), r)
    assert torch.allclose(both - W, delta(p) + delta(q), atol=1e-6)


@pytest.mark.parametrize("share", [0.125, 0.25, 0.5])
def test_s2ft_keeps_the_chosen_activations_only(share):
    """What down keeps for its backward pass beside the weight and the places is [tokens, k]."""
    attached = put("s2ft", d_ratio=share, o_ratio=0.0)
    layer, kept = attached.layers["model.layers.0.mlp.down_proj"], []
    x = torch.randn(5, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda z: (kept.append(z), z)[1], lambda z: z):
        layer(x)
    mine = [z for z in kept if z.is_floating_point() and z.ndim == 2 and 5 in z.shape]
    assert sum(z.numel() for z in mine) == 5 * round(64 * share)


def test_s2ft_counts():
    """d_ratio * intermediate columns of down, o_ratio * heads of o: the paper's numbers."""
    attached = put("s2ft", d_ratio=0.25, o_ratio=0.5)
    moving = sum(p.numel() for p in attached.parameters().values())
    assert moving == 4 * (32 * 16 + 32 * 2 * 8)
    assert moving == sum(p.numel() for p in attached.model.parameters() if p.requires_grad)


# ---------------------------------------------------------------------------------------------- masks


def test_r_amt_masks():
    attached, before = put("r_amt"), base()
    W = torch.randn(3, 5)
    p = SimpleNamespace(
        M=torch.full((3, 5), 1e-2, requires_grad=True), bits=torch.full((2,), 255, dtype=torch.uint8)
    )
    attached.settings.weight(W, p).backward(G := torch.randn(3, 5))
    assert torch.equal(p.M.grad, G * W)  # straight through
    start = float(loss_of(attached.model))
    train(attached, 30, rate=1e-3)
    masks = [m <= attached.settings.threshold for m in attached.parameters().values()]
    masked = float(sum(m.sum() for m in masks)) / sum(m.numel() for m in masks)
    assert 0 < masked < 0.5 and float(loss_of(attached.model)) < start
    untouched = dict(before.named_parameters())
    with attached.merged():
        for name, layer in attached.layers.items():
            now, was = layer.get_base_layer().weight, untouched[f"{name}.weight"]
            assert ((now == was) | (now == 0)).all()


def test_r_amt_is_kept_as_bits(tmp_path):
    attached = put("r_amt")
    train(attached, 10, rate=1e-3)
    attached.save(tmp_path)
    numbers = sum(p.numel() for p in attached.parameters().values())
    held = attached.adapter_state()
    assert sum(v.numel() for v in held.values()) == numbers // 8 and {v.dtype for v in held.values()} == {
        torch.uint8
    }
    again = put("r_amt")
    again.load(again.read(tmp_path))
    assert torch.equal(say(again.model), say(attached.model))


def test_gradient_dropout():
    a = torch.randn(1000)
    assert torch.allclose(chance(a, a), torch.ones(1000), atol=1e-4) and chance(a, -1e6 * a).max() < 1e-4
    assert torch.allclose(chance(a, -a), torch.full((1000,), 0.5), atol=1e-4)
    method = build("estimator", "gradient_dropout")
    rng = lambda: torch.Generator().manual_seed(0)
    assert torch.equal(method.dropped(a, 5 * a, rng()), a) and not method.dropped(a, -1e6 * a, rng()).any()
    kept = method.dropped(a, -a, rng())
    assert set(kept.tolist()) <= {*a.tolist(), 0.0} and 400 < int((kept != 0).sum()) < 600
    half_way = build("estimator", {"name": "gradient_dropout", "blend": 0.25}).dropped(a, -1e6 * a, rng())
    assert torch.allclose(half_way, 0.75 * a)


def test_gradient_dropout_in_a_run(base, tmp_path):
    with pytest.raises(RecipeError, match="wants an objective with a term 'kl'"):
        luthier.tune(**base, estimator="gradient_dropout", output_dir=str(tmp_path / "refused"))
    recipe = {
        **base,
        "tuner": "r_amt",
        "learning_rate": 1e-3,
        "max_steps": 20,
        "objective": "sft + kl",
        "estimator": "gradient_dropout",
    }
    report = luthier.tune(**recipe, output_dir=str(tmp_path / "a"))
    assert sum(report.losses[-4:]) < sum(report.losses[:4])


# ---------------------------------------------------------------------------------------------- sparse supports


def changed(attached, untuned) -> int:
    with attached.merged():
        own = {n.replace(".base_layer", ""): p for n, p in attached.model.named_parameters()}
        return sum(int((own[n] != p).sum()) for n, p in untuned.named_parameters())


def test_apet_moves_as_many_as_it_says():
    one, two, other = put("apet", n=123), put("apet", n=123), put("apet", n=123, selection_seed=1)
    places = lambda a: {n: m.tensors("default").indices.tolist() for n, m in a.layers.items()}
    assert places(one) == places(two) != places(other)
    assert sum(p.numel() for p in one.parameters().values()) == 123
    train(one)
    assert changed(one, base()) == 123
    chosen = sum(
        m.weight.numel() for n, m in base().named_modules() if isinstance(m, nn.Linear) and n != "lm_head"
    )
    whole = put("apet", n=chosen)
    full = build(
        "tuner",
        {
            "name": "cofitune",
            "layer_range": [0, 1],
            "modules": ["qkv", "o", "up", "gate", "down"],
            "soft_mask": False,
        },
    ).attach(base())
    train(whole), train(full)
    assert torch.allclose(say(whole.model), say(full.model), atol=1e-4)
    with pytest.raises(RecipeError, match="positions, and the chosen modules have"):
        put("apet", n=10**9)


def test_sara_support_state_and_rest():
    attached, untuned = put("sara", density=0.1), base()
    for name, layer in attached.layers.items():
        W, at = untuned.get_submodule(name).weight.flatten().abs(), layer.tensors("default").indices.long()
        rest = torch.ones(len(W), dtype=torch.bool)
        rest[at] = False
        assert W[at].max() <= W[rest].min() and len(at) == round(0.1 * len(W))
    chain = train(attached, 3, total=8)
    moving = sum(p.numel() for p in attached.parameters().values())
    assert state_bytes(chain.state) == 4 * 2 * moving
    counts = changed(attached, untuned)
    assert counts <= moving
    train(attached, 5, first=3, chain=chain, total=8, rate=0.02)  # step 4 is half of the run
    live = torch.cat(list(attached.live.values()))
    assert 0 < int(live.sum()) < moving
    was = attached.tensors()
    train(attached, 8, first=5, chain=chain, total=8)
    for name, mask in attached.live.items():
        now, before = attached.tensors()[f"{name}.values"], was[f"{name}.values"]
        assert torch.equal(now[~mask], before[~mask]) and (
            not mask.any() or not torch.equal(now[mask], before[mask])
        )


def test_sara_threshold_and_nuclear_norm():
    attached = put("sara", threshold=0.02)
    name, layer = next(iter(attached.layers.items()))
    p, W = layer.tensors("default"), layer.get_base_layer().weight
    assert len(p.values) == int((W.abs() < 0.02).sum())
    with torch.no_grad():
        p.values.normal_(std=0.1)
    masked = attached.settings.masked(W.detach(), p)
    norm = torch.linalg.matrix_norm(masked, ord="nuc")
    (wanted,) = torch.autograd.grad(norm, p.values)
    assert torch.allclose(attached.nuclear(name), wanted, atol=1e-4)
    U, _, Vh = torch.linalg.svd(masked.detach(), full_matrices=False)
    assert torch.allclose(wanted, (U @ Vh).flatten()[p.indices.long()], atol=1e-4)
    free, pulled = put("sara", lambda_rank=0), put("sara", lambda_rank=0.5)
    start = pulled.tensors()
    train(free, 1, transform=None), train(pulled, 1, transform=None)
    different = [
        n
        for n in pulled.layers
        if not torch.equal(pulled.tensors()[f"{n}.values"], free.tensors()[f"{n}.values"])
    ]
    assert len(different) == 1  # one weight a step
    twice = put("sara", lambda_rank=0.5)
    twice.load(start)
    gap = lambda a, b: a.tensors()[f"{different[0]}.values"] - b.tensors()[f"{different[0]}.values"]
    assert torch.allclose(gap(pulled, free), -0.02 * 0.5 * twice.nuclear(different[0]), atol=1e-6)
    with pytest.raises(RecipeError, match="no entry of a"):
        put("sara", threshold=1e-12)


def test_small_weights_carry_little():
    """Without its smallest tenth a trained model is nearly what it was; without as many large ones it is
    not.
    """
    tuned = luthier.load("toy:lm-small")
    rows = load_rows(str(Path(model_names.resolve_model("toy:lm-small")) / "probe.jsonl")).rows[::40]
    model, tokenizer = tuned.model, tuned.tokenizer
    texts = [
        tokenizer(r["prompt"] + r["completions"][0], return_tensors="pt").input_ids
        for r in rows
        if isinstance(r["prompt"], str)
    ]
    loss = lambda m: sum(float(m(x, labels=x).loss) for x in texts) / len(texts)

    @torch.no_grad()
    def without(smallest: bool) -> float:
        m = copy.deepcopy(model)
        for n, module in m.named_modules():
            if isinstance(module, nn.Linear) and "lm_head" not in n:
                W = module.weight.view(-1)
                W[W.abs().topk(len(W) // 10, largest=not smallest).indices] = 0
        return loss(m)

    with torch.no_grad():
        was = loss(model)
    assert abs(without(True) - was) < 0.05 * was and without(False) > 1.5 * was


def test_spt_plan():
    """The budget is met; the most sensitive entries move; alpha decides between entries and LoRA."""
    torch.manual_seed(0)
    scores = {"a": torch.rand(8, 8), "b": 10 * torch.rand(8, 8), "c": 0.1 * torch.rand(8, 8)}
    spt = find("tuner", "spt")
    plan, places = spt(budget=50, alpha=0.0, r=1).planned(scores)
    assert (
        sum(plan.values()) == 50 and all(v >= 0 for v in plan.values()) and plan["b"] == 50 - plan["a"] > 40
    )
    assert set(places["b"].tolist()) == set(scores["b"].flatten().topk(plan["b"]).indices.tolist())
    plan, _ = spt(budget=50, alpha=1e9, r=1).planned(scores)
    assert set(plan.values()) <= {-1, 0} and plan["b"] == -1
    plan, _ = spt(budget=50, alpha=1.0, r=2).planned(scores)
    assert plan["b"] == -2 and plan["a"] + plan["c"] == 50 - 2 * 16 and plan["a"] > 0


def test_spt_on_a_model(tmp_path):
    attached = put("spt", budget=600, alpha=10.0, r=2)
    assert abs(sum(p.numel() for p in attached.parameters().values()) - 600) <= 12
    attached.initialize(ROWS, roles_of(attached))
    moving = sum(p.numel() for p in attached.parameters().values())
    assert abs(moving - 600) <= 12 and any(v < 0 for v in attached.settings.plan.values())
    assert torch.equal(say(attached.model), say(base()))
    full = base()
    Causal().forward(full, Untuned(full), batch()).logprobs.mean().neg().backward()
    from luthier.model.statistics import gather

    name = "model.layers.1.self_attn.o_proj"
    again = put("spt", budget=600)
    got = gather("squared_gradients", {name: again.layers[name].get_base_layer()}, ROWS, roles_of(again))[
        name
    ]
    assert np.allclose(
        got.numpy(), np.square(full.get_submodule(name).weight.grad.numpy()), rtol=1e-3, atol=1e-9
    )
    before = attached.tensors()
    train(attached)
    assert all(
        not torch.equal(v, before[k])
        for k, v in attached.tensors().items()
        if k.endswith((".values", ".B")) and v.numel()
    )
    attached.save(tmp_path)
    assert torch.allclose(
        say(PeftModel.from_pretrained(base(), tmp_path).eval()), say(attached.model), atol=1e-5
    )
    other = put("spt", budget=600)
    other.load(attached.tensors())  # a plan shows in the shapes
    assert torch.equal(say(other.model), say(attached.model))


def test_spt_puts_the_budget_where_the_task_is():
    """A network of which only one layer matters."""
    model = base()
    with torch.no_grad():
        for i in (0, 1, 3):
            model.model.layers[i].self_attn.o_proj.weight.zero_()
            model.model.layers[i].mlp.down_proj.weight.zero_()
    attached = put("spt", model, budget=400, alpha=0.0, exclude_modules=["o_proj", "down_proj"])
    attached.initialize(ROWS, roles_of(attached))
    there = sum(v for n, v in attached.settings.plan.items() if ".layers.2." in n)
    assert there > 0.8 * 400


# ---------------------------------------------------------------------------------------------- parts and projects


@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2", "t5"])
def test_part_moves_exactly_what_it_names(kind):
    names = put("part", base(kind), part="embeddings").names
    assert names == {
        "llama": ["model.embed_tokens.weight", "lm_head.weight"],
        "tied": ["model.embed_tokens.weight"],
    }.get(kind, ["transformer.wte.weight"] if kind == "gpt2" else names)
    if kind == "t5":
        assert set(names) <= {"shared.weight", "lm_head.weight"}
    last = {
        "llama": "model.layers.3.",
        "tied": "model.layers.3.",
        "gpt2": "transformer.h.3.",
        "t5": "decoder.block.1.",
    }[kind]
    model = base(kind)
    assert put("part", model).names == [n for n, _ in model.named_parameters() if n.startswith(last)]


def test_projects_compare_ways(shallow, tmp_path):
    """Three projects of their own words: every way learns, all weights most; cheaper ways cost fewer
    operations and bytes.
    """
    words = ["kelo", "tarn", "mipu"]
    data = [
        [{"prompt": f"{a}+{b}:", "completion": f"{w}{w[::-1]}"} for a in range(4) for b in range(4)]
        for w in words
    ]
    recipe = recipe_of(shallow) | {"evaluate": ["loss", "cost"], "max_steps": 12, "learning_rate": 3e-3}
    recipe.pop("data"), recipe.pop("eval_data")
    of = [{"data": rows, "eval_data": rows} for rows in data]
    ways = [
        "full",
        {"name": "part", "part": "embeddings"},
        "part",
        {"tuner": {"name": "prompt", "num_virtual_tokens": 8}, "learning_rate": 0.1},
    ]
    luthier.tune(**recipe, plan={"name": "projects", "of": of, "ways": ways}, output_dir=str(tmp_path))
    from luthier.run.run import Report

    reports = [Report.read(tmp_path / f"run-{i}") for i in range(12)]
    for project in (reports[i : i + 4] for i in range(0, 12, 4)):
        loss = [r.after["loss"] for r in project]
        assert all(r.after["loss"] < r.before["loss"] for r in project) and min(loss) == loss[0]
        flops, stored = [[r.after[k] for r in project] for k in ("gflops_per_row", "stored_mb")]
        assert flops[2] < flops[0] and stored[0] > max(stored[1:])
        assert [r.stats["moving"] * 4 / 2**20 for r in project] == pytest.approx(stored)
