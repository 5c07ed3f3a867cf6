"""Any sequence classifier of transformers as a reward: one label's probability, a regression, or several
heads with weights.

For encoders (sentiment, toxicity, DeBERTa reward models that read question and answer as a pair) and for
classifiers with several outputs, each a quality of its own, of which a weighted sum is taken.
"""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from luthier.errors import RecipeError
from luthier.methods.rewards._base import Reward
from luthier.registry import did_you_mean, reward


@reward(
    use_when="a published classifier or scorer says what is good: sentiment, toxicity, quality in several"
    " respects.",
    costs="the classifier in memory and a forward pass over each completion.",
)
class Classifier(Reward):
    """A number from the logits of each text."""

    model: str = ""  # folder of a model or Hub name
    label: str | int = 0  # the label whose number counts: its name, or its place
    # weight of several labels by name; their sum is the score and `label` is not used
    weights: dict[str, float] | None = None
    # what counts: the logit (a regression's value), the probability among all labels, or of one alone
    output: Literal["logit", "softmax", "sigmoid"] = "logit"
    # what is read: prompt and text as a pair, the text alone, or the chat template's turns
    input: Literal["pair", "text", "chat"] = "pair"
    max_length: Annotated[int, Field(ge=1)] = 512  # tokens that are read
    batch_size: Annotated[int, Field(ge=1)] = 16  # texts per forward pass

    def scores(self, row: dict, texts: list[str]) -> list[float]:
        tokenizer, model = classifier(self.model)
        weights, out = self.label_weights(model.config.label2id, model.config.num_labels), []
        for i in range(0, len(texts), self.batch_size):
            inputs = self.inputs(tokenizer, row, texts[i : i + self.batch_size]).to(model.device)
            with torch.no_grad():
                logits = model(**inputs).logits.float()
            if self.output == "softmax":
                logits = logits.softmax(-1)
            if self.output == "sigmoid":
                logits = logits.sigmoid()
            out += (logits @ weights.to(logits.device)).tolist()
        return out

    def label_weights(self, places: dict[str, int], count: int) -> torch.Tensor:
        """[labels] how much each counts."""
        weights = torch.zeros(count)
        for label, weight in (self.weights or {str(self.label): 1.0}).items():
            place = places.get(label, int(label) if label.isdigit() else count)
            if place >= count:
                labels = ", ".join(places)
                hint = did_you_mean(label, places)
                raise RecipeError(
                    f"reward 'classifier': {self.model} has no label '{label}'{hint}; it has {labels}"
                )
            weights[place] = weight
        return weights

    def inputs(self, tokenizer: Any, row: dict, texts: list[str]) -> Any:
        """Tokens of some texts with the row's prompt."""
        how = {"padding": True, "truncation": True, "max_length": self.max_length, "return_tensors": "pt"}
        prompt = row["prompt"]
        turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        if self.input == "chat":
            chats = [[*turns, {"role": "assistant", "content": text}] for text in texts]
            plain = [tokenizer.apply_chat_template(each, tokenize=False) for each in chats]
            return tokenizer(plain, add_special_tokens=False, **how)
        if self.input == "text":
            return tokenizer(texts, **how)
        question = "\n".join(str(turn["content"]) for turn in turns)
        return tokenizer([question] * len(texts), texts, **how)


@cache
def classifier(model: str) -> tuple[Any, Any]:
    """The tokenizer and the network, loaded once. Raises RecipeError where there is none."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from luthier.recipe.model_names import resolve_model

    if not model:
        raise RecipeError("reward 'classifier': set `model` to a folder or a Hub name")
    path = resolve_model(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        network = AutoModelForSequenceClassification.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise RecipeError(f"reward 'classifier': {model} cannot be loaded: {error}") from None
    if network.config.pad_token_id is None:
        network.config.pad_token_id = tokenizer.pad_token_id
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return tokenizer, network.to(device).eval()
