"""What is exported: a run's tuned model; and the same as a plain transformers folder in fp32, from which
other forms are made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from luthier.data.load import load_data
from luthier.methods.tuners._base import Untuned
from luthier.model.load import device, fit_renderer, pick_dtype
from luthier.model.loaded import Loaded, load
from luthier.model.policy import Policy, Roles
from luthier.model.saved import plain_configs
from luthier.recipe.recipe import Recipe
from luthier.run.folder import rows_fingerprint
from luthier.serve.agreement import Probe
from luthier.storage import files
from luthier.storage.layout import REPORT
from luthier.text.templates import with_defaults

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Source:
    """A finished run, loaded in fp32. dtype: what stays in floats is written in it; None where it was not
    chosen, and is the run's own. scratch: a folder for what is needed on the way.
    """

    folder: Path
    loaded: Loaded
    dtype: str | None
    scratch: Path
    notes: list[str] = field(default_factory=list)

    @cached_property
    def probe(self) -> Probe:
        """What the tuned model answers."""
        return Probe.of(self.loaded)

    @property
    def precision(self) -> torch.dtype:
        """In which floats are written."""
        return DTYPES[self.dtype or dtype_of_run(self.folder)]

    @cached_property
    def plain(self) -> Path:
        """The tuned model as a plain transformers folder in fp32, which was loaded again and compared."""
        folder = self.scratch / "plain"
        self.write_plain(folder)
        return folder

    def write_plain(self, folder: Path) -> None:
        """Write the tuned model as a plain transformers folder in fp32. Raises Refused where it does not
        answer like the tuned model.
        """
        merge(self.loaded, folder)
        self.save_tokenizer(folder)
        self.probe.check(load(folder, dtype="float32"), "merged")
        self.finish_configs(folder)

    def finish_configs(self, folder: Path) -> None:
        """The base's configs, but for what tuning meant to change: other tools stop where `luthier chat`
        does.
        """
        plain_configs(self.loaded.recipe.model, folder, self.stop_ids())

    def save_tokenizer(self, folder: Path) -> None:
        """The tokenizer, with a chat template that asks as the model was tuned to be asked: what the run
        handed the template (`chat_template_kwargs`) is its default.
        """
        with self.template_of_run():
            self.loaded.roles.renderer.save(folder)

    @contextmanager
    def template_of_run(self) -> Iterator[Any]:
        """The tokenizer, for a while with a chat template that asks as the model was tuned to be asked."""
        tokenizer, own = self.loaded.tokenizer, self.loaded.tokenizer.chat_template
        if isinstance(own, str):
            tokenizer.chat_template = with_defaults(own, self.loaded.roles.renderer.chat.options)
        try:
            yield tokenizer
        finally:
            tokenizer.chat_template = own

    def stop_ids(self) -> list[int]:
        """Where the answers of a model that was tuned on turns end; none of another."""
        if not self.loaded.turns or "generate" not in self.loaded.roles.policy.architecture.provides:
            return []
        return self.loaded.roles.renderer.stop_ids

    def around(self, model: Any, tokenizer: Any) -> Loaded:
        """A network and a tokenizer that were read from a form, to be asked as the tuned model is."""
        roles = self.loaded.roles
        architecture = roles.policy.architecture
        renderer = architecture.renderer(
            tokenizer,
            model.config,
            max_length=roles.renderer.max_length,
            split_special_tokens=self.loaded.recipe.split_special_tokens,
        )
        model.config.use_cache = False
        # transformers' own `to` refuses what it read from codes, though they are expanded
        model = torch.nn.Module.to(model, roles.device, torch.float32).eval()
        model.fresh = []
        fit_renderer(renderer, model)
        policy = Policy(architecture, model, Untuned(model))
        return replace(self.loaded, roles=Roles(policy, roles.clock, renderer))

    def training_rows(self, count: int) -> list[dict]:
        """The first rows that the run was tuned on, for forms that are measured on rows."""
        rows = load_data(self.loaded.recipe, fingerprint=rows_fingerprint(self.folder)).rows[: 2 * count]
        usable = self.loaded.roles.policy.architecture.encode_all(rows, self.loaded.roles.renderer).rows
        return usable[:count]


def merge(loaded: Loaded, folder: Path) -> None:
    """Write the tuned network as a plain one, in the precision that it is loaded in."""
    tuned: Any = loaded.roles.tuner
    if hasattr(tuned, "export_merged"):
        tuned.export_merged(folder)
        return
    with tuned.merged() as model:
        model.save_pretrained(folder)


def dtype_of_run(folder: Path) -> str:
    """What a run computed in; of one with dtype auto by its report, or else as on this machine."""
    recipe = Recipe.load(folder / "recipe.yaml")
    if recipe.dtype != "auto":
        return recipe.dtype
    if (folder / REPORT).is_file():
        dtype = files.read_object(folder / REPORT, stats=dict)["stats"].get("dtype")
        if dtype in DTYPES:
            return dtype
    return str(pick_dtype("auto", device())).removeprefix("torch.")
