"""BitFit: trains only the biases.

The initial biases are stored, so disabling the tuner gives the base bit for bit. Networks without biases
(Llama, Mistral, ...) are refused: `also: [norms]` trains the weights of their norms instead.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import nn

from luthier.errors import RecipeError
from luthier.methods.tuners._base import DISABLE_ADAPTER, MERGE, Tuner
from luthier.methods.tuners.subset._subset import TunedWeights, head_of
from luthier.registry import tuner


@tuner(
    paper="arXiv:2106.10199",
    provides=[DISABLE_ADAPTER, MERGE],
    use_when="the model has biases (BERT, GPT-2, OPT) and each task's copy must be tiny, below 0.1 %"
    " of the parameters. Llama-like models have none: there `also: [norms]` trains the norms.",
    costs="gradients and optimizer state of the biases alone; merged, inference costs nothing more.",
    starting_rate="about ten times that of full fine-tuning; the paper tries 1e-4 to 1e-3.",
    default_rate=5e-4,
)
class BitFit(Tuner):
    """Every bias of the network, and the weights in `also`."""

    on_quantized: ClassVar[bool] = True  # biases and norms are no codes

    # further weights to train: of norms, of the output head (a classifier's: all above its base network)
    also: tuple[Literal["norms", "head"], ...] = ()

    def attach(self, model):
        norms = [
            m for m in model.modules() if isinstance(m, nn.LayerNorm) or type(m).__name__.endswith("Norm")
        ]
        modules = norms if "norms" in self.also else []
        if "head" in self.also:
            modules = [*modules, *head_of(model, "bitfit")]
        moving = {id(p) for m in modules for p in m.parameters(recurse=False)}
        moving |= {id(p) for n, p in model.named_parameters() if n.rpartition(".")[2] == "bias"}
        if not moving:
            raise RecipeError(
                f"tuner 'bitfit': {type(model).__name__} has no biases; try `also: [norms]`, or 'ssf', which"
                " adds shifts"
            )
        return TunedWeights(self, model, lambda name, p: id(p) in moving, keep_start=True)
