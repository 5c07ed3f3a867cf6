"""extract_method: no program, no new function, a new function that is called."""

from __future__ import annotations

from luthier.registry import build

SOURCE = "def f(x):\n    y = x + 1\n    return y * 2\n"
EXTRACTED = "def g(x):\n    return x + 1\n\ndef f(x):\n    return g(x) * 2\n"
METHOD = "class A:\n    def g(self):\n        return 1\n    def f(self):\n        return self.g()\n"


def test_minus_one_zero_and_one():
    texts = [
        "def f(x:",
        "",
        SOURCE,
        "def g(x):\n    return x\n\ndef f(x):\n    return x\n",
        "def g(x):\n    return g(x - 1)\n\ndef f(x):\n    return x\n",
        EXTRACTED,
        f"```python\n{EXTRACTED}```",
        METHOD,
    ]
    scores = build("reward", "extract_method").scores({"id": "r", "source": SOURCE}, texts)
    assert scores == [-1.0, -1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
