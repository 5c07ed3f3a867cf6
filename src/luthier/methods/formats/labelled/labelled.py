"""A text, or two, and its class: the completion is the label's name."""

from luthier.methods.formats._base import LABELLED, BadRow, Format, as_list, first_of, opened, plain, text
from luthier.registry import row_format

PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("s1", "s2"), ("question1", "question2"))


@row_format(
    provides=[LABELLED],
    use_when="rows are texts with a class, as in GLUE: `text` and `label`, or two sentences.",
)
class Labelled(Format):
    """{"text": "a fine film", "label": 1}; also sentence, sequence, or two sentences; also several `labels`,
    and numbers.

    The prompt ends with a line break, so that the label begins on its own line (not with `chat: true`). Two
    sentences are joined by a line break too, and kept apart in `texts`. `label_name`, where there is one, is
    what the completion says.
    """

    reading = "texts with a class, `label`; its name is learned as the answer"
    advice = "or architecture: classifier, which gives each class a score"
    columns = (
        "text label",
        "sentence label",
        "sequence label",
        "text labels",
        *(f"{a} {b} label" for a, b in PAIRS),
    )

    def read(self, raw):
        pair = next((p for p in PAIRS if raw.get(p[0]) is not None and raw.get(p[1]) is not None), ())
        one = first_of(raw, ("text", "sentence", "sequence"), "text")
        texts = [text(raw, name) for name in pair or (one,)]
        row = {"prompt": "\n".join(texts) + self.prompt_end, **label_of(raw)}
        if pair:
            row["texts"] = texts
        return row


def label_of(raw: dict) -> dict:
    """{"completions": the label's name, "label"} of a raw row. Raises BadRow where it has none."""
    label = opened(raw.get(first_of(raw, ("label",), "labels")), "label")
    empty = label == [] and raw.get("label", label) is None  # beside a label that is null
    if label is None or empty:
        raise BadRow("label is missing")
    names = raw.get("label_name") or ", ".join(plain(each, "label") for each in as_list(label))
    return {"completions": [names], "label": label}
