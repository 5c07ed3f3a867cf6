"""All requests in one running batch: they join it when there is room, and leave it at their last token.

One thread does all the computing. What it is handed and what it hands back passes through `Job`: a prompt
with as many samples as are wanted, and a function that is called with each piece of text.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from luthier.errors import RecipeError, out_of_memory
from luthier.kernels.prepacked import prepacked
from luthier.model.continuous import Reading, SequenceBatch
from luthier.model.generate import uniforms_of
from luthier.serve.co_serving import CoServing
from luthier.serve.server.sampling import Draw, Sampler, Sampling, TokenLogprobs
from luthier.serve.server.text_stream import TextStream
from luthier.text.structured_outputs import Follower

LONGEST_WAIT = 60  # seconds that a client is told to wait at most before it tries again


class Busy(Exception):
    """There are too many requests. retry_after: seconds after which it is worth trying again."""

    def __init__(self, message: str, retry_after: int):
        super().__init__(message)
        self.retry_after = retry_after


class Stopping(Exception):
    """The server is ending, and takes no more requests."""


@dataclass(frozen=True)
class Piece:
    """What a job hears of one of its samples."""

    sample: int
    text: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()
    tokens: int = 0  # written so far, the stop token included
    finish_reason: str | None = None  # stop or length, with the last piece
    error: Exception | None = None  # with which the whole job ended


@dataclass(eq=False)
class Job:
    """A prompt, and n samples of what comes after it."""

    served: Any  # ServedModel
    tokens: list[int]
    settings: Sampling
    put: Callable[[Job, Piece], None]  # hears each piece
    n: int = 1
    seed: int = 0  # from which each sample draws
    special: bool = False  # special tokens are a part of the text
    follower: Follower | None = None  # at the beginning of the structure that each sample must have
    canceled: bool = False
    reused: int = 0  # tokens of the prompt that were not read again
    running: int = 0  # samples that are being written
    begun_at: float = 0.0

    @property
    def columns(self) -> int:
        """Tokens that a sample of it takes at most."""
        return len(self.tokens) + self.settings.max_tokens


@dataclass(eq=False)
class Written:
    """A sample that is being written."""

    job: Job
    sample: int
    stream: TextStream
    draw: Draw
    last: int = 0  # the token that the network has not read yet
    finished: bool = False


@dataclass(eq=False)
class Group:
    """Models that share a network, and so a batch."""

    batch: SequenceBatch
    model: Any
    limit: int | None  # tokens that it has positions for; None: any number
    needed: Callable[[int], int]  # how many of them a prompt of some length takes
    most_tokens: int = 0  # samples times tokens for which there is memory; 0: not known
    waiting: deque[Job] = field(default_factory=deque)
    reading: list[tuple[Job, Reading]] = field(default_factory=list)
    rows: list[Written] = field(default_factory=list)  # as in the batch

    @property
    def samples(self) -> int:
        """Rows that are taken or promised."""
        return len(self.rows) + sum(job.n for job, _ in self.reading)

    @property
    def busy(self) -> bool:
        """Is there anything to do?"""
        return bool(self.waiting or self.reading or self.rows)

    def active(self) -> list[Job]:
        """Jobs that are being read or written, each once."""
        jobs = [job for job, _ in self.reading]
        for row in self.rows:
            if row.job not in jobs:
                jobs.append(row.job)
        return jobs


class Engine:
    """Writes jobs. max_running: samples in a batch at once; max_waiting: prompts that wait for it."""

    def __init__(
        self,
        groups: Sequence[Group],
        max_running: int = 64,
        max_waiting: int = 128,
        dispatch: Callable[[list[tuple[Job, Piece]]], None] | None = None,
        co_serving: CoServing | None = None,
    ):
        """dispatch: hands the pieces of one token of all jobs out; by default it calls each job's `put`.
        co_serving: a fine-tuning that has the time between two tokens.
        """
        self.groups, self.max_running, self.max_waiting = groups, max_running, max_waiting
        self.dispatch, self.co_serving = dispatch or put_all, co_serving
        self.changed = threading.Condition()
        self.arrived: list[Job] = []
        self.draining = self.ended = False
        self.failure: str | None = None  # why the thread has ended, where it should not have
        self.seconds = 1.0  # that a job takes, of late
        self.jobs_done = self.tokens_written = 0
        self.pieces: list[tuple[Job, Piece]] = []
        self.sampler = Sampler()
        self.thread = threading.Thread(target=self.run, name="luthier-engine", daemon=True)

    # --- from other threads

    def start(self) -> None:
        """Begin to write."""
        self.thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Write these. Raises Busy or Stopping, and then writes none of them."""
        with self.changed:
            if self.draining or self.failure:
                raise Stopping("the server has failed" if self.failure else "the server is shutting down")
            waiting = self.count_waiting()
            room = self.max_waiting + max(0, self.max_running - self.count_running())
            if waiting + len(jobs) > room:
                raise Busy(
                    f"{waiting} prompts are waiting for {self.max_running} places; try again later",
                    self.retry_after(waiting),
                )
            now = time.monotonic()
            for job in jobs:
                job.begun_at = now
            self.arrived += jobs
            self.changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Nobody hears these any more: their places are free at the next token."""
        with self.changed:
            for job in jobs:
                job.canceled = True
            self.changed.notify()

    def drain(self) -> None:
        """Take no more jobs, and write those that there are."""
        with self.changed:
            self.draining = True
            self.changed.notify()

    def stop(self, timeout: float = 10.0) -> None:
        """End now: what is being written hears that the server stops."""
        with self.changed:
            self.draining = self.ended = True
            self.changed.notify()
        if self.thread.is_alive():
            self.thread.join(timeout)

    def count_waiting(self) -> int:
        """Prompts that nothing was read of."""
        return len(self.arrived) + sum(len(group.waiting) for group in self.groups)

    def count_running(self) -> int:
        """Samples that are being written, or whose prompt is being read."""
        return sum(group.samples for group in self.groups)

    def retry_after(self, waiting: int) -> int:
        """Seconds until those who wait now are about through."""
        rounds = 1 + waiting / max(1, self.max_running)
        return min(LONGEST_WAIT, max(1, math.ceil(rounds * self.seconds)))

    def health(self) -> dict[str, Any]:
        """Whether it works, and what it does now."""
        status = "ok"
        if self.failure:
            status = "failed"
        elif self.draining:
            status = "stopping"
        return {
            "status": status,
            "running": self.count_running(),
            "waiting": self.count_waiting(),
            "jobs_done": self.jobs_done,
            "tokens_written": self.tokens_written,
        }

    # --- the engine's own thread

    @torch.no_grad()
    def run(self) -> None:
        """Write until the end."""
        with ExitStack() as stack:
            try:
                for group in self.groups:
                    stack.enter_context(prepacked(group.model))
                while self.take():
                    begun = time.monotonic()
                    for group in self.groups:
                        self.step(group)
                    self.hand_out()
                    if self.co_serving is not None:
                        self.train(self.co_serving, time.monotonic() - begun)
                self.end_all(Stopping("the server is shutting down"))
            except BaseException as error:
                self.failure = f"{type(error).__name__}: {error}"
                self.end_all(error if isinstance(error, Exception) else Stopping("the server has failed"))
                raise

    def take(self) -> bool:
        """Wait until there is something to do, and sort it into the groups; False: it is time to end."""
        with self.changed:
            while not (self.arrived or self.ended or self.trains or self.busy):
                if self.draining:
                    return False
                self.changed.wait()
            for job in self.arrived:
                job.served.group.waiting.append(job)
            self.arrived = []
            return not self.ended

    @property
    def busy(self) -> bool:
        """Is anybody waiting for an answer?"""
        return any(group.busy for group in self.groups)

    @property
    def trains(self) -> bool:
        """Is there training to do while nobody is answered?"""
        return self.co_serving is not None and not self.co_serving.over and not self.draining

    def train(self, co_serving: CoServing, seconds: float) -> None:
        """Training in what answers leave. seconds: that their last token took."""
        if self.busy:
            co_serving.served(seconds)
        if not self.draining:
            co_serving.fill(self.busy)

    def step(self, group: Group) -> None:
        """One token for every row of a group, and before that the next part of the prompts that wait."""
        self.leave(group)
        try:
            self.admit(group)
            if group.reading:
                self.read(group)
                self.hand_out()  # first tokens do not wait for the next ones
            if group.rows:
                logits = group.batch.next([row.last for row in group.rows])
                self.advance(group.rows, logits)
                self.leave(group)
        except (RuntimeError, MemoryError, ValueError, IndexError) as error:
            # whatever a network raises; others are not concerned, and the batch begins anew
            self.fail(group, error)

    def admit(self, group: Group) -> None:
        """Begin prompts for which there is room, in the order in which they came."""
        while group.waiting:
            job = group.waiting[0]
            alone = not group.rows and not group.reading
            if group.samples + job.n > self.max_running and not alone:
                return
            if not alone and not self.fits(group, job):
                return
            group.waiting.popleft()
            reading = group.batch.begin(job.tokens, job.served.adapter)
            job.reused = reading.reused
            group.reading.append((job, reading))

    def fits(self, group: Group, job: Job) -> bool:
        """Is there memory for all rows being as long as the longest may become?"""
        if not group.most_tokens:
            return True
        columns = max(other.columns for other in [job, *group.active()])
        return (group.samples + job.n) * columns <= group.most_tokens

    def read(self, group: Group) -> None:
        """Read the next part of the prompts; those that were read whole begin to be written."""
        chosen = group.batch.together([reading for _, reading in group.reading])
        logits = group.batch.read(chosen)
        for i, reading in enumerate(chosen):
            if reading.complete:
                job = next(job for job, own in group.reading if own is reading)
                group.reading = [(j, r) for j, r in group.reading if r is not reading]
                self.begin(group, job, reading, logits[i : i + 1])

    def begin(self, group: Group, job: Job, reading: Reading, logits: Tensor) -> None:
        """The first token of each sample of a prompt that was read, and rows for those that go on."""
        settings, renderer = job.settings, job.served.texts
        samples = []
        for number in range(job.n):
            uniforms = None
            if settings.temperature:
                uniforms = uniforms_of(job.seed, number, settings.max_tokens)
            stream = TextStream(renderer, settings.stop, job.special)
            draw = Draw(settings, uniforms)
            if job.follower is not None:
                draw.follower = job.follower.copy()
            samples.append(Written(job, number, stream, draw))
        job.running = job.n
        self.advance(samples, logits.expand(job.n, -1))
        for row in samples:
            if not row.finished:
                group.batch.join(reading)
                group.rows.append(row)

    def advance(self, rows: Sequence[Written], logits: Tensor) -> None:
        """Choose a token for each, and tell its job."""
        for row in rows:
            try:
                row.draw.prepare(logits.shape[1])
            except RecipeError as error:
                row.finished = True
                self.pieces.append((row.job, Piece(row.sample, error=error)))
                self.finish(row.job)
        tokens, logprobs = self.sampler.choose(logits, [row.draw for row in rows])
        self.tokens_written += len(tokens)
        for row, token, own in zip(rows, tokens, logprobs, strict=True):
            if row.finished:
                continue
            settings, stream = row.job.settings, row.stream
            row.last = token
            stops = token in row.job.served.stop_ids and not settings.ignore_eos
            text, reason = "", None
            if not (stops and stream.special):
                text = stream.add(token)
            if stops or stream.stopped:
                reason = "stop"
            elif row.draw.step >= settings.max_tokens:
                reason = "length"
            if reason is not None:
                text += stream.end()
                row.finished = True
                if stream.stopped:
                    reason = "stop"
            if text or own or reason:
                reported = (own,) if own else ()
                piece = Piece(row.sample, text, reported, row.draw.step, reason)
                self.pieces.append((row.job, piece))
            if reason is not None:
                self.finish(row.job)

    def finish(self, job: Job) -> None:
        """One of its samples has ended."""
        job.running -= 1
        if not job.running:
            self.jobs_done += 1
            self.seconds += 0.1 * (time.monotonic() - job.begun_at - self.seconds)

    def leave(self, group: Group) -> None:
        """Give the places of those who have ended, or whom nobody hears, to others."""
        for number in reversed(range(len(group.rows))):
            row = group.rows[number]
            if row.finished or row.job.canceled:
                group.batch.leave(number)
                group.rows[number] = group.rows[-1]
                group.rows.pop()
        group.reading = [(job, reading) for job, reading in group.reading if not job.canceled]
        if any(job.canceled for job in group.waiting):
            group.waiting = deque(job for job in group.waiting if not job.canceled)

    def fail(self, group: Group, error: Exception) -> None:
        """Everything that was being read or written in a group ends with an error."""
        if out_of_memory(error):
            error = RecipeError("out of memory; send fewer or shorter requests at once")
        for job in group.active():
            self.pieces.append((job, Piece(0, error=error)))
        group.reading, group.rows = [], []
        group.batch.clear()
        self.sampler = Sampler()

    def end_all(self, error: Exception) -> None:
        """Everyone hears that there is nothing more."""
        with self.changed:
            self.draining = True
            jobs, self.arrived = self.arrived, []
        for group in self.groups:
            jobs += [*group.waiting, *group.active()]
            group.waiting.clear()
            group.reading, group.rows = [], []
            group.batch.clear()
        for job in jobs:
            self.pieces.append((job, Piece(0, error=error)))
        self.hand_out()

    def hand_out(self) -> None:
        """The pieces of this token, to those who still hear them."""
        pieces, self.pieces = self.pieces, []
        if pieces:
            self.dispatch([(job, piece) for job, piece in pieces if not job.canceled])


def put_all(pieces: Sequence[tuple[Job, Piece]]) -> None:
    """Each piece to its job."""
    for job, piece in pieces:
        job.put(job, piece)
