"""ollama: a folder for `ollama create`: model.gguf and a Modelfile with template, stops and system prompt.

The chat template becomes a Go template where it writes every message of a role alike, as ChatML, Llama 3 and
most others do. Others are left to Ollama, which knows some of the templates that a GGUF file holds.
"""

from __future__ import annotations

from typing import Any, ClassVar

from luthier.methods.exporters._base import Usage
from luthier.methods.exporters.gguf._chat import pieces_of
from luthier.methods.exporters.gguf.gguf import FILE, GGUF
from luthier.registry import exporter
from luthier.storage import files


@exporter(
    use_when="the model should answer by `ollama run`.",
    costs="as `gguf`.",
    tests=["methods/exporters/gguf/test_ollama.py::test_a_modelfile_asks_as_the_template_does"],
)
class Ollama(GGUF):
    """A GGUF file and its Modelfile."""

    library: ClassVar[str] = "gguf"

    temperature: float = 0.0  # of sampling, written into the Modelfile

    def write(self, source, folder):
        super().write(source, folder)
        files.write_text(folder / "Modelfile", self.modelfile(source))

    def modelfile(self, source: Any) -> str:
        """What `ollama create` reads."""
        loaded = source.loaded
        lines = [f"FROM ./{FILE}", f"PARAMETER temperature {self.temperature:g}"]
        system = loaded.system
        if not loaded.turns:
            lines.append('TEMPLATE """{{ .Prompt }}"""')  # a text is continued as it is
        else:
            with source.template_of_run() as tokenizer:
                pieces = pieces_of(tokenizer)
            if pieces is None:
                source.notes.append(
                    "the chat template has no Go form here, so the Modelfile has none: Ollama takes its own"
                    " for the template in the file where it knows it; compare its answers"
                )
            else:
                lines.append(f'TEMPLATE """{pieces.go()}"""')
                system = system or pieces.system
            for token in source.stop_ids():
                stop = loaded.tokenizer.convert_ids_to_tokens(token)
                lines.append(f'PARAMETER stop "{stop}"')
        if system:
            lines.append(f'SYSTEM """{system}"""')
        return "\n".join(lines) + "\n"

    def usage(self, source, folder, place):
        name = source.folder.resolve().name.lower()
        return [Usage("Ollama", f"ollama create {name} -f {place}/Modelfile\nollama run {name}")]
