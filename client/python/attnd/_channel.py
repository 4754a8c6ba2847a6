"""What every connection has: limits, a count of its bytes, and calls that are made again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from attnd.errors import DeadlineExceeded, Unavailable

MAX_MESSAGE_BYTES = (1 << 31) - 1  # protobuf's own; the server's limit is the one that counts
_FIRST_PAUSE_SECONDS = 0.05

ResultT = TypeVar("ResultT")


def options(
    max_message_bytes: int, channel_options: Sequence[tuple[str, Any]]
) -> list[tuple[str, Any]]:
    return [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        *channel_options,
    ]


class Traffic:
    """Bytes of the messages of a connection, without gRPC's framing; safe to read at any time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes_sent = 0
        self._bytes_received = 0

    @property
    def bytes_sent(self) -> int:
        return self._bytes_sent

    @property
    def bytes_received(self) -> int:
        return self._bytes_received

    def add_sent(self, size: int) -> None:
        with self._lock:
            self._bytes_sent += size

    def add_received(self, size: int) -> None:
        with self._lock:
            self._bytes_received += size

    def counts_sent(self, serialize: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
        def counting(message: Any) -> bytes:
            data = serialize(message)
            self.add_sent(len(data))
            return data

        return counting

    def counts_received(self, parse: Callable[[bytes], ResultT]) -> Callable[[bytes], ResultT]:
        def counting(data: bytes) -> ResultT:
            self.add_received(len(data))
            return parse(data)

        return counting


def with_retries(
    call: Callable[[float | None], ResultT], *, retries: int, timeout: float | None
) -> ResultT:
    """Calls again where the failure may have been of the transport, with a growing pause.

    For what may be done twice alone. `timeout` is that of all attempts together; each is given what
    is left of it.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    pause = _FIRST_PAUSE_SECONDS
    for left in range(retries, -1, -1):
        try:
            return call(None if deadline is None else max(0.0, deadline - time.monotonic()))
        except (Unavailable, DeadlineExceeded) as error:
            wait = max(pause, error.retry_delay_seconds)
            if left == 0 or (deadline is not None and time.monotonic() + wait >= deadline):
                raise
        time.sleep(wait)
        pause *= 2
    raise ValueError(f"retries is {retries}; it must be 0 or more")
