"""Small Python functions from a comment, with unit tests. An item is the sequence of operations."""

from random import Random

from ._sample import sample

SHARE = 0.09
SPLITS = {
    "train": {"list": 0.75, "number": 0.25},
    "validation": {"list": 1},
    "test": {"list": 1},
    "ood": {"long_list": 1},
}
OPERATIONS = {
    "add {k} to each": "[v + {k} for v in x]",
    "multiply each by {k}": "[v * {k} for v in x]",
    "keep those above {k}": "[v for v in x if v > {k}]",
    "keep the even ones": "[v for v in x if v % 2 == 0]",
    "keep the odd ones": "[v for v in x if v % 2 == 1]",
    "reverse the list": "x[::-1]",
    "sort the list": "sorted(x)",
    "drop the first {k}": "x[{k}:]",
    "take the first {k}": "x[:{k}]",
    "square each": "[v * v for v in x]",
    "remove duplicates": "list(dict.fromkeys(x))",
    "negate each": "[-v for v in x]",
}
RETURNS = {
    "return the list": "x",
    "return the sum": "sum(x)",
    "return the length": "len(x)",
    "return the largest": "max(x + [0])",
}
LISTS = [[3, 1, 4, 1, 5], [2, 2, 9, -4, 6, 6, 12], [8]]
NUMBERS = [0, 2, 11]


def _function(expression: str):
    """Our own expression as a function of x and k, made once: rows get their expected values without exec."""
    return eval(f"lambda x, k: {expression.replace('{k}', 'k')}")  # noqa: S307


_RUN = {words: _function(expression) for words, expression in (OPERATIONS | RETURNS).items()}


def draw(random: Random, kind: str) -> dict:
    if kind == "number":
        return _number_row(random.randint(2, 20), random.choice("+-"), random.randint(1, 50))
    count = 4 if kind == "long_list" else random.choice((1, 2, 2, 3))
    steps = [(random.choice(list(OPERATIONS)), random.randint(1, 5)) for _ in range(count)]
    return _list_row(steps, random.choice(list(RETURNS)))


def _number_row(factor: int, sign: str, term: int) -> dict:
    words = f"multiply x by {factor}, then {'add' if sign == '+' else 'subtract'} {term}"
    tests = [f"assert f({x}) == {x * factor + (term if sign == '+' else -term)}" for x in NUMBERS]
    return _row(words, f"\n    return x * {factor} {sign} {term}", tests, words)


def _list_row(steps: list[tuple[str, int]], ending: str) -> dict:
    words = ", then ".join([words.format(k=k) for words, k in steps] + [ending])
    lines = [f"x = {OPERATIONS[words].format(k=k)}" for words, k in steps] + [f"return {RETURNS[ending]}"]
    tests = []
    for given in LISTS:
        value = given
        for step, k in steps:
            value = _RUN[step](value, k)
        tests.append(f"assert f({given}) == {_RUN[ending](value, 0)}")
    item = ", ".join([words for words, _ in steps] + [ending])
    return _row(words, "".join(f"\n    {line}" for line in lines), tests, item)


def _row(words: str, body: str, tests: list[str], item: str) -> dict:
    return {"prompt": f"# {words}\ndef f(x):", "completion": body, "tests": tests, "item": item}


def rows(split: str, n: int, seed: int | str = 0) -> list[dict]:
    return sample(__name__, SPLITS, draw, split, n, seed)
