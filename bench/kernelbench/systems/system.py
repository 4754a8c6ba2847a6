"""What every measured system offers its worker, and what they share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, Protocol

import numpy as np


class Unsupported(Exception):
    """The system can't do what is asked; not a failure."""


class System(Protocol):
    def describe(self) -> dict[str, Any]: ...

    def prepare(
        self, slot: str, problem: dict[str, Any], files: dict[str, str], **ours: Any
    ) -> dict[str, Any] | None: ...

    def run(
        self, slot: str, repeats: int, min_seconds: float, warm: bool, **ours: Any
    ) -> dict[str, Any]: ...

    def output(self, slot: str, path: str) -> None: ...

    def release(self, slot: str) -> None: ...


LONG_CALL_SECONDS = 0.3

RAW_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


def load(problem: dict[str, Any], files: dict[str, str]) -> dict[str, np.ndarray]:
    """The inputs [batch, heads, length, dim]; bfloat16 as uint16."""
    p = problem
    keys = (p["batch"], p["num_kv_heads"], p["kv_len"])
    sizes = {
        "query": (p["batch"], p["num_heads"], p["q_len"], p["head_dim"]),
        "key": (*keys, p["head_dim"]),
        "value": (*keys, p["value_dim"]),
    }
    dtype = RAW_DTYPES[p["dtype"]]
    return {name: np.fromfile(files[name], dtype=dtype).reshape(sizes[name]) for name in sizes}


def visible_mask(problem: dict[str, Any]) -> np.ndarray | None:
    """[q_len, kv_len], true where a query sees a key, for what "causal" alone does not say.

    Libraries put query i at key i; here the queries are the last keys.
    """
    p = problem
    if not p["is_causal"] or p["q_len"] == p["kv_len"]:
        return None
    return np.tri(p["q_len"], p["kv_len"], p["kv_len"] - p["q_len"], dtype=bool)


def time_calls(
    call: Callable[[], Any], repeats: int, min_seconds: float, warm: bool
) -> list[float]:
    """Seconds of at least `repeats` calls and `min_seconds`, after an untimed one if `warm`."""
    if warm:
        call()
    seconds: list[float] = []
    while len(seconds) < repeats or sum(seconds) < min_seconds:
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return seconds


def fastest(
    variants: Sequence[tuple[str, Callable[[], Callable[[], Any]]]],
    as_array: Callable[[Any], np.ndarray],
) -> tuple[str, Callable[[], Any]]:
    """The variant with the lowest median of a few calls.

    Each is a name and a function that prepares it (and raises where the system can't do it). One
    whose result is not that of the first variant which works is left out.
    """
    best: tuple[float, str, Callable[[], Any]] | None = None
    expected: np.ndarray | None = None
    problems = []
    for name, prepare in variants:
        try:
            call = prepare()
            begin = time.perf_counter()
            result = as_array(call()).astype(np.float32)
        except Exception as error:
            problems.append(f"{name}: {str(error).splitlines()[0] if str(error) else error!r}")
            continue
        if expected is None:
            expected = result
        elif not np.allclose(result, expected, rtol=0.05, atol=0.02):
            problems.append(f"{name}: another result")
            continue
        # Long calls differ little from the first; short ones are noisy.
        long = time.perf_counter() - begin > LONG_CALL_SECONDS
        seconds = median(time_calls(call, 1 if long else 3, 0.02, False))
        if best is None or seconds < best[0]:
            best = (seconds, name, call)
    if best is None:
        raise Unsupported("; ".join(problems)[:400])
    return best[1], best[2]


def as_float32(raw: np.ndarray, dtype: str) -> np.ndarray:
    if dtype != "bfloat16":
        return raw.astype(np.float32)
    return (raw.astype(np.uint32) << 16).view(np.float32)


class InTurn:
    """One of several equal things after the other."""

    def __init__(self, items: Sequence[Any]) -> None:
        self._items = items
        self._next = 0

    def __call__(self) -> Any:
        item = self._items[self._next]
        self._next = (self._next + 1) % len(self._items)
        return item


class Peer:
    """A peer whose slots are a call, and what makes [batch, heads, q_len, dim] of its result."""

    def __init__(self) -> None:
        self._slots: dict[str, tuple[Callable[[], Any], Callable[[Any], np.ndarray]]] = {}

    def run(self, slot: str, repeats: int, min_seconds: float, warm: bool) -> dict[str, Any]:
        return {"seconds": time_calls(self._slots[slot][0], repeats, min_seconds, warm)}

    def output(self, slot: str, path: str) -> None:
        call, as_array = self._slots[slot]
        np.ascontiguousarray(as_array(call()).astype(np.float32)).tofile(path)

    def release(self, slot: str) -> None:
        self._slots.pop(slot, None)
