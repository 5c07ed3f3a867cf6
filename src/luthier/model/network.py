"""What luthier uses of a network, for type checkers: at run time it is whatever transformers loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Matrix(nn.Module):
    """A module around one weight: Linear, Embedding, GPT-2's Conv1D, a norm."""

    weight: nn.Parameter
    bias: nn.Parameter | None


class Network(nn.Module):
    """A transformers model (PreTrainedModel), and what `Architecture.load` notes on it."""

    config: Any
    generation_config: Any
    dtype: torch.dtype
    fresh: list[str]  # modules whose weights no checkpoint held
    new_tokens: list[int]  # ids of tokens that the recipe adds
    _is_stateful: bool  # transformers' word for layers that read on from one sequence into the next

    get_input_embeddings: Callable[[], Matrix]
    get_output_embeddings: Callable[[], Matrix | None]
    get_encoder: Callable[[], nn.Module]
    save_pretrained: Callable[..., None]
