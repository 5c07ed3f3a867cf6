"""A tuned model as a PeftModel that other libraries' loops save, load and resume: in luthier's own form of
adapters, which every PeftModel reads.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft.tuners.tuners_utils import BaseTunerLayer

from luthier.methods.tuners._peft.layer import ADAPTER, INITIAL
from luthier.storage import tuner_state

if TYPE_CHECKING:
    from luthier.methods.tuners._base import TunedModel


def hand_over(tuned: TunedModel, peft: Any) -> Any:
    """The PeftModel around a tuned model, and the network inside it, save the adapter and not the layers that
    PEFT has put in: under their names nobody would find the weights again.
    """
    peft.save_pretrained = partial(_save, tuned, peft)
    peft.load_adapter = partial(_load, tuned, peft)
    tuned.model.save_pretrained = partial(_save, tuned, tuned.model)
    if INITIAL in peft.peft_config:
        peft.set_adapter, peft.add_adapter = partial(_select, peft), partial(_add, peft)
    return peft


def _select(peft: Any, adapter_name: str, inference_mode: bool = False) -> None:
    """As `set_adapter` of PeftModel; the frozen adapter that belongs to the start stays beside the other."""
    type(peft).set_adapter(peft, adapter_name, inference_mode)
    peft.base_model.set_adapter([adapter_name, INITIAL], inference_mode)
    peft.base_model.set_requires_grad([INITIAL], False)


def _add(peft: Any, adapter_name: str, *how: Any, **options: Any) -> None:
    """As `add_adapter` of PeftModel, which lets whatever is active train."""
    type(peft).add_adapter(peft, adapter_name, *how, **options)
    _select(peft, peft.active_adapter)


def _save(
    tuned: TunedModel,
    module: Any,
    save_directory: str | Path,
    is_main_process: bool = True,
    push_to_hub: bool = False,
    **options: Any,
) -> None:
    """As `save_pretrained` of transformers and of PEFT."""
    layers = any(isinstance(inner, BaseTunerLayer) for inner in module.modules())
    virtual = tuned.virtual > 0
    if module is tuned.model and not (layers or virtual):  # merged and unloaded: a plain network again
        type(module).save_pretrained(
            module, save_directory, is_main_process=is_main_process, push_to_hub=push_to_hub, **options
        )
        return
    if is_main_process:
        tuned.save(Path(save_directory))
    if push_to_hub:
        module.push_to_hub(options.pop("repo_id", Path(save_directory).name), **options)


def _load(
    tuned: TunedModel, peft: Any, model_id: str | Path, adapter_name: str, *how: Any, **options: Any
) -> Any:
    """As `load_adapter` of PeftModel; the tuner's own adapter goes on from the folder in place."""
    folder = Path(model_id)
    if adapter_name != ADAPTER or not folder.is_dir():
        return type(peft).load_adapter(peft, model_id, adapter_name, *how, **options)
    tensors = tuned.read(folder)
    tuned.load(tensors | tuner_state.read(folder))
    return None
