"""urial: what the prompt holds, and where the answer ends."""

from __future__ import annotations

from types import SimpleNamespace

from helpers.models import make_tokenizer
from luthier.methods.decoders.prompts.urial import URIAL


def test_the_prompt_holds_examples_and_query():
    decoder = URIAL()
    text = decoder.prompt({"prompt": [{"role": "user", "content": "Why is the sky blue?"}]})
    assert text.startswith(decoder.preamble) and text.count("# Query:\n") == 4
    assert text.endswith("# Query:\nWhy is the sky blue?\n\n# Answer:\n")
    for example in decoder.examples:
        assert f"# Query:\n{example['query']}\n\n# Answer:\n{example['answer']}\n" in text
    none = URIAL(examples=[], preamble="")
    assert none.prompt({"prompt": "Hi"}) == "\n# Query:\nHi\n\n# Answer:\n"


def test_earlier_turns_stand_as_examples_do():
    turns = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello!"), ("user", "Bye")]
    prompt = [{"role": role, "content": content} for role, content in turns]
    text = URIAL(examples=[], preamble="").prompt({"prompt": prompt})
    assert text == "\n# Query:\nBe kind.\n\nHi\n\n# Answer:\nHello!\n\n# Query:\nBye\n\n# Answer:\n"


def roles_that_write(answer: str):
    """A policy that writes a text after any prompt, as far as the decoder lets it."""
    import torch

    from helpers.decoding import TablePolicy

    tokenizer = make_tokenizer()
    ids = [*tokenizer.encode(answer), tokenizer.eos_token_id]
    prompts = []

    class Scripted(TablePolicy):
        def generate(self, texts, **how):
            prompts.append(texts)
            self.table = lambda text: row(len(text) - len(texts[0]))
            return super().generate(texts, **how)

    def row(place: int):
        p = torch.full((262,), 1e-9)
        p[ids[min(place, len(ids) - 1)]] = 1.0
        return p.tolist()

    read = lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True)
    renderer = SimpleNamespace(tokenizer=tokenizer, text=read, answer=read)
    return SimpleNamespace(policy=Scripted(row), renderer=renderer), prompts


def test_the_answer_ends_at_the_next_query():
    roles, prompts = roles_that_write("It is blue.\n\n# Query:\nAnd now?\n\n# Answer:\nNo")
    how = {"seeds": [0], "max_new_tokens": 60, "temperature": 0.0, "stop": [1]}
    ((answer,),) = URIAL().generate(roles, [{"prompt": "Why?"}], [[5]], **how)
    assert roles.renderer.answer(answer) == "It is blue." and answer[-1] == 1
    assert roles.renderer.tokenizer.decode(prompts[0][0]).endswith("Why?\n\n# Answer:\n")
    roles, _ = roles_that_write("Short.")
    ((answer,),) = URIAL().generate(roles, [{"prompt": "Why?"}], [[5]], **how)
    assert roles.renderer.answer(answer) == "Short."
