"""Practice: generated worlds and small models pretrained on them, so that everything can be tried offline.

`path("lm")` is the folder of a shipped model (in recipes `practice:lm`), `rows("people", "train", 100)` are
rows of a world (`practice:people/train`). Worlds and models are our own making; the models are made again by
`python -m luthier.practice.make`.
"""

from pathlib import Path

from .worlds import names as worlds
from .worlds import rows

__all__ = ["models", "path", "rows", "worlds"]

_MODELS = Path(__file__).parent / "models"


def models() -> list[str]:
    """The names of the shipped models."""
    return sorted(folder.parent.name for folder in _MODELS.glob("*/config.json"))


def path(name: str) -> Path:
    """The folder of a shipped model; an unknown name is answered by the known ones."""
    if name not in models():
        raise ValueError(f"no practice model {name!r}; there are {', '.join(models()) or 'none'}")
    return _MODELS / name
