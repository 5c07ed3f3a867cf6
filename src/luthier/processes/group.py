"""The processes that train together: they add up numbers, and they fail together.

A collective operation that one process does not come to never ends. So whatever a process fails of, it goes
to the others' next one and says so there: every small sum has a place for the number of processes that have
failed, and costs no operation more for it. All then raise the same error, and may go on with another run.
Only where a process is gone, or the others wait for it in the middle of a large sum, is there nothing to go
to: the lifeline then ends each of them with the sentence.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from luthier.errors import RecipeError, from_code
from luthier.processes import launcher
from luthier.processes.lifeline import INTERRUPTED, LOST, PATIENCE, Fault, Lifeline, describe, lost

SMALL = 256  # numbers of a small sum, of which the first says how the processes are
WELL, FAILED, LEAVING = 0, 1, 2**20  # how a process is; the last is more than all that fail
BUCKET = 2**22  # numbers that are added up in one operation


class Processes:
    """All processes of a run, as one of them sees them; alone it is all of them."""

    def __init__(self, index: int = 0, count: int = 1, lifeline: Lifeline | None = None):
        self.index, self.count = index, count
        self.lifeline = lifeline or Lifeline(index, count) if count > 1 else None
        self.device = torch.device("cpu")
        self._broken = False  # can the others no longer be reached?
        self._within = False  # is this process amid a sum of gradients?
        self._agreed: Exception | None = None  # what all processes have raised

    @property
    def main(self) -> bool:
        """Is it the one that writes files and talks?"""
        return self.index == 0

    # ------------------------------------------------------------------------------------------ collectives

    def sum(self, x: Tensor) -> Tensor:
        """The sum over processes of a few numbers. Raises what another process has failed of."""
        if self.count == 1:
            return x
        flat = x.detach().flatten().to(self.device, torch.float64)
        parts = [self._small_sum(flat[: SMALL - 1])]
        if len(flat) >= SMALL:
            rest = flat[SMALL - 1 :].clone()
            self._add(rest)
            parts.append(rest)
        return torch.cat(parts).view(x.shape).to(x)

    def sum_named(
        self, values: dict[str, tuple[float, float]], names: list[str]
    ) -> dict[str, tuple[float, float]]:
        """Name -> sum and count, over processes. Not all need have the same names.

        names: those that all processes know, the same list in all of them; new ones are added to it.
        """
        if self.count == 1:
            return values
        new = sorted(values.keys() - set(names))
        totals, others = self._sum_of(values, names, len(new))
        if others:
            for part in self.gather(new):
                names += [name for name in part if name not in names]
            totals, _ = self._sum_of(values, names, 0)
        return totals

    def _sum_of(
        self, values: dict[str, tuple[float, float]], names: list[str], new: int
    ) -> tuple[dict[str, tuple[float, float]], float]:
        """The sums of known names, and how many new ones all processes have."""
        numbers = [float(new)]
        for name in names:
            numbers += [float(number) for number in values.get(name, (0.0, 0.0))]
        new_names, *summed = self.sum(torch.tensor(numbers, dtype=torch.float64)).tolist()
        totals = {}
        for i, name in enumerate(names):
            if name in values or summed[2 * i + 1]:
                totals[name] = (summed[2 * i], summed[2 * i + 1])
        return totals, new_names

    def sum_gradients(self, params: Sequence[torch.nn.Parameter]) -> None:
        """Gradients summed over processes. A tensor that no process reached has none, as in one process."""
        if self.count == 1:
            return
        # a small sum, which also says that all processes are here and well
        reached = self.sum(torch.tensor([float(p.grad is not None) for p in params]))
        self._within = True  # whatever goes wrong from here on, the others wait for all of it
        grads = []
        for p, somewhere in zip(params, reached.tolist(), strict=True):
            if somewhere:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                grads.append(p.grad)
        self._sum_in_place(grads)
        self._within = False

    def _sum_in_place(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums, many in one operation."""
        buckets: dict[Any, list[Tensor]] = {}
        for tensor in tensors:
            if tensor.numel() >= BUCKET and tensor.is_contiguous():
                self._add(tensor)
                continue
            bucket = buckets.setdefault((tensor.dtype, tensor.device), [])
            bucket.append(tensor)
            if sum(t.numel() for t in bucket) >= BUCKET:
                self._sum_bucket(bucket)
                bucket.clear()
        for bucket in buckets.values():
            self._sum_bucket(bucket)

    def _sum_bucket(self, tensors: Sequence[Tensor]) -> None:
        if not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        self._add(flat)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view(tensor.shape))

    def gather(self, value: Any) -> list[Any]:
        """What each process has, in their order; the same list in all of them."""
        if self.count == 1:
            return [value]
        self.wait_for_all()
        return self._gather(value)

    def broadcast(self, value: Any) -> Any:
        """The first process's value, in every process: they must not part ways over it."""
        if self.count == 1:
            return value
        self.wait_for_all()
        values = [value]
        with self._collective():
            torch.distributed.broadcast_object_list(values)
        return values[0]

    def wait_for_all(self) -> None:
        """Until every process is here. Raises what another one has failed of."""
        if self.count > 1:
            self._small_sum(torch.zeros(0))

    def _small_sum(self, numbers: Tensor, state: int = WELL) -> Tensor:
        message = torch.zeros(SMALL, dtype=torch.float64, device=self.device)
        message[0] = state
        message[1 : 1 + len(numbers)] = numbers
        self._add(message)
        states = int(message[0])
        if state != LEAVING and states >= LEAVING:
            self._broken = True
            raise RecipeError("another process of this run has ended early; run the same command again", LOST)
        if state == WELL and states:
            raise self._exchange(None)
        return message[1 : 1 + len(numbers)]

    def _add(self, tensor: Tensor) -> None:
        with self._collective():
            torch.distributed.all_reduce(tensor)

    def _gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.count
        with self._collective():
            torch.distributed.all_gather_object(values, value)
        return values

    @contextmanager
    def _collective(self) -> Iterator[None]:
        """An operation to which every process must come; where one is gone, the error says so."""
        if self._broken:
            raise self._lost(0.0)
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            self._broken = True
            raise self._lost(PATIENCE) from error

    def _lost(self, patience: float) -> RecipeError:
        """The error of a process whose others are gone."""
        fault = None
        if self.lifeline is not None:
            fault = self.lifeline.wait(patience)
        if fault is None:
            message = lost(self.index, self.count).message
            message = message.replace(f"rank {self.index} of {self.count} processes", "another process")
            return RecipeError(message, LOST)
        return from_code(fault.code, describe(fault, self.index, self.count))

    # ------------------------------------------------------------------------------------------ failing

    def agree(self, error: Exception) -> Exception:
        """Tell the others what this process fails of, and learn what they do. Returns what to raise: the same
        error in all of them, the first's where several fail of different things.
        """
        if self.count == 1 or error is self._agreed or self._broken:
            return error
        fault = self._report(error)
        if self._within:  # the others wait for the rest of a sum, and will be ended
            self._broken = True
            return error
        try:
            self._small_sum(torch.zeros(0), FAILED)
            outcome = self._exchange(fault)
        except RecipeError:  # they are gone
            return error
        if (fault.code, fault.message) == (outcome.code, str(outcome)):
            self._agreed = error
        return self._agreed or error

    def _report(self, error: Exception) -> Fault:
        code, message = "crash", f"{type(error).__name__}: {error}"
        if isinstance(error, RecipeError):
            code, message = error.code, str(error)
        number = self.lifeline.report(code, message) if self.lifeline else 0
        return Fault(self.index, number, code, message)

    def _exchange(self, own: Fault | None) -> RecipeError:
        """What all processes raise, where some have said that they fail. own: what this one fails of."""
        faults = [fault for fault in self._gather(own) if fault is not None]
        if self.lifeline is not None:
            self.lifeline.settle([(fault.rank, fault.number) for fault in faults])
        first = faults[0]
        message = describe(first, self.index, self.count)
        if own is not None and (own.code, own.message) == (first.code, first.message):
            message = own.message
        outcome = from_code(first.code, message)
        self._agreed = outcome
        return outcome

    def wait_before_leaving(self) -> None:
        """After an error that all have agreed on: until every process is here, such as the one that writes it
        down.
        """
        if self.count > 1 and not self._broken:
            with suppress(RecipeError):
                self.wait_for_all()

    @contextmanager
    def watching(self, on_end: Callable[[Fault], None]) -> Iterator[None]:
        """While a run goes on in its folder. on_end: what to do where the lifeline ends this process."""
        if self.lifeline is None:
            yield
            return
        former, self.lifeline.on_end = self.lifeline.on_end, on_end
        try:
            yield
        finally:
            self.lifeline.on_end = former

    def leave(self) -> None:
        """At the end of this process. Who leaves first, or leaves threads waiting, makes the others abort;
        after an error there is nobody to wait for.
        """
        if self.lifeline is None or not torch.distributed.is_initialized():
            return
        error = getattr(sys, "last_value", None)
        if error is not None and error is not self._agreed:
            self.interrupt("has ended early, with an error of its own")
        if not self._broken:
            with suppress(Exception):
                self._small_sum(torch.zeros(0), LEAVING)
        self.lifeline.close()
        with suppress(Exception):
            torch.distributed.destroy_process_group()

    def interrupt(self, reason: str) -> None:
        """Tell the others that this process leaves them, and why: `was interrupted`."""
        if self.lifeline is not None and not self._broken:
            self._broken = True
            self.lifeline.report(INTERRUPTED, reason)


ALONE = Processes()
_current = ALONE


def current() -> Processes:
    """Those that this process is one of; it alone where it was not started with others."""
    return _current


def join() -> Processes:
    """Meet the other processes, once. Raises RecipeError where they are to do what luthier does not."""
    global _current
    launcher.check_sharding()
    if _current is not ALONE or not launcher.several():
        return _current
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    cpu = not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    state: Any = PartialState(cpu=cpu)
    if state.num_processes == 1:
        return ALONE
    processes = Processes(state.process_index, state.num_processes)
    if "gloo" not in torch.distributed.get_backend():
        processes.device = state.device
    _connect(processes)
    _current = processes
    atexit.register(processes.leave)
    return processes


def _connect(processes: Processes) -> None:
    """Every process to the first one. Where that is not possible, only collective operations will tell."""
    lifeline: Any = processes.lifeline
    address = None
    if processes.main:
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        for place in (host, ""):
            with suppress(OSError):
                address = lifeline.listen(place)
                address = type(address)(host, address.port, address.token)
                break
    address = processes.broadcast(address)
    if address is not None and not processes.main:
        with suppress(OSError):
            lifeline.connect(address)
    processes.wait_for_all()


@contextmanager
def together() -> Iterator[Processes]:
    """With the other processes: whatever one of them fails of within, all raise."""
    processes = join()
    if processes.lifeline is None:
        yield processes
        return
    with processes.lifeline.watching():
        try:
            yield processes
        except Exception as error:
            outcome = processes.agree(error)
            if outcome is error:
                raise
            raise outcome from error
        except BaseException as error:
            processes.interrupt(f"was interrupted ({type(error).__name__})")
            raise
