"""Just One Byte: MeZO in several processes that send each other one byte for a gradient.

Every micro-batch of every process has a direction of its own, which follows from (seed, step, number of the
micro-batch), and is measured on its own rows. What is sent is the slope along it, as one signed byte on a
logarithmic scale: sign and round(8 ln |slope|), from -63 to 63, so a slope is off by at most 6.5 % within
exp(+-7.9). All processes regenerate all directions and take the same step from the same bytes in the same
order, so their weights stay alike bit for bit without ever being compared. The bytes of a run lie in its
checkpoints; `replay` computes the weights from those of the start and the bytes alone.

Departs: the paper's code keeps sixteenths of a power, which do not fit beside the sign, and sends the
floating-point number; here eighths do, and the byte is what is sent and what is applied. The step is the mean
over directions unless `divide_by: root`, as in the paper's code. Every process reads the same number of
micro-batches, where the paper's read as many as they can in a given time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch

from luthier.clock import Clock
from luthier.methods.estimators._base import FORWARD_ONLY
from luthier.methods.estimators.zeroth_order.mezo import MeZO
from luthier.processes.group import ALONE
from luthier.registry import estimator

if TYPE_CHECKING:
    from luthier.train.optimizer import Chain

LEVELS = 8  # of a power of e
LARGEST = 63  # power, in levels
STORE = "bytes"  # under this name the log lies in the state of the first parameter group


@estimator(
    paper="arXiv:2306.10015",
    row="just-one-byte",
    provides=[FORWARD_ONLY],
    example={"n_probes": 1},
    use_when="you train with `mezo` on machines between which hardly anything can be sent.",
    costs="two forward passes for each micro-batch, and for each one of all processes a direction drawn anew"
    " for the step; one byte sent for each.",
    starting_rate="that of `mezo`.",
    covers="one byte a micro-batch is what is sent and applied; replicas stay alike bit for bit; the weights"
    " follow from the start and the bytes, exactly; a single process without rounding is `mezo`.",
    omits="machines that join or leave during a run (they start from a checkpoint, or replay its bytes by a"
    " function); as many rows as fit into a given time; the sums for a run's log (losses) are sent"
    " beside the bytes.",
    tests=[
        "methods/estimators/zeroth_order/test_just_one_byte.py::test_a_slope_is_one_byte",
        "methods/estimators/zeroth_order/test_just_one_byte.py::test_replicas_stay_alike_and_are_replayed",
        "methods/estimators/zeroth_order/test_just_one_byte.py::test_without_rounding_one_process_is_mezo",
        "methods/estimators/zeroth_order/test_just_one_byte.py::test_it_points_along_the_gradient",
    ],
)
class JustOneByte(MeZO):
    """MeZO with a direction for each micro-batch, whose slope is one byte."""

    # what the sum over directions is divided by: their number (the mean), or its square root
    divide_by: Literal["count", "root"] = "count"
    one_byte: bool = True  # round each slope to a byte; false: send it in full

    def step(self, closure, chain, clock):
        processes = closure.trainer.processes if hasattr(closure, "trainer") else ALONE
        losses, slopes = [], []
        for index, loss in enumerate(own_losses(closure)):
            first = (processes.index + index * processes.count) * self.n_probes
            for number in range(first, first + self.n_probes):
                losses += self.sides(loss, chain, clock, number)
                slopes.append(self.slope(*losses[-2:]))
        own: Any = slopes
        if self.one_byte:
            own = torch.tensor([encoded(slope) for slope in slopes], dtype=torch.int8).numpy().tobytes()
        codes = in_turn(processes.gather(own), self.n_probes)
        if self.one_byte:
            codes = torch.frombuffer(bytearray(codes), dtype=torch.int8).tolist() if codes else []
            remember(chain, codes)
        self.apply(codes, chain, clock)
        if note := getattr(closure, "note", None):
            note({"slope_bytes": float(len(own) if self.one_byte else 8 * len(own))})
        total, count = processes.sum(torch.tensor([sum(losses), len(losses)], dtype=torch.float64)).tolist()
        return total / max(count, 1)

    def apply(self, codes: Sequence[float], chain: Chain, clock: Clock) -> None:
        """The step that follows from the codes of all directions: bytes, or slopes where these are sent in
        full.
        """
        count = len(codes) if self.divide_by == "count" else len(codes) ** 0.5
        slopes = [float(code) for code in codes]
        if self.one_byte:
            slopes = [restored(int(code)) for code in codes]
        if slopes:
            self.step_along([slope / count for slope in slopes], chain, clock)


def own_losses(closure: Any) -> list[Callable[[], float]]:
    """What gives the loss of each micro-batch of this process; a closure without any is one."""
    if not hasattr(closure, "own_loss"):
        return [lambda: closure(grad=False)]
    return [partial(closure.own_loss, index) for index in range(len(closure.batches))]


def encoded(slope: float) -> int:
    """-127..127; 0 stands for zero alone."""
    if not slope:
        return 0
    power = max(-LARGEST, min(LARGEST, round(LEVELS * math.log(abs(slope)))))
    return int(math.copysign(power + LARGEST + 1, slope))


def restored(code: int) -> float:
    """The slope that a byte stands for."""
    if not code:
        return 0.0
    return math.copysign(math.exp((abs(code) - LARGEST - 1) / LEVELS), code)


def in_turn(shares: Sequence[Any], size: int) -> Any:
    """What processes have, `size` of each in turn: the order of the micro-batches of the step."""
    joined = shares[0][:0]
    for first in range(0, max(map(len, shares)), size):
        for own in shares:
            joined += own[first : first + size]
    return joined


# --------------------------------------------------------------------------------------------------- the log


def remember(chain: Chain, codes: Sequence[int]) -> None:
    """Put the bytes of a step into the optimizer's state, and so into checkpoints."""
    first = chain.param_groups()[0].name  # makes the state that is read next
    state = chain.state.setdefault(first, {}).setdefault(STORE, {})
    for key, values, dtype in (("codes", codes, torch.int8), ("counts", [len(codes)], torch.int32)):
        state[key] = torch.cat(
            [state.get(key, torch.zeros(0, dtype=dtype)), torch.tensor(values, dtype=dtype)]
        )


def log_of(state: Mapping[str, Any]) -> list[list[int]]:
    """The bytes of each step so far, from an optimizer's state as a checkpoint has it."""
    for group in state.values():
        if STORE in group:
            parts = group[STORE]["codes"].split(group[STORE]["counts"].tolist())
            return [part.tolist() for part in parts]
    return []


def replay(method: JustOneByte, log: Sequence[Sequence[int]], chain: Chain) -> None:
    """Take the steps of a log, from the weights of its start, without reading a row."""
    for codes in log:
        remember(chain, codes)
        method.apply(codes, chain, chain.clock)
        chain.clock.step += 1
