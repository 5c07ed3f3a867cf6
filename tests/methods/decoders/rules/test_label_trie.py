"""label_trie: whatever a model writes are labels of the list, none twice; free decoding does both wrong."""

from __future__ import annotations

import pytest
import torch

from helpers.models import make_tokenizer
from luthier.errors import RecipeError
from luthier.registry import build

LABELS = ["bank", "banking", "bakery", "steel", "ban"]


class Texts:
    """What a decoder needs of a renderer."""

    tokenizer = make_tokenizer()
    stop_ids = (tokenizer.eos_token_id,)


def written(adjust, rng: torch.Generator, most: int = 80) -> str:
    """The likeliest token of random logits, one after another until the end."""
    response: list[int] = []
    while len(response) < most:
        logits = torch.randn(1, 262, generator=rng)
        token = int(adjust(logits, [[]], [response]).argmax())
        if token in Texts.stop_ids:
            break
        response.append(token)
    return Texts.tokenizer.decode(response)


def valid(text: str) -> bool:
    names = text.removeprefix(" ").split(", ")
    return text.startswith(" ") and set(names) <= {*LABELS} and len({*names}) == len(names)


def test_no_label_is_invented_or_written_twice():
    rng, seen, lengths = torch.Generator().manual_seed(0), set(), set()
    adjust = build("decoder", {"name": "label_trie", "labels": LABELS}).begin(Texts)
    for _ in range(1000):
        text = written(adjust, rng)
        assert valid(text), text
        names = text.removeprefix(" ").split(", ")
        seen |= {*names}
        lengths.add(len(names))
    assert seen == {*LABELS} and lengths == {1, 2, 3, 4, 5}  # nothing that is allowed is out of reach
    free = [written(lambda logits, prompts, responses: logits, rng, 20) for _ in range(50)]
    assert not any(map(valid, free))


def test_where_it_may_be_free_the_model_decides():
    """Behind `ban` three labels go on, another begins, or the answer ends; their logits stay as they were."""
    adjust = build("decoder", {"name": "label_trie", "labels": LABELS}).begin(Texts)
    response = Texts.tokenizer.encode(" ban", add_special_tokens=False)
    logits = torch.randn(1, 262, generator=torch.Generator().manual_seed(1))
    own = adjust(logits.clone(), [[]], [response])[0]
    allowed = own.isfinite().nonzero()[:, 0].tolist()
    following = {Texts.tokenizer.encode(t, add_special_tokens=False)[0] for t in ("k", ", ")}
    assert {*allowed} == following | {*Texts.stop_ids}
    assert torch.equal(own[allowed], logits[0, allowed])


def test_no_more_labels_than_are_wanted():
    rng = torch.Generator().manual_seed(2)
    adjust = build("decoder", {"name": "label_trie", "labels": LABELS, "max_labels": 2}).begin(Texts)
    lengths = {len(written(adjust, rng).split(", ")) for _ in range(60)}
    assert lengths == {1, 2}


@pytest.mark.parametrize(
    "settings",
    [{"labels": []}, {"labels": ["a", "a"]}, {"labels": ["a, b"]}, {"labels": ["a"], "separator": " "}],
)
def test_labels_that_cannot_be_told_apart_are_refused(settings):
    with pytest.raises(RecipeError, match="label_trie"):
        build("decoder", {"name": "label_trie", **settings})
