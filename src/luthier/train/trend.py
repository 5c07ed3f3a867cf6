"""Whether a run ended too early, too late, or about right: was the loss still falling, flat, or rising?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

FALLING = 0.02  # by this share of the loss, over the last half of the steps, it counts as falling
RISING = 0.01  # by this share above its lowest value it counts as risen
LEAST_CHANGE = 0.01  # nats: a smaller change is none, however small the loss
LEAST = 8  # steps of a run on which the held-out loss is measured on the way
WINDOW = 4  # the last and the last but one of so many parts of a log are compared


@dataclass(frozen=True)
class Trend:
    """How the loss, or a reward, moved toward the end of a run."""

    word: str  # falling, flat or rising
    text: str  # what was measured, as a clause
    lowest_step: int = 0  # where a loss that has risen was lowest


def checkpoints_of(total: int) -> set[int]:
    """The steps after which the held-out loss of a run of so many steps is measured: its quarters."""
    if total < LEAST:
        return set()
    return {math.ceil(total * part / 4) for part in (1, 2, 3)}


def held_out_trend(points: Sequence[tuple[int, float]]) -> Trend | None:
    """points: (step, held-out loss), ascending, the last one at the end of the run; None where fewer than
    three were measured.
    """
    points = [(step, loss) for step, loss in points if math.isfinite(loss)]
    if len(points) < 3:
        return None
    last_step, last = points[-1]
    lowest_step, lowest = min(points, key=lambda point: point[1])
    if last > lowest + max(LEAST_CHANGE, RISING * abs(lowest)):
        text = f"it was lowest after step {lowest_step:,} ({lowest:.3g}) and rose to {last:.3g}"
        return Trend("rising", text, lowest_step)
    step, middle = min(points[:-1], key=lambda point: abs(point[0] - last_step / 2))
    change = f"{middle:.3g} after step {step:,}, {last:.3g} at the end"
    if middle - last > max(LEAST_CHANGE, FALLING * abs(middle)):
        return Trend("falling", f"it was still falling ({change})")
    return Trend("flat", f"it was flat ({change})")


def logged_trend(values: Sequence[float]) -> Trend | None:
    """values: of each logged step. The last quarter against the one before; a change within twice its
    standard error is none. None of fewer than 16 values.
    """
    values = [value for value in values if math.isfinite(value)]
    size = len(values) // WINDOW
    if size < 4:
        return None
    before, last = values[-2 * size : -size], values[-size:]
    first_mean, last_mean = statistics.fmean(before), statistics.fmean(last)
    error = math.sqrt((statistics.variance(before) + statistics.variance(last)) / size)
    change = f"{first_mean:.3g} in the third quarter of the steps, {last_mean:.3g} in the last"
    gap = last_mean - first_mean
    if abs(gap) <= max(2 * error, FALLING * abs(first_mean)):
        return Trend("flat", f"it was flat ({change})")
    word = "falling" if gap < 0 else "rising"
    return Trend(word, f"it was still {word} ({change})")


def sentence(trend: Trend, what: str, key: str, length: float, steps: int, higher_is_better: bool) -> str:
    """A trend with advice. what: "held-out loss". key, length: `num_train_epochs` or `max_steps` and its
    value in this run, of so many steps.
    """
    text = f"{what} at the end: {trend.text}"
    improving = "rising" if higher_is_better else "falling"
    if trend.word == "flat":
        return f"{text}; training longer would change little"
    if trend.word == improving:
        return f"{text}; training longer may help ({key}={_format(key, 2 * length)})"
    if trend.lowest_step:
        fewer = _format(key, length * trend.lowest_step / max(1, steps))
        return f"{text}; fewer steps ({key}={fewer}) or a lower learning_rate would keep it lower"
    return f"{text}; a lower learning_rate may help"


def _format(key: str, value: float) -> str:
    if key == "max_steps":
        return f"{max(1, round(value))}"
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"
