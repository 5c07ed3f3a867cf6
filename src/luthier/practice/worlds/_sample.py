"""What every world shares: how a row is drawn, and which split its underlying item belongs to.

A world is one file with five names:

    SHARE                      its share of the pretraining tokens
    SPLITS                     {split: {kind: weight}}: which kinds of row a split is made of
    draw(random, kind)         one row as a dict (prompt, completion, answer, item, ...), of any split
    rows(split, n, seed=0)     n rows of a split; nearly always `sample(...)` below
    verify(row, answer)        how right a written answer is: 1.0 for the row's own completion, below 1.0 for a wrong
                               one; or several such numbers by name, where a world has several objectives

`row["item"]` names what the row is about, canonically: one or more atoms joined by ";" (`17+25;42-30`).
The bucket of an item decides its split, whatever world and wording it occurs in, so a sum held out in
arithmetic is held out in word problems and in chat too.
"""

from collections.abc import Callable, Mapping
from zlib import crc32

from ._random import Random

_HELD_OUT = {0: "validation", 1: "test", 2: "ood"}  # of 20: 5 % of all atoms each


def bucket_of_split(split: str) -> str:
    """The bucket a split draws its items from. "train" is what pretraining reads; other splits that teach share its bucket."""
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
    world: str,
    splits: Mapping[str, Mapping[str, float]],
    draw: Callable[[Random, str], dict],
    split: str,
    n: int,
    seed: int | str = 0,
) -> list[dict]:
    """Draw n rows of a split: kinds by weight, items of other buckets refused. Same arguments, same rows."""
    world = world.rpartition(".")[2]
    check_split(world, splits, split)
    random = Random(f"{world}/{split}/{seed}")
    kinds, weights = list(splits[split]), list(splits[split].values())
    wanted = bucket_of_split(split)
    found: list[dict] = []
    while len(found) < n:
        kind = kinds[0] if len(kinds) == 1 else random.choices(kinds, weights)[0]
        row = draw(random, kind)
        while bucket(row["item"]) != wanted:
            row = draw(random, kind)
        found.append({"id": f"{world}/{split}/{seed}/{len(found)}", "kind": kind, **row})
    return found


def check_split(world: str, splits: Mapping, split: str) -> None:
    """Refuse a split that is not there, with the one that was probably meant."""
    if split not in splits:
        from luthier.method import meant

        near = meant(split, splits).removesuffix("?")
        raise ValueError(f"world {world!r} has no split {split!r}{near if 'mean' in near else ''}; it has {', '.join(splits)}")


def same_text(row: dict, answer: str) -> float:
    """1.0 where an answer is the row's completion, but for blanks around it."""
    return float(answer.strip() == gold(row).strip())


def gold(row: dict) -> str:
    """The right completion of a row as the worlds give it, or as it was read (`completions`, the best first)."""
    if "clean" in row:
        return row["clean"]
    return row["completion"] if "completion" in row else row["completions"][0]
