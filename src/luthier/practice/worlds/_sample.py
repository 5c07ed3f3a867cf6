"""What every world shares: how a row is drawn, and which split its underlying item belongs to.

A world is one file with four names:

    SHARE                      its share of the pretraining tokens
    SPLITS                     {split: {kind: weight}}: which kinds of row a split is made of
    draw(random, kind)         one row as a dict (prompt, completion, answer, item, ...), of any split
    rows(split, n, seed=0)     n rows of a split; nearly always `sample(...)` below

`row["item"]` names what the row is about, canonically: one or more atoms joined by ";" (`17+25;42-30`).
The bucket of an item decides its split, whatever world and wording it occurs in, so a sum held out in
arithmetic is held out in word problems and in chat too.
"""

from collections.abc import Callable, Mapping
from random import Random
from zlib import crc32

# Each split draws its items from one bucket. "new" and "new_test" hold what no pretraining row mentions; "preference"
# has a better and a worse completion of each prompt, "unpaired" one completion with a label, good or bad.
BUCKET_OF_SPLIT = {
    "train": "train",
    "validation": "validation",
    "test": "test",
    "ood": "ood",
    "new": "train",
    "new_test": "test",
    "preference": "train",
    "preference_test": "test",
    "unpaired": "train",
    "unpaired_test": "test",
}
_HELD_OUT = {0: "validation", 1: "test", 2: "ood"}  # of 20: 5 % of all atoms each


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
    wanted = BUCKET_OF_SPLIT[split]
    found: list[dict] = []
    while len(found) < n:
        kind = kinds[0] if len(kinds) == 1 else random.choices(kinds, weights)[0]
        row = draw(random, kind)
        while bucket(row["item"]) != wanted:
            row = draw(random, kind)
        found.append({"id": f"{world}/{split}/{seed}/{len(found)}", "kind": kind, **row})
    return found


def check_split(world: str, splits: Mapping, split: str) -> None:
    if split not in splits:
        raise ValueError(f"world {world!r} has no split {split!r}; it has {', '.join(splits)}")
