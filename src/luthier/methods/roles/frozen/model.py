"""Another model, frozen: a teacher, a separate reference, a reward model. It reads the policy's tokens, so
both need the same tokenizer. A run's folder or an exported adapter loads as that tuned model. For a teacher
with another tokenizer, stage `teacher_spans` and objective `alm` compare spans of text instead.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

from luthier.errors import RecipeError
from luthier.methods.architectures._base import LABEL_HEAD
from luthier.methods.roles._base import Role
from luthier.methods.tuners._base import Untuned
from luthier.model.policy import Policy
from luthier.recipe.model_names import resolve_model
from luthier.registry import build, role

AnyQuantizer = Annotated[Any, BeforeValidator(lambda v: v if v is None else build("quantizer", v))]


@role(
    use_when="another model is to teach, to be the reference or to score: a folder, a run, an adapter"
    " or a hub name with the policy's tokenizer.",
    costs="that model in memory; `quantization: nf4` takes about a quarter of 16 bits.",
)
class Model(Role):
    """Loaded with the policy's architecture and precision; its tokenizer must be the policy's."""

    constant = True

    model: str = "toy:lm"  # folder of a model, a run or an adapter; Hub name, or toy:NAME
    quantization: AnyQuantizer = None  # quantizer of its linear weights, e.g. nf4; null: none

    def __post_init__(self):
        if self.quantization is not None and (self.quantization.reads or self.quantization.whole):
            raise RecipeError(
                "a role's weights are quantized one tensor at a time, which quantizer"
                f" '{self.quantization.name}' does not support; use nf4, fp4 or int8"
            )
        if self.quantization is not None and self.tuned:
            raise RecipeError(
                f"role 'model': {self.model} was tuned on its own quantized base; leave quantization out"
            )

    @property
    def tuned(self) -> bool:
        """Is it a run's folder or an adapter's?"""
        return any(
            (Path(self.model).expanduser() / file).is_file()
            for file in ("recipe.yaml", "report.json", "adapter_config.json")
        )

    def reads(self, name, tokenizer):
        from transformers import AutoTokenizer

        try:
            folder = self.model if self.tuned else resolve_model(self.model)
            other = AutoTokenizer.from_pretrained(folder, trust_remote_code=False).get_vocab()
        except (OSError, ValueError, ImportError):
            return  # a folder of weights alone: its size is compared when it is loaded
        own = tokenizer.get_vocab()
        # that it knows more tokens does no harm
        if differ := [token for token in own if own[token] != other.get(token)]:
            words = (
                f"{len(own):,} and {len(other):,} tokens"
                if len(own) != len(other)
                else f"{len(own):,} tokens each"
            )
            raise RecipeError(
                f"roles.{name}: {self.model} and the policy have different tokenizers ({words};"
                f" {len(differ):,} tokens differ, e.g. {differ[0]!r}), but a role reads the"
                " policy's tokens. To distill across tokenizers: `stages: [{name:"
                f" teacher_spans, model: {self.model}}}]` with `objective: alm`"
            )

    def play(self, name, policy):
        own = next(policy.model.parameters())
        if self.tuned:
            from luthier.model.loaded import load

            other = load(self.model, dtype=str(own.dtype).removeprefix("torch.")).roles.policy
            network, attached = other.model.to(own.device).eval().requires_grad_(False), other.attached
        else:
            path = resolve_model(self.model)
            if self.quantization is None:
                try:
                    network = policy.architecture.load(path, dtype=own.dtype).to(own.device)
                except RecipeError as error:
                    raise RecipeError(f"roles.{name}: {error}") from None
            else:
                from luthier.model.quantized_load import loaded

                network = loaded(
                    lambda **kwargs: policy.architecture.load(path, **kwargs),
                    self.quantization,
                    own.dtype,
                    own.device,
                    None,
                )
            network = network.eval().requires_grad_(False)
            attached = Untuned(network)
        words = [vocabulary_of(m) for m in (network, policy.model)]
        if words[0] != words[1]:
            raise RecipeError(
                f"roles.{name}: {self.model} has {words[0]} tokens and the policy {words[1]};"
                " they must have the same tokenizer"
            )
        if LABEL_HEAD in policy.architecture.provides:
            theirs, ours = (list(m.config.label2id) for m in (network, policy.model))
            if theirs != ours:
                raise RecipeError(
                    f"roles.{name}: {self.model} knows the classes {', '.join(theirs[:4])} and the policy"
                    f" {', '.join(ours[:4])}; they must be the same, in one order"
                )
        return Policy(policy.architecture, network, attached, name, nullcontext)


def vocabulary_of(network: Any) -> int | None:
    """How many tokens a network has embeddings for; None where it reads no tokens."""
    weight = getattr(network.get_input_embeddings(), "weight", None)
    return None if weight is None else len(weight)
