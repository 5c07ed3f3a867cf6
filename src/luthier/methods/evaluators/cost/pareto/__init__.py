"""The Pareto-optimal sub-networks of an elastic run (no other is both cheaper and better), searched on
held-out rows after training by LINAS.

The costs are the loss and the multiplications per token. Some sub-networks are measured; a regression on
their one-hot choices predicts the loss of others; NSGA-II on these predictions proposes the next to measure,
and so on. Multiplications are counted, not predicted. `pareto.json` in the run's folder has each sub-network
with both costs and its shape, for `luthier.load(folder).roles.tuner.export(shape, folder)`. Departs from the
paper: kernel ridge regression instead of support vectors beside the linear one; the better of them is chosen
by leave-one-out instead of five folds.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.evaluators._base import Evaluator, batches, liked
from luthier.methods.evaluators.cost.pareto.genetic import Genes, guided, search
from luthier.methods.evaluators.cost.pareto.predictor import predicted
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.tuners.pruned.elastic import ELASTIC
from luthier.registry import Artifact, Metric, evaluator
from luthier.storage import files


@evaluator(
    metrics=[
        Metric("pareto_size", "sub-networks on the front", better="higher"),
        Metric("pareto_cheapest_loss", "loss of the cheapest sub-network", better="lower"),
        Metric("pareto_cheapest_share", "cost of the cheapest sub-network", unit="%", better="lower"),
    ],
    artifacts=[Artifact("pareto.json", says="each sub-network with its loss, cost and shape")],
    paper="arXiv:2308.15609",
    row="instatune",
    requires=[ELASTIC, COMPLETIONS, LOGPROBS],
    use_when="a run with tuner `elastic` has ended and you want its best smaller networks.",
    costs="a forward pass over `n` rows for each of up to `population` * (`generations` + 1) sub-networks.",
)
class Pareto(Evaluator):
    """`pareto_size`, and of the cheapest member `pareto_cheapest_loss` and `pareto_cheapest_share` of the
    multiplications.
    """

    population: Annotated[int, Field(ge=2)] = 16  # sub-networks per generation
    generations: Annotated[int, Field(ge=0)] = 4  # number of generations, each with as many children
    n: Annotated[int, Field(ge=1)] = 64  # held-out rows that are read
    predictor: bool = True  # select children by predicted loss over many generations before measuring them
    # whether layers may differ; if not, a sub-network can be exported as a plain model
    per_layer: bool = False

    def run(self, roles, rows, folder, when):
        if when != "after":
            return {}
        attached, some = roles.tuner, liked(rows)[: self.n]
        heads, widths, depths = attached.units()
        layers = len(attached.anatomy.layers) if self.per_layer else 1
        choices = [len(heads), len(widths)] * layers + [len(depths)]

        def shape(genes: Genes):
            pairs = [(heads[genes[2 * i]], widths[genes[2 * i + 1]]) for i in range(layers)]
            return attached.shape(
                pairs if self.per_layer else pairs * len(attached.anatomy.layers), depths[genes[-1]]
            )

        def cost(genes: Genes) -> tuple[float, float]:
            with attached.playing(shape(genes)):
                losses = [-roles.policy.logprobs(b) for b in batches(roles, some, 16)]
            return sum(float(s.sum()) for s in losses) / max(1, sum(len(s) for s in losses)), float(
                attached.macs(shape(genes))
            )

        ends = [tuple(n - 1 for n in choices), (0,) * len(choices)]
        how = (self.population, self.generations, roles.clock.rng("pareto", at=0), ends)

        def guess(measured):
            loss = predicted(choices, list(measured), [c[0] for c in measured.values()])
            return lambda genes: (loss(genes), float(attached.macs(shape(genes))))

        best = guided(choices, cost, guess, *how) if self.predictor else search(choices, cost, *how)
        whole = attached.macs(attached.anatomy.whole)
        table = [
            {"loss": a, "macs": b, "share": b / whole, "shape": shape(g)}
            for g, (a, b) in sorted(best.items(), key=lambda x: x[1][1])
        ]
        files.write_json(folder / "pareto.json", table)
        return {
            "pareto_size": float(len(table)),
            "pareto_cheapest_loss": table[0]["loss"],
            "pareto_cheapest_share": table[0]["share"],
        }
