"""A question with choices and the right one, as MMLU, ARC, CommonsenseQA and HellaSwag hold them."""

from string import ascii_uppercase

from luthier.methods.formats._base import COMPLETIONS, BadRow, Format, first_of, opened, plain, text
from luthier.registry import row_format

QUESTIONS = ("question", "question_stem", "ctx")
CHOICES = ("choices", "options", "endings")
ANSWERS = ("answer", "answerKey", "answer_idx", "label")


@row_format(
    provides=[COMPLETIONS],
    use_when="rows are questions with `choices` and which of them is right, as exams hold them.",
)
class MultipleChoice(Format):
    """{"question": "2+2?", "choices": ["3", "4"], "answer": 1}; the answer is a place from 0, a letter or a
    choice's text.

    Also `options` and `endings`, `answerKey` and `label`, and choices as {"text": [...], "label": [...]} or
    {"A": "...", "B": "..."}. The prompt is the question, a line for each choice ("A. 3") and "Answer:"; the
    letter is learned, and kept as `answer`.
    """

    reading = "questions with choices, of which the letter of the right one is learned"
    columns = tuple(
        f"{question} {choices} {answer}"
        for question in QUESTIONS
        for choices in CHOICES
        for answer in ANSWERS
    )
    optional = "passage context"

    def read(self, raw):
        before = [text(raw, name) for name in ("passage", "context") if raw.get(name)]
        question = text(raw, first_of(raw, QUESTIONS, "question"))
        labels, texts = choices_of(raw)
        right = ascii_uppercase[place_of(raw, labels, texts)]
        lines = [f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, texts, strict=False)]
        prompt = "\n".join([*before, question, *lines, "Answer:"])
        space = "" if self.chat else " "
        return {"prompt": prompt, "completions": [space + right], "answer": right}


def choices_of(raw: dict) -> tuple[list[str], list[str]]:
    """The labels and the texts of the choices. Raises BadRow."""
    name = first_of(raw, CHOICES, "choices")
    value = opened(raw.get(name), name)
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        labels, texts = value.get("label") or list(ascii_uppercase), value["text"]
    elif isinstance(value, dict):
        labels, texts = list(value), list(value.values())
    elif isinstance(value, list) and all(isinstance(choice, dict) for choice in value):
        labels, texts = [choice.get("label") for choice in value], [choice.get("text") for choice in value]
    else:
        labels, texts = list(ascii_uppercase), value
    if not isinstance(texts, list) or not 2 <= len(texts) <= len(ascii_uppercase):
        raise BadRow(f"{name} is not a list of 2 to 26 choices")
    return [plain(label, name) for label in labels], [plain(choice, name) for choice in texts]


def place_of(raw: dict, labels: list[str], texts: list[str]) -> int:
    """Which choice is right: named by its label, by its text, or by its place from 0. Raises BadRow."""
    name = first_of(raw, ANSWERS, "answer")
    answer = plain(raw.get(name), name).strip()
    for names in (labels[: len(texts)], texts):
        if answer in names:
            return names.index(answer)
    if answer.isdigit() and int(answer) < len(texts):
        return int(answer)
    raise BadRow(f"{name} is {answer!r}, which is none of the {len(texts)} choices")
