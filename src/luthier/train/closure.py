"""What an estimator calls: the loss of a step's global batch, and its gradient.

The loss is, for each term of the objective, the average over all its units in the global batch, however the
batch is split into micro-batches and over processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from luthier.errors import out_of_memory
from luthier.kernels.lora import CASTS
from luthier.methods.transforms._base import joint_norm
from luthier.model.batch import Batch
from luthier.train import checks

if TYPE_CHECKING:
    from luthier.train.trainer import Trainer


class MicroBatchTooLarge(MemoryError):
    """Memory ran out while a micro-batch was read: smaller ones may do."""


LOSS = "\0loss"  # in a sum by names: none of an objective's


class PendingNumbers:
    """Numbers of a step that a GPU has not computed yet: read all at once, since each reading waits for it.
    Those of a CPU are there already.
    """

    def __init__(self):
        self.waiting: list[tuple[Callable[[float], None], torch.Tensor]] = []

    def add(self, take: Callable[[float], None], value: torch.Tensor | float) -> None:
        """take: is called with the number, now or when all are read."""
        if torch.is_tensor(value) and not value.is_cpu:
            self.waiting.append((take, value))
        else:
            take(float(value))

    def read(self) -> None:
        """Read all, in the order in which they were added."""
        waiting, self.waiting = self.waiting, []
        if not waiting:
            return
        wide = torch.float64 if any(x.dtype == torch.float64 for _, x in waiting) else torch.float32
        numbers = torch.stack([x.to(wide).reshape(()) for _, x in waiting]).tolist()
        for (take, _), number in zip(waiting, numbers, strict=True):
            take(number)


def every_term(index: int, name: str) -> float:
    """The default of `only`: all terms of an objective, at their own weights."""
    return 1.0


class LossClosure:
    """The loss of a step's global batch; with grad, its gradient in p.grad of what moves.

    A call is `begin`, `micro_batch` for each of them, and `end`; batched LoRA runs make these in turn.
    """

    def __init__(self, trainer: Trainer, batches: list[Batch]):
        """batches: this process's micro-batches."""
        self.trainer, self.batches = trainer, batches
        self.metrics: dict[str, float] = {}
        self.values: dict[str, float] = {}  # each term's own average, by name, as of the last call
        self.names = [objective.name for _, objective in trainer.objective.terms()]
        sizes = torch.zeros(len(batches), len(self.names) + 3, dtype=torch.float64)
        for row, batch in zip(sizes, batches, strict=True):
            for i, (_, objective) in enumerate(trainer.objective.terms()):
                row[i] = float(objective.divisor(batch))
            row[-3], row[-2], row[-1] = len(batch.ids), len(batch.owner), len(batch.rows)
        *self.units, tokens, supervised, rows = trainer.processes.sum(sizes.sum(0)).tolist()
        self.counts = {"tokens": int(tokens), "supervised": int(supervised), "rows": int(rows)}

    def note(self, metrics: Mapping[str, float]) -> None:
        """Further numbers for the log."""
        self.metrics.update(metrics)

    def __call__(self, grad: bool = True, only: Callable[[int, str], float] = every_term) -> float:
        """only: (index, name) of a term -> how much it counts; 0 leaves it out, True is its own weight.

        Raises MicroBatchTooLarge where memory runs out.
        """
        try:
            self.begin(grad)
            for i in range(len(self.batches)):
                self.micro_batch(i, grad, only)
            return self.end(grad, only)
        except (RuntimeError, MemoryError) as error:
            if out_of_memory(error):
                raise MicroBatchTooLarge(str(error)) from None
            raise

    def row_gradients(self) -> Iterator[None]:
        """One row of this process after another: in p.grad the gradient of its own loss, each term the
        average over the row's units, whatever else is in the batch. Micro-batches are of one row.

        `end(grad=False)` then gives the mean of these losses. Raises MicroBatchTooLarge where memory runs
        out.
        """
        trainer, units = self.trainer, self.units
        tuner, terms = trainer.roles.tuner, trainer.objective.terms()
        self.begin(grad=True)
        for i, batch in enumerate(self.batches):
            for p in tuner.parameters().values():
                p.grad = None
            self.units = [float(objective.divisor(batch)) for _, objective in terms]
            try:
                self.micro_batch(i)
            except (RuntimeError, MemoryError) as error:
                if out_of_memory(error):
                    raise MicroBatchTooLarge(str(error)) from None
                raise
            finally:
                self.units = units
            last = i == len(self.batches) - 1
            if not trainer.gradient_checked:
                trainer.gradient_checked = checks.check_gradient(tuner, not last or self._may_be_flat())
            yield
        self.pending.read()
        rows = max(1, self.counts["rows"])
        self.total /= rows
        self.term_totals = [total / rows for total in self.term_totals]

    def own_loss(self, index: int) -> float:
        """The loss of one of this process's micro-batches by itself, without gradients: each term the average
        over its own units. Nothing is summed over processes. Raises MicroBatchTooLarge where memory runs out.
        """
        units = self.units
        batch, terms = self.batches[index], self.trainer.objective.terms()
        self.begin(grad=False)
        self.units = [float(objective.divisor(batch)) for _, objective in terms]
        try:
            self.micro_batch(index, grad=False)
            self.pending.read()
        except (RuntimeError, MemoryError) as error:
            if out_of_memory(error):
                raise MicroBatchTooLarge(str(error)) from None
            raise
        finally:
            self.units = units
        return self.total

    def begin(self, grad: bool) -> None:
        """Clear the sums, and gradients if there are to be new ones."""
        self.total = 0.0
        self.term_totals = [0.0] * len(self.names)
        self.sums: dict[str, tuple[float, int]] = {}  # metric -> sum and count
        self.pending = PendingNumbers()
        if grad:
            for p in self.trainer.roles.tuner.parameters().values():
                p.grad = None

    def micro_batch(
        self,
        index: int,
        grad: bool = True,
        only: Callable[[int, str], float] = every_term,
        outputs: Mapping[str, Any] | None = None,
    ) -> None:
        """Add one micro-batch. outputs: role -> its outputs, where they are there already."""
        trainer, clock = self.trainer, self.trainer.roles.clock
        batch = self.batches[index].view(metrics={})
        batch.read.update(outputs or {})
        # dropout: alike in every call of a step, and on any number of processes
        number = trainer.processes.index + index * trainer.processes.count  # in the global batch
        torch.manual_seed(clock.derive_seed("noise", number, 0))
        with torch.set_grad_enabled(grad), CASTS.once():
            loss: Any = 0.0
            for i, (weight, objective) in enumerate(trainer.objective.terms()):
                factor = only(i, objective.name)
                if not factor:
                    continue
                values = objective.loss(trainer.roles, batch)
                checks.check_unit_count(values, objective, batch)
                if values.is_cpu:
                    checks.check_finite(values.detach(), objective.name, clock.step, batch)
                term = values.sum() / (self.units[i] or 1.0)
                loss = loss + float(factor) * weight * term
                self.pending.add(partial(self._add_term, i, batch), term.detach())
            if torch.is_tensor(loss):
                self.pending.add(self._add_loss, loss.detach())
                if grad and loss.requires_grad:
                    loss.backward()
        for name, (value, count) in batch.metrics.items():
            self.pending.add(partial(self._add_metric, name, count), value)

    def _add_term(self, index: int, batch: Batch, value: float) -> None:
        checks.check_finite(torch.tensor(value), self.names[index], self.trainer.roles.clock.step, batch)
        self.term_totals[index] += value

    def _add_loss(self, value: float) -> None:
        self.total += value

    def _add_metric(self, name: str, count: int, value: float) -> None:
        total, n = self.sums.get(name, (0.0, 0))
        self.sums[name] = (total + value, n + count)

    def _may_be_flat(self) -> bool:
        """May the gradient of this batch be zero though nothing is wrong? So it is where an objective
        compares completions by their scores and those of each row are equal.
        """
        if "samples" in self.trainer.objective.requires:
            return True
        if "scores" not in self.trainer.objective.requires:
            return False
        for batch in self.batches:
            if any(len(set(row.get("scores", ()))) > 1 for row in batch.rows):
                return False
        return True

    def end(self, grad: bool = True, only: Callable[[int, str], float] = every_term) -> float:
        """Sum over processes, check the first gradient of a run, and return the loss."""
        trainer, roles = self.trainer, self.trainer.roles
        moving = []
        if grad:
            for group in roles.tuner.param_groups():
                moving += [p for p in group.params.values() if p.requires_grad]
        # the averages are global already: gradients only add up
        if trainer.processes.count > 1 and grad:
            trainer.processes.sum_gradients(moving)
        if moving and moving[0].is_cuda:
            trainer.prefetch()  # while the device is still computing what is read below
            if trainer.estimator.single_backward:
                grads = [p.grad for p in moving if p.grad is not None]
                self.pending.add(trainer.chain.note_norm, joint_norm(grads))
        self.pending.read()
        if grad and only is every_term and not trainer.gradient_checked and self.counts["rows"]:
            trainer.gradient_checked = checks.check_gradient(roles.tuner, self._may_be_flat())
        # one sum for the losses and for all that objectives noted
        values: dict[str, tuple[float, float]] = {LOSS: (self.total, 1)}
        for i, total in enumerate(self.term_totals):
            values[f"{LOSS}{i}"] = (total, 1)
        totals = trainer.processes.sum_named({**values, **self.sums}, trainer.names)
        terms = [totals[f"{LOSS}{i}"][0] for i in range(len(self.names))]
        self.values = dict(zip(self.names, terms, strict=True))
        for name, (value, count) in totals.items():
            if not name.startswith(LOSS):
                self.metrics[name] = value / max(count, 1)
        if len(self.names) > 1:
            self._note_terms(terms, only)
        return totals[LOSS][0]

    def _note_terms(self, terms: list[float], only: Callable[[int, str], float]) -> None:
        """The loss of each term that was computed, for the log."""
        losses: dict[str, float] = {}
        for i, name in enumerate(self.names):
            if only(i, name):
                losses[f"loss/{name}"] = losses.get(f"loss/{name}", 0.0) + terms[i]
        self.metrics.update(losses)
