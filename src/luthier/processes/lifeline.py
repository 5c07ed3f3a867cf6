"""How a process learns that another one of its run has ended, whatever it is doing itself.

Each process holds a connection to the first one, and a thread of its own listens there. Who fails says so
through it; who is killed is noticed, as the system closes its connection. A process that has not ended by
itself some seconds after that, since it waits for the other one in a collective operation, is ended by its
thread, with the other one's sentence.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

GRACE = 10.0  # seconds in which a process may end by itself after another one has failed
PATIENCE = 3.0  # seconds in which a stop signal may turn out to follow from another process's end
CONNECTING = 20.0  # seconds in which a connection must come about
GREETING = 2.0  # seconds in which who has connected must say who it is
LOST = "process_lost"  # the code of a process that ended without a word
INTERRUPTED = "interrupted"  # of one that left amid a run; its message goes on from "rank 1 of 2 processes"
OPTIONS = ("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)  # a machine that lost its power


@dataclass(frozen=True)
class Fault:
    """What a process has failed of."""

    rank: int
    number: int  # of the faults of this process
    code: str
    message: str  # for people


def lost(rank: int, count: int) -> Fault:
    """The fault of a process that ended without a word."""
    return Fault(
        rank,
        -1,
        LOST,
        f"rank {rank} of {count} processes has ended without a word: it was killed, perhaps by the system for"
        " its memory. What was saved is intact; run the same command again to resume",
    )


@dataclass(frozen=True)
class Address:
    """Where the first process listens; `token` keeps strangers out."""

    host: str
    port: int
    token: str


class Lifeline:
    """The connections of one process. `on_end` is called when the thread ends the process."""

    def __init__(self, rank: int, count: int):
        self.rank, self.count = rank, count
        self.fault: Fault | None = None  # what another process, or this one, has failed of
        self.on_end: Callable[[Fault], None] = lambda fault: None
        self._numbers = 0
        self._settled: set[tuple[int, int]] = set()  # faults that all processes have agreed on
        self._deadline: float | None = None
        self._stop_at: float | None = None  # when a stop signal is obeyed
        self._watching = 0
        self._listener: socket.socket | None = None
        self._peers: dict[int, socket.socket] = {}
        self._buffers: dict[int, bytes] = {}
        self._changed = threading.Condition()
        self._waker, self._wake = socket.socketpair()
        for end in (self._waker, self._wake):
            end.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._waker, selectors.EVENT_READ, None)
        os.register_at_fork(after_in_child=self._leave_to_parent)

    # ------------------------------------------------------------------------------------------ connecting

    def listen(self, host: str) -> Address:
        """In the first process: wait for the others, in the thread."""
        self._listener = socket.create_server((host, 0))
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._token = secrets.token_hex(16)
        self._start()
        return Address(host, self._listener.getsockname()[1], self._token)

    def connect(self, address: Address) -> None:
        """In every other process. Raises OSError where the first one cannot be reached."""
        peer = socket.create_connection((address.host, address.port), timeout=CONNECTING)
        peer.settimeout(None)
        self._add(0, peer)
        self._send(0, {"token": address.token, "rank": self.rank})
        self._start()

    def _start(self) -> None:
        threading.Thread(target=self._run, daemon=True, name="lifeline").start()

    def _add(self, rank: int, peer: socket.socket) -> None:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in OPTIONS:
            if hasattr(socket, name):
                peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._peers[rank], self._buffers[rank] = peer, b""
        self._selector.register(peer, selectors.EVENT_READ, rank)

    def _accept(self) -> None:
        """A new connection; without the token it is closed."""
        assert self._listener is not None
        peer, _ = self._listener.accept()
        peer.settimeout(GREETING)
        try:
            hello = json.loads(_first_line(peer))
            if not secrets.compare_digest(str(hello["token"]), self._token):
                raise ValueError("another token")
            rank = int(hello["rank"])
        except (OSError, ValueError, KeyError, TypeError):
            peer.close()
            return
        peer.settimeout(None)
        self._add(rank, peer)
        if self.fault is not None:
            self._send(rank, asdict(self.fault))

    # ------------------------------------------------------------------------------------------ saying

    def report(self, code: str, message: str) -> int:
        """Tell the others what this process fails of. Returns the number of this fault."""
        self._numbers += 1
        fault = Fault(self.rank, self._numbers, code, message)
        for rank in list(self._peers):
            self._send(rank, asdict(fault))
        self._take(fault)
        return self._numbers

    def settle(self, faults: list[tuple[int, int]]) -> None:
        """All processes have agreed on these (rank, number): nobody need be ended for them."""
        with self._changed:
            self._settled.update(faults)
            if self.fault and (self.fault.rank, self.fault.number) in self._settled:
                self.fault = self._deadline = None
        self._interrupt()

    def wait(self, seconds: float) -> Fault | None:
        """The fault of another process, if it is heard of within so many seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self.fault is not None, seconds)
            return self.fault

    def close(self) -> None:
        """Leave in peace."""
        for rank in list(self._peers):
            self._send(rank, {"bye": True})
            self._drop(rank)
        if self._listener is not None:
            self._listener.close()

    def _send(self, rank: int, message: dict[str, Any]) -> None:
        with suppress(OSError, KeyError):  # who has ended need not hear it
            self._peers[rank].sendall(json.dumps(message).encode() + b"\n")

    # ------------------------------------------------------------------------------------------ listening

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While a run goes on: a fault ends this process, after a while. A stop signal waits for a moment
        for the fault that it follows from, since launchers stop all processes when one has ended.
        """
        restore = self._take_signals() if not self._watching else lambda: None
        self._watching += 1
        self._interrupt()
        try:
            yield
        finally:
            self._watching -= 1
            restore()

    def _take_signals(self) -> Callable[[], None]:
        """Hear of SIGTERM in the thread, also while the main one is within a collective operation. Returns
        what puts things back.
        """
        own = threading.current_thread() is threading.main_thread()
        if not own or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
            return lambda: None
        former = signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda number, frame: None)

        def restore() -> None:
            signal.set_wakeup_fd(former)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

        return restore

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select(self._timeout()):
                if key.fileobj is self._waker:
                    self._wake_up()
                elif key.fileobj is self._listener:
                    self._accept()
                else:
                    self._read(key.data)
            self._check_times()

    def _timeout(self) -> float | None:
        """Seconds until something is due; None where nothing is."""
        times = []
        if self._stop_at is not None:
            times.append(self._stop_at)
        if self._deadline is not None and self._watching:
            times.append(self._deadline)
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _check_times(self) -> None:
        now = time.monotonic()
        fault, deadline = self.fault, self._deadline
        if self._watching and fault is not None and deadline is not None and now >= deadline:
            self._end(fault)
        if self._stop_at is not None and now >= self._stop_at:
            if self.fault is None:
                os._exit(128 + signal.SIGTERM)
            self._stop_at = None  # this process is ending, with a sentence

    def _wake_up(self) -> None:
        with suppress(BlockingIOError):
            if signal.SIGTERM in self._waker.recv(4096):
                self._stop_at = time.monotonic() + PATIENCE

    def _interrupt(self) -> None:
        """Let the thread look at the times again."""
        with suppress(BlockingIOError):
            self._wake.send(b"\0")

    def _read(self, rank: int) -> None:
        try:
            data = self._peers[rank].recv(65536)
        except OSError:
            data = b""
        if not data:
            self._drop(rank)
            self._pass_on(lost(rank, self.count))
            return
        *lines, self._buffers[rank] = (self._buffers[rank] + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "bye" in message:
                self._drop(rank)
                return
            self._pass_on(Fault(**message))

    def _pass_on(self, fault: Fault) -> None:
        """To all but whose fault it is; the others know only this process."""
        for rank in list(self._peers):
            if rank != fault.rank and self.rank == 0:
                self._send(rank, asdict(fault))
        self._take(fault)

    def _take(self, fault: Fault) -> None:
        with self._changed:
            settled = (fault.rank, fault.number) in self._settled
            if self.fault is None and not settled:
                self.fault, self._deadline = fault, time.monotonic() + GRACE
            self._changed.notify_all()
        self._interrupt()

    def _drop(self, rank: int) -> None:
        peer = self._peers.pop(rank, None)
        if peer is not None:
            with suppress(KeyError, ValueError):
                self._selector.unregister(peer)
            peer.close()

    def _end(self, fault: Fault) -> None:
        """End this process: its main thread waits for a process that is gone."""
        with suppress(Exception):
            self.on_end(fault)
        with suppress(Exception):
            print(f"luthier: {describe(fault, self.rank, self.count)}", file=sys.stderr, flush=True)
        os._exit(2)

    def _leave_to_parent(self) -> None:
        """In a child that was forked: connections and signals are the parent's."""
        for end in (*self._peers.values(), *filter(None, [self._listener])):
            end.close()
        if self._watching and threading.current_thread() is threading.main_thread():
            with suppress(ValueError):
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGTERM, signal.SIG_DFL)


def describe(fault: Fault, rank: int, count: int) -> str:
    """A fault as the process `rank` says it."""
    if fault.rank == rank or fault.code == LOST:
        return fault.message
    middle = {"crash": " has failed: ", INTERRUPTED: " "}.get(fault.code, ": ")
    return f"rank {fault.rank} of {count} processes{middle}{fault.message}"


def _first_line(peer: socket.socket) -> bytes:
    """Byte by byte, since what comes after it is read elsewhere."""
    line = b""
    while not line.endswith(b"\n") and len(line) < 256:
        byte = peer.recv(1)
        if not byte:
            raise OSError("the connection has ended")
        line += byte
    return line
