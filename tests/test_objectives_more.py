"""Distillation from columns, denoisers, self-distillation, gradients of several terms, layer-wise rates: what
their papers say holds.
"""

from __future__ import annotations

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

import luthier
from conftest import SUMS, make_llama, make_tokenizer
from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.methods.estimators.multi_objective.pareto_da import weights
from luthier.methods.objectives.distillation.alm import event_divergence
from luthier.methods.stages.augment.ul2 import DENOISERS, corrupt, restored, spans
from luthier.methods.stages.rollout.teacher_spans import along
from luthier.methods.stages.rollout.teacher_top import calibrated
from luthier.registry import build

TEXT = (
    "the quick brown fox jumps over the lazy dog and runs away into the deep dark wood where nobody lives"
    " at all"
)


@pytest.fixture(scope="session")
def tiny(shallow) -> str:
    return shallow


def roles(step: int = 0):
    tokenizer = make_tokenizer()
    text = lambda ids, special=False: tokenizer.decode(ids)
    return SimpleNamespace(
        clock=Clock(seed=1), renderer=SimpleNamespace(tokenizer=tokenizer, text=text), warn=lambda s: None
    )


# ---------------------------------------------------------------------------------------------- denoisers


@pytest.mark.parametrize(("mean", "rate"), [kind for kinds in DENOISERS.values() for kind in kinds])
def test_a_denoiser_hides_its_share_in_spans_of_its_length_and_can_be_undone(mean, rate):
    rng, parts = torch.Generator().manual_seed(0), [f"w{i} " for i in range(256)]
    hidden, count = 0, 0
    for _ in range(200):
        cut = spans(256, mean, rate, rng)
        hidden += sum(len(b) for _, b in cut)
        count += len(cut)
        read, said = corrupt(parts, mean, rate, "<extra_id_{}>", rng)
        assert restored(read, said) == "".join(parts)
    assert hidden / (200 * 256) == pytest.approx(rate, rel=0.05)
    assert hidden / count == pytest.approx(min(mean, 256 * rate), rel=0.1)


def test_ul2_draws_modes_by_their_shares_from_seed_and_row():
    stage = build("stage", {"name": "ul2", "shares": {"R": 0.5, "X": 0.3, "S": 0.2}})
    rows = [{"id": i, "prompt": "", "completions": [TEXT]} for i in range(400)]
    made = list(stage(rows, roles()))
    seen = {m: sum(r["mode"] == m for r in made) / len(made) for m in "RXS"}
    assert seen["R"] == pytest.approx(0.5, abs=0.08) and seen["S"] == pytest.approx(0.2, abs=0.06)
    assert made == list(stage(rows, roles()))
    for row in made:
        read = row["prompt"].removeprefix(f"[{row['mode']}] ")
        assert row["prompt"] != read
        assert (
            read + row["completions"][0] if row["mode"] == "S" else restored(read, row["completions"][0])
        ) == TEXT
    target = [len(r["completions"][0]) / len(TEXT) for r in made if r["mode"] == "S"]
    assert sum(target) / len(target) == pytest.approx(0.25, abs=0.06)
    with pytest.raises(RecipeError, match="R, X and S"):
        build("stage", {"name": "ul2", "shares": {"Q": 1.0}})


def test_code_switching_exchanges_its_share_and_only_known_words():
    words = [f"w{i}" for i in range(40)]
    stage = build("stage", {"name": "code_switch", "dictionary": {w: [w.upper(), w + "X"] for w in words}})
    rows = [{"id": i, "prompt": "", "completions": [" ".join(words)]} for i in range(100)]
    changed = 0
    for row in stage(rows, roles()):
        for was, now in zip(words, row["prompt"].split(" "), strict=True):
            assert now in (was, was.upper(), was + "X")
            changed += was != now
    assert changed / 4000 == pytest.approx(0.35, abs=0.02)
    same = build("stage", {"name": "code_switch", "dictionary": {"w1": "W1"}, "share": 0.0})
    assert [r["prompt"] for r in same(rows, roles())] == [r["completions"][0] for r in rows]


def test_step_by_step_makes_two_tasks_of_a_row():
    stage = build("stage", "predict_explain")
    rows = [
        {"id": 0, "prompt": "2+3=", "completions": ["5"], "rationale": "3 after 2 is 5"},
        {"id": 1, "prompt": "1+1=", "completions": ["2"]},
    ]
    made = list(stage(rows, roles()))
    assert [(r["prompt"], r["completions"], r["tasks"]) for r in made] == [
        ("2+3=", ["5"], ["answer"]),
        ("[rationale] 2+3=", ["3 after 2 is 5"], ["rationale"]),
    ]


def test_step_by_step_is_the_weighted_sum_of_two_losses(base, tmp_path):
    rows = [{**r, "rationale": f"because of {r['answer']}"} for r in SUMS]
    both = {
        **base,
        "data": rows,
        "stages": ["predict_explain"],
        "max_steps": 1,
        "per_device_train_batch_size": 16,
    }
    losses = {}
    for alpha in (0.3, 1.0, 0.0):
        terms = [
            {"name": "task_sft", "task": "answer", "weight": alpha},
            {"name": "task_sft", "task": "rationale", "weight": 1 - alpha},
        ]
        losses[alpha] = luthier.tune({**both, "objective": terms}, folder=tmp_path / str(alpha)).losses[0]
    assert losses[0.3] == pytest.approx(0.3 * losses[1.0] + 0.7 * losses[0.0], rel=1e-5)


# ---------------------------------------------------------------------------------------------- teachers


def test_first_with_the_whole_vocabulary_is_the_forward_kl(base, tiny, tmp_path):
    teacher = {"roles": {"teacher": {"name": "model", "model": tiny}}}
    tuned = luthier.tune({**base, "learning_rate": 3e-3}, folder=tmp_path / "t").folder
    start = {**base, **teacher, "start": tuned, "max_steps": 1, "per_device_train_batch_size": 8}
    whole = luthier.tune({**start, "objective": "distill"}, folder=tmp_path / "a")
    stage = {"name": "teacher_top", "k": 262, "temperature": 1.0}
    kept = luthier.tune({**start, "objective": "first", "stages": [stage]}, folder=tmp_path / "b")
    assert kept.losses[0] == pytest.approx(whole.losses[0], rel=2e-3) and whole.losses[0] > 1e-3
    row = json.loads((tmp_path / "b" / "rows.jsonl").read_text().splitlines()[0])
    assert {len(place) for place in row["teacher_ids"][0]} == {262}


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> str:
    """A tiny Llama with a tokenizer of its own: two digits are one token."""
    made = json.loads(make_tokenizer().backend_tokenizer.to_str())
    merges = [[a, b] for a in "0123456789" for b in "0123456789"]
    for pair in merges:
        made["model"]["vocab"]["".join(pair)] = len(made["model"]["vocab"])
    made["model"]["merges"] = merges
    folder = tmp_path_factory.mktemp("other")
    make_llama(3, vocab_size=len(made["model"]["vocab"])).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(made)), eos_token="<|end|>", pad_token="<|pad|>"
    ).save_pretrained(folder)
    return str(folder)


def test_a_teacher_with_other_tokens_is_refused_where_sizes_agree(base, tiny, tmp_path):
    made = json.loads(make_tokenizer().backend_tokenizer.to_str())
    words = made["model"]["vocab"]
    words["1"], words["2"] = words["2"], words["1"]
    make_llama(3).save_pretrained(tmp_path / "swapped")
    swapped = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(made)), eos_token="<|end|>", pad_token="<|pad|>"
    )
    swapped.save_pretrained(tmp_path / "swapped")
    asked = {
        **base,
        "objective": "distill",
        "max_steps": 1,
        "roles": {"teacher": {"name": "model", "model": str(tmp_path / "swapped")}},
    }
    with pytest.raises(RecipeError, match="2 not the same.*teacher_spans"):
        luthier.tune(asked, folder=tmp_path / "r")


def test_the_same_base_with_another_adapter_teaches(base, tiny, tmp_path):
    teacher = luthier.tune(
        {**base, "tuner": "lora", "learning_rate": 1e-2, "max_steps": 5}, folder=tmp_path / "teacher"
    ).folder
    asked = {
        **base,
        "tuner": "lora",
        "objective": "distill",
        "roles": {"teacher": {"name": "model", "model": teacher}},
    }
    report = luthier.tune({**asked, "start": teacher, "max_steps": 1}, folder=tmp_path / "same")
    assert report.losses[0] == pytest.approx(0, abs=1e-5)
    report = luthier.tune({**asked, "learning_rate": 1e-2, "max_steps": 12}, folder=tmp_path / "other")
    assert report.losses[0] > 1e-3 and report.losses[-1] < report.losses[0] / 2


def test_spans_of_one_tokenizer_are_its_tokens(base, tiny, tmp_path):
    stages = [{"name": "teacher_spans", "model": tiny}]
    same = luthier.tune(
        {**base, "objective": "alm", "stages": stages, "max_steps": 1, "tuner": "full"},
        folder=tmp_path / "same",
    )
    assert same.losses[0] == pytest.approx(0, abs=1e-6)
    row = json.loads((tmp_path / "same" / "rows.jsonl").read_text().splitlines()[0])
    loaded = luthier.load(tiny, dtype="float32")
    assert row["teacher_spans"][0] == pytest.approx(
        loaded.logprobs([{k: row[k] for k in ("id", "prompt", "completions")}]).tolist(), abs=1e-4
    )


def test_spans_of_another_tokenizer_add_up_to_its_own_log_probability(base, other, tmp_path):
    rows = [{"prompt": f"{a}+{b}=", "completion": f"{a}+{b}={a + b}"} for a in range(3) for b in range(8, 16)]
    tuned = {
        **base,
        "data": rows,
        "objective": "alm",
        "stages": [{"name": "teacher_spans", "model": other}],
        "tuner": "full",
    }
    report = luthier.tune({**tuned, "learning_rate": 3e-3, "max_steps": 40}, folder=tmp_path / "a")
    teacher = luthier.load(other, dtype="float32")
    for line in (tmp_path / "a" / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        told = [v for v in row["teacher_spans"][0] if v <= 0]
        long = sum(len(n) == 2 for n in re.findall(r"\d+", row["completions"][0]))
        assert len(told) == len(row["teacher_spans"][0]) - long and row["teacher_spans"][0][-1] <= 0
        plain = {k: row[k] for k in ("id", "prompt", "completions")}
        assert sum(told) == pytest.approx(float(teacher.logprobs([plain]).sum()), abs=1e-3)
    assert report.losses[-1] < 0.7 * report.losses[0]


def test_where_both_cut_a_span_ends():
    assert along(5, [(2, 1), (3, 3), (5, 4)], [-1.0, -2.0, -3.0, -4.0]) == [1.0, -1.0, -5.0, 1.0, -4.0]
    assert along(4, [(2, 1)], [-1.0, -9.0]) == [1.0, -1.0, 2.0, 2.0]
    p, q = torch.tensor([0.3, 1.0]).log(), torch.tensor([0.6, 0.5]).log()
    want = 0.3 * math.log(0.3 / 0.6) + 0.7 * math.log(0.7 / 0.4)
    assert event_divergence(p, q)[0] == pytest.approx(want, rel=1e-5) and event_divergence(p, q)[
        1
    ] == pytest.approx(math.log(2), rel=1e-3)
    assert event_divergence(p, p).abs().max() < 1e-6


def test_an_overconfident_teacher_is_tempered():
    torch.manual_seed(0)
    true = (torch.randn(4000, 5) * 1.5).log_softmax(-1)
    right = torch.multinomial(true.exp(), 1).squeeze(1)
    order = true.argsort(-1, descending=True)
    ranked, hit = true.gather(1, order), order[:, 0] == right
    assert calibrated((3 * ranked).log_softmax(-1), hit) == pytest.approx(3.0, abs=0.5)
    assert calibrated(ranked, hit) == pytest.approx(1.0, abs=0.2)


def test_self_distillation_is_nothing_at_the_teacher_and_keeps_the_student_near(base, tiny, tmp_path):
    teacher = {"roles": {"teacher": {"name": "model", "model": tiny}}}
    luthier.tune(
        {**base, **teacher, "objective": "sft + self_distill", "max_steps": 1}, folder=tmp_path / "z"
    )
    assert (
        json.loads((tmp_path / "z" / "metrics.jsonl").read_text().splitlines()[0])["loss/self_distill"] == 0
    )
    from safetensors.torch import load_file

    def moved(name: str, objective: str, roles: dict) -> float:
        folder = luthier.tune(
            {**base, **roles, "objective": objective, "max_steps": 12, "learning_rate": 3e-3},
            folder=tmp_path / name,
        ).folder
        a, b = load_file(f"{folder}/model.safetensors"), load_file(f"{tiny}/model.safetensors")
        return math.sqrt(sum(float((a[k].float() - b[k].float()).square().sum()) for k in a))

    assert moved("near", "sft + 5*self_distill", teacher) < moved("free", "sft", {})


# ---------------------------------------------------------------------------------------------- gradients of several terms


def combined(name: str, grads: torch.Tensor) -> torch.Tensor:
    share = build("estimator", name).combine(
        grads.double() @ grads.double().T, torch.ones(len(grads)), torch.Generator().manual_seed(0)
    )
    return share.float() @ grads


def test_pcgrad_leaves_agreeing_gradients_and_projects_conflicting_ones():
    agree = torch.tensor([[1.0, 0.0], [0.5, 1.0]])
    assert torch.allclose(combined("pcgrad", agree), agree.sum(0))
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([-0.5, 1.0])
    want = (a - (a @ b) / (b @ b) * b) + (b - (b @ a) / (a @ a) * a)
    assert torch.allclose(combined("pcgrad", torch.stack([a, b])), want)


def test_min_norm_is_the_shortest_mix_and_no_term_is_against_it():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([-0.5, 1.0])
    share = float(((b - a) @ b / (a - b).square().sum()).clamp(0, 1))
    assert torch.allclose(combined("min_norm", torch.stack([a, b])), share * a + (1 - share) * b, atol=1e-5)
    torch.manual_seed(0)
    grads = torch.randn(4, 12)
    step = combined("min_norm", grads)
    assert (grads @ step >= float(step.square().sum()) - 1e-2).all()


def test_the_pareto_program_keeps_its_bounds():
    rng = np.random.default_rng(0)
    for i in range(1000):
        k = 2 + i % 3
        G, v = rng.normal(size=(k, 4)), rng.normal(size=4)
        C, c = G @ G.T, G @ v
        a = weights(C, c, guided=bool(i % 5))
        assert abs(a.sum() - 1) < 1e-6 and (a >= -1e-9).all()
        least = np.zeros(k)
        if i % 5 and (c > 0).any():
            least = np.where(c > 0, -np.inf, c)
            least[c.argmax()] = 0
        assert (C @ a >= least - 1e-6 * np.abs(C).max()).all()
    same = np.ones((3, 1)) @ rng.normal(size=(1, 5))
    assert np.allclose(weights(same @ same.T, same @ same[0], True) @ same, same[0])
    axes = np.eye(4)[:3]
    assert np.allclose(weights(axes @ axes.T, axes @ axes[1], True), [0, 1, 0])
    G, v = np.array([[1.0, 0.2], [-0.4, 1.0]]), np.array([0.3, 1.0])  # two terms: the best of a fine grid
    C, c, grid = G @ G.T, G @ v, np.linspace(0, 1, 20001)
    may = [x for x in grid if C[int(c.argmax())] @ [x, 1 - x] >= -1e-9]
    assert float(c @ weights(C, c, True)) == pytest.approx(max(c @ [x, 1 - x] for x in may), abs=1e-3)


def test_a_guide_goes_down_where_a_plain_sum_would_raise_it():
    """Two losses pull apart, one of them against the guide: |x - p|^2 for three places p."""
    places = torch.tensor([[0.0, 2.0], [3.0, -1.0], [0.2, 1.5]])  # the last is only looked at
    x = torch.tensor([0.4, 0.6])
    grads, losses = 2 * (x - places), (x - places).square().sum(1)
    share = build("estimator", "pareto_da").combine((grads @ grads.T).double(), losses, None).float()
    assert float(share[-1]) == 0 and float(share.sum()) == pytest.approx(2)
    after = lambda step: float((x - 0.02 * step - places[-1]).square().sum())
    assert after(share @ grads) < float(losses[-1]) < after(grads[0] + grads[1])
    assert torch.equal(
        build("estimator", {"name": "pareto_da", "guide": 2})
        .combine((grads @ grads.T).double(), losses, None)
        .float(),
        share,
    )
    with pytest.raises(RecipeError, match="has 3 terms"):
        build("estimator", {"name": "pareto_da", "guide": 3}).combine(
            (grads @ grads.T).double(), losses, None
        )


@pytest.mark.parametrize("name", ["pcgrad", "min_norm", "pareto_da"])
def test_terms_are_trained_together_and_one_term_is_backprop(base, tmp_path, name):
    recipe = {
        **base,
        "objective": "sft + 0.5*dft",
        "estimator": name,
        "learning_rate": 3e-3,
        "max_steps": 16,
        "per_device_train_batch_size": 16,
    }
    report = luthier.tune(recipe, folder=tmp_path / "a")
    assert report.losses[-1] < report.losses[0]
    alone = [luthier.tune({**base, "estimator": e}, folder=tmp_path / e).losses for e in (name, "backprop")]
    assert alone[0] == alone[1]


def test_glad_without_its_share_is_backprop_and_with_all_of_it_sam(base, tmp_path):
    def end(name: str, estimator) -> list[float]:
        return luthier.tune({**base, "estimator": estimator}, folder=tmp_path / name).losses

    assert end("a", {"name": "glad", "alpha": 0.0}) == end("b", "backprop")
    assert end("c", {"name": "glad", "alpha": 1.0, "rho": 0.1}) == pytest.approx(
        end("d", {"name": "sam", "rho": 0.1}), rel=1e-5
    )


def test_glad_on_a_quadratic_is_its_closed_form():
    from luthier.methods.tuners._base import ParamGroup, TunedModel
    from luthier.train.optimizer import Chain

    torch.manual_seed(0)
    A = torch.randn(6, 6)
    H, p = A @ A.T / 6, torch.nn.Parameter(torch.randn(6))

    class One(TunedModel):
        def all_param_groups(self):
            return [ParamGroup("p", {"weight": p})]

    seen = {}

    class Keep:
        def bind(self, attached):
            return self

        def gather(self, every):
            return every

        def apply(self, grads, state, group, step):
            seen.update(grads)
            return grads

    clock = Clock(seed=0, total=1)
    chain = Chain([Keep()], One(SimpleNamespace(name="x"), torch.nn.Identity()), clock, 0.0)

    def closure(grad=True):
        p.grad = None
        loss = 0.5 * p @ H @ p
        loss.backward()
        return float(loss.detach())

    g = (H @ p).detach()
    build("estimator", {"name": "glad", "alpha": 0.4, "rho": 1e-2}).step(closure, chain, clock)
    assert torch.allclose(seen["weight"], g + 0.4 * 1e-2 * H @ g / g.norm(), atol=1e-5)


# ---------------------------------------------------------------------------------------------- rates, bytes


def test_layerwise_rates_are_the_formula():
    from luthier.train.optimizer import Chain

    model = make_llama()
    attached = build("tuner", "full").attach(model)
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    chain = Chain(
        [build("transform", {"name": "layerwise_decay", "decay": 0.5})], attached, Clock(seed=0, total=1), 0.1
    )
    chain.step({s.name: {k: torch.ones_like(p) for k, p in s.params.items()} for s in chain.param_groups()})
    step = {k: float((before[k] - p).mean()) for k, p in model.named_parameters()}
    assert [step[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(4)] == pytest.approx(
        [0.1 * 0.5 ** (3 - i) for i in range(4)], rel=1e-3
    )
    assert step["model.embed_tokens.weight"] == pytest.approx(0.1 * 0.5**4, rel=1e-3) and step[
        "model.norm.weight"
    ] == pytest.approx(0.1, rel=1e-3)


def test_bits_per_byte_are_those_of_the_text(base, tmp_path):
    report = luthier.tune(
        {**base, "eval_data": 0.3, "evaluate": ["loss", "bits_per_byte"], "max_steps": 1},
        folder=tmp_path / "a",
    )
    by_row = (
        json.loads((tmp_path / "a" / "per_example-before.json").read_text())
        if (tmp_path / "a" / "per_example-before.json").is_file()
        else None
    )
    assert report.before["bits_per_byte"] > 0 and (by_row is None or len(by_row["loss"]) > 3)
    # a byte is a token here, but for the end of turn, which is asked and says nothing
    tokens = report.before["loss"] / math.log(2)
    assert report.before["bits_per_byte"] == pytest.approx(tokens * 1.7, rel=0.4)
