"""How much of a reference a free text has in common with it: chrF and ROUGE-L, and whether answers are free
texts at all.

chrF (Popovic 2015) as sacreBLEU computes it of one sentence: n-grams of 1 to 6 characters without spaces,
recall counting four times precision (beta 2). ROUGE-L (Lin 2004): the F measure of the longest common
subsequence of words, without stemming, as rouge-score computes it of English; letters with accents belong to
words here. Both lie between 0 and 1.
"""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter
from collections.abc import Sequence

ORDERS = 6  # longest n-gram of chrF, in characters
RECALL = 4.0  # beta squared
SHORT = 6  # words: answers of which half are no longer are short
WORD = re.compile(r"\w+")


def is_closed(references: Sequence[str]) -> bool:
    """Whether answers can be judged right or wrong: most are short or JSON, or few different ones recur."""
    if not references:
        return False
    words = statistics.median(len(text.split()) for text in references)
    recurring = len(references) > 2 and 2 * len(set(references)) <= len(references)
    structured = 2 * sum(map(_is_json, references)) > len(references)
    return words <= SHORT or recurring or structured


def _is_json(text: str) -> bool:
    """Whether a text is a JSON object or list."""
    try:
        return isinstance(json.loads(text), (dict, list))
    except (ValueError, RecursionError):
        return False


def chrf(answer: str, reference: str) -> float:
    """chrF of one text, from 0 to 1."""
    answer, reference = "".join(answer.split()), "".join(reference.split())
    precision = recall = 0.0
    orders = 0
    for n in range(1, ORDERS + 1):
        ours, theirs = _ngrams(answer, n), _ngrams(reference, n)
        if not ours or not theirs:
            break  # neither has longer ones
        common = sum((ours & theirs).values())
        precision += common / sum(ours.values())
        recall += common / sum(theirs.values())
        orders += 1
    if not precision + recall:
        return 0.0
    precision, recall = precision / orders, recall / orders
    return (1 + RECALL) * precision * recall / (RECALL * precision + recall)


def _ngrams(text: str, n: int) -> Counter[str]:
    return Counter(text[i : i + n] for i in range(len(text) - n + 1))


def rouge_l(answer: str, reference: str) -> float:
    """F measure of the longest common subsequence of words, from 0 to 1."""
    ours, theirs = WORD.findall(answer.lower()), WORD.findall(reference.lower())
    common = _longest_common(ours, theirs)
    if not common:
        return 0.0
    precision, recall = common / len(ours), common / len(theirs)
    return 2 * precision * recall / (precision + recall)


def _longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            above = row[j]
            row[j] = diagonal + 1 if word == other else max(above, row[j - 1])
            diagonal = above
    return row[-1]
