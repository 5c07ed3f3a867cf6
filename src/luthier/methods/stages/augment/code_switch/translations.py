"""Learns a word dictionary between two languages from monolingual texts, without any given word pairs.

Word vectors of both languages are aligned by a rotation (VecMap, arXiv:1805.06297): starting from seeds, the
rotation that fits the pairs best and the pairs that are nearest under it are computed in turn, until nothing
improves. Departs: vectors are the leading factors of positive pointwise mutual information, which word2vec
approximates (Levy and Goldberg 2014) and which need no training; VecMap's last reweighting is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Pairs = tuple[Tensor, Tensor]  # places of words that mean the same, in either language


def frequent(texts: Sequence[Sequence[str]], least: int, most: int) -> list[str]:
    """The words that stand at least so often, the most frequent first."""
    counts = Counter(w for text in texts for w in text)
    return sorted((w for w, n in counts.items() if n >= least), key=lambda w: (-counts[w], w))[:most]


def vectors(
    texts: Sequence[Sequence[str]], words: Sequence[str], width: int, window: int, rng: torch.Generator
) -> Tensor:
    """[V, width] a vector for each word, from the words that stand within `window` of it (near ones count
    more).
    """
    place = {w: i for i, w in enumerate(words)}
    beside: Counter[tuple[int, int]] = Counter()
    for text in texts:
        ids = [place.get(w, -1) for w in text]
        for d in range(1, window + 1):
            beside.update(
                (a, b)
                for a, b in zip(ids, ids[d:], strict=False)
                if a >= 0 and b >= 0
                for _ in range(window + 1 - d)
            )
    n = len(words)
    counts = torch.zeros(n, n, dtype=torch.float64)
    if beside:
        at = torch.tensor(list(beside))
        counts[at[:, 0], at[:, 1]] = torch.tensor([float(v) for v in beside.values()], dtype=torch.float64)
    counts = counts + counts.T
    share = counts.sum(1) / counts.sum().clamp(min=1)
    # frequent contexts say less
    expected = (share[:, None] * share.pow(0.75) / share.pow(0.75).sum().clamp(min=1e-12)) * counts.sum()
    pmi = torch.where(counts > 0, (counts / expected.clamp(min=1e-12)).log(), 0).clamp(min=0)
    basis = torch.linalg.qr(torch.randn(n, min(n, width + 16), generator=rng, dtype=torch.float64)).Q
    for _ in range(6):  # subspace iteration: the leading left factors
        basis = torch.linalg.qr(pmi @ (pmi.T @ basis)).Q
    U, S, _ = torch.linalg.svd(basis.T @ pmi, full_matrices=False)
    return ((basis @ U) * S.sqrt())[:, :width]


def normal(X: Tensor) -> Tensor:
    """Of length one, centred, and of length one again."""
    X = X / X.norm(dim=1, keepdim=True).clamp(min=1e-9)
    X = X - X.mean(0)
    return X / X.norm(dim=1, keepdim=True).clamp(min=1e-9)


def csls(sims: Tensor, k: int = 10) -> Tensor:
    """Similarities less half of how near each word's k nearest are: words that are near to everything are no
    translation.
    """
    k = min(k, *sims.shape)
    return sims - sims.topk(k, 1).values.mean(1, keepdim=True) / 2 - sims.topk(k, 0).values.mean(0) / 2


def joined(*several: Pairs) -> Pairs:
    return torch.cat([i for i, _ in several]), torch.cat([j for _, j in several])


def both_ways(sims: Tensor) -> Pairs:
    """Each word with the nearest of the other language, asked from both sides."""
    n, m = sims.shape
    return torch.cat([torch.arange(n), sims.argmax(0)]), torch.cat([sims.argmax(1), torch.arange(m)])


def mutual(sims: Tensor) -> Pairs:
    """Words that are each other's nearest."""
    there = sims.argmax(1)
    agreed = sims.argmax(0)[there] == torch.arange(len(there))
    return agreed.nonzero()[:, 0], there[agreed]


def by_shape(X: Tensor, Y: Tensor) -> Pairs:
    """Seeds where nothing is shared: how near all others lie to a word, sorted, is alike for its
    translation.
    """
    n = min(len(X), len(Y))  # the most frequent of both

    def shape(Z: Tensor) -> Tensor:
        U, S, _ = torch.linalg.svd(Z[:n], full_matrices=False)
        return normal(((U * S) @ U.T).sort(1).values)

    return both_ways(csls(shape(X) @ shape(Y).T))


def by_name(a: Sequence[str], b: Sequence[str]) -> Pairs:
    """Seeds that are written alike in both: numerals above all, names."""
    place = {w: i for i, w in enumerate(b)}
    same = [(i, place[w]) for i, w in enumerate(a) if w in place]
    return torch.tensor([i for i, _ in same], dtype=torch.long), torch.tensor(
        [j for _, j in same], dtype=torch.long
    )


def by_pairs(a: Sequence[Sequence[str]], b: Sequence[Sequence[str]], words: Sequence[Sequence[str]]) -> Pairs:
    """Seeds where the i-th text of one side translates the i-th of the other: words that stand in the same
    pairs.
    """

    def where(texts: Sequence[Sequence[str]], own: Sequence[str]) -> Tensor:
        place, matrix = (
            {w: i for i, w in enumerate(own)},
            torch.zeros(len(own), len(texts), dtype=torch.float64),
        )
        for t, text in enumerate(texts):
            for w in text:
                if w in place:
                    matrix[place[w], t] = 1.0
        return matrix / matrix.norm(dim=1, keepdim=True)

    return mutual(where(a, words[0]) @ where(b, words[1]).T)


def rotation(X: Tensor, Y: Tensor) -> Tensor:
    """The orthogonal W for which X W is nearest to Y."""
    U, _, V = torch.linalg.svd(X.T @ Y)
    return U @ V


def mapped(
    X: Tensor, Y: Tensor, start: Pairs, stay: Pairs, keep: float, rng: torch.Generator
) -> tuple[Tensor, float]:
    """[V, V'] how near each word of one side comes to each of the other; and how near the nearest, on
    average.

    start: pairs of words at first. stay: pairs that are always among them. keep: share of the similarities
    that is seen at first, the rest is left out at random.
    """
    best, best_sims, stuck, pairs = -torch.inf, X @ Y.T, 0, start
    for _ in range(500):
        sims = csls(X @ rotation(X[pairs[0]], Y[pairs[1]]) @ Y.T)
        score = float(sims.amax(1).mean() + sims.amax(0).mean()) / 2
        if score > best + 1e-6:
            best, best_sims, stuck = score, sims, 0
        elif stuck < 5:
            stuck += 1
        elif keep >= 1:
            break
        else:
            keep, stuck = min(1.0, 2 * keep), 0
        visible = (
            sims if keep >= 1 else torch.where(torch.rand(sims.shape, generator=rng) < keep, sims, -torch.inf)
        )
        pairs = joined(both_ways(visible), stay)
    return best_sims, best


def learned(
    a: Sequence[Sequence[str]],
    b: Sequence[Sequence[str]],
    rng: Callable[..., torch.Generator],
    pairs: bool = False,
    k: int = 3,
    width: int = 100,
    window: int = 5,
    least: int = 1,
    most: int = 5000,
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Texts of two languages as lists of words -> the k likeliest translations of each word, both ways.

    Seeds are words that are written alike in both and, where texts are pairs, words that stand in the same
    ones; where there are fewer than five, the shape of similarities. Of texts that are no pairs few factors
    are aligned first, then twice as many: what further factors of few words say is noise, and only pairs
    share it.
    """
    words = [frequent(texts, least, most) for texts in (a, b)]
    fewest = min(map(len, words))
    if fewest < 2:
        return {}, {}
    widths = (
        [min(width, fewest)]
        if pairs
        else sorted({min(width, max(2, fewest // 6)), min(width, max(2, fewest // 3))})
    )
    X, Y = (
        vectors(t, w, widths[-1], window, rng("words", side))
        for t, w, side in zip((a, b), words, "ab", strict=True)
    )
    seeds = joined(by_name(*words), *([by_pairs(a, b, words)] if pairs else []))
    seeded = len(seeds[0]) >= min(5, fewest)
    tries = []
    for keep in (1.0,) if seeded else (1.0, 0.3, 0.1):
        start, mapping = seeds if seeded else by_shape(normal(X), normal(Y)), (X @ Y.T, 0.0)
        for n in widths:
            mapping = mapped(normal(X[:, :n]), normal(Y[:, :n]), start, seeds, keep, rng("pairs", keep, n))
            start = joined(both_ways(mapping[0]), seeds)
        tries.append(mapping)
    sims = max(tries, key=lambda t: t[1])[0]

    def near(S: Tensor, own: list[str], other: list[str]) -> dict[str, list[str]]:
        top = S.topk(min(k, S.shape[1]), 1).indices.tolist()
        return {w: [other[j] for j in js] for w, js in zip(own, top, strict=True)}

    return near(sims, words[0], words[1]), near(sims.T, words[1], words[0])
