"""emulated_fine_tuning: what cancels, the nucleus, and speculative sampling."""

from __future__ import annotations

import pytest
import torch

from helpers.models import make_llama, make_tokenizer
from luthier.methods.decoders.arithmetic.emulated_fine_tuning import EmulatedFineTuning

PROMPTS = [[20, 21, 22], [30, 31, 32, 33, 34]]
HOW = {"seeds": [1, 2], "max_new_tokens": 6, "temperature": 1.0, "stop": [1]}


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> list[str]:
    """Two models that say one of a few tokens."""
    folders = []
    for seed in (1, 2):
        folder = tmp_path_factory.mktemp("few")
        model = make_llama(seed=seed, num_hidden_layers=1, tie_word_embeddings=False)
        with torch.no_grad():
            model.lm_head.weight[8:] = 0
            model.lm_head.weight[:8] *= 3
        model.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        folders.append(str(folder))
    return folders


def logits(n: int = 3, *shape: int):
    return list(torch.randn(n, *(shape or (4, 6)), generator=torch.Generator().manual_seed(0)).double())


def test_what_cancels():
    policy, tuned, base = logits()
    same = EmulatedFineTuning(base="x").combine([base, tuned, base])
    torch.testing.assert_close(same.softmax(-1), tuned.softmax(-1), atol=1e-6, rtol=0)
    off = EmulatedFineTuning(base="x", beta=0.0).combine([policy, tuned, base])
    torch.testing.assert_close(off.softmax(-1), policy.softmax(-1), atol=1e-6, rtol=0)


def test_several_pairs_are_weighed():
    policy, one, other, base = logits(4)
    decoder = EmulatedFineTuning(tuned={"one": 0.3, "other": 0.7}, base="x")
    moved = decoder.combine([policy, one, base, other, base]).softmax(-1)
    expected = (policy + 0.3 * (one - base) + 0.7 * (other - base)).softmax(-1)
    torch.testing.assert_close(moved, expected, atol=1e-6, rtol=0)


def test_tokens_outside_the_nucleus():
    """They keep the policy's value, but for the tuned model's best."""
    policy, tuned, base = (one.log_softmax(-1) for one in logits())
    moved = EmulatedFineTuning(base="x", top_p=0.5).combine([policy, tuned, base])
    for row in range(len(policy)):
        total, nucleus = 0.0, set()
        for token in policy[row].argsort(descending=True).tolist():
            if total < 0.5:
                nucleus.add(token)
            total += float(policy[row, token].exp())
        for token in range(policy.shape[1]):
            ratio = tuned[row, token] - base[row, token]
            inside = token in nucleus or token == int(tuned[row].argmax())
            expected = policy[row, token] + (ratio if inside else 0.0)
            assert float(moved[row, token]) == pytest.approx(float(expected), abs=1e-9)


def test_greedy_with_a_draft_is_greedy(tiny_roles, tiny, few):
    plain = EmulatedFineTuning(tuned=few[0], base=few[1], beta=0.6)
    how = {**HOW, "temperature": 0.0}
    ahead = EmulatedFineTuning(tuned=few[0], base=few[1], beta=0.6, draft=3)
    assert ahead.generate(tiny_roles, [{}, {}], PROMPTS, **how) == plain.generate(
        tiny_roles, [{}, {}], PROMPTS, **how
    )


@pytest.mark.long
def test_speculative_sampling_has_the_same_distribution(tiny_roles, few):
    """Two tokens, drawn many times: chi-square of the pairs of plain and of speculative samples."""
    counts = []
    for draft, n in ((0, 1200), (2, 600)):
        decoder = EmulatedFineTuning(tuned=few[0], base=few[1], beta=1.0, draft=draft)
        how = {"seeds": [3], "n": n, "max_new_tokens": 2, "temperature": 0.5, "stop": [1]}
        (texts,) = decoder.generate(tiny_roles, [{}], PROMPTS[:1], **how)
        tally: dict[tuple, int] = {}
        for text in texts:
            tally[tuple(text)] = tally.get(tuple(text), 0) + 1
        counts.append(tally)
    plain, ahead = counts
    common = sorted(plain, key=plain.__getitem__, reverse=True)[:12]
    table = [[tally.get(text, 0) for text in common] for tally in counts]
    for tally, row in zip(counts, table, strict=True):
        row.append(sum(tally.values()) - sum(row))
    from scipy.stats import chi2_contingency

    assert chi2_contingency(torch.tensor(table).numpy() + 1e-9).pvalue > 1e-3
