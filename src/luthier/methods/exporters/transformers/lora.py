"""lora: an adapter that plain PEFT loads, without luthier.

Of a base that was tuned in codes (`quantization`), the quantizer's settings and codes lie beside it, since
the adapter belongs to the weights that they stand for.
"""

from __future__ import annotations

from typing import Any, ClassVar

from luthier.errors import RecipeError
from luthier.methods.exporters._base import CAUSAL, Exporter, Usage
from luthier.model import quantized as codes
from luthier.model.loaded import Loaded, load
from luthier.registry import build, exporter, spec
from luthier.storage import files


@exporter(
    use_when="the base model is there where the result is used: PEFT, vLLM and others add an adapter to it.",
    costs="as many bytes as what was trained: megabytes.",
)
class LoRA(Exporter):
    """A LoRA adapter in PEFT's form."""

    library: ClassVar[str] = "peft"
    relation: ClassVar[str] = "adapter"

    def check(self, source):
        super().check(source)
        self.check_tuner(source.loaded)

    def check_tuner(self, loaded: Loaded) -> None:
        """Raises RecipeError for a run that has no adapter which plain PEFT loads."""
        if not hasattr(loaded.roles.tuner, "export_lora"):
            tuner = build("tuner", loaded.recipe.tuner)
            advice = "load its run folder with luthier instead"
            if "merge" in tuner.provides:
                advice = "export it with --as merged"
            raise RecipeError(f"tuner '{tuner.name}' has no PEFT adapter form; {advice}")
        if loaded.roles.policy.architecture.name == "classifier":
            raise RecipeError(
                "a LoRA adapter does not store the class names of a classifier head; export it with --as"
                " merged"
            )

    def write(self, source, folder):
        tuned: Any = source.loaded.roles.tuner
        tuned.export_lora(folder)
        source.save_tokenizer(folder)
        quantizer = source.loaded.recipe.methods()["quantization"]
        if quantizer is None:
            return
        files.write_json(folder / files.QUANTIZATION, spec(quantizer))
        if quantizer.whole:
            codes.save(source.loaded.model, folder / codes.FILE)

    def read(self, source, folder):
        return load(folder, dtype="float32")

    def finish(self, source, folder):
        """Let other tools stop where `luthier chat` does: the base brings its own generation config, so by
        the tokenizer's end of sequence too.
        """
        tokenizer, stop = source.loaded.tokenizer, source.stop_ids()
        if stop and tokenizer.eos_token_id != stop[-1]:
            own = tokenizer.eos_token
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(stop[-1])
            source.save_tokenizer(folder)
            tokenizer.eos_token = own
        source.finish_configs(folder)

    def usage(self, source, folder, place):
        name = source.loaded.roles.policy.architecture.auto_class().__name__
        code = (
            "from peft import AutoPeftModelForCausalLM\n\n"
            f'model = AutoPeftModelForCausalLM.from_pretrained("{place}")'
        )
        if name != CAUSAL:
            code = (
                f"from peft import PeftModel\nfrom transformers import {name}\n\n"
                f'base = {name}.from_pretrained("{source.loaded.recipe.model}")\n'
                f'model = PeftModel.from_pretrained(base, "{place}")'
            )
        return [Usage("peft", code, "python")]
