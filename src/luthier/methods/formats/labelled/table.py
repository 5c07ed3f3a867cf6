"""Rows of a table as {column: value}, with the column that is asked about: as text, `age is 40; sex is M`."""

from luthier.methods.formats._base import LABELLED, BadRow, Format, opened
from luthier.methods.formats._tables import FEATURES, TARGET, answer, question
from luthier.registry import row_format


@row_format(
    provides=[LABELLED, FEATURES, TARGET],
    use_when="rows are those of tables: `features` is an object of columns, `target` the one to predict.",
)
class Table(Format):
    """{"features": {"age": 40, "sex": "M", "ill": "no"}, "target": "ill"}; any column may be the target.

    `background` (a sentence about the table) and `meanings` ({column: what it means}) come before the row.
    Numbers stay text; what is null or empty is read as unknown.
    """

    reading = "rows of tables; one column is predicted from the others"
    columns = ("features target",)
    generic = True  # rows that were read once already have prompts, of this row alone or of more
    optional = "background meanings"

    def read(self, raw):
        features, target = opened(raw.get("features"), "features"), raw.get("target")
        if not isinstance(features, dict) or len(features) < 2:
            raise BadRow("features is not an object with two columns or more")
        if target not in features:
            raise BadRow(f"target {target!r} is not a column of features")
        meanings = opened(raw.get("meanings"), "meanings")
        if meanings is not None and not isinstance(meanings, dict):
            raise BadRow("meanings is not an object of columns")
        row = {
            "features": features,
            "target": target,
            "background": raw.get("background"),
            "meanings": meanings,
        }
        value = answer(row)
        prompt = question(row)
        if self.chat:
            return {**row, "prompt": prompt, "completions": [value]}
        return {**row, "prompt": prompt, "completions": [f" {value}"]}
