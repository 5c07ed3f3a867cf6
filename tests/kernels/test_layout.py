"""layout: a token sees its own sequence and nothing else; packing wastes little and shares prompts; views
ask the same of other tokens.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from helpers import zoo
from helpers.kernels import seen, token_at
from luthier.model.layout import lay_out


@pytest.mark.parametrize("virtual", [0, 3])
@pytest.mark.parametrize("share,width", [(True, 10**6), (True, 16), (False, 24), (False, 0), (True, 0)])
@pytest.mark.parametrize("make", [zoo.rows, zoo.deep])
def test_a_token_sees_its_own_sequence_and_nothing_else(make, share, width, virtual):
    batch = make()
    layout = lay_out(batch, share=share, width=width, virtual=virtual)
    pieces, parents = batch.segments(), batch.parent.tolist()
    found = seen(batch, layout)
    narrow, blocks = seen(batch, layout, window=3), seen(batch, layout, chunk=4)
    assert sorted(found) == list(range(len(batch.ids)))
    for s in range(len(parents)):
        way = [s]
        while parents[way[0]] >= 0:
            way.insert(0, parents[way[0]])
        line = [-1 - k for k in range(virtual)] + [t for p in way for t in pieces[p].tolist()]
        for token in pieces[s].tolist():
            here = line.index(token)
            want = [(t, k) for k, t in enumerate(line[: here + 1])]
            assert all(row == want for row in found[token])
            assert all(row == want[-3:] for row in narrow[token])
            assert all(row == [x for x in want if x[1] // 4 == here // 4] for row in blocks[token])
            place = int(layout.at[token])
            if here == 0:
                assert place == -1
            else:
                r, w = divmod(place, layout.source.shape[1])
                assert token_at(layout, r, w) == line[here - 1] and int(layout.position[r, w]) == here - 1


def test_packing_wastes_little_and_shares_prompts():
    batch = zoo.rows()
    packed = lay_out(batch, width=10**6)
    assert packed.source.shape == (1, len(batch.ids))  # every token once, no padding
    own = lay_out(batch, share=False, width=10**6)
    # prompts of 5 and 9 tokens again for their further completions
    assert own.source.shape[1] == len(batch.ids) + 2 * 5 + 9
    padded = lay_out(batch, share=False)
    assert len(padded.source) == len(batch.completion)
    assert all(len(set(p[p >= 0].tolist())) == 2 for p in padded.piece)


def test_views_ask_the_same_of_other_tokens():
    batch = zoo.rows()
    other = batch.view(ids=batch.ids.flip(0))
    assert torch.equal(lay_out(batch).at, lay_out(other).at) and other.read == {}
    assert torch.equal(replace(other, ids=batch.ids).labels, batch.labels)
