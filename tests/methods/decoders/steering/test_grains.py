"""grains: scores add up, norms are kept, a preferred token becomes likelier and the other way round."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from helpers.models import make_llama, make_tokenizer
from helpers.stages import make_roles
from luthier.methods.decoders.steering import grains
from luthier.methods.decoders.steering.grains import GrAInS

PROMPT = [20, 21, 22, 23]


@pytest.mark.long
def test_scores_add_up():
    """On a network whose positions keep its norms away from zero."""
    torch.manual_seed(0)
    shape = dict(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2, initializer_range=0.2)
    model = GPT2LMHeadModel(GPT2Config(**shape)).eval()
    scores, (there, zeros) = grains.attribution(model, PROMPT, 30, 31, steps=256)
    assert abs(there - zeros) > 0.1
    assert float(scores.sum()) == pytest.approx(there - zeros, rel=0.01)


def test_norms_are_kept_and_zero_changes_nothing(tiny_roles):
    model = tiny_roles.policy.model
    block = grains.blocks_of(model)[1]
    vector = torch.randn(48, generator=torch.Generator().manual_seed(0))
    plain = block_output(model, block)
    for strength, changed in ((4.0, True), (0.0, False)):
        with grains.steered([block], [vector], strength):
            moved = block_output(model, block)
        torch.testing.assert_close(moved.norm(dim=-1), plain.norm(dim=-1), atol=1e-5, rtol=1e-5)
        assert torch.equal(moved, plain) != changed
    assert torch.equal(block_output(model, block), plain)


@torch.no_grad()
def block_output(model, block):
    """The output of a block, with all hooks before."""
    outputs = []
    hook = block.register_forward_hook(lambda module, inputs, out: outputs.append(out))
    model(input_ids=torch.tensor([PROMPT]), use_cache=False)
    hook.remove()
    return outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]


def rows() -> list[dict]:
    """`a` is always preferred; one word of the prompt speaks for it, another against it."""
    out = []
    for i in range(8):
        out.append({"prompt": f"yes {i}", "chosen": "a", "rejected": "b"})
        out.append({"prompt": f"no {i}", "chosen": "a", "rejected": "b"})
    return out


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Roles of a model that has learned to say a after yes, and b after no."""
    model, tokenizer = make_llama(num_hidden_layers=2), make_tokenizer()
    texts = [f"{word} {i}" + "ab"[word == "no"] for word in ("yes", "no") for i in range(8)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(25):
        loss = torch.tensor(0.0)
        for word in (0, 8):
            ids = torch.tensor([tokenizer.encode(text) for text in texts[word : word + 8]])
            logits = model(input_ids=ids).logits[:, -2]
            loss = loss + torch.nn.functional.cross_entropy(logits, ids[:, -1])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("planted")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return make_roles(str(folder))


@pytest.mark.slow
def test_the_preferred_token_becomes_likelier(planted):
    """On other prompts than those of the rows; with the sign turned, less likely."""
    tokenizer, model = planted.renderer.tokenizer, planted.policy.model
    blocks = [grains.blocks_of(model)[1]]
    decoder = GrAInS(data=rows(), n=16, k=2, steps=16)
    vectors = decoder.vectors(planted, blocks)
    (a, b), prompts = tokenizer.encode("ab"), ["maybe 9", "no 9", "yes 9"]

    @torch.no_grad()
    def preference(strength: float) -> float:
        total = 0.0
        for prompt in prompts:
            with grains.steered(blocks, vectors, strength):
                logits = model(input_ids=torch.tensor([tokenizer.encode(prompt)])).logits[0, -1]
            total += float(logits[a] - logits[b])
        return total

    assert preference(2.0) > preference(0.0) > preference(-2.0)


def test_generates_and_leaves_no_hook(tiny_roles):
    how = {"seeds": [0], "max_new_tokens": 4, "temperature": 0.0, "stop": [1]}
    plain = tiny_roles.policy.generate([PROMPT], **how)
    still = GrAInS(data=rows(), n=2, strength=0.0, steps=2)
    assert still.generate(tiny_roles, [{}], [PROMPT], **how) == plain
    GrAInS(data=rows(), n=2, strength=50.0, steps=2).generate(tiny_roles, [{}], [PROMPT], **how)
    assert tiny_roles.policy.generate([PROMPT], **how) == plain
