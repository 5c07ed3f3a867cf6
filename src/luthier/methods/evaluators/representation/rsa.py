"""How much training changed each layer's representation of the rows: representational similarity analysis,
before against after.

For every layer, the mean hidden state of each row is compared with that of every other row by cosine; the
correlation of these similarities between the untuned and the tuned model is 1 where the layer's similarities
are unchanged. Similarities from before training are stored in the run folder. Telly's study finds that only
the top two layers change much.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.evaluators._base import Evaluator, liked
from luthier.methods.formats._base import COMPLETIONS
from luthier.model.anatomy import layer_of
from luthier.model.layout import rows_apart
from luthier.registry import Artifact, Metric, evaluator


@evaluator(
    metrics=[Metric("rsa", "similarity of representations to those before training")],
    artifacts=[Artifact("rsa.safetensors", says="similarities of the rows before training")],
    paper="arXiv:2304.05216",
    row="telly-k",
    requires=[COMPLETIONS, LOGPROBS],
    use_when="you ask which layers training changed, for example to freeze the others (tuner `telly`).",
    costs="one forward pass over `n` rows, before and after.",
    covers="how alike layers are before and after.",
    tests=[
        "methods/evaluators/representation/test_rsa.py::test_rsa_is_pearsons_correlation_of_likenesses",
        "methods/evaluators/representation/test_rsa.py::test_rsa_sees_which_layers_changed",
    ],
)
class RSA(Evaluator):
    """`rsa/N` of layer N counted from the input, and their mean `rsa`: 1 at the start."""

    n: Annotated[int, Field(ge=3)] = 48  # rows

    def run(self, roles, rows, folder, when):
        path, now = Path(folder) / "rsa.safetensors", pictures(roles, liked(rows)[: self.n])
        if not path.is_file():
            save_file(now, str(path))
        then = load_file(str(path))
        metrics = {
            f"rsa/{k}": correlation(then[k], v)
            for k, v in now.items()
            if then[k].shape == v.shape and len(v) > 1
        }
        return {**metrics, "rsa": sum(metrics.values()) / len(metrics)} if metrics else {}


def pictures(roles, rows: list[dict]) -> dict[str, Tensor]:
    """Layer number -> [pairs] the cosine of each pair of rows."""
    layers: dict[tuple, torch.nn.Module] = {}
    for name, module in roles.policy.model.named_modules():
        place = layer_of(f"{name}.")
        if place and name == f"{place[0]}.{place[1]}":
            layers[place] = module
    means: dict[tuple, list[Tensor]] = {place: [] for place in layers}

    def see(place: tuple):
        def hook(module, args, y) -> None:
            h = y[0] if isinstance(y, tuple) else y
            means[place].append(h.detach().float().flatten(0, -2).mean(0).cpu())

        return hook

    hooks = [m.register_forward_hook(see(place)) for place, m in layers.items()]
    try:
        with torch.no_grad(), rows_apart():
            for row in rows:  # one at a time: a hidden state is of this row
                roles.policy.logprobs(roles.batch([row]))
    finally:
        for h in hooks:
            h.remove()
    return {
        str(i): cosines(torch.stack(h)) for i, h in enumerate(means.values()) if len(h) == len(rows) and h
    }


def cosines(h: Tensor) -> Tensor:
    """[n, d] -> [n (n - 1) / 2] the cosine of every two rows."""
    h = h / h.norm(dim=1, keepdim=True).clamp(min=1e-12)
    one, other = torch.triu_indices(len(h), len(h), 1)
    return (h @ h.T)[one, other].contiguous()


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's."""
    return float(torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1].clamp(-1, 1))
