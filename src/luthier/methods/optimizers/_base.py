"""The kind's protocol: optimizers by their usual names, each a chain of transforms with the settings that
Hugging Face users know.
"""

from __future__ import annotations

from luthier.methods.transforms._base import Transform
from luthier.registry import family


@family
class Optimizer:
    """Family: a name for a chain."""

    weight_decay: float = 0.0  # decoupled weight decay, on matrices only
    max_grad_norm: float = 1.0  # maximum global gradient norm; 0 = no limit

    def chain(self) -> tuple[Transform, ...]:
        """The transforms, first to last."""
        raise NotImplementedError
