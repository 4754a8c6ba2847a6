"""A server of one's own, for tests and examples.

with ServerProcess("build/release/bin/attnd", models={"minilm": directory}) as server:
    with attnd.Client(server.address) as client: ...
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

_STEP_SECONDS = 0.01
_LOG_NAME = "log.txt"


class ServerError(Exception):
    """The server did not start, or not as it should; the text ends with its log."""


class ServerProcess:
    """An attnd process on a free port, with a temporary folder of its own; ends with its context.

    `start` returns once the server serves, which it says by its ready file. `models` are served
    from the start: {name: directory}. `arguments` are further flags, `listen` replaces the free TCP
    port.
    """

    def __init__(
        self,
        binary: str | os.PathLike[str],
        *,
        models: Mapping[str, str | os.PathLike[str]] | None = None,
        model_root: str | os.PathLike[str] | None = None,
        listen: Sequence[str] = ("127.0.0.1:0",),
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        start_timeout: float = 60.0,
        stop_timeout: float = 60.0,
    ) -> None:
        self._command = [os.fspath(binary), "--listen", ",".join(listen)]
        self._command += ["--metrics-listen", "127.0.0.1:0"]
        for name, directory in (models or {}).items():
            self._command += ["--model", f"{name}={os.fspath(directory)}"]
        if model_root is not None:
            self._command += ["--model-root", os.fspath(model_root)]
        self._command += arguments
        self._environment = {**os.environ, **(environment or {})}
        self._start_timeout = start_timeout
        self._stop_timeout = stop_timeout
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.addresses: list[str] = []
        self._metrics_address = ""

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def address(self) -> str:
        """The first one that it serves on."""
        return self.addresses[0]

    @property
    def folder(self) -> Path:
        """The server's own temporary folder: ready file and log."""
        if self._folder is None:
            raise ServerError("the server was not started")
        return self._folder

    @property
    def process(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise ServerError("the server was not started")
        return self._process

    def start(self) -> Self:
        """Returns once the server serves; a ServerError if it does not come to that."""
        self._folder = Path(tempfile.mkdtemp(prefix="attnd-"))
        ready_file = self._folder / "ready.json"
        self._command += ["--ready-file", str(ready_file)]
        with (self._folder / _LOG_NAME).open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
            )
        deadline = time.monotonic() + self._start_timeout
        while not ready_file.exists():
            try:
                status = self.process.wait(_STEP_SECONDS)  # returns early when the process ends
            except subprocess.TimeoutExpired:
                if time.monotonic() > deadline:
                    raise self._failure(f"was not ready in {self._start_timeout:g} s") from None
            else:
                raise self._failure(f"ended with status {status} before it was ready")
        ready = json.loads(ready_file.read_text())
        self.addresses = ready["listen"]
        self._metrics_address = ready["metrics"]
        return self

    def terminate(self) -> None:
        """Asks for a drain and returns at once; `wait` tells when the process has ended."""
        self.process.send_signal(signal.SIGTERM)

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, once the process has ended."""
        return self.process.wait(timeout)

    def close(self) -> None:
        """Ends the process, by force if a drain does not, and removes the temporary folder."""
        process = self._process
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(self._stop_timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def log(self) -> str:
        """What the server has printed so far."""
        path = self.folder / _LOG_NAME
        return path.read_text(errors="replace") if path.exists() else ""

    def metrics(self) -> str:
        """Prometheus' text, as it is now."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://{self._metrics_address}/metrics", timeout=10.0) as response:
            text: bytes = response.read()
        return text.decode()

    def _failure(self, what: str) -> ServerError:
        return ServerError(f"{' '.join(self._command)}\n{what}; its log:\n{self.log()}")
