"""Luthier against TRL + PEFT and a plain loop, on the same work: python benchmarks/speed.py sft dpo --shape a
--shape b.

The same as `luthier bench`; results go to benchmarks/results. README.md says how to read them.
"""

import sys
from pathlib import Path

from luthier.cli import app

if __name__ == "__main__":
    app(["bench", *sys.argv[1:], "--output-dir", str(Path(__file__).parent / "results")])
