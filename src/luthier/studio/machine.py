"""How busy this machine is: processor, memory, GPUs."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from typing import Any

import psutil

FRESH = 1.5  # seconds for which an answer is used again, whoever asks
PATIENCE = 3.0  # seconds that nvidia-smi has
QUERY = "name,utilization.gpu,memory.used,memory.total,temperature.gpu"
MEGABYTE = 1 << 20


class Machine:
    """Reads the machine at most every FRESH seconds, for as many pages as there are."""

    def __init__(self):
        self.lock = threading.Lock()
        self.latest: dict[str, Any] = {}
        self.read_at = float("-inf")
        self.busy, self.total = processor_seconds()  # psutil's own count is of one thread, and any may ask

    def state(self) -> dict[str, Any]:
        """{cpu: percent, cores, memory: {used, total}, gpus: [{name, busy, heat, used, total}]}: sizes in
        bytes, heat in degrees Celsius.
        """
        with self.lock:
            if time.monotonic() - self.read_at <= FRESH:
                return self.latest
            self.read_at = time.monotonic()
            busy, total = processor_seconds()
            share = (busy - self.busy) / max(1e-9, total - self.total)
            self.busy, self.total = busy, total
            memory = psutil.virtual_memory()
            self.latest = {
                "cpu": round(100 * min(1.0, max(0.0, share)), 1),
                "cores": psutil.cpu_count() or 1,
                "memory": {"used": memory.total - memory.available, "total": memory.total},
                "gpus": gpus(),
            }
            return self.latest


def processor_seconds() -> tuple[float, float]:
    """(busy, all) seconds of all cores since the machine started."""
    times = psutil.cpu_times()._asdict()
    total = sum(times.values()) - times.get("guest", 0.0) - times.get("guest_nice", 0.0)
    return total - times["idle"] - times.get("iowait", 0.0), total


def gpus() -> list[dict[str, Any]]:
    """What nvidia-smi says of each GPU; none where there is no such command, or it does not answer."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    try:
        answer = subprocess.run(
            [command, f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_gpus(answer.stdout)


def parse_gpus(text: str) -> list[dict[str, Any]]:
    """Lines of nvidia-smi's CSV; a number that a GPU does not report ('[N/A]') is None."""
    listing = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.rsplit(",", 4)]
        if len(cells) != 5:
            continue
        busy, used, total, heat = map(_number, cells[1:])
        gpu = {"name": cells[0], "busy": busy, "heat": heat}
        gpu["used"] = None if used is None else used * MEGABYTE
        gpu["total"] = None if total is None else total * MEGABYTE
        listing.append(gpu)
    return listing


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
