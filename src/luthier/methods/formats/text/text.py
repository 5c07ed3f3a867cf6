"""Plain text to continue: every token is supervised."""

from luthier.methods.formats._base import COMPLETIONS, Format, text
from luthier.registry import row_format


@row_format(
    provides=[COMPLETIONS],
    use_when="rows are plain text to continue: pretraining further on documents or code.",
)
class Text(Format):
    """{"text": "Once upon a time ..."}. Rows longer than max_length are cut into consecutive pieces."""

    reading = "plain text to continue; every token is learned"
    columns = ("text",)
    generic = True

    def read(self, raw):
        return {"prompt": "", "completions": [text(raw, "text")]}
