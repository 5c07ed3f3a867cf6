"""Does a network leave out numbers at random?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from luthier.model.network import Network

# settings of networks that draw without a module
FUNCTIONAL = (
    "attention_dropout",
    "attn_pdrop",
    "attention_probs_dropout_prob",
    "dropout",
    "activation_dropout",
    "hidden_dropout",
    "layerdrop",
    "router_jitter_noise",
)


def has_dropout(model: Network, outside: Iterable[nn.Module] = ()) -> bool:
    """Does a network leave out numbers at random anywhere outside of these layers?"""
    ignored = {m for layer in outside for m in layer.modules()}
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p and module not in ignored:
            return True
    config = model.config.get_text_config()
    return any(getattr(config, name, 0) for name in FUNCTIONAL)
