"""Every layout answers like the network's own forward; every writer writes what transformers' `generate`
writes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers as t
from transformers.models.auto import modeling_auto as auto

from helpers import zoo
from helpers.architectures import BART, CAUSAL, PROMPTS, own_greedy
from luthier.clock import Clock
from luthier.errors import RecipeError, Refused
from luthier.methods.tuners._base import Untuned
from luthier.model.batch import collate
from luthier.model.generate import Picker
from luthier.model.policy import Policy
from luthier.registry import build, cards
from luthier.train import checks as guards

LAYOUTS = {
    "one row": replace(CAUSAL, width=10**6),
    "short rows": replace(CAUSAL, width=16),
    "common prefixes": replace(CAUSAL, width=10**6, share_prefixes=True),
    "common prefixes, mask": replace(CAUSAL, blocks=False, width=16, share_prefixes=True),
    "own prompts": replace(CAUSAL, share_prompts=False, width=24),
    "padded": replace(CAUSAL, packing=False),
    "own head": replace(CAUSAL, packing=False, own_head=True),
}


def gradient(model, architecture, attached, batch):
    """Gradients of -sum of weighted log-probabilities of all weights (and of soft vectors)."""
    moved = [p for p in model.parameters() if p.requires_grad] + (
        [attached.vectors] if attached.virtual else []
    )
    values = (
        architecture
        if torch.is_tensor(architecture)
        else architecture.forward(model, attached, batch).logprobs
    )
    weights = torch.linspace(0.5, 1.5, len(values))
    grads = torch.autograd.grad((values * weights).sum(), moved, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(grads, moved, strict=True)]


@pytest.mark.parametrize("name", zoo.CAUSAL)
def test_every_layout_answers_like_the_plain_forward(name):
    model = zoo.make(name)
    layouts = {k: a for k, a in LAYOUTS.items() if name not in zoo.PADDED or not a.packing}
    with torch.no_grad():
        for batch in (zoo.rows(), zoo.deep(), zoo.common()):
            for attached in (Untuned(model), zoo.Soft(model)):
                want = CAUSAL.plain(model, attached, batch)
                assert want.std() > 0.1
                for layout, arch in layouts.items():
                    got = arch.forward(model, attached, batch).logprobs
                    torch.testing.assert_close(
                        got, want, atol=1e-5, rtol=1e-5, msg=lambda m, x=layout: f"{x}: {m}"
                    )


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "mistral"])
def test_eager_attention_too(name):
    model, batch = zoo.make(name, "eager"), zoo.rows()
    with torch.no_grad():
        want = CAUSAL.plain(model, Untuned(model), batch)
        for arch in LAYOUTS.values():
            torch.testing.assert_close(
                arch.forward(model, Untuned(model), batch).logprobs, want, atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize("name", zoo.CAUSAL)
def test_gradients_too(name):
    model = zoo.make(name)
    batch, attached = zoo.common(), zoo.Soft(model)
    want = gradient(model, CAUSAL.plain(model, attached, batch), attached, batch)
    assert want[-1].abs().sum() > 0
    layouts = [LAYOUTS[k] for k in ("one row", "common prefixes", "own prompts", "padded")]
    for arch in [a for a in layouts if not a.packing or name not in zoo.PADDED]:
        for got, expected in zip(gradient(model, arch, attached, batch), want, strict=True):
            assert (got - expected).abs().max() <= 1e-4 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("name", zoo.CAUSAL)
def test_the_guard_falls_back_where_it_must_and_only_there(name):
    model, told = zoo.make(name), []
    policy = Policy(CAUSAL, model, Untuned(model))
    guards.check_forward(policy, zoo.rows(), told.append)
    assert policy.architecture.packing == (name not in zoo.PADDED), told
    assert not policy.architecture.own_head
    assert bool(told) == (name in zoo.PADDED)


@pytest.mark.parametrize("name", [n for n in ("mamba", "lfm2", "gpt_neo") if n in zoo.PADDED])
def test_the_guard_sees_what_packing_would_break(name, monkeypatch):
    """Without the checks that know these families, numbers alone give them away."""
    monkeypatch.setattr(type(CAUSAL), "check", lambda self, model: None)
    model, told = zoo.make(name), []
    policy = Policy(CAUSAL, model, Untuned(model))
    guards.check_forward(policy, zoo.rows(), told.append)
    assert not policy.architecture.packing and told


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mixtral"])
def test_half_precision_does_not_alarm_the_guard(name):
    model, told = zoo.make(name).to(torch.bfloat16), []
    guards.check_forward(Policy(CAUSAL, model, Untuned(model)), zoo.rows(), told.append)
    assert not told


@pytest.mark.parametrize("where", [["q_proj", "v_proj"], ["q_proj", "lm_head"], ["embed_tokens", "lm_head"]])
def test_adapters_wherever_they_sit(where):
    peft = pytest.importorskip("peft")
    model = zoo.make("llama")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=where, init_lora_weights=False, r=2), model)
    model.eval()
    moved, grads = [p for p in model.parameters() if p.requires_grad], []
    assert len(moved) >= 4
    for values in (
        CAUSAL.plain(model, Untuned(model), zoo.rows()),
        CAUSAL.forward(model, Untuned(model), zoo.rows()).logprobs,
    ):
        grads.append((values, *torch.autograd.grad(values.sum(), moved)))
    for got, want in zip(*grads, strict=True):
        assert (got - want).abs().max() <= 1e-4 * max(1.0, float(want.abs().max()))
    assert CAUSAL.forward(model, Untuned(model), zoo.rows()).head.linear == ("lm_head" not in where)


def test_an_unknown_head_falls_back_to_the_networks_own():
    class Odd(t.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            said = super().forward(*args, **kwargs)
            said.logits = said.logits + 0.3 * torch.sin(said.logits)
            return said

    torch.manual_seed(0)
    model = Odd(t.LlamaConfig(**zoo.SMALL)).eval()
    policy, told = Policy(CAUSAL, model, Untuned(model)), []
    guards.check_forward(policy, zoo.rows(), told.append)
    assert policy.architecture.own_head and len(told) == 2 and "own head" in told[1]
    got = policy.architecture.forward(model, policy.attached, zoo.rows()).logprobs
    torch.testing.assert_close(got, CAUSAL.plain(model, policy.attached, zoo.rows()), atol=1e-5, rtol=1e-5)


def test_a_network_that_no_reading_suits_is_refused(monkeypatch):
    model = zoo.make("llama")
    monkeypatch.setattr(type(CAUSAL), "plain", lambda self, m, a, b: torch.zeros(len(b.owner)))
    with pytest.raises(Refused, match="cannot run"):
        guards.check_forward(Policy(CAUSAL, model, Untuned(model)), zoo.rows(), lambda s: None)


def test_an_empty_prompt_passes_its_question_on():
    batch = collate(
        [
            {
                "id": str(k),
                "e": SimpleNamespace(prompt=[], completions=[[5, 6, 7]], supervised=[[k > 5, True, True]]),
            }
            for k in range(2)
        ],
        lambda r: r["e"],
    )
    model = zoo.make("llama")
    with torch.no_grad():
        for arch in LAYOUTS.values():
            torch.testing.assert_close(
                arch.forward(model, Untuned(model), batch).logprobs,
                CAUSAL.plain(model, Untuned(model), batch),
                atol=1e-5,
                rtol=0,
            )
        first = replace(batch, supervised=torch.ones(6, dtype=torch.bool))
        soft = zoo.Soft(model)
        torch.testing.assert_close(
            CAUSAL.forward(model, soft, first).logprobs, CAUSAL.plain(model, soft, first), atol=1e-5, rtol=0
        )
        with pytest.raises(ValueError, match="nothing precedes"):
            CAUSAL.forward(model, Untuned(model), first)


def test_sampling_draws_from_the_distribution():
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0]).expand(20000, -1)

    def drawn(**how):
        pick = Picker([(s, 0) for s in range(20000)], 1, 0.7, **how)
        counts = Counter(pick(logits, list(range(20000)), 0).tolist())
        return torch.tensor([counts[k] / 20000 for k in range(5)])

    p = (logits[0] / 0.7).softmax(-1)
    assert (drawn() - p).abs().max() < 0.012
    two = torch.where(torch.arange(5) < 2, p, 0.0)
    assert (drawn(top_k=2) - two / two.sum()).abs().max() < 0.012
    # the token that reaches top_p belongs to it
    assert (drawn(top_p=float(p[0]) + 0.01) - two / two.sum()).abs().max() < 0.012
    assert drawn(top_p=0.1)[0] == 1.0
    between = float(p[0] + p[0] / two.sum()) / 2  # top_p is a share of what top_k leaves
    assert drawn(top_k=2, top_p=between)[0] == 1.0
    assert (drawn(top_k=99) - p).abs().max() < 0.012


T5 = dict(
    vocab_size=zoo.WORDS,
    d_model=32,
    d_kv=8,
    d_ff=48,
    num_layers=2,
    num_heads=4,
    decoder_start_token_id=0,
    pad_token_id=0,
    eos_token_id=2,
    initializer_factor=1.5,
    dropout_rate=0.0,
)


PAIRED = {
    "t5": ("T5Config", T5),
    "t5_gated": ("T5Config", T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "bart": ("BartConfig", BART),
    "marian": ("MarianConfig", BART | {"share_encoder_decoder_embeddings": True}),
}


def paired(name):
    torch.manual_seed(0)
    kind, settings = PAIRED[name]
    model = t.AutoModelForSeq2SeqLM.from_config(getattr(t, kind)(**settings)).eval()
    if name in ("bart", "marian"):
        model.final_logits_bias.copy_(torch.linspace(-1, 1, zoo.WORDS)[None])  # what a checkpoint may carry
    return model


@pytest.mark.parametrize("name", PAIRED)
def test_seq2seq_reads_right(name):
    arch, model = build("architecture", "seq2seq"), paired(name)
    for batch in (zoo.rows(), zoo.deep()):
        for attached in (Untuned(model), zoo.Soft(model)):
            want = arch.plain(model, attached, batch)
            for a in (arch, arch.simpler()):
                torch.testing.assert_close(
                    a.forward(model, attached, batch).logprobs, want, atol=1e-5, rtol=1e-5
                )
    batch = zoo.rows()
    want = gradient(model, arch.plain(model, attached, batch), attached, batch)
    for got, expected in zip(gradient(model, arch, attached, batch), want, strict=True):
        assert (got - expected).abs().max() <= 1e-4 * max(1.0, float(expected.abs().max()))
    told = []
    guards.check_forward(Policy(arch, model, Untuned(model)), zoo.rows(), told.append)
    assert not told
    prompt, labels = zoo.tokens(6, 1), zoo.tokens(5, 2)
    one = collate(
        [{"id": "0", "e": SimpleNamespace(prompt=prompt, completions=[labels], supervised=[[True] * 5])}],
        lambda r: r["e"],
    )
    want = model(input_ids=torch.tensor([prompt]), labels=torch.tensor([labels])).loss
    torch.testing.assert_close(
        -arch.forward(model, Untuned(model), one).logprobs.mean(), want, atol=1e-5, rtol=1e-5
    )


def test_the_encoder_reads_a_prompt_once():
    arch, model, seen = build("architecture", "seq2seq"), paired("t5"), []
    model.get_encoder().register_forward_pre_hook(
        lambda m, a, k: seen.append(tuple(k["input_ids"].shape)), with_kwargs=True
    )
    arch.forward(model, Untuned(model), zoo.rows())
    assert {s[0] for s in seen} == {4}


@pytest.mark.parametrize("name", PAIRED)
def test_seq2seq_writes_right(name):
    arch, model = build("architecture", "seq2seq"), paired(name)
    got = arch.generate(
        model, Untuned(model), PROMPTS, seeds=[0] * 4, max_new_tokens=8, temperature=0.0, stop=[2]
    )
    for prompt, written in zip(PROMPTS, got, strict=True):
        assert written[0] == own_greedy(model, prompt, 8, eos_token_id=2)[1:].tolist()
    sampled = arch.generate(
        model, zoo.Soft(model), PROMPTS, seeds=[1, 2, 3, 4], n=2, max_new_tokens=6, stop=[5, 6, 7, 8, 9]
    )
    assert (
        sampled[1]
        == arch.generate(
            model, zoo.Soft(model), PROMPTS[1:2], seeds=[2], n=2, max_new_tokens=6, stop=[5, 6, 7, 8, 9]
        )[0]
    )


MASKED = {
    "bert": ("BertConfig", zoo.BERT),
    "roberta": ("RobertaConfig", zoo.BERT | {"max_position_embeddings": 66, "pad_token_id": 0}),
    "distilbert": (
        "DistilBertConfig",
        dict(
            vocab_size=zoo.WORDS,
            dim=32,
            hidden_dim=48,
            n_layers=2,
            n_heads=4,
            max_position_embeddings=64,
            initializer_range=0.3,
            pad_token_id=0,
        ),
    ),
    "electra": ("ElectraConfig", zoo.BERT | {"embedding_size": 16}),
    "modernbert": (
        "ModernBertConfig",
        zoo.BERT
        | {
            "sep_token_id": 2,
            "cls_token_id": 1,
            "global_attn_every_n_layers": 2,
            "local_attention": 8,
            "reference_compile": False,
        },
    ),
}


def masked(name):
    torch.manual_seed(0)
    kind, settings = MASKED[name]
    return t.AutoModelForMaskedLM.from_config(getattr(t, kind)(**settings)).eval()


@pytest.mark.parametrize("name", MASKED)
def test_masked_lm_reads_right(name):
    arch, model, batch = build("architecture", "masked_lm"), masked(name), zoo.rows()
    hidden = batch.view(ids=torch.where(batch.supervised, torch.tensor(4), batch.ids))
    for attached in (Untuned(model), zoo.Soft(model)) if name != "modernbert" else (Untuned(model),):
        want = arch.plain(model, attached, hidden)
        for a in (arch, arch.simpler()):
            torch.testing.assert_close(
                a.forward(model, attached, hidden).logprobs, want, atol=1e-5, rtol=1e-5
            )
    deep = zoo.deep()  # both directions: what continues a completion is not part of its row
    torch.testing.assert_close(
        arch.forward(model, Untuned(model), deep).logprobs,
        arch.plain(model, Untuned(model), deep),
        atol=1e-5,
        rtol=1e-5,
    )
    told = []
    guards.check_forward(Policy(arch, model, Untuned(model)), hidden, told.append)
    assert not told
    ids, labels = torch.tensor([zoo.tokens(9, 1)]), torch.full((1, 9), -100)
    labels[0, [2, 5, 6]] = torch.tensor([11, 12, 13])
    one = collate(
        [
            {
                "id": "0",
                "e": SimpleNamespace(
                    prompt=[], completions=[ids[0].tolist()], supervised=[(labels[0] >= 0).tolist()]
                ),
            }
        ],
        lambda r: r["e"],
    )
    one = one.view(labels=torch.where(labels[0] >= 0, labels[0], one.labels))
    want = model(input_ids=ids, labels=labels).loss
    torch.testing.assert_close(
        -arch.forward(model, Untuned(model), one).logprobs.mean(), want, atol=1e-5, rtol=1e-5
    )


def test_gaps_are_drawn_from_seed_step_and_row():
    arch = build("architecture", "masked_lm")

    class Words:
        mask_token_id = 4

        def __len__(self):
            return zoo.WORDS

    renderer = SimpleNamespace(tokenizer=Words(), special={0, 1, 2, 4})
    long = [1, *zoo.tokens(40, 1), 2]
    text = {
        "id": "t",
        "prompt": "",
        "e": SimpleNamespace(prompt=[1], completions=[long[1:]], supervised=[[True] * 41]),
    }
    cloze = {
        "id": "c",
        "prompt": "p",
        "e": SimpleNamespace(prompt=[1, 7, 8], completions=[[9, 10, 2]], supervised=[[True] * 3]),
    }
    batch = collate([text, cloze], lambda r: r["e"])
    asked = arch.ask(batch, renderer, Clock(seed=1, step=3))
    assert torch.equal(asked.labels, batch.labels)
    share = int(asked.supervised[:42].sum())
    candidates = int((~torch.isin(batch.labels[:42], torch.tensor([0, 1, 2, 4]))).sum())
    assert share == max(1, round(candidates * 0.15))
    assert torch.equal(asked.ids[~asked.supervised], batch.ids[~asked.supervised])
    assert asked.supervised[42:].tolist() == [False] * 3 + [True, True, False] and asked.ids[
        45:47
    ].tolist() == [4, 4]
    assert asked.count("token") == share + 2
    again, later = (
        arch.ask(batch, renderer, Clock(seed=1, step=3)),
        arch.ask(batch, renderer, Clock(seed=1, step=4)),
    )
    assert torch.equal(again.ids, asked.ids) and not torch.equal(later.supervised, asked.supervised)
    alone = arch.ask(collate([cloze, text], lambda r: r["e"]), renderer, Clock(seed=1, step=3))
    assert torch.equal(alone.ids[6:], asked.ids[:42])  # not a matter of the rows beside it
    fates = Counter()
    for step in range(400):
        a = arch.ask(batch, renderer, Clock(seed=0, step=step))
        own = a.supervised.clone()
        own[42:] = False
        fates.update(
            "hidden" if x == 4 else "same" if x == y else "other"
            for x, y in zip(a.ids[own].tolist(), a.labels[own].tolist(), strict=True)
        )
    total = sum(fates.values())
    assert (
        abs(fates["hidden"] / total - 0.8) < 0.03
        and abs(fates["other"] / total - 0.1) < 0.03
        and abs(fates["same"] / total - 0.1) < 0.03
    )
    with pytest.raises(RecipeError, match="no mask token"):
        arch.ask(
            batch, SimpleNamespace(tokenizer=SimpleNamespace(mask_token_id=None), special=set()), Clock()
        )


CLASSIFIERS = {
    "bert": ("BertConfig", zoo.BERT),
    "roberta": ("RobertaConfig", zoo.BERT | {"max_position_embeddings": 66}),
    "llama": ("LlamaConfig", zoo.SMALL),
    "gpt2": ("GPT2Config", zoo.GPT | {"pad_token_id": 0}),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_read_right(name):
    arch, (kind, settings) = build("architecture", "classifier"), CLASSIFIERS[name]
    torch.manual_seed(0)
    model = t.AutoModelForSequenceClassification.from_config(
        getattr(t, kind)(**settings, num_labels=3)
    ).eval()
    texts, classes = [zoo.tokens(n, n) for n in (5, 9, 1, 7)], [[0], [2, 1], [1], [2]]
    rows = [
        {
            "id": str(k),
            "e": SimpleNamespace(prompt=x, completions=[[c] for c in cs], supervised=[[True]] * len(cs)),
        }
        for k, (x, cs) in enumerate(zip(texts, classes, strict=True))
    ]
    batch = collate(rows, lambda r: r["e"])
    want = arch.plain(model, Untuned(model), batch)
    outputs = arch.forward(model, Untuned(model), batch)
    torch.testing.assert_close(outputs.logprobs, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs.top(3)[0].exp().sum(1), torch.ones(5))
    own = model(input_ids=torch.tensor([texts[3]]), labels=torch.tensor([2])).loss
    torch.testing.assert_close(-outputs.logprobs[-1], own, atol=1e-5, rtol=1e-5)
    told = []
    guards.check_forward(Policy(arch, model, Untuned(model)), batch, told.append)
    assert not told


def test_classes_come_from_the_rows():
    arch = build("architecture", "classifier")
    assert arch.fit_to([{"completions": [c]} for c in ("pos", "neg", "pos")])["label2id"] == {
        "neg": 0,
        "pos": 1,
    }
    assert arch.fit_to([{"completions": [c]} for c in ("10", "9", "1")])["id2label"] == {
        0: "1",
        1: "9",
        2: "10",
    }
    named = arch.fit_to(
        [{"completions": [c], "label": k} for c, k in (("world", 0), ("sports", 1), ("business", 2))]
    )
    assert named["id2label"] == {0: "world", 1: "sports", 2: "business"} and named["num_labels"] == 3
    with pytest.raises(RecipeError, match="the same class"):
        arch.fit_to([{"completions": ["a"]}])
    assert arch.fit_to([{"prompt": "x"}]) == {}


def test_a_classifier_is_loaded_with_its_classes(tmp_path):
    from helpers.models import make_llama, make_tokenizer

    arch, tokenizer = build("architecture", "classifier"), make_tokenizer()
    make_llama(pad_token_id=None).save_pretrained(tmp_path / "lm")
    rows = [
        {"id": "0", "prompt": "so good", "completions": ["pos"]},
        {"id": "1", "prompt": "bad", "completions": ["neg"]},
    ]
    model = arch.load(tmp_path / "lm", **arch.fit_to(rows))
    assert model.config.label2id == {"neg": 0, "pos": 1} and model.config.pad_token_id == 1
    model.config.label2id, model.config.id2label = {"pos": 0, "neg": 1}, {0: "pos", 1: "neg"}
    model.save_pretrained(tmp_path / "classifier")
    again = arch.load(tmp_path / "classifier", **arch.fit_to(rows))
    assert again.config.label2id == {"pos": 0, "neg": 1}  # a checkpoint's own order is kept
    assert torch.equal(again.score.weight, model.score.weight)
    assert arch.suits(again.config) and not CAUSAL.suits(again.config)
    other = arch.load(tmp_path / "classifier", **arch.fit_to([{"completions": [c]} for c in "abc"]))
    assert other.config.num_labels == 3 and other.score.weight.shape[0] == 3
    renderer = arch.renderer(tokenizer, again.config, max_length=5)
    encoded = arch.encode(rows[0], renderer)
    assert encoded.completions == [[0]] and encoded.supervised == [[True]] and len(encoded.prompt) == 5
    kept, bad, stats = arch.encode_all(
        [*rows, {"id": "2", "prompt": "hm", "completions": ["neutral"]}], renderer
    )
    assert len(kept) == 2 and "not one of the classes" in bad[0]["reason"]
    assert renderer.prompt({"prompt": "bad"}) == arch.encode(rows[1], renderer).prompt
    with pytest.raises(RecipeError, match="name the classes"):
        arch.load(tmp_path / "lm")


def test_a_config_suits_at_most_one_architecture():
    every = [build("architecture", c.name) for c in cards("architecture")]
    told = Counter()
    mappings = ["CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SEQUENCE_CLASSIFICATION"]
    mappings += ["IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION"]
    for mapping in mappings:
        for names in getattr(auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").values():
            for name in [names] if isinstance(names, str) else names:
                suited = [a.name for a in every if a.suits(SimpleNamespace(architectures=[name]))]
                assert len(suited) <= 1, (name, suited)
                told[suited[0] if suited else "none"] += 1
    assert (
        told["causal"] > 100
        and told["masked_lm"] > 20
        and told["seq2seq"] > 10
        and told["classifier"] > 50
        and told["none"] < 10
    ), told
    known = {
        "LlamaForCausalLM": "causal",
        "GPT2LMHeadModel": "causal",
        "T5ForConditionalGeneration": "seq2seq",
        "BartForConditionalGeneration": "seq2seq",
        "BertForMaskedLM": "masked_lm",
        "LlamaForSequenceClassification": "classifier",
        "MarianMTModel": "seq2seq",
        "ViTForImageClassification": "image_classifier",
        "DeiTForImageClassificationWithTeacher": "image_classifier",
        "Wav2Vec2ForSequenceClassification": "audio_classifier",
    }
    for name, kind in known.items():
        assert [a.name for a in every if a.suits(SimpleNamespace(architectures=[name]))] == [kind]
    assert not any(a.suits(SimpleNamespace(architectures=None)) for a in every)
