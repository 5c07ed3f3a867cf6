"""The kind's protocol: a finished run in the form that another tool reads. Used by `luthier export RUN --as
NAME`.

The caller (serve/export.py) writes into a new folder, reads the form back as its users would, compares its
answers with the tuned model's, and adds a model card. An exporter says how it is written, how it is read
back, and how much of the weights its numbers may lose.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from luthier.errors import RecipeError
from luthier.registry import family

if TYPE_CHECKING:
    from luthier.model.loaded import Loaded
    from luthier.serve.source import Source


@dataclass(frozen=True)
class Limits:
    """What a form may differ by. weights: the largest share of a weight that its numbers may lose (the norm
    of the difference, divided by the weight's); None where it is compared by its outputs alone. logprobs: the
    largest mean difference of log-probabilities, in nats; None where only the weights are rounded, and
    everything else must be exact.
    """

    weights: float | None = None
    logprobs: float | None = None


@dataclass(frozen=True)
class Usage:
    """How a form is used: a tool, and what to type, for the terminal and the model card."""

    tool: str
    code: str
    language: str = "sh"


CAUSAL = "AutoModelForCausalLM"


def in_transformers(place: str, auto_class: str = CAUSAL) -> str:
    """How a folder is loaded in Python."""
    return f'from transformers import {auto_class}\n\nmodel = {auto_class}.from_pretrained("{place}")'


@family
class Exporter:
    """Family: one file defines how a run's result is written for others, and how it is read back."""

    dtypes: ClassVar[tuple[str, ...]] = ()  # values of --dtype, beside the run's own precision
    library: ClassVar[str] = "transformers"  # as the hub's model cards name what reads it
    relation: ClassVar[str] = "finetune"  # to the base model, as the hub's model cards name it
    package: ClassVar[str] = ""  # what must be installed, as pip names it
    generates: ClassVar[bool] = False  # is it a form of causal language models alone?

    def check(self, source: Source) -> None:
        """Raises RecipeError for a run that has no such form; called before anything is written."""
        architecture = source.loaded.roles.policy.architecture
        if self.generates and architecture.auto_class().__name__ != CAUSAL:
            raise RecipeError(
                f"export format '{self.name}' is for causal language models, not for architecture"
                f" '{architecture.name}'; use --as merged"
            )
        if self.package and find_spec(self.package.replace("-", "_")) is None:
            raise RecipeError(
                f"export format '{self.name}' needs {self.package}, which is not installed: pip install"
                f" {self.package}"
            )

    def write(self, source: Source, folder: Path) -> None:
        """Write the form into a folder that is empty. What the user should know goes to `source.notes`."""
        raise NotImplementedError

    def read(self, source: Source, folder: Path) -> Loaded:
        """What was written, as its users read it, with weights in fp32."""
        raise NotImplementedError

    def finish(self, source: Source, folder: Path) -> None:
        """What is left to write when the form has been compared with the tuned model."""

    def reference(self, source: Source) -> Path:
        """A plain folder in fp32 that computes what the tuned model does, and whose weights the form has, but
        for their rounding.
        """
        return source.plain

    def limits(self, source: Source, folder: Path) -> Limits:
        """What the form in a folder may differ by from the tuned model."""
        return Limits()

    def usage(self, source: Source, folder: Path, place: str) -> list[Usage]:
        """What to type to use what lies in a folder. place: what that folder is called then."""
        return []
