"""Nearest class means in a fixed embedding, gathered by several clients without a gradient step: what a
network's states tell apart while classes keep arriving (federated reconnaissance).

An embedding is the state behind the prompt's last token. Each client sees rows of its own and sends the mean
and the number of its rows for every class; means of a class are merged by these numbers, which is the mean of
all rows however they were spread. A row is of the class with the nearest mean, by squared Euclidean distance,
among all classes so far. Half of the rows of each class teach, the others are asked for; classes arrive in
the order of their names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.evaluators._base import Evaluator, batches
from luthier.model.policy import eval_mode
from luthier.registry import Metric, evaluator

Means = Mapping[str, tuple[Tensor, int]]  # class -> mean [d] and number of rows
NUMBER = 4  # bytes of a number that a client sends


@evaluator(
    metrics=[
        Metric("prototype_accuracy", "accuracy by nearest class means", unit="%", better="higher", rank=6),
        Metric("prototype_bytes", "bytes that clients send", better="lower", rank=7),
    ],
    paper="arXiv:2109.00150",
    row="federated-reconnaissance",
    requires=[LOGPROBS],
    use_when="classes keep arriving, or at several places, and you ask how far a network's own states carry"
    " without any further training.",
    costs="one forward pass over up to `n` prompts.",
    covers="prototypes of clients, merged by their counts, accuracy over all classes so far after each number"
    " of classes, bytes that are sent.",
    omits="episodic training of the embedding, which here is any network before or after tuning; Omniglot,"
    " mini-ImageNet and the methods that it is compared with, so that nothing here shows an advantage over"
    " sequential tuning; time of an update.",
    tests=[
        "methods/evaluators/representation/test_prototypes.py::test_merged_means_are_those_of_all_rows",
        "methods/evaluators/representation/test_prototypes.py::test_later_classes_only_compete",
        "methods/evaluators/representation/test_prototypes.py::test_a_network_tells_letters_apart",
    ],
)
class Prototypes(Evaluator):
    """`prototype_accuracy` over all classes, `prototype_accuracy/N` over the first N when only these had
    arrived; `prototype_bytes`: what all clients send.
    """

    column: str = "answer"  # column that names the class of a row
    clients: Annotated[int, Field(ge=1)] = 4  # among whom the teaching rows are spread
    n: Annotated[int, Field(ge=4)] = 256  # rows
    batch_size: int | None = None  # rows read at once; by default 16, and more where they are short

    def run(self, roles, rows, folder, when):
        rows = [row for row in rows if row["prompt"] and row.get(self.column) is not None][: self.n]
        places: dict[str, list[int]] = {}
        for place, row in enumerate(rows):
            places.setdefault(str(row[self.column]), []).append(place)
        classes = sorted(name for name, own in places.items() if len(own) > 1)
        if len(classes) < 2:
            return {}
        states = self.states(roles, rows)
        teach, ask = {}, {}
        for name in classes:
            own = torch.stack([states[str(rows[place]["id"])] for place in places[name]])
            teach[name], ask[name] = own[::2], own[1::2]
        messages = []
        for client in range(self.clients):
            parts = {name: x[client :: self.clients] for name, x in teach.items()}
            messages.append(means({name: x for name, x in parts.items() if len(x)}))
        whole = merged(messages)
        out = {"prototype_bytes": float(sum(map(bytes_of, messages)))}
        for count in range(2, len(classes) + 1):
            some = {name: whole[name] for name in classes[:count]}
            out[f"prototype_accuracy/{count}"] = accuracy(some, {name: ask[name] for name in some})
        return {**out, "prototype_accuracy": out[f"prototype_accuracy/{len(classes)}"]}

    @torch.no_grad()
    def states(self, roles, rows: Sequence[dict]) -> dict[str, Tensor]:
        """Row id -> [d] the last layer's state behind the prompt."""
        out: dict[str, Tensor] = {}
        blank = [{**row, "completions": ["."], "scores": [1.0]} for row in rows]
        for batch in batches(roles, blank, self.batch_size):
            with eval_mode(roles.policy.model):
                last = list(roles.policy.layers(batch))[-1]
            names = [str(row["id"]) for row in batch.rows]
            out |= dict(zip(names, last[batch.place == 0].double().cpu(), strict=True))
        return out


def means(rows: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, int]]:
    """Class -> rows [n, d] -> its mean and n: what a client sends."""
    return {name: (x.mean(0), len(x)) for name, x in rows.items()}


def merged(several: Iterable[Means]) -> dict[str, tuple[Tensor, int]]:
    """The means of all rows that these are of."""
    out: dict[str, tuple[Tensor, int]] = {}
    for message in several:
        for name, (mean, count) in message.items():
            if name in out:
                other, more = out[name]
                mean, count = (more * other + count * mean) / (more + count), more + count
            out[name] = (mean, count)
    return out


def bytes_of(message: Means) -> int:
    """A mean and a count for each class."""
    return sum((mean.numel() + 1) * NUMBER for mean, _ in message.values())


def nearest(whole: Means, x: Tensor) -> list[str]:
    """Of rows [n, d], the class with the nearest mean."""
    names = list(whole)
    centres = torch.stack([whole[name][0] for name in names])
    return [names[k] for k in torch.cdist(x, centres).argmin(1).tolist()]


def accuracy(whole: Means, queries: Mapping[str, Tensor]) -> float:
    """The share of rows whose own class is nearest."""
    right = total = 0
    for name, x in queries.items():
        right += nearest(whole, x).count(name)
        total += len(x)
    return right / total
