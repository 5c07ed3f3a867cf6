"""Write what a run tuned for other tools, load it back, and compare its answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from luthier.data.load import load_data
from luthier.errors import RecipeError, Refused
from luthier.kernels.tolerance import magnitude
from luthier.methods.tuners._base import Untuned
from luthier.model import quantized as codes
from luthier.model.load import device, pick_dtype
from luthier.model.loaded import Loaded, load
from luthier.model.saved import plain_configs
from luthier.recipe.recipe import Recipe
from luthier.registry import build, did_you_mean, spec
from luthier.storage import files
from luthier.storage.layout import REPORT
from luthier.text.templates import with_defaults
from luthier.train import checks

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROBE = (  # fixed texts: their token log-probabilities must be the same before and after export
    "The quick brown fox jumps over the lazy dog.",
    "Question: What is 12 + 30?\nAnswer: 42",
    "def add(a, b):\n    return a + b\n",
    "Once upon a time there was a small house at the edge of a wood, and nobody lived there.",
)
EXACT = 1e-3  # nats, on average over the probe's tokens: what the order of sums may change in fp32
FLOOR = 1e-4  # of a model that tuning hardly changed
LARGE = 0.5  # a share of what tuning changed: where rounding changes more, the export is refused
ROUNDING = {torch.float16: 0.02, torch.bfloat16: 0.1}  # and what rounding the merged weights may change


def export(folder: str | Path, kind: str, to: str | Path, dtype: str | None = None) -> str:
    """Write a run's result for other tools, load it back, and compare its answers with the tuned model's.

    Both forms are first compared in fp32, so that rounding cannot hide an adapter that was lost.

    Args:
        folder: of a finished run.
        kind: `lora`, an adapter that plain PEFT loads, or `merged`, a plain transformers model.
        to: a folder that does not exist or is empty.
        dtype: of a merged model: float32, bfloat16 or float16; by default what the run computed in.

    Returns:
        a sentence for people that says what was written, how far its log-probabilities differ, and how far
        tuning had changed them.

    Raises:
        RecipeError: it has no such form, what was written differs from the tuned model by more than
            rounding, or rounding undoes most of what tuning changed; then nothing is left at `to`.
    """
    if kind not in WRITERS:
        raise RecipeError(f"there is no export format '{kind}'{did_you_mean(kind, WRITERS)}")
    to = Path(to)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise RecipeError(f"{to} already exists and is not empty; use another folder")
    if dtype is not None and (kind != "merged" or dtype not in DTYPES):
        raise RecipeError(f"dtype: {dtype} must be {', '.join(DTYPES)}, and of a merged model")
    loaded = load(folder, dtype="float32")
    if isinstance(loaded.roles.tuner, Untuned):
        raise RecipeError(f"{folder} is not the folder of a run: it has no tuned weights")
    precision = DTYPES[dtype or dtype_of_run(Path(folder))]
    quantizer = loaded.recipe.methods()["quantization"]
    rows = _probe(loaded)
    choose_layout(loaded, rows)
    want = loaded.logprobs(rows)
    moved = _moved(loaded, rows, want)
    with files.new_folder(to) as beside:
        WRITERS[kind](loaded, beside)
        save_tokenizer(loaded, beside)
        if quantizer is not None and kind == "lora":
            files.write_json(beside / files.QUANTIZATION, spec(quantizer))
            if quantizer.whole:
                codes.save(loaded.model, beside / codes.FILE)
        gap = _compare(beside, rows, want, kind, torch.float32, moved)
        if kind == "merged" and precision in ROUNDING:  # merged and compared in fp32, then rounded once
            rounded: Any = loaded.roles.policy.architecture.load(str(beside), dtype=precision)
            rounded.save_pretrained(beside)
            gap = _compare(beside, rows, want, kind, precision, moved)
            if dtype is None and moved is not None and gap > LARGE * moved:
                raise Refused(
                    f"in {str(precision).removeprefix('torch.')} the export would lose most of what tuning"
                    f" changed: rounding changes log-probabilities by {gap:.1e} on average, tuning by"
                    f" {moved:.1e}; add --dtype float32. Nothing was written"
                )
        _end_at_turns(loaded, kind, beside)
        cost = _requantized(loaded, beside, rows) if quantizer is not None and kind == "merged" else ""
    close = f"log-probabilities differ by {gap:.1e} on average"
    if moved:
        close += f"; tuning changed them by {moved:.1e}"
    sentence = f"exported to {to}; loaded again, its outputs match the tuned model's ({close}){cost}"
    return "; ".join([sentence, *loaded.notes])


def save_tokenizer(loaded: Loaded, to: Path) -> None:
    """The tokenizer, with a chat template that asks as the model was tuned to be asked: what the run handed
    the template (`chat_template_kwargs`) is its default.
    """
    tokenizer, own = loaded.tokenizer, loaded.tokenizer.chat_template
    if isinstance(own, str):
        tokenizer.chat_template = with_defaults(own, loaded.roles.renderer.chat.options)
    tokenizer.save_pretrained(to)
    tokenizer.chat_template = own


def _requantized(loaded: Loaded, folder: Path, rows: list[dict]) -> str:
    """What it costs to quantize the merged weights as the base was: the divergence from the tuned model,
    before and after.
    """
    quantizer = loaded.recipe.methods()["quantization"]
    name = quantizer.name
    if quantizer.reads:
        return f"; quantizer {name} needs calibration rows, so the cost of requantizing was not measured"
    settings = {"quantization": loaded.recipe.quantization, "architecture": loaded.recipe.architecture}
    merged = _divergence(loaded, load(folder, dtype="float32"), rows)
    requantized = _divergence(loaded, load(folder, dtype="float32", **settings), rows)
    return (
        f"; merged into the dequantized {name} weights: KL to the tuned model is {merged:.1e}"
        f" per token, and {requantized:.1e} if requantized to {name}"
    )


@torch.no_grad()
def _divergence(one: Loaded, other: Loaded, rows: list[dict]) -> float:
    """KL of the first model's next-token distribution to the second's, in nats, the mean over the rows'
    supervised tokens.
    """
    outputs = []
    for loaded in (one, other):
        loaded.roles.policy.eval()
        outputs.append(loaded.roles.policy.outputs(loaded.roles.batch(rows)))

    def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)

    return float(outputs[0].apply(kl, beside=outputs[1:]).mean())


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


def _moved(loaded: Loaded, rows: list[dict], tuned: torch.Tensor) -> float | None:
    """How far tuning changed the log-probabilities, on average; None where the base cannot be asked."""
    if "disable_adapter" in build("tuner", loaded.recipe.tuner).provides:
        with loaded.roles.tuner.off():
            base = loaded.logprobs(rows)
    elif "generate" in loaded.roles.policy.architecture.provides and loaded.recipe.quantization is None:
        plain = load(loaded.recipe.model, dtype="float32", architecture=loaded.recipe.architecture)
        choose_layout(plain, rows)
        base = plain.logprobs(rows)
    else:
        return None
    return float((tuned - base).abs().mean()) if base.shape == tuned.shape else None


def stop_ids(loaded: Loaded) -> list[int]:
    """Where the answers of a model that was tuned on turns end; none of another."""
    if not loaded.turns or "generate" not in loaded.roles.policy.architecture.provides:
        return []
    return loaded.roles.renderer.stop_ids


def _end_at_turns(loaded: Loaded, kind: str, folder: Path) -> None:
    """Let other tools stop where `luthier chat` does: by the generation config, and beside an adapter, whose
    base brings its own, by the tokenizer's end of sequence too.
    """
    tokenizer, ends = loaded.tokenizer, stop_ids(loaded)
    if kind == "lora" and ends and tokenizer.eos_token_id != ends[-1]:
        own = tokenizer.eos_token
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[-1])
        save_tokenizer(loaded, folder)
        tokenizer.eos_token = own
    plain_configs(loaded.recipe.model, folder, ends)


def _compare(
    folder: Path, rows: list[dict], want: torch.Tensor, kind: str, dtype: torch.dtype, moved: float | None
) -> float:
    """How far the exported thing's log-probabilities are from the tuned model's; refuses what rounding cannot
    explain.
    """
    gap = _gap(load(folder, dtype="float32"), rows, want)
    limit = ROUNDING.get(dtype, EXACT) * magnitude(want)
    if dtype not in ROUNDING and moved is not None:  # or an adapter that changes little could be lost
        limit = max(FLOOR * magnitude(want), min(limit, moved / 4))
    if not gap <= limit:
        raise Refused(
            f"the model exported as {kind} does not match the tuned model: log-probabilities of"
            f" the test texts differ by {gap:.1e} on average (rounding explains at most"
            f" {limit:.2g}). Nothing was written"
        )
    return gap


def choose_layout(loaded: Loaded, rows: list[dict]) -> None:
    """Read in a layout that this model can take, as a run would."""
    checks.check_forward(loaded.roles.policy, loaded.roles.batch(rows[:2]), [].append)


def _lora(loaded: Loaded, to: Path) -> None:
    """An adapter that plain PEFT loads."""
    attached: Any = loaded.roles.tuner
    if not hasattr(attached, "export_lora"):
        tuner = build("tuner", loaded.recipe.tuner)
        advice = "load its run folder with luthier instead"
        if "merge" in tuner.provides:
            advice = "export it with --as merged"
        raise RecipeError(f"tuner '{tuner.name}' has no PEFT adapter form; {advice}")
    if loaded.roles.policy.architecture.name == "classifier":
        raise RecipeError(
            "a LoRA adapter does not store the class names of a classifier head; export it with --as merged"
        )
    attached.export_lora(to)


def _merged(loaded: Loaded, to: Path) -> None:
    """A plain transformers model."""
    attached: Any = loaded.roles.tuner
    if hasattr(attached, "export_merged"):
        attached.export_merged(to)
        return
    with attached.merged() as model:
        model.save_pretrained(to)


def _probe(loaded: Loaded) -> list[dict]:
    """The fixed texts as rows; where a network does not write, rows it was tuned on."""
    if "generate" in loaded.roles.policy.architecture.provides:
        halves = [(t[: len(t) // 2], t[len(t) // 2 :]) for t in PROBE]
        return [{"id": f"probe-{i}", "prompt": a, "completions": [b]} for i, (a, b) in enumerate(halves)]
    rows = load_data(replace(loaded.recipe, eval_data=0)).rows[:16]
    return loaded.roles.policy.architecture.encode_all(rows, loaded.roles.renderer).rows


def _gap(again: Loaded, rows: list[dict], want: torch.Tensor) -> float:
    choose_layout(again, rows)
    have = again.logprobs(rows)
    if have.shape != want.shape:
        raise Refused(
            f"the exported tokenizer splits the test texts into {len(have)} tokens, the tuned"
            f" model's into {len(want)}"
        )
    return float((have - want).abs().mean())


WRITERS = {"lora": _lora, "merged": _merged}
