"""A question and its answer, worked out or short: to train on, and to check sampled answers against."""

from luthier.methods.formats._base import COMPLETIONS, BadRow, Format, first_of, opened, plain, text
from luthier.registry import row_format


@row_format(
    provides=[COMPLETIONS],
    use_when="rows are questions with worked answers, as in GSM8K or SQuAD-like sets.",
)
class QuestionAnswer(Format):
    r"""{"question": "...", "answer": "48/2 = 24 ...\n#### 24"}, as GSM8K writes them; a passage or context
    comes first.

    The prompt ends with a line break, so that the answer begins on its own line (not with `chat: true`). The
    completion is the whole answer; `answer` becomes what follows the last ####, or the answer itself. Of a
    list of answers the first is learned, all are kept in `answers`; SQuAD's {"text": [...]} and
    [{"text": ...}, ...] are such lists.
    To sample instead: columns: {prompt: question}.
    """

    reading = "`answer` answers `question`"
    columns = ("question answer", "question answers")
    optional = "passage context"

    def read(self, raw):
        before = [text(raw, name) for name in ("passage", "context") if raw.get(name)]
        name = first_of(raw, ("answer",), "answers")
        answer = opened(raw.get(name), name)
        several = None
        if isinstance(answer, dict) and isinstance(answer.get("text"), list):
            answer = answer["text"]
        if isinstance(answer, dict):
            raise BadRow(f"{name} is an object, not text")
        if isinstance(answer, list):
            answer = [entry.get("text") if isinstance(entry, dict) else entry for entry in answer]
            if not answer:
                raise BadRow(f"{name} is empty")
            several, answer = answer, answer[0]
        solution = final = plain(answer, name, ("yes", "no"))
        if "####" in solution:
            final = solution.rsplit("####", 1)[-1].strip()
        prompt = "\n\n".join([*before, text(raw, "question")]) + self.prompt_end
        return {"prompt": prompt, "completions": [solution], "answer": final, "answers": several}
