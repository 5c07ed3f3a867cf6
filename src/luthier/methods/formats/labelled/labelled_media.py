"""An image or a recording and its class, as in `datasets`: `image` or `audio`, and `label`."""

from typing import ClassVar

from luthier.methods.formats._base import LABELLED, BadRow, Format
from luthier.methods.formats.labelled.labelled import label_of
from luthier.registry import row_format

# columns of other formats: a row that has one of them says in words what is to be learned
TEXTS = frozenset(
    "text texts prompt question query instruction input sentence sequence messages conversations chosen"
    " rejected completion completions answer response".split()
)


@row_format(
    provides=[LABELLED],
    use_when="rows are images or recordings with a class: `image` or `audio`, and `label`.",
)
class LabelledMedia(Format):
    """{"image": path, bytes or a PIL image, "label": 3}; {"audio": {"array", "sampling_rate"}, "label":
    "yes"}; also several `labels`. `label_name`, where there is one, is what the class is called.
    """

    reading = "images or recordings with a class, `label`"
    advice = "with a model that reads them: architecture image_classifier, audio_classifier or audio_text"
    columns = tuple(
        f"{media} {label}"
        for media in ("images", "image", "audios", "audio")
        for label in ("label", "labels")
    )
    optional: ClassVar[str] = "label_name images audios"
    generic = True

    @classmethod
    def fit(cls, columns):
        columns = set(columns)
        return 0 if columns & TEXTS else super().fit(columns)

    def read(self, raw):
        row = label_of(raw)
        for name, kind in (("images", "image"), ("audios", "recording")):
            paths = raw.get(name)
            if not paths:
                continue
            if len(paths) != 1:
                raise BadRow(f"{name} has {len(paths)} of them, and a label belongs to one {kind}")
            return {"prompt": "", name: paths, **row}
        name = "image" if raw.get("image") is not None else "audio"
        raise BadRow(f"{name} is no file that can be read: {str(raw.get(name))[:80]}")
