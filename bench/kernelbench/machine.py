"""How busy the machine is, and by whom: a figure taken beside a compiler is none."""

from __future__ import annotations

import os
import time
from pathlib import Path

IDLE_POLL_SECONDS = 0.005
# CPU time within a poll below which a process counts as idle.
IDLE_CPU_SECONDS = 0.0003
IDLE_PATIENCE_SECONDS = 0.5

_TICKS = os.sysconf("SC_CLK_TCK")


def process_cpu_seconds(pid: int) -> float:
    """Of all its threads; 0 where it has ended."""
    total = 0
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += int((task / "schedstat").read_text().split()[0])
    except OSError:
        return 0.0
    return total / 1e9


def wait_until_idle(pid: int) -> None:
    """Until the process's threads have stopped spinning, as those of OpenMP do after a while."""
    deadline = time.monotonic() + IDLE_PATIENCE_SECONDS
    before = process_cpu_seconds(pid)
    while time.monotonic() < deadline:
        time.sleep(IDLE_POLL_SECONDS)
        after = process_cpu_seconds(pid)
        if after - before < IDLE_CPU_SECONDS:
            return
        before = after


class ForeignLoad:
    """The share of the cores' time that processes other than the given ones took, from now on."""

    def __init__(self, pids: list[int]) -> None:
        self._pids = pids
        self._begin = self._reading()

    def _reading(self) -> tuple[float, float, float]:
        fields = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        idle = fields[3] + fields[4]
        own = sum(process_cpu_seconds(pid) for pid in self._pids)
        return sum(fields) / _TICKS, (sum(fields) - idle) / _TICKS, own

    def share(self) -> float:
        all_before, busy_before, own_before = self._begin
        all_now, busy_now, own_now = self._reading()
        elapsed = max(all_now - all_before, 1e-3)
        return min(1.0, max(0.0, (busy_now - busy_before) - (own_now - own_before)) / elapsed)
