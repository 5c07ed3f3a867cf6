"""What every toy task shares: how a row is drawn, and which split its underlying item belongs to.

A task is one file with five names:

    SHARE                      its share of the pretraining tokens
    SPLITS                     {split: {kind: weight}}: which kinds of row a split is made of
    draw(random, kind)         one row as a dict (prompt, completion, answer, item, ...), of any split
    rows(split, n, seed=0)     n rows of a split; nearly always `sample(...)` below
    verify(row, answer)        the score of an answer: 1.0 for the row's own completion, below 1.0 for a wrong
                               one; or several such numbers by name, where a task has several objectives

`row["item"]` names what the row is about, canonically: one or more atoms joined by ";" (`17+25;42-30`).
The bucket of an item decides its split, whatever task and wording it occurs in, so a sum held out in
arithmetic is held out in word problems and in chat too.
"""

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from zlib import crc32

from ._random import Random

_HELD_OUT = {0: "validation", 1: "test", 2: "ood"}  # of 20: 5 % of all atoms each


def bucket_of_split(split: str) -> str:
    """The bucket a split draws its items from. "train" is what pretraining reads; other splits that teach
    share its bucket.
    """
    if split.startswith("ood"):
        return "ood"
    if split == "validation" or split.endswith("_validation"):
        return "validation"
    return "test" if split == "test" or split.endswith("_test") else "train"


def atom_bucket(atom: str) -> str:
    """The bucket of one atom. One that begins with "!" is out of distribution by decree."""
    if atom.startswith("!"):
        return "ood"
    return _HELD_OUT.get(crc32(atom.encode()) % 20, "train")


def bucket(item: str) -> str | None:
    """The bucket of an item: "train" if nothing in it is held out, None if two held-out buckets meet."""
    held_out = {atom_bucket(atom) for atom in item.split(";") if atom} - {"train"}
    if not held_out:
        return "train"
    return held_out.pop() if len(held_out) == 1 else None


def sum_atom(a: int, sign: str, b: int) -> str:
    """The atom of a sum: a+b is b+a. None for one-digit numbers: all other sums are built of theirs."""
    if a < 10 or b < 10:
        return ""
    return f"{min(a, b)}+{max(a, b)}" if sign == "+" else f"{a}{sign}{b}"


def join_atoms(*atoms: str) -> str:
    return ";".join(atom for atom in atoms if atom)


def sample(
    task: str,
    splits: Mapping[str, Mapping[str, float]],
    draw: Callable[[Random, str], dict],
    split: str,
    n: int,
    seed: int | str = 0,
) -> list[dict]:
    """Draw n rows of a split: kinds by weight, items of other buckets refused. Same arguments, same rows."""
    task = task.rpartition(".")[2]
    check_split(task, splits, split)
    random = Random(f"{task}/{split}/{seed}")
    kinds, weights = list(splits[split]), list(splits[split].values())
    split_bucket = bucket_of_split(split)
    rows: list[dict] = []
    while len(rows) < n:
        kind = kinds[0] if len(kinds) == 1 else random.choices(kinds, weights)[0]
        row = draw(random, kind)
        while bucket(row["item"]) != split_bucket:
            row = draw(random, kind)
        rows.append({"kind": kind, **row})
    return signed(rows, task, split, seed)


def signed(rows: list[dict], task: str, split: str, seed: int | str) -> list[dict]:
    """The rows with an id each, and the name of their task, by which its verifier is found."""
    return [{"id": f"{task}/{split}/{seed}/{i}", "task": task, **row} for i, row in enumerate(rows)]


def check_split(task: str, splits: Mapping, split: str) -> None:
    """Refuse a split that is not there, with the one that was probably meant."""
    if split not in splits:
        raise ValueError(
            f"toy task {task!r} has no split {split!r}; it has {', '.join(splits)}{near(split, splits)}"
        )


def near(word: str, choices: Iterable[str]) -> str:
    """'; did you mean ...?' where one of the choices is like a word, else nothing."""
    matches = get_close_matches(word, list(choices), 1, cutoff=0.55)
    return f"; did you mean '{matches[0]}'?" if matches else ""


def same_text(row: dict, answer: str) -> float:
    """1.0 where an answer is the row's, but for blanks around it."""
    return float(answer.strip() == row["answer"].strip())


def slots(row: dict, answer: str) -> float:
    """The share of words in place, of an answer whose words each have one; 1.0 where nothing is wrong,
    missing or added.
    """
    words, right = answer.split(), row["answer"].split()
    return sum(a == b for a, b in zip(words, right, strict=False)) / max(len(words), len(right))
