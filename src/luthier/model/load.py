"""From a recipe to a policy: the network in its precision, the tuner on it, the tokenizer, and what an
earlier run moved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from luthier import compat
from luthier.clock import Clock
from luthier.compat.lazy_imports import import_models
from luthier.compat.malloc import keep_memory
from luthier.compat.transformers import checkpoint_activations, quiet_transformers
from luthier.errors import RecipeError
from luthier.kernels import attention, compiled, elementwise, liger
from luthier.methods.roles._base import PREFIX, bring
from luthier.methods.tuners._base import Untuned
from luthier.model.anatomy import layer_of
from luthier.model.new_tokens import add_tokens, check_tokens_train, token_modules, with_tokens
from luthier.model.policy import Policy, Roles
from luthier.model.quantized_linear import modules as coded
from luthier.recipe import model_names
from luthier.recipe.new_tokens import read_new_tokens
from luthier.recipe.recipe import Recipe
from luthier.recipe.validate import Methods
from luthier.registry import build
from luthier.storage.layout import saved_rendering

if TYPE_CHECKING:
    from luthier.model.network import Network
    from luthier.text.encode import Renderer


def device() -> torch.device:
    """Where networks are put: this process's GPU, where there is one."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def pick_dtype(name: str, where: torch.device) -> torch.dtype:
    """auto: bfloat16 where the chip multiplies in it (on CPUs: AMX or AVX-512 BF16), else float32. What moves
    has fp32 masters.
    """
    if name != "auto":
        return getattr(torch, name)
    if where.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if where.type == "cpu":
        for query in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
            if getattr(torch.cpu, query, lambda: False)():
                return torch.bfloat16
    return torch.float32


@compat.one_at_a_time
def load_model(
    recipe: Recipe, parts: Methods, network: Mapping[str, Any], folder: Path | None = None
) -> tuple[Network, Any]:
    """The base network and its tokenizer. network: settings that follow from the data (a classifier's
    classes).
    """
    import_models()
    quiet_transformers()  # what it warns of when loading is reported by us, or refused
    path, where = model_names.resolve_model(recipe.model), device()
    if where.type == "cpu":
        keep_memory()
    how = {"dtype": pick_dtype(recipe.dtype, where), **network}
    if recipe.attn_implementation:
        how["attn_implementation"] = recipe.attn_implementation
    try:
        if parts.quantizer:
            model = _quantized(recipe, parts, path, how, where, folder)
        else:
            model = parts.architecture.load(path, **how)
        tokenizer = parts.architecture.tokenizer(path)
    except model_names.LOAD_ERRORS as error:
        raise model_names.load_error(recipe.model, error) from None
    _check_complete(model, recipe)
    new_tokens = read_new_tokens(recipe.add_tokens)
    if new_tokens is not None:
        model.new_tokens = add_tokens(model, tokenizer, new_tokens)
    model.config.use_cache = False
    if recipe.gradient_checkpointing is True:
        checkpoint_activations(model)
    model = model.to(where).eval()
    fused = getattr(parts.architecture, "fused", False)
    if recipe.torch_compile:
        compiled.compile_blocks(model)
        attention.exclude_from_compile(model)
    elif fused:
        elementwise.install(model, _fast_forms(fused, where))
    return model, tokenizer


def _fast_forms(fused: bool | str, where: torch.device) -> elementwise.FastForms:
    """Of norms and rotary positions, for a device."""
    if fused == "liger":
        return liger.forms(where)
    return elementwise.ON_CUDA if where.type == "cuda" else elementwise.OWN


def _check_complete(model: Network, recipe: Recipe) -> None:
    """Refuse a checkpoint without weights that are no head's: they would be random, and trained as if they
    were not. A new head, and a pooler below it, are what tuning is for.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    embeddings = input_embeddings(model)
    missing = []
    for name in model.fresh:
        inside = name.startswith(prefix) or layer_of(f"{name}.weight") is not None
        if (inside and "pooler" not in name) or model.get_submodule(name) is embeddings:
            missing.append(name)
    if missing:
        rest = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise RecipeError(
            f"model: {recipe.model} has no weights for {', '.join(missing[:3])}{rest} of"
            f" {type(model).__name__}, so they would be random; use a complete checkpoint",
            "incomplete_model",
        )


def _quantized(
    recipe: Recipe, parts: Methods, path: str, how: dict[str, Any], where: torch.device, folder: Path | None
) -> Network:
    """The base as codes: those of this run, else of the run that it goes on from, else made while the weights
    are read.

    A quantizer that must see all weights, or rows, gets the network as it is (see `_calibrated`).
    """
    from luthier.model.quantized import FILE, read
    from luthier.model.quantized_load import loaded

    saved = None
    for earlier in (folder, recipe.init_from):
        if saved is None and isinstance(earlier, (str, Path)) and (Path(earlier) / FILE).is_file():
            saved = read(Path(earlier) / FILE)
    if parts.quantizer.whole and saved is None:
        return parts.architecture.load(path, **how)
    dtype = how.pop("dtype")
    load = partial(parts.architecture.load, path, **how)
    return loaded(load, parts.quantizer, dtype, where, saved)


@torch.no_grad()
def _read_otherwise(policy: Policy, batch: Any) -> None:
    """Networks that cannot be packed are read padded here, too: calibration comes before a run's checks."""
    while True:
        try:
            policy(batch)
            return
        except ValueError:
            simpler = policy.architecture.simpler()
            if simpler is None:
                raise
            policy.architecture = simpler


def _calibrated(parts: Methods, roles: Roles, rows: list[dict], folder: Path | None) -> None:
    from luthier.model.quantized import FILE, quantize, save

    if parts.quantizer.reads and not rows:
        raise RecipeError(f"quantizer '{parts.quantizer.name}' needs calibration rows, and there are none")
    if parts.quantizer.reads:
        _read_otherwise(roles.policy, roles.batch(rows[:1]))
    quantize(roles.policy.model, parts.quantizer, roles, rows)
    if folder is not None:
        save(roles.policy.model, folder / FILE)


@compat.one_at_a_time
def assemble(
    recipe: Recipe,
    parts: Methods,
    network: Mapping[str, Any] | None = None,
    folder: Path | None = None,
    rows: list[dict] | None = None,
    loaded: tuple[Network, Any] | None = None,
) -> Roles:
    """Model, tuner and tokenizer as the training policy; seeded before weights are drawn.

    folder, rows: of the run, where the codes of a quantized base are kept, and what they may be made from.
    loaded: the network and its tokenizer, where they are there already.
    """
    clock = Clock(seed=recipe.seed)
    torch.manual_seed(clock.derive_seed("model"))
    model, tokenizer = loaded or load_model(recipe, parts, network or {}, folder)
    parts.architecture.check_network(model)
    if parts.quantizer is not None and not coded(model):
        limit = recipe.max_length or min(2048, max_positions(model))
        plain = parts.architecture.renderer(tokenizer, model.config, max_length=limit)
        untuned = Roles(Policy(parts.architecture, model, Untuned(model)), clock, plain)
        _calibrated(parts, untuned, rows or [], folder)
    torch.manual_seed(clock.derive_seed("tuner"))
    tuner, token_ids = parts.tuner, getattr(model, "new_tokens", [])
    new_tokens = read_new_tokens(recipe.add_tokens)
    if token_ids and new_tokens is not None:
        token_names = list(token_modules(model))
        tuner = with_tokens(tuner, token_names, new_tokens.train, token_ids)
        attached = attach(tuner, model, parts.architecture)
        check_tokens_train(attached, token_names)
    else:
        attached = attach(tuner, model, parts.architecture)
    if getattr(parts.architecture, "fused", False) and not recipe.torch_compile:
        elementwise.install_dropout(model)
    most = max_positions(model) - attached.virtual
    if recipe.max_length and recipe.max_length > most:
        raise RecipeError(
            f"max_length: {recipe.max_length} tokens is more than {recipe.model} reads with"
            f" this tuner ({most})"
        )
    limit = recipe.max_length or min(2048, most)
    rendering = saved_rendering(folder)
    renderer = parts.architecture.renderer(
        tokenizer,
        model.config,
        max_length=limit,
        chat_template=recipe.chat_template,
        chat_template_kwargs={**rendering.get("chat_template_kwargs", {}), **recipe.chat_template_kwargs},
        split_special_tokens=recipe.split_special_tokens,
        today=rendering.get("today"),
    )
    fit_renderer(renderer, model)
    return Roles(Policy(parts.architecture, model, attached), clock, renderer)


def fit_renderer(renderer: Renderer, model: Network) -> None:
    """Tell a renderer what it must know of the network: how many tokens its embedding holds, and at which
    tokens its own settings end generation.
    """
    weight = getattr(input_embeddings(model), "weight", None)
    if weight is not None and len(renderer.tokenizer) > weight.shape[0]:
        renderer.vocabulary = weight.shape[0]
    ends: list[Any] = []
    generation = getattr(model, "generation_config", None)
    # Settings that no file holds are transformers' own guesses.
    if generation is not None and not getattr(generation, "_from_model_config", False):
        ends.append(generation.eos_token_id)
    ends.append(model.config.to_diff_dict().get("eos_token_id"))
    for end in ends:
        for token in end if isinstance(end, (list, tuple)) else [end]:
            if isinstance(token, int) and token in renderer.special and token not in renderer.stops:
                renderer.stops.append(token)


def input_embeddings(model: Network) -> Any:
    """The module that reads the input; None where a network does not say which."""
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def max_positions(model: Network) -> float:
    """How many tokens the network has positions for."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    skipped = 0  # RoBERTa counts from behind its padding
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding:
            skipped = max(skipped, padding + 1)
    return most - skipped


def attach(tuner: Any, model: Network, architecture: Any) -> Any:
    """The tuner on the model. Modules that no checkpoint held (a new classifier's head) are trained along and
    saved with it.
    """
    all_linear = getattr(tuner, "target_modules", None) == "all-linear"
    if all_linear and tuner.exclude_modules is None:
        tuner = replace(tuner, exclude_modules=architecture.left_out(model))
    if model.fresh and any(f.name == "modules_to_save" for f in fields(tuner)):
        tuner = replace(tuner, modules_to_save=sorted({*(tuner.modules_to_save or ()), *model.fresh}))
    new = {}
    for name in model.fresh:
        for p in model.get_submodule(name).parameters():
            new[id(p)] = name
    attached = tuner.attach(model)
    moving = {id(p) for p in attached.parameters().values()}
    # a tuner that answers without them takes them from the list
    left = {new[i] for i in new.keys() - moving} & {*model.fresh}
    if left and tuner.provides and not hasattr(tuner, "modules_to_save"):
        raise RecipeError(
            f"tuner '{tuner.name}' does not train {', '.join(sorted(left))} of {type(model).__name__}, which"
            " the checkpoint has no weights for; use a tuner that does: lora, full, or any with"
            " modules_to_save"
        )
    return attached


def try_attach(recipe: Recipe, parts: Methods, rows: list[dict]) -> Any:
    """A recipe's tuner on a network without weights (torch's meta device): what it refuses is known before
    anything is loaded. None where it cannot be attached so, as a start from singular values: that is left to
    the run. Raises RecipeError where the tuner does not fit the network.
    """
    if parts.quantizer is not None:
        return None
    try:
        config = model_names.model_config(recipe.model)
        for key, value in parts.architecture.fit_to(rows).items():
            setattr(config, key, value)
        with torch.device("meta"):
            model = parts.architecture.auto_class().from_config(config, trust_remote_code=False)
        model.fresh = []
        return attach(parts.tuner, model, parts.architecture)
    except RecipeError:
        raise
    except Exception:  # whatever a network or a tuner raises that needs weights
        return None


def tensors_of(start: Any, attached: Any) -> dict[str, torch.Tensor]:
    """What a finished run moved, or a merge of several runs; with `modules_of` all that a run moved but its
    head, for other labels (PVP, arXiv:2304.13639).
    """
    if isinstance(start, dict):
        if set(start) == {"modules_of"}:
            return _modules_of(start["modules_of"], attached)
        if set(start) != {"merge", "of"} or not start["of"]:
            raise RecipeError(
                "init_from: expected the folder of a run, {merge: average, of: [folder, folder]}, or"
                " {modules_of: folder}"
            )
        merger = build("merger", start["merge"])
        # nothing has been trained or loaded yet
        base = None
        if "base" in merger.requires:
            base = attached.tensors()
        return merger.merge([tensors_of(s, attached) for s in start["of"]], base)
    folder = Path(start)
    if not folder.is_dir():
        raise RecipeError(f"init_from: folder {folder} does not exist")
    return {k: v for k, v in attached.read(folder).items() if not k.startswith(PREFIX)}


def _modules_of(folder: Any, attached: Any) -> dict[str, torch.Tensor]:
    """What a run moved, but for the modules that no checkpoint of this network holds: they stay as they are
    here, whatever labels they are of.
    """
    own, heads = attached.tensors(), tuple(f"{name}." for name in attached.model.fresh)
    if not heads:
        raise RecipeError(
            "init_from: modules_of leaves out a new head, and this network has none; name the folder alone"
        )
    moved = tensors_of(folder, attached)
    others = {name: tensor for name, tensor in moved.items() if not name.startswith(heads)}
    return own | others


def take_parts(roles: Roles, parts: Methods) -> None:
    """Attach the parts that roles bring (a critic's head): they train along with the tuner. A run that
    goes on from this one takes what the tuner trained, and begins with parts of its own.
    """
    brought = {}
    for name, role in parts.roles.items():
        brought[name] = role.parts(roles.policy)
    for name, some in brought.items():
        bring(roles.tuner, name, some)
