"""Who an objective may ask besides the policy. A role may bring trained parts of its own (a critic's head)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from luthier.method import family

if TYPE_CHECKING:
    from luthier.architectures._network import Network


@family
class Role:
    """Family: `play` answers with whatever `roles.<name>` shall be."""

    constant: ClassVar[bool] = False  # does it say the same of a row at every step of a run?

    def parts(self, model: Network) -> dict[str, nn.Module]:
        """Trained modules that this role brings, by name."""
        return {}

    def play(self, name: str, policy: Any) -> Any:
        """policy: the training policy. Usually returns a Policy."""
        raise NotImplementedError
