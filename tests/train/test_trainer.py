"""The loop's promises: how a batch is split changes nothing, a killed run goes on bit for bit, faults are
told.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import luthier
from helpers.rows import PAIRS, SUMS
from helpers.runs import ROLLOUT, near, weights
from luthier.clock import Clock
from luthier.errors import NotFinite, OutOfMemory, RecipeError, Refused
from luthier.model.load import pick_dtype
from luthier.storage import checkpoints, files
from luthier.train import checks as guards
from luthier.train import memory
from luthier.train.trainer import draw


@pytest.fixture(scope="session")
def tiny(shallow) -> str:
    return shallow


@pytest.mark.long
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


def test_every_row_once_an_epoch():
    clock = Clock(seed=3)
    seen = []
    for clock.step in range(7):  # two epochs of ten rows, three at a time: the last step takes what is left
        seen += draw(10, clock, 3, stop_at=20)
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]


def test_every_row_once_an_epoch_where_a_draw_is_learned_several_times():
    clock, seen = Clock(seed=3), []
    for clock.step in range(8):  # four draws, two steps each
        drawn = draw(10, clock, 3, stop_at=10, num_iterations=2)
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


@pytest.mark.long
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
    with pytest.raises(OutOfMemory, match="out of memory; everything saved so far is intact"):
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
    assert len(told) == 1 and "the end-of-turn token is not supervised" in told[0]


def test_more_tokens_than_the_network_has_positions_for_are_refused(base, tmp_path):
    with pytest.raises(
        RecipeError, match="max_length: 600 tokens is more than .* reads with this tuner .512."
    ):
        luthier.tune(base | {"max_length": 600}, folder=tmp_path)
    with pytest.raises(RecipeError, match="reads with this tuner .507."):
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


def test_nothing_to_learn_is_refused(base, tmp_path):
    rows = [
        {
            "messages": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": "ho", "loss": False},
            ]
        }
    ] * 8
    with pytest.raises(RecipeError, match="no supervised tokens|none of the 8 rows"):
        luthier.tune(base | {"data": rows, "max_bad_rows": 1}, folder=tmp_path)


def test_a_gradient_that_does_not_arrive_is_refused(base, tmp_path, monkeypatch):
    from luthier.methods.objectives.supervised.sft import SFT

    monkeypatch.setattr(SFT, "loss", lambda self, roles, batch: roles.policy.logprobs(batch) * 0.0)
    with pytest.raises(Refused, match="receives a gradient"):
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
    assert any("using 'padded' instead" in n for n in got.notes) and got.losses == pytest.approx(
        want.losses, abs=1e-4
    )


@pytest.mark.long
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


@pytest.mark.long
def test_rows_that_are_yet_to_be_answered_are_read_right_too(base, tmp_path, monkeypatch):
    """The layout is tried before the first rollout, which reads in it."""
    leak(monkeypatch)
    prompts = [{"prompt": r["prompt"], "answer": r["answer"]} for r in SUMS]
    report = luthier.tune(
        base | {"tuner": "lora", "objective": "grpo", "live": ROLLOUT, "data": prompts, "max_steps": 1},
        folder=tmp_path,
    )
    assert any("using 'padded' instead" in n for n in report.notes)
