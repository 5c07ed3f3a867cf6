"""A sentence in two languages, as the hub's translation sets hold it."""

from luthier.methods.formats._base import COMPLETIONS, BadRow, Format, kind_of, opened, text, unusable
from luthier.registry import row_format


@row_format(
    provides=[COMPLETIONS],
    use_when="rows hold a sentence in several languages, as WMT's and Opus's sets on the hub do.",
)
class Translation(Format):
    """{"translation": {"en": "Hello", "fr": "Bonjour"}}: from `source_lang` to `target_lang`; without these
    from the first language of a row to its second.

    The prompt says so (`prefix`, empty for models that translate anyway) and ends with a line break (not with
    `chat: true`).
    """

    reading = "a sentence in two languages, the second is learned (source_lang, target_lang: others)"
    columns = ("translation",)
    source_lang: str = ""  # the language to translate from; default: the first of a row
    target_lang: str = ""  # the language to translate to; default: the next one of a row
    prefix: str = "Translate from {source} to {target}: "  # what the prompt begins with

    def read(self, raw):
        sides = opened(raw.get("translation"), "translation")
        if not isinstance(sides, dict):
            raise unusable(sides, "translation", f"is {kind_of(sides)}, not an object of languages")
        named = [name for name, value in sides.items() if value is not None]
        if len(named) < 2:
            raise BadRow("translation has fewer than two languages")
        source = self.source_lang or next(name for name in named if name != self.target_lang)
        target = self.target_lang or next(name for name in named if name != source)
        begin = self.prefix.replace("{source}", source).replace("{target}", target)
        return {"prompt": begin + text(sides, source) + self.prompt_end, "completions": [text(sides, target)]}
