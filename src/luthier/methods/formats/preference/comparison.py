"""Two responses, and a column that says which one was preferred: arenas, SafeRLHF, HelpSteer."""

from luthier.methods.formats._base import PAIRS, BadRow, Format, alike, first_of, numbers, plain, side, tools
from luthier.registry import row_format

# the two responses and the verdict, as public sets name them
SHAPES = (
    "response_a response_b winner",
    "answer_a answer_b winner",
    "conversation_a conversation_b winner",
    "response_0 response_1 better_response_id",
    "response_1 response_2 preference_strength",
)
FIRST = {"model_a", "response_a", "answer_a", "a", "left"}
SECOND = {"model_b", "response_b", "answer_b", "b", "right"}


@row_format(
    provides=[PAIRS],
    use_when="rows have two responses and which one won, as arenas and rating tools write them.",
)
class Comparison(Format):
    """{"prompt": "Hi", "response_a": "Hello!", "response_b": "What?", "winner": "model_a"}.

    Also conversation_a and conversation_b (LMSYS), response_0, response_1 and better_response_id
    (PKU-SafeRLHF), response_1, response_2 and preference_strength (HelpSteer: below zero the first is
    better). Ties are set aside.
    """

    reading = "two responses, and which of them was preferred"
    objective = "dpo"
    columns = tuple(f"prompt {s}" for s in SHAPES) + tuple(f"question {s}" for s in SHAPES) + (SHAPES[2],)
    optional = "tools"

    def read(self, raw):
        *sides, verdict = next(shape.split() for shape in SHAPES if set(shape.split()) <= raw.keys())
        responses = [side(raw[name], name) for name in sides]
        if responses[0] == responses[1]:
            raise BadRow(f"{sides[0]} and {sides[1]} are the same")
        if second_won(raw[verdict], verdict):
            responses.reverse()
        name = first_of(raw, ("prompt", "question"))
        prompt = side(raw[name], name) if name else responses[0][:1]
        prompt, completions = alike(prompt, *responses)
        return {"prompt": prompt, "completions": completions, "scores": [1.0, 0.0], "tools": tools(raw)}


def second_won(value, name: str) -> bool:
    """Whether a verdict names the second response. Raises BadRow for a tie and for what cannot be read."""
    if name == "preference_strength":
        strength = numbers([value], name)[0]
        if strength == 0:
            raise BadRow(f"{name} is a tie")
        return strength > 0
    if name == "better_response_id":
        if value not in (0, 1):
            raise BadRow(f"{name} is {value!r}, not 0 or 1")
        return value == 1
    word = plain(value, name).strip().lower()
    if word in SECOND:
        return True
    if word in FIRST:
        return False
    if word.startswith("tie") or word.startswith("both"):
        raise BadRow(f"{name} is a tie")
    raise BadRow(f"{name} is {value!r}; model_a, model_b or tie is expected")
