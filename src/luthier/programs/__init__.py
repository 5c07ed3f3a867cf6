"""Programs of prompts, and their tuning: demonstrations, instructions, and the weights of the models behind
them.

A program is Python code with predictors in it; a compiler tunes it from rows and a metric. Any workflow of
Python functions can be tuned by textual feedback on its outcome, too: `node`, `bundle` and `optoprime`.
"""

from luthier.programs.graph import Failed, Node, ancestors, attempt, bundle, call, node
from luthier.programs.models import Remembering, Speaker, speaker
from luthier.programs.program import (
    ChainOfThought,
    Majority,
    MultiChainComparison,
    Predict,
    Prediction,
    Program,
    ProgramOfThought,
    ReAct,
    evaluate,
    rewarded,
)
from luthier.programs.signature import Signature

__all__ = [
    "ChainOfThought",
    "Failed",
    "Majority",
    "MultiChainComparison",
    "Node",
    "Predict",
    "Prediction",
    "Program",
    "ProgramOfThought",
    "ReAct",
    "Remembering",
    "Signature",
    "Speaker",
    "ancestors",
    "attempt",
    "bundle",
    "call",
    "compiler",
    "evaluate",
    "node",
    "rewarded",
    "speaker",
]


def compiler(name: str, **settings):
    """A compiler by its name.

    `compiler("random_search", num_candidates=8).compile(program, rows, metric)` tunes a program.
    """
    from luthier.registry import build

    return build("compiler", {"name": name, **settings})
