"""ProMoT: one half trains at a time, what is saved has no prompt, and weights without it collapse less."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from helpers.objectives import small_llama
from helpers.tuners import IDS, batch, logprobs, put
from luthier.clock import Clock
from luthier.methods.architectures.text.causal import Causal
from luthier.model.batch import collate
from luthier.registry import build

YES, NO = 38, 39


def rounds(attached: Any, batches, steps: int, rates: dict[str, float]):
    """Steps with a rate for the prompt and one for everything else."""
    clock = Clock(seed=3, total=steps)
    own = attached.parameters()
    groups = [
        {"params": [p], "lr": rates.get(name.split(".")[0], rates["default"])} for name, p in own.items()
    ]
    optimizer = torch.optim.Adam(groups)
    for clock.step in range(steps):
        attached.begin_step(clock)
        optimizer.zero_grad()
        of = batches[clock.step % len(batches)]
        (-Causal().forward(attached.model, attached, of).logprobs).mean().backward()
        optimizer.step()
        yield clock.step


def test_each_phase_leaves_the_other_half_as_it_is():
    attached: Any = put("promot", prompt_share=0.5)
    before = attached.tensors()
    steps = rounds(attached, [batch()], 4, {"default": 1e-2, "prompt": 0.1})
    moved = []
    for _ in steps:
        now = attached.tensors()
        moved.append({name for name in now if not torch.equal(now[name], before[name])})
        before = now
    assert moved[0] == moved[1] == {"prompt.embeddings"}
    assert moved[2] and moved[3] and "prompt.embeddings" not in moved[2] | moved[3]
    # each phase has the whole of the schedule
    of = [attached.schedule_step(SimpleNamespace(step=s, total=4)) for s in range(4)]
    assert of == [0, 2, 0, 2]


@torch.no_grad()
def test_what_is_saved_is_the_network_without_its_prompt(tmp_path):
    attached: Any = put("promot")
    with torch.enable_grad():
        list(rounds(attached, [batch()], 2, {"default": 1e-2, "prompt": 0.1}))
    attached.save(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(plain(IDS).logits, attached.model(IDS).logits)
    with_prompt = logprobs(attached)
    with attached.without_prompt():
        assert not torch.allclose(logprobs(attached), with_prompt, atol=1e-3)
    theirs = PeftModel.from_pretrained(plain, str(tmp_path / "prompt")).eval()
    embeds = torch.cat([attached.prompt.expand(2, -1, -1), plain.get_input_embeddings()(IDS)], 1)
    assert torch.allclose(theirs(IDS).logits, plain(inputs_embeds=embeds).logits, atol=1e-5)
    again: Any = put("promot", prompt_tuning_init="random")
    again.load(again.read(tmp_path))
    assert torch.equal(logprobs(again), with_prompt)


def rows_of(answer, n: int, seed: int):
    prompts = torch.randint(3, 15, (n, 3), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = [{"id": i, "prompt": p, "answer": answer(p)} for i, p in enumerate(prompts)]
    encode = lambda r: SimpleNamespace(
        prompt=r["prompt"], completions=[r["answer"]], supervised=[[True] * len(r["answer"])]
    )
    return collate(rows, encode)


@pytest.mark.slow
def test_weights_without_the_prompt_keep_to_the_format_less():
    """A network that repeats its prompt learns to answer yes or no; then it is asked to repeat again."""
    repeat = lambda p: [p[-1]]
    judge = lambda p: [YES if p[-1] < 9 else NO]
    torch.manual_seed(0)
    net = small_llama().policy.model
    start: Any = build("tuner", "full").attach(net)
    list(rounds(start, [rows_of(repeat, 32, s) for s in range(20)], 80, {"default": 1e-2}))
    weights = start.tensors()
    tasks, held = [rows_of(judge, 16, 100 + s) for s in range(10)], rows_of(judge, 64, 7)
    collapsed, right = {}, {}
    for name, settings in (("full", {}), ("promot", {"num_virtual_tokens": 4, "prompt_share": 0.5})):
        start.load(weights)
        torch.manual_seed(1)
        attached: Any = build("tuner", {"name": name, **settings}).attach(net)
        steps = 100 if name == "promot" else 40
        list(rounds(attached, tasks, steps, {"default": 2e-3, "prompt": 0.1}))
        with torch.no_grad():
            first = Causal().forward(net, attached, held).first()
            right[name] = float((first == held.labels[held.targets]).float().mean())
            if name == "promot":
                attached.virtual = 0
            answers = Causal().forward(net, attached, held).first()
        collapsed[name] = float(((answers == YES) | (answers == NO)).float().mean())
    assert right["promot"] > right["full"] - 0.05 > 0.85, right
    assert collapsed["promot"] < collapsed["full"] - 0.3, collapsed
