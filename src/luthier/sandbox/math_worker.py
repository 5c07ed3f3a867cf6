"""The process in which mathematical answers are compared: it can be killed, which a thread cannot.

Simplifying what a model wrote may take for ever or all memory (9**9**9**9), inside calls that never look at a
signal. Reads a JSON list [gold, text] a line; writes true, false, or null (gold is not mathematics) a line.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
from functools import lru_cache


def serve(memory_mb: int) -> None:
    """Answer until standard input ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no answer
    logging.disable(logging.CRITICAL)
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    kinds = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]

    def parsed(text: str) -> list:
        # None sets no alarm: documented by math_verify, whose annotation leaves it out
        return parse(text, kinds, parsing_timeout=None)  # pyright: ignore[reportArgumentType]

    @lru_cache(maxsize=64)
    def read(gold: str) -> list:
        # bare LaTeX is only recognized between dollars
        marked = "$" in gold or "\\boxed" in gold
        return (marked and parsed(gold)) or parsed(f"${gold}$")

    resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        gold, text = json.loads(line)
        try:
            right = read(gold)
            answer = parsed(text)
            verdict = None
            if right:
                verdict = text.strip() == gold.strip() or verify(right, answer, timeout_seconds=None)
        except (Exception, RecursionError, MemoryError):
            verdict = False
        print(json.dumps(verdict), file=answers, flush=True)
