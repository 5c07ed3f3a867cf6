"""What rows begin with in common stands once, and every row still reads its own tokens and no others."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from helpers import zoo
from luthier.compat.transformers import checkpoint_activations
from luthier.kernels import attention, attention_plan
from luthier.methods.architectures.text.causal import Causal
from luthier.methods.tuners._base import Untuned
from luthier.model.batch import collate
from luthier.model.language_model import path
from luthier.model.layout import lay_out, rows_apart
from luthier.model.trie import WORTH, common_stretches, tokens_saved

MERGED = Causal(share_prefixes=True)


def encoded(*rows):
    """A batch of (prompt, completions), everything supervised but the first token of a prompt."""
    made = []
    for i, (prompt, completions) in enumerate(rows):
        marks = [[True] * len(c) for c in completions]
        made.append(
            {"id": str(i), "e": SimpleNamespace(prompt=prompt, completions=completions, supervised=marks)}
        )
    return collate(made, lambda row: row["e"])


def sequence(batch, segment: int) -> list[int]:
    """The tokens from the root to the end of a segment."""
    pieces = batch.segments()
    return [t for s in path(batch, segment) for t in batch.ids[pieces[s]].tolist()]


@pytest.mark.parametrize("virtual", [0, 3])
@pytest.mark.parametrize("width", [10**6, 16])
@pytest.mark.parametrize("make", [zoo.common, zoo.rows, zoo.deep])
def test_a_token_sees_the_beginning_of_its_own_sequence(make, width, virtual):
    batch = make()
    layout = lay_out(batch, width=width, virtual=virtual, merge=True)
    mask, wide = layout.mask()[:, 0], layout.source.shape[1]
    ids = batch.ids[layout.source].masked_fill(layout.soft >= 0, -1)
    for segment in range(len(batch.parent)):
        line = [-1] * virtual + sequence(batch, segment)
        own = (batch.segment == segment).nonzero().squeeze(1).tolist()
        for i, token in enumerate(own):
            here = len(line) - len(own) + i
            r, w = divmod(int(layout.place[token]), wide)
            looked = mask[r, w].nonzero().squeeze(1)
            order = layout.position[r, looked].argsort()
            assert ids[r, looked[order]].tolist() == line[: here + 1]
            before = int(layout.at[token])
            assert before == -1 if here == 0 else int(ids.flatten()[before]) == line[here - 1]
    placed = int(((layout.piece >= 0) & (layout.soft < 0)).sum())
    assert placed + layout.saved == len(batch.ids)
    if width > 16:  # else a mask over rows of that width would grow
        assert bool(layout.saved) == (make is zoo.common)


def test_every_common_token_stands_once():
    batch = zoo.common()
    prefixes = set()
    for s in range(len(batch.parent)):
        line = sequence(batch, s)
        prefixes |= {tuple(line[: i + 1]) for i in range(len(line))}
    assert len(batch.ids) - tokens_saved(batch, common_stretches(batch, least=1)) == len(prefixes)


def test_a_short_beginning_is_not_cut_off_but_long_ones_behind_it_are():
    one, other, more = [3, *range(10, 60)], [3, *range(20, 70)], [3, 4]
    batch = encoded((one, [[7]]), (other, [[8]]), (one, [[9]]), (other, [[7]]), (more, [[5]]))
    blocks = common_stretches(batch)
    assert [[s.size for s in block] for block in blocks] == [[51, 1, 1], [51, 1, 1], [2, 1]]
    assert tokens_saved(batch, blocks) == 102


def test_rows_that_each_go_on_from_the_last_are_no_problem():
    """A trie as deep as there are rows."""
    chain = encoded(*(([3] * k, [[3]]) for k in range(1, 100)))
    assert tokens_saved(chain, common_stretches(chain, least=1)) == len(chain.ids) - 100
    layout = lay_out(chain, width=10**6, merge=True)
    assert layout.source.shape == (1, 100) and int(layout.position.max()) == 99


def test_it_is_chosen_where_it_saves_enough():
    prompt = zoo.tokens(WORTH // 2, 1)
    few = encoded((prompt, [[5]]), (prompt, [[6]]))
    many = encoded((prompt, [[5]]), (prompt, [[6]]), (prompt, [[7]]))
    assert not lay_out(few, width=10**6, merge="auto").saved
    assert lay_out(many, width=10**6, merge="auto").saved == WORTH
    assert not lay_out(many, width=0, merge=True).saved  # padded: rows are apart
    assert not lay_out(many, width=10**6, share=False, merge=True).saved


def test_prompts_read_from_both_sides_are_shared_as_a_whole():
    batch = zoo.common()
    layout = lay_out(batch, width=10**6, prefix=True, merge=True)
    # one prompt of 12 tokens twice; after it, one answer of 5 tokens twice, the first 3 of another
    assert layout.saved == 12 + 3 + 5 and int(layout.both.sum()) == 5
    model, causal = zoo.make("llama"), Causal(prefix=True)
    with torch.no_grad():
        apart = causal.forward(model, Untuned(model), batch).logprobs
        merged = replace(causal, share_prefixes=True).forward(model, Untuned(model), batch).logprobs
    torch.testing.assert_close(merged, apart, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2_moe"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_everything_of_a_token_is_what_rows_apart_give(name, checkpointing):
    """Distributions, hidden states and layers; gradients where each row weighs a common token otherwise."""
    model, batch = zoo.make(name), zoo.common()
    if checkpointing:
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        for setting in ("resid_pdrop", "attn_pdrop", "embd_pdrop"):
            if hasattr(model.config, setting):
                setattr(model.config, setting, 0.0)
        checkpoint_activations(model)
    both = []
    for arch in (MERGED, Causal(share_prefixes=False)):
        out = arch.forward(model, Untuned(model), batch)
        assert (out.which is None) == (arch is not MERGED)
        logprobs, ids = out.top(3)
        weights = torch.linspace(-1, 2, len(out.logprobs))
        loss = (out.logprobs * weights).sum() + (out.entropy * weights).sum() + out.at(ids).exp().sum()
        loss = loss + out.apply(lambda z, w: z.softmax(-1)[:, 5] * w, weights).sum() + out.hidden.mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        both.append(([out.logprobs, out.entropy, logprobs, out.first(), out.hidden], gradients))
    for a, b in zip(both[0][0], both[1][0], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    for a, b in zip(both[0][1], both[1][1], strict=True):
        if b is not None:
            assert (a - b).abs().max() <= 1e-4 * max(1.0, float(b.abs().max()))


def test_what_reads_equal_tokens_otherwise_keeps_rows_apart():
    model, batch = zoo.make("gpt2"), zoo.common()
    attached = Untuned(model)
    saved, reason = MERGED.shared_tokens(model, attached, batch)
    assert saved and "dropout" in reason  # gpt2's, in training
    assert MERGED.forward(model, attached, batch).which is not None
    assert MERGED.forward(model.train(), attached, batch).which is None
    mixed = batch.view(mixed=(batch.ids, torch.zeros(len(batch.ids))))
    assert "mixed" in MERGED.why_rows_apart(model, attached, mixed, False)
    with rows_apart():
        assert MERGED.forward(model.eval(), attached, batch).which is None
    llama = zoo.make("llama")
    assert MERGED.shared_tokens(llama, Untuned(llama), batch) == (saved, None)
    assert MERGED.forward(llama.train(), Untuned(llama), batch).which is not None
    noisy = replace(MERGED, neftune_noise_alpha=5.0)
    assert noisy.forward(llama, Untuned(llama), batch).which is None


@pytest.mark.parametrize("reach", [(None, None), (7, None), (None, 16)])
def test_branches_meet_a_long_trunk_in_one_block(reach, monkeypatch):
    """Values and gradients of attention where branches of two depths share blocks; fewer keys are copied."""
    monkeypatch.setattr(attention_plan, "QUERIES", 24)
    monkeypatch.setattr(attention_plan, "WHOLE", 8)
    trunk, rows = zoo.tokens(60, 1), []
    for k in range(6):
        rows.append((trunk + zoo.tokens(2 + k, 20 + k), [zoo.tokens(3, 40 + k), zoo.tokens(2, 60 + k)]))
    layout = lay_out(encoded(*rows), width=10**6, merge=True)
    how = attention_plan.plan(layout, torch.float32, *reach)
    if reach == (None, None):
        below = [int((g.queries[i] >= 60).any()) for g in how.groups for i in range(len(g.queries))]
        assert sum(below) <= 5  # of 18 pieces behind the trunk
    g = torch.Generator().manual_seed(0)
    w = layout.source.shape[1]
    inputs = [torch.randn(1, h, w, 8, generator=g).requires_grad_() for h in (6, 2, 2)]
    weight = torch.randn(1, w, 6, 8, generator=g)
    got, want = attention.attend(*inputs, how, 0.3), attention.plain(*inputs, how, 0.3)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    for a, b in zip(
        torch.autograd.grad((got * weight).sum(), inputs),
        torch.autograd.grad((want * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
