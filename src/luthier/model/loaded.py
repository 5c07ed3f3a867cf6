"""Load what a run tuned, an adapter or a plain model, and generate with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from luthier import compat
from luthier.compat import caller
from luthier.compat.transformers import quiet
from luthier.data.images import with_images
from luthier.data.load import load_rows
from luthier.errors import RecipeError
from luthier.methods.formats._base import BadRow, is_continued, text_of_parts
from luthier.methods.tuners._base import Untuned
from luthier.model import base_mark
from luthier.model.load import assemble, fit_renderer, tensors_of
from luthier.model.policy import Roles
from luthier.model.quantized_linear import open_up
from luthier.recipe.recipe import Recipe
from luthier.recipe.validate import Methods, build_methods, detect
from luthier.registry import build
from luthier.storage import files
from luthier.storage.layout import (
    CHECKSUM,
    REPORT,
    STATE,
    read_state,
    run_folders,
    saved_network,
    saved_rendering,
    state_is_unchanged,
)

if TYPE_CHECKING:
    from luthier.model.network import Network


Base = tuple[Any, Any]  # a network without a tuner, and its tokenizer


@dataclass
class Loaded:
    """A model that is ready to generate, and how it was tuned."""

    name: str  # what was loaded
    roles: Roles
    recipe: Recipe  # how it was tuned; of a plain model only what loads it
    # is a prompt a turn of a conversation (through the chat template), or continued as it is?
    turns: bool = True
    notes: list[str] = field(default_factory=list)  # what the user should know of it
    ends: str = ""  # what every prompt it was tuned on ended with: a line break, or nothing
    system: str = ""  # the system prompt of all rows that it was tuned on

    @property
    def model(self) -> torch.nn.Module:
        """The network, tuner attached."""
        return self.roles.policy.model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers."""
        return self.roles.renderer.tokenizer

    def generate(
        self,
        prompt: Any,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
        hear: Callable[[str], object] | None = None,
        decoder: Any = None,
        **how: Any,
    ) -> Any:
        """The answer to a prompt.

        Args:
            prompt: text, which is continued as it is, or messages, which go through the chat template; a list
                of either gives a list of answers. The content of a message may have parts {"type": "image",
                "image": a path, bytes or a PIL image}, where the network reads images.
            max_new_tokens: tokens of an answer at most.
            temperature: of sampling; 0 takes the likeliest token.
            seed: of the random draws.
            hear: for one prompt, called with the answer so far after each token; where it returns true, the
                answer ends there.
            decoder: how it is written, by name or with settings: {name: instruction_rules}, {name:
                proxy_tuning, expert: RUN}.
            how: `top_p` and `top_k`.

        Raises:
            RecipeError: the network does not generate text, or the chat template does not take the messages.

        A prompt that ends in an assistant message is continued.
        """
        if "generate" not in self.roles.policy.architecture.provides:
            raise RecipeError(
                f"{self.name} cannot generate text: its architecture is {self.roles.policy.architecture.name}"
            )
        several = isinstance(prompt, (list, tuple)) and not all(isinstance(p, dict) for p in prompt)
        renderer, clock = self.roles.renderer, self.roles.clock
        rows, prompts, seeds = [], [], []
        for i, text in enumerate(prompt if several else [prompt]):
            row = {"id": str(i), "prompt": text}
            if isinstance(text, list) and is_continued(text):
                row |= {"prompt": text[:-1], "prefix": text_of_parts(text[-1]["content"])}
            try:
                row = with_images(row)
                prompts.append(renderer.prompt(row))
            except BadRow as why:
                raise RecipeError(f"the prompt cannot be read: {why}") from None
            rows.append(row)
            seeds.append(clock.derive_seed("ask", seed, i, at=0))
        options = {
            "seeds": seeds,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "stop": renderer.stop_ids,
            **how,
        }
        if hear:
            options["hear"] = lambda written: hear(renderer.answer(written[0]))
        if decoder is None:
            written = self.roles.policy.generate(prompts, **options)
        else:
            written = build("decoder", decoder).generate(self.roles, rows, prompts, **options)
        answers = [renderer.answer(ids) for (ids,) in written]
        return answers if several else answers[0]

    def ask(self, text: str, before: Sequence[dict] = (), *, images: Sequence[Any] = (), **how: Any) -> str:
        """An answer in the form the model was tuned on: after earlier turns, or to the text as it is (\\n is
        a line break). images: paths or PIL images that the text is about.
        """
        if self.turns or images:
            return self.generate([*before, user_turn(text, images)], **how)
        prompt = text.replace("\\n", "\n")
        if not prompt.endswith(self.ends):
            prompt += self.ends
        return self.generate(prompt, **how)

    @torch.no_grad()
    def logprobs(self, rows: Sequence[dict]) -> torch.Tensor:
        """The log-probability of each supervised token of rows: [tokens of all rows], float32, in nats.

        rows: in canonical form (`completions`), or in any form that a recipe's `data` may have. Raises
        RecipeError where one of them cannot be read.
        """
        rows = list(rows)
        if not all("completions" in row for row in rows):
            read = load_rows(rows)
            if read.bad:
                raise RecipeError(f"a row cannot be read: {read.bad[0]['reason']}")
            rows = read.rows
        self.roles.policy.eval()
        return self.roles.policy.logprobs(self.roles.batch(rows)).float().cpu()


def user_turn(text: str, images: Sequence[Any]) -> dict:
    """What a user says, about images."""
    if not images:
        return {"role": "user", "content": text}
    parts = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


# ---------------------------------------------------------------------------------------------- loading


@dataclass(frozen=True)
class NoTuner:
    """In the place of a tuner: the model is as it is."""

    name: str = "none"
    provides: frozenset = frozenset({"disable_adapter", "merge"})

    def attach(self, model: Network) -> Untuned:
        return Untuned(model)


def load(name: str | Path, *, base: Base | None = None, **settings: Any) -> Loaded:
    """Load a model, ready to generate.

    Args:
        name: a run's folder, an exported adapter, a model's folder, a hub name, or toy:NAME.
        base: of a run or a plain model, the network without a tuner and its tokenizer, where they are there
            already. The tuner is attached to this network.
        settings: keys of a recipe that should differ from how it was tuned, e.g. dtype="float32" or
            max_length=512.

    Raises:
        RecipeError: there is no such model, or it cannot be read.
    """
    with compat.loading(), quiet(), caller.restored():
        loaded = _load(name, settings, base)
        compat.hold(loaded.model)
    return loaded


def _load(name: str | Path, settings: Mapping[str, Any], base: Base | None = None) -> Loaded:
    """As `load`."""
    folder = Path(name).expanduser()
    if (folder / "recipe.yaml").is_file():
        return load_run(folder, settings, base)
    if (folder / REPORT).is_file():  # a plan: its last run
        return _load(files.read_object(folder / REPORT, folder=str)["folder"], settings)
    if (folder / "adapter_config.json").is_file():
        return load_adapter(folder, settings)
    recipe, roles = load_plain(str(name), settings, base=base)
    return Loaded(str(name), roles, recipe, turns=roles.renderer.note is None)


def load_run(folder: Path, settings: Mapping[str, Any], base: Base | None = None) -> Loaded:
    """What a run tuned, from its folder."""
    recipe = Recipe.load(folder / "recipe.yaml", settings)
    if recipe.plan is not None:
        runs = ", ".join(run.name for run in run_folders(folder))
        raise RecipeError(f"{folder} holds a plan; choose one of its runs: {runs}")
    state = read_state(folder)
    if "model" not in settings:
        base_mark.check(recipe.model, state.get("base"), folder)
    roles = assemble(recipe, build_methods(recipe), saved_network(folder), folder, loaded=base)
    roles.tuner.load(tensors_of(folder, roles.tuner))
    roles.policy.eval()
    notes, turns, ends = [], roles.renderer.note is None, ""
    if (folder / REPORT).is_file():
        stats = files.read_object(folder / REPORT, stats=dict)["stats"]
        turns, ends = stats.get("turns", turns), stats.get("ends", ends)
    else:
        notes.append(f"{folder} is not finished; using its last checkpoint")
    if not state_is_unchanged(state):
        notes.append(f"{folder / STATE} was changed after it was written: its checksum differs")
    # version 0.1 wrote no checksum, and its recipes have other fingerprints
    if CHECKSUM in state and Recipe.load(folder / "recipe.yaml").fingerprint() != state["fingerprint"]:
        notes.append(f"{folder / 'recipe.yaml'} is not what the run was begun with: its fingerprint differs")
    return Loaded(str(folder), roles, recipe, turns, notes, ends, saved_rendering(folder).get("system", ""))


def load_plain(
    model: str, settings: Mapping[str, Any], folder: Path | None = None, base: Base | None = None
) -> tuple[Recipe, Roles]:
    """A model as it is. folder: where the codes of a quantized base may lie."""
    recipe = Recipe.load({**settings, "model": model})
    architecture, quantizer = (recipe.methods()[key] for key in ("architecture", "quantization"))
    architecture = architecture or detect(model)
    methods = Methods(architecture, NoTuner(), None, None, (), {}, [], [], [], quantizer)
    roles = assemble(recipe, methods, folder=folder, loaded=base)
    roles.policy.eval()
    return recipe, roles


def load_adapter(folder: Path, settings: Mapping[str, Any]) -> Loaded:
    """An adapter in PEFT's form, ours or anyone's, merged into its base in memory."""
    from peft import PeftModel

    from luthier.compat.peft import register_type

    config = files.read_object(folder / "adapter_config.json")
    base = config.get("base_model_name_or_path")
    if not base:
        raise RecipeError(
            f"{folder}: adapter_config.json has no base_model_name_or_path, so the base model is unknown"
        )
    coded = folder / files.QUANTIZATION
    if coded.is_file():  # it was trained on the weights that the base's codes stand for
        settings = {"quantization": files.read_json(coded), **settings}
    recipe, roles = load_plain(base, settings, folder)
    open_up(roles.policy.model)
    if (folder / "tokenizer_config.json").is_file():
        from transformers import AutoTokenizer

        tokenizer, limit = AutoTokenizer.from_pretrained(folder), roles.renderer.max_length
        roles.renderer = roles.policy.architecture.renderer(
            tokenizer, roles.policy.model.config, max_length=limit
        )
        fit_renderer(roles.renderer, roles.policy.model)
    register_type(str(config.get("peft_type", "")))
    try:
        model = PeftModel.from_pretrained(roles.policy.model, str(folder)).merge_and_unload().eval()
    except (AttributeError, ValueError, KeyError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0] or "its method changes more than the base model's weights"
        raise RecipeError(f"the adapter in {folder} cannot be merged into {base}: {reason}") from None
    roles.policy.model, roles.policy.attached = model, Untuned(model)
    return Loaded(str(folder), roles, recipe, turns=roles.renderer.note is None)
