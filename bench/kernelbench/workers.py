"""The coordinator's side of worker processes."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGE_FOLDER = Path(__file__).resolve().parents[1]


class WorkerError(Exception):
    """The worker's system refused or failed; `unsupported`: it said that it can't do this."""

    def __init__(self, message: str, unsupported: bool = False) -> None:
        super().__init__(message)
        self.unsupported = unsupported


START_SECONDS = 120.0
CALL_SECONDS = 900.0


@dataclass(frozen=True)
class Launch:
    """How a system's worker is started."""

    system: str
    module: str
    python: Path
    environment: dict[str, str] = field(default_factory=dict)

    def available(self) -> bool:
        return self.python.exists()


LAUNCHES = {
    launch.system: launch
    for launch in (
        # As the server has it: threads of its own compute, OpenMP's do not spin beside them.
        Launch("attnd", "attnd_core", ROOT / ".venv/bin/python", {"OMP_WAIT_POLICY": "passive"}),
        Launch("torch", "torch_sdpa", ROOT / ".venv/bin/python"),
        Launch("onnxruntime", "onnxruntime_attention", ROOT / ".venv-bench/bin/python"),
        Launch("openvino", "openvino_sdpa", ROOT / ".venv-bench/bin/python"),
        Launch("vllm", "vllm_cpu", ROOT / ".venv-vllm/bin/python"),
    )
}


class Worker:
    def __init__(self, launch: Launch, threads: int) -> None:
        self.name = launch.system
        self._launch = launch
        self._threads = threads
        self._busy = False
        self._start()

    def _start(self) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": str(PACKAGE_FOLDER),
            "OMP_NUM_THREADS": str(self._threads),
            **self._launch.environment,
        }
        # A session of its own: an interrupt at the terminal reaches the coordinator alone.
        self._process = subprocess.Popen(
            [
                str(self._launch.python),
                "-m",
                "kernelbench.worker",
                self._launch.module,
                str(self._threads),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if "BENCH_DEBUG" in os.environ else subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        self._pending = b""
        try:
            self._read(START_SECONDS)
        except WorkerError:
            self.close()
            raise

    def ensure_running(self) -> None:
        """Starts it again where it ended."""
        if self._process.poll() is not None:
            self.close()
            self._start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def release(self, slot: str) -> None:
        """Lets a slot's memory go, unless the worker has ended or was interrupted in its work."""
        if not self._busy:
            with contextlib.suppress(WorkerError):
                self.call("release", slot=slot)

    def call(self, op: str, timeout: float = CALL_SECONDS, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"op": op, **request}).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise WorkerError(f"{self.name} has ended") from None
        return self._read(timeout)

    def _read(self, timeout: float) -> dict[str, Any]:
        self._busy = True
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._pending:
            if not select.select([descriptor], [], [], timeout)[0]:
                self._process.kill()
                raise WorkerError(f"{self.name} took longer than {timeout:.0f} s")
            chunk = os.read(descriptor, 1 << 16)
            if not chunk:
                raise WorkerError(f"{self.name} ended unexpectedly")
            self._pending += chunk
        line, self._pending = self._pending.split(b"\n", 1)
        self._busy = False
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise WorkerError(reply["error"], reply.get("unsupported", False))
        return reply

    def close(self) -> None:
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        if self._busy:
            self._process.kill()
        try:
            self._process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


@contextlib.contextmanager
def started(names: list[str], threads: int, say: Any) -> Iterator[dict[str, Worker]]:
    """Workers of the systems that are there; none is left behind."""
    workers: dict[str, Worker] = {}
    try:
        for name in names:
            launch = LAUNCHES[name]
            if not launch.available():
                say(f"{name} is not installed: left out")
                continue
            try:
                workers[name] = Worker(launch, threads)
            except WorkerError as error:
                say(f"{name} does not start: {error}")
        yield workers
    finally:
        for worker in workers.values():
            worker.close()
