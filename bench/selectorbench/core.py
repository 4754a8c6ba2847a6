"""The implementations and the selector through core, on tensors of one problem at a time."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from kernelbench.systems.attnd_core import AttndCore

from .grid import Point

SLOT = "point"
NUMPY_DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}
BLOCK = 1 << 20


class SelectorCore(AttndCore):
    """Values are random, and repeat: no implementation's speed depends on them."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self._values = np.random.default_rng(0).standard_normal(BLOCK, dtype=np.float32)

    def make(self, point: Point) -> None:
        block = self._values.astype(NUMPY_DTYPES[point.dtype])
        arrays = {
            name: np.resize(block, point.batch * heads * length * point.head_dim)
            for name, heads, length in (
                ("query", point.num_heads, point.q_len),
                ("key", point.num_kv_heads, point.kv_len),
                ("value", point.num_kv_heads, point.kv_len),
            )
        }
        addresses = {name: array.ctypes.data for name, array in arrays.items()}
        self._call("make", slot=SLOT, shape=point.problem(), **addresses)

    def select(self) -> dict[str, Any]:
        return self._call("select", slot=SLOT)

    def learn(self, implementation: str, seconds: float) -> None:
        self._call("learn", slot=SLOT, implementation=implementation, seconds=seconds)
