"""Where things lie: the repository, what is kept for tests, and real data where it is there."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
DATA = Path(os.environ.get("LUTHIER_DATA") or ROOT.parent / "shared" / "data")
