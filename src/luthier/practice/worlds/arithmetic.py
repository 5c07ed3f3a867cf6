"""Sums: digit by digit with the steps written out ("worked"), or the result alone ("direct").

Graded: two and three digits worked and two digits direct are common in pretraining; three digits direct are
rare
(so the base model gets some of them); four digits worked are out of distribution; products are for tuning.
"""

from random import Random

from ._sample import sample, sum_atom

SHARE = 0.22
_KINDS = {"worked": 0.38, "direct": 0.47, "direct_long": 0.15}
SPLITS = {
    "train": _KINDS,
    "validation": _KINDS,
    "test": _KINDS,
    "ood": {"worked_long": 1},
    "new": {"product": 1},
    "new_test": {"product": 1},
}
_DIGITS = {"direct": [(2, 2)], "direct_long": [(3, 3)], "worked_long": [(4, 4)]}
_DIGITS["worked"] = [(2, 2), (3, 2), (2, 3), (3, 3), (3, 3)]


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


def work_product(a: int, b: int) -> tuple[str, int]:
    """The steps of a times a one-digit b, with what is carried, and the result."""
    steps, carry = [], 0
    for x in map(int, reversed(str(a))):
        total = x * b + carry
        steps.append(f"{x}*{b}+{carry}={total}" if carry else f"{x}*{b}={total}")
        carry = total // 10
    return "; ".join(steps), a * b


def draw(random: Random, kind: str) -> dict:
    if kind == "product":
        a, b = random.randint(10, 999), random.randint(2, 9)
        steps, result = work_product(a, b)
        return _worked(f"{a}*{b}", steps, result, f"{a}*{b}")
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


def _worked(question: str, steps: str, result: int, item: str) -> dict:
    return {
        "prompt": f"Compute {question}:",
        "completion": f" {steps}; so {result}",
        "answer": str(result),
        "item": item,
    }


def rows(split: str, n: int, seed: int | str = 0) -> list[dict]:
    return sample(__name__, SPLITS, draw, split, n, seed)
