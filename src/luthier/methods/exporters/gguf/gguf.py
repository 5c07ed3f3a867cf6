"""gguf: the file that llama.cpp, Ollama and LM Studio read, tokenizer and chat template inside.

f32, f16, bf16 and q8_0 are written here through the `gguf` package, for networks of the Llama, Mistral, Qwen
and Gemma 2 kinds. Others are converted by llama.cpp's convert_hf_to_gguf.py, and other quantizations made by
its quantizer, where they are on this machine. The file is read back by transformers, which expands its codes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from luthier.errors import RecipeError
from luthier.methods.exporters._base import Exporter, Limits, Usage
from luthier.methods.exporters.gguf import _llama_cpp
from luthier.methods.exporters.gguf._tokens import add_tokenizer, read_tokenizer
from luthier.methods.exporters.gguf._write import ARCHITECTURES, FILE_TYPES, check_config, read, write
from luthier.registry import exporter

FILE = "model.gguf"
OF_DTYPE = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
# the largest share of a weight that is lost
ROUNDING = {"f32": 1e-6, "f16": 1e-3, "bf16": 4e-3, "q8_0": 0.02, "q6_k": 0.06}
COARSE = 0.3  # of fewer than 6 bits


@exporter(
    use_when="the model should answer on a laptop, a phone or without Python: llama.cpp, Ollama, LM Studio.",
    costs="16 bits a weight in f16, 8.5 in q8_0, about 4.8 in q4_k_m.",
    tests=["methods/exporters/gguf/test_gguf.py::test_a_file_answers_like_the_model"],
)
class GGUF(Exporter):
    """One file, model.gguf."""

    dtypes: ClassVar[tuple[str, ...]] = tuple(OF_DTYPE)
    library: ClassVar[str] = "gguf"
    relation: ClassVar[str] = "quantized"
    package: ClassVar[str] = "gguf"
    generates: ClassVar[bool] = True

    # how matrices are stored; f16 unless --dtype says otherwise. Those with a k, and q4_0, by llama.cpp
    quantization: Literal["f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "q3_k_m", ""] = ""

    def stored_as(self, source: Any) -> str:
        """How matrices are stored."""
        return self.quantization or OF_DTYPE[source.dtype or "float16"]

    def check(self, source):
        super().check(source)
        if self.quantization and source.dtype:
            raise RecipeError(
                f"--dtype {source.dtype} and quantization={self.quantization} both say how weights are"
                " stored; leave one of them out"
            )
        if _llama_cpp.find(_llama_cpp.CONVERTER) is None:
            check_config(source.loaded.model.config)

    def write(self, source, folder):
        kind = self.stored_as(source)
        if kind in FILE_TYPES:
            self.convert(source, folder / FILE, kind)
            return
        whole = source.scratch / "f16.gguf"
        self.convert(source, whole, "f16")
        _llama_cpp.quantize(whole, folder / FILE, kind)

    def convert(self, source: Any, path: Path, kind: str) -> None:
        """A file in one of the types that are written here."""
        try:
            if _llama_cpp.convert(source.plain, path, kind):
                source.notes.append("written by llama.cpp's convert_hf_to_gguf.py")
                return
        except RecipeError as error:
            if source.loaded.model.config.model_type not in ARCHITECTURES:
                raise
            source.notes.append(f"written by luthier, since {error}")
        name, stops = Path(source.loaded.recipe.model).name, source.stop_ids()
        with source.template_of_run() as tokenizer:
            write(source.plain, path, kind, name, lambda w, size: add_tokenizer(w, tokenizer, size, stops))

    def read(self, source, folder):
        return source.around(read(folder / FILE), read_tokenizer(folder / FILE))

    def limits(self, source, folder):
        return Limits(weights=ROUNDING.get(self.stored_as(source), COARSE))

    def usage(self, source, folder, place):
        path = f"{place}/{FILE}"
        server = Usage("llama.cpp", f"llama-cli -m {path}\nllama-server -m {path} --port 8080")
        package = f'from llama_cpp import Llama\n\nmodel = Llama("{path}")'
        return [server, Usage("llama-cpp-python", package, "python")]
