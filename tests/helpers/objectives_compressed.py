"""What tests of objectives_compressed share."""

from __future__ import annotations

import luthier
from helpers.rows import SUMS


def tune(tmp_path, name: str, **changes):
    base = {
        "data": SUMS,
        "eval_data": SUMS,
        "max_steps": 2,
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-3,
        "evaluate": ["loss"],
        "dtype": "float32",
    }
    return luthier.tune({**base, **changes}, folder=tmp_path / name)
