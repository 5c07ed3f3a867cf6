"""Sums: digit by digit with the steps written out ("worked"), or the result alone ("direct").

Graded: two and three digits worked and two digits direct are common in pretraining; three digits direct and
chains of three numbers are rare (so the base model gets some of them); four digits worked are out of
distribution.

Products are for tuning ("new"); so are products whose steps are spoiled, as in "Understanding the Effect of
Noise in LLM Training Data with Algorithmic Chains of Thought": in "static_noise" characters of the finished
steps are replaced and the result stays right; in "dynamic_noise" a value is wrong when it is computed, and
all that follows is computed from it, the result too. Such rows keep the right text under "clean". Their test
is "new_test".
"""

from ._random import Random
from ._sample import join_atoms, sample, sum_atom

SHARE = 0.15
_KINDS = {"worked": 0.36, "direct": 0.41, "direct_long": 0.14, "chain": 0.09}
SPLITS = {
    "train": _KINDS,
    "validation": _KINDS,
    "test": _KINDS,
    "ood": {"worked_long": 1},
    "new": {"product": 1},
    "new_test": {"product": 1},
    "static_noise": {"static": 1},
    "dynamic_noise": {"dynamic": 1},
}
_DIGITS = {"direct": [(2, 2)], "direct_long": [(3, 3)], "worked_long": [(4, 4)]}
_DIGITS["worked"] = [(2, 2), (3, 2), (2, 3), (3, 3), (3, 3)]
NOISE = 0.3  # how probably each item of a noisy row is spoiled: a character, or a computed value


def _operand(random: Random, digits: int) -> int:
    return random.randint(10 ** (digits - 1), 10**digits - 1)


def work_sum(a: int, sign: str, b: int) -> tuple[str, int]:
    """The steps of a+b or a-b from the last digit on, with what is carried, and the result."""
    steps, result, carry, place = [], 0, 0, 1
    while place <= max(a, b):
        x, y = a // place % 10, b // place % 10
        carried = f"{sign}1" if carry else ""
        if sign == "+":
            total = x + y + carry
            carry, digit = divmod(total, 10)
        else:
            borrow = int(x < y + carry)
            x += 10 * borrow
            total = digit = x - y - carry
            carry = borrow
        steps.append(f"{x}{sign}{y}{carried}={total}")
        result += digit * place
        place *= 10
    return "; ".join(steps), result + carry * place


def work_product(a: int, b: int, slip=lambda value: value) -> tuple[str, int]:
    """The steps of a times a one-digit b, with what is carried, and the result. `slip` may alter a computed
    value.
    """
    steps, carry, result, place = [], 0, 0, 1
    for x in map(int, reversed(str(a))):
        total = slip(x * b + carry)
        steps.append(f"{x}*{b}+{carry}={total}" if carry else f"{x}*{b}={total}")
        result += total % 10 * place
        carry, place = total // 10, 10 * place
    return "; ".join(steps), result + carry * place


def static_noise(random: Random, text: str) -> str:
    """Digits of a finished text replaced by others, at least one of them."""
    places = [i for i, c in enumerate(text) if c.isdigit()]
    spoiled = [i for i in places if random.random() < NOISE] or [random.choice(places)]
    characters = list(text)
    for i in spoiled:
        characters[i] = random.choice([c for c in "0123456789" if c != text[i]])
    return "".join(characters)


def dynamic_noise(random: Random, a: int, b: int) -> tuple[str, int]:
    """The steps of a product of which at least one is computed wrong, and the result that follows
    from them.
    """
    while True:
        steps, result = work_product(
            a, b, lambda value: random.randint(0, 81) if random.random() < NOISE else value
        )
        if result != a * b:
            return steps, result


def draw(random: Random, kind: str) -> dict:
    if kind in ("product", "static", "dynamic"):
        return _product(random, kind)
    if kind == "chain":
        return _chain(random)
    digits = random.choice(_DIGITS[kind])
    a, b, sign = _operand(random, digits[0]), _operand(random, digits[1]), random.choice("+-")
    if sign == "-" and b > a:
        a, b = b, a
    atom = sum_atom(a, sign, b)
    if kind.startswith("worked"):
        steps, result = work_sum(a, sign, b)
        return _worked(f"{a}{sign}{b}", steps, result, atom)
    result = str(a + b if sign == "+" else a - b)
    return {"prompt": f"{a}{sign}{b}=", "completion": result, "answer": result, "item": atom}


def _product(random: Random, kind: str) -> dict:
    a, b = random.randint(10, 999), random.randint(2, 9)
    steps, result = work_product(a, b)
    row = _worked(f"{a}*{b}", steps, result, f"{a}*{b}")
    if kind == "product":
        return row
    steps, written = (
        (static_noise(random, steps), result) if kind == "static" else dynamic_noise(random, a, b)
    )
    return {**row, "completion": f" {steps}; so {written}", "clean": row["completion"]}


def _chain(random: Random) -> dict:
    """a+b-c or a-b+c in one go; held out when one of its sums is, or what looks like one."""
    while True:
        a, b, c = (random.randint(10, 50) for _ in range(3))
        first, second = random.choice((("+", "-"), ("-", "+")))
        middle = a + b if first == "+" else a - b
        result = middle - c if second == "-" else middle + c
        if min(middle, result, b - c if second == "-" else 0) >= 0:
            break
    atoms = join_atoms(sum_atom(a, first, b), sum_atom(middle, second, c), sum_atom(b, second, c))
    return {
        "prompt": f"{a}{first}{b}{second}{c}=",
        "completion": str(result),
        "answer": str(result),
        "item": atoms,
    }


def _worked(question: str, steps: str, result: int, item: str) -> dict:
    return {
        "prompt": f"Compute {question}:",
        "completion": f" {steps}; so {result}",
        "answer": str(result),
        "item": item,
    }


def rows(split: str, n: int, seed: int | str = 0) -> list[dict]:
    return sample(__name__, SPLITS, draw, split, n, seed)


def verify_result(row: dict, answer: str) -> float:
    """1.0 where the number after the last "so ", or the only number there, is the row's answer; steps do not
    count.
    """
    result = answer.rpartition("so ")[2] if "so " in answer else answer
    return float(result.strip().rstrip(".") == row["answer"])


verify = verify_result
