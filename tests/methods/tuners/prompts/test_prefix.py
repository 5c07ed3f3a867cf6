"""Prefix LMs: a prompt is read from both sides, what follows it as ever."""

from __future__ import annotations

import pytest
import torch
import transformers as t

import luthier
from helpers.objectives import batch_of, make_rows, network
from helpers.rows import SUMS
from luthier.errors import RecipeError
from luthier.kernels import attention, attention_plan
from luthier.methods.architectures.text.causal import Causal
from luthier.methods.tuners._base import Untuned
from luthier.model.layout import lay_out
from luthier.model.policy import Policy
from luthier.registry import build

LAYOUTS = [
    Causal(prefix=True),
    Causal(prefix=True, share_prompts=False),
    Causal(prefix=True, blocks=False),
    Causal(prefix=True, packing=False, share_prompts=False),
]


def say(model, layout, rows, attached=None):
    policy = Policy(layout, model, attached or Untuned(model))
    with torch.no_grad():
        return policy.logprobs(batch_of(rows))


def by_hand(model, row) -> torch.Tensor:
    """transformers alone, with a mask of four dimensions."""
    out = []
    for c in row["completions"]:
        ids, n = torch.tensor([row["prompt"] + c]), len(row["prompt"])
        may = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        may[:n, :n] = True
        with torch.no_grad():
            logp = model(input_ids=ids, attention_mask=may[None, None]).logits[0].log_softmax(-1)
        out.append(logp[torch.arange(n - 1, ids.shape[1] - 1), ids[0, n:]])
    return torch.cat(out)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_reads_as_a_mask_by_hand_does(layout):
    rows, model = make_rows(4, k=2), network()
    found = say(model, layout, rows)
    torch.testing.assert_close(found, torch.cat([by_hand(model, r) for r in rows]), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found, say(model, Causal(), rows), atol=1e-3)
    torch.testing.assert_close(
        layout.plain(model, Untuned(model), batch_of(rows)), found, atol=1e-5, rtol=1e-4
    )


def test_long_prompts_are_cut_into_blocks_that_see_to_their_end():
    rng = torch.Generator().manual_seed(0)
    tokens = lambda n: torch.randint(3, 40, (n,), generator=rng).tolist()
    rows = [
        {"id": i, "prompt": tokens(n), "completions": [tokens(300), tokens(5)][: 1 + i % 2]}
        for i, n in enumerate((600, 40, 290))
    ]
    torch.manual_seed(0)
    model = t.LlamaForCausalLM(
        t.LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=1024,
        )
    ).eval()
    found = [say(model, layout, rows) for layout in LAYOUTS]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-5, rtol=1e-4)
    layout = lay_out(batch_of(rows), width=2**20, prefix=True)
    q, k, v = (torch.randn(1, h, layout.source.shape[1], 8, generator=rng) for h in (2, 1, 1))
    how = attention_plan.plan(layout, torch.float32)
    torch.testing.assert_close(
        attention.attend(q, k, v, how, 0.3), attention.plain(q, k, v, how, 0.3), atol=1e-5, rtol=1e-4
    )


def test_what_may_change_changes_and_nothing_else():
    row, model, layout = make_rows(1, k=1)[0], network(), Causal(prefix=True)
    row["completions"] = [[5, 6, 7, 8, 9]]
    was = say(model, layout, [row])
    later = say(model, layout, [{**row, "completions": [[5, 6, 7, 8, 10]]}])
    torch.testing.assert_close(was[:4], later[:4])  # no completion token sees a later one
    states = lambda layout, prompt: Policy(layout, model, Untuned(model)).layers(
        batch_of([{**row, "prompt": prompt}])
    )[0][0]
    ends = [[11, 12, 13], [11, 12, 14]]
    first = lambda layout, prompt: hidden_of_first(model, layout, {**row, "prompt": prompt})
    assert states(layout, ends[0]).shape == (16,)
    # a prompt's first token sees its last
    assert not torch.allclose(first(layout, ends[0]), first(layout, ends[1]), atol=1e-4)
    torch.testing.assert_close(first(Causal(), ends[0]), first(Causal(), ends[1]))


def hidden_of_first(model, layout, row) -> torch.Tensor:
    """The state of the prompt's first token behind the last block."""
    caught = []
    hook = model.model.layers[-1].register_forward_hook(lambda m, i, o: caught.append(o))
    say(model, layout, [row])
    hook.remove()
    return caught[0][0, 0]


@pytest.mark.long
@pytest.mark.parametrize("tuner", [None, "prompt"])
def test_it_writes_as_it_reads(tuner):
    model, layout = network(), Causal(prefix=True)
    torch.manual_seed(1)
    attached = build("tuner", tuner).attach(model) if tuner else Untuned(model)
    prompts = [[5, 9, 11, 4], [7, 8]]
    texts = layout.generate(model, attached, prompts, seeds=[0, 1], n=2, max_new_tokens=6, temperature=0.0)
    for prompt, some in zip(prompts, texts, strict=True):
        assert some[0] == some[1]
        for k, token in enumerate(some[0]):  # greedy: each is the likeliest of all
            rows = [{"id": x, "prompt": prompt, "completions": [[*some[0][:k], x]]} for x in range(3, 40)]
            last = [float(say(model, layout, [r], attached)[-1]) for r in rows]
            assert max(last) - last[token - 3] < 1e-4 if token >= 3 else True


def test_a_prefix_is_refused_where_layers_cannot_read_it():
    torch.manual_seed(0)
    small = dict(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = t.MistralForCausalLM(t.MistralConfig(**small, sliding_window=4)).eval()
    with pytest.raises(RecipeError, match="bidirectionally"):
        say(model, Causal(prefix=True), make_rows(1, k=1))


@pytest.mark.slow
@pytest.mark.long
def test_a_causal_model_adapts_sooner_than_a_new_one_learns(tmp_path):
    """Non-causal MLM adaptation: spans are restored by a prefix LM; a model that knows the texts gets there
    in fewer steps.
    """
    asked = {
        "model": "toy:lm-small",
        "architecture": {"name": "causal", "prefix": True},
        "tuner": "full",
        "dtype": "float32",
        "data": {"path": "toy:people/train", "n": 200},
        "eval_data": {"path": "toy:people/test", "n": 40},
        "evaluate": ["loss"],
        "stages": [{"name": "ul2", "shares": {"R": 1.0}, "sentinel": "<{}>"}],
        "max_steps": 15,
        "learning_rate": 1e-3,
    }
    known = luthier.tune(asked, folder=tmp_path / "known").losses
    config = t.AutoConfig.from_pretrained(luthier.load("toy:lm-small").model.config._name_or_path)
    torch.manual_seed(0)
    t.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "new")
    t.AutoTokenizer.from_pretrained(config._name_or_path).save_pretrained(tmp_path / "new")
    fresh = luthier.tune({**asked, "model": str(tmp_path / "new")}, folder=tmp_path / "fresh").losses
    assert min(known) < min(fresh) - 0.3


@pytest.mark.slow
@pytest.mark.long
def test_a_prefix_run_compares_itself_and_goes_on(tiny, tmp_path):
    report = luthier.tune(
        {
            "model": tiny,
            "data": SUMS,
            "architecture": {"name": "causal", "prefix": True},
            "max_steps": 3,
            "per_device_train_batch_size": 8,
        },
        folder=tmp_path / "r",
    )
    assert len(report.losses) and not [n for n in report.notes if "plain" in n or "slower" in n]
    assert luthier.load(report.folder).roles.policy.architecture.prefix
