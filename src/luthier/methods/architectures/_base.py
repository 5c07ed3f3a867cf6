"""The kind's protocol: how a kind of model reads batches and generates completions. Objectives do not depend
on it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from luthier.compat.activations import add_activations
from luthier.compat.lazy_imports import import_models, unfilled, waiting
from luthier.registry import Capability, family

if TYPE_CHECKING:
    from luthier.clock import Clock
    from luthier.methods.tuners._base import TunedModel
    from luthier.model.batch import Batch
    from luthier.model.generate import Writer
    from luthier.model.network import Network
    from luthier.model.outputs import Outputs
    from luthier.text.encode import Encoded, EncodedAll, Renderer

LOGPROBS = Capability("logprobs", says="a network that gives token log-probabilities")
ENTROPY = Capability("entropy", says="a network that gives a distribution over tokens")
TOPK = Capability("topk", says="a network with a vocabulary to compare")
HIDDEN = Capability("hidden", says="a network that gives hidden states")
GENERATE = Capability("generate", says="a network that generates text")
EMBEDDINGS = Capability("embeddings", says="a network that reads mixed token embeddings (a causal one)")
VALUES = Capability("values", says="a network that gives numbers, not text (architecture `reward_model`)")


ANSWER_TOKENS = Capability(
    "answer_tokens", says="a network whose answers are texts of tokens (not a classifier)"
)
LABEL_HEAD = Capability("label_head", says="a head for classes or numbers (architecture `classifier`)")
SOFT_PROMPTS = Capability("soft_prompts", says="a network that reads vectors before the text")
FIXED_TARGETS = Capability(
    "fixed_targets", says="a model whose input for a row is the same at every step (not a masked_lm)"
)


@family
class Architecture:
    """Family: one file defines how such a model is loaded, reads a batch and generates."""

    def suits(self, config: Any) -> bool:
        """Is a checkpoint with this transformers config of this kind? Asked when the recipe says `auto`."""
        raise NotImplementedError

    def auto_class(self) -> Any:
        """The transformers Auto class that loads it."""
        raise NotImplementedError

    def fit_to(self, rows: list[dict]) -> dict[str, Any]:
        """What the data says about the network: further keyword arguments for `load` (a classifier's
        classes).
        """
        return {}

    def tokenizer(self, path: str) -> Any:
        """What turns text into tokens, from a model's folder or hub name. Of a network that reads no text:
        what reads its images or recordings (text/media.py), which has no token of its own.
        """
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)

    def renderer(self, tokenizer: Any, config: Any, **how: Any) -> Renderer:
        """What turns rows into tokens for this kind of network. how: max_length, chat_template."""
        raise NotImplementedError

    def load(self, path: str, **kwargs: Any) -> Network:
        """The network with its weights, from a folder or hub name. kwargs go to from_pretrained.

        `model.fresh` names the modules whose weights no checkpoint held, such as a new classifier's head.
        """
        import_models()
        add_activations()
        kwargs |= {"trust_remote_code": False, "output_loading_info": True}
        with waiting():
            try:
                with unfilled():
                    model, report = self.auto_class().from_pretrained(path, **kwargs)
            # a network that mixes ranges with other numbers while it is laid out: slower, and the same
            except RuntimeError as error:
                if "meta" not in str(error):
                    raise
                model, report = self.auto_class().from_pretrained(path, **kwargs)
        absent = [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
        model.fresh = sorted({key.rsplit(".", 1)[0] for key in absent})
        return model

    def check_network(self, model: Network) -> None:
        """Raise RecipeError where a network that was loaded cannot be read as this architecture reads."""

    def left_out(self, model: Network) -> str | None:
        """A regular expression of the modules that `target_modules: all-linear` does not reach."""
        return None

    def encode(self, row: dict, renderer: Renderer) -> Encoded:
        """A row's tokens and which of them are asked about."""
        return renderer.encode(row)

    def encode_all(self, rows: list[dict], renderer: Renderer) -> EncodedAll:
        """Every row once: those that can be used, those that cannot with the reason, and statistics."""
        return renderer.encode_all(rows)

    def forward(self, model: Network, attached: TunedModel, batch: Batch) -> Outputs:
        """Read a batch and answer its questions."""
        raise NotImplementedError

    def plain(self, model: Network, attached: TunedModel, batch: Batch) -> Tensor:
        """[T] log-probabilities the slow, obvious way: one sequence at a time through the model's own
        forward.
        """
        raise NotImplementedError

    @property
    def reading(self) -> str:
        """How batches are read, in words: "packed", "padded"."""
        return "padded"

    def simpler(self) -> Architecture | None:
        """The same with one shortcut less, to fall back on; None where none is left."""
        return None

    def crowded(self) -> Architecture:
        """The same as it is tried out: with everything that can happen in a large batch happening in a small
        one.
        """
        return self

    def shares_prefixes(self, attached: TunedModel) -> bool:
        """Is what rows begin with in common read once in evaluation, where it is long?"""
        return False

    def shared_tokens(self, model: Network, attached: TunedModel, batch: Batch) -> tuple[int, str | None]:
        """How many tokens of a batch are read with another row's, as both begin alike; and why not in
        training, where that is so.
        """
        return 0, None

    def why_not_joined(self, model: Network) -> str | None:
        """Why batches of several runs on one base cannot be read in one pass (train/batched_forward.py); None
        where they can, by `laid_out_jointly` and `answer`.
        """
        return "only causal language models with the same layout can be"

    def ask(self, batch: Batch, renderer: Renderer, clock: Clock) -> Batch:
        """The batch as it is asked at this step: networks that fill gaps hide tokens here."""
        return batch

    def writer(self, model: Network, attached: TunedModel) -> tuple[Writer, int | None]:
        """(what writes with this network, how many tokens it has positions for, None: any number)."""
        raise NotImplementedError(f"architecture '{type(self).__name__}' cannot generate text")

    def generate(
        self, model: Network, attached: TunedModel, prompts: list[list[int]], **how: Any
    ) -> list[list[list[int]]]:
        """Completions of each prompt (see model/generate.py)."""
        raise NotImplementedError(f"architecture '{type(self).__name__}' cannot generate text")
