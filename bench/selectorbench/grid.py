"""The shapes: a grid from decode steps to long prompts, and random ones between its points."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Q_LENGTHS = (1, 8, 64, 512, 4096)
KV_LENGTHS = (1, 8, 64, 512, 4096, 32768)
BATCHES = (1, 4, 32)
DTYPES = ("float32", "float16", "bfloat16")
HEADS = ((8, 2, 128), (12, 12, 64))  # heads, key-value heads, head_dim

QUICK_Q_LENGTHS = (1, 64)
QUICK_KV_LENGTHS = (8, 256)
QUICK_BATCHES = (1, 2)

MOST_OPERATIONS = 2e11
MOST_TENSOR_BYTES = 1 << 30
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True)
class Point:
    q_len: int
    kv_len: int
    batch: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    cache_dtype: str  # "": plain tensors
    is_causal: bool

    @property
    def operations(self) -> float:
        pairs = self.q_len * self.kv_len * self.batch
        return 4.0 * pairs * self.num_heads * self.head_dim

    @property
    def tensor_bytes(self) -> int:
        """Of queries, keys, values and output, and of the pages beside them."""
        item = ITEM_BYTES[self.dtype]
        rows = 2 * self.q_len * self.num_heads + 2 * self.kv_len * self.num_kv_heads
        pages = (
            2 * self.kv_len * self.num_kv_heads * ITEM_BYTES[self.cache_dtype]
            if self.cache_dtype
            else 0
        )
        return self.batch * self.head_dim * (rows * item + pages)

    def problem(self) -> dict[str, Any]:
        return {
            "batch": self.batch,
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "q_len": self.q_len,
            "kv_len": self.kv_len,
            "head_dim": self.head_dim,
            "value_dim": self.head_dim,
            "is_causal": self.is_causal,
            "dtype": self.dtype,
            "cache_dtype": self.cache_dtype,
        }

    def title(self) -> str:
        where = f"cached {self.cache_dtype}" if self.cache_dtype else "plain"
        causal = " causal" if self.is_causal else ""
        return (
            f"b{self.batch} h{self.num_heads}/{self.num_kv_heads} d{self.head_dim} "
            f"q{self.q_len} kv{self.kv_len} {self.dtype} {where}{causal}"
        )


def _kinds(q_len: int, kv_len: int, dtype: str) -> Iterable[tuple[str, bool]]:
    """Cache dtype and causality. Queries stand at the end of a cache, and see what is before."""
    yield "", False
    if q_len == kv_len and q_len > 1:
        yield "", True
    if q_len <= kv_len:
        yield dtype, True
        if dtype == "float32":
            yield "int8", True


def grid(quick: bool) -> list[Point]:
    q_lengths = QUICK_Q_LENGTHS if quick else Q_LENGTHS
    kv_lengths = QUICK_KV_LENGTHS if quick else KV_LENGTHS
    batches = QUICK_BATCHES if quick else BATCHES
    return [
        Point(q_len, kv_len, batch, *heads, dtype, cache_dtype, is_causal)
        for q_len, kv_len, batch, heads, dtype in itertools.product(
            q_lengths, kv_lengths, batches, HEADS, DTYPES
        )
        for cache_dtype, is_causal in _kinds(q_len, kv_len, dtype)
    ]


def random_points(count: int, seed: int) -> list[Point]:
    """Within the grid's bounds, lengths even on a logarithmic scale."""
    source = random.Random(seed)
    points: list[Point] = []
    while len(points) < count:
        q_len = round(2 ** source.uniform(0, 12))
        kv_len = round(2 ** source.uniform(0, 15))
        dtype = source.choice(DTYPES)
        cache_dtype, is_causal = source.choice(list(_kinds(q_len, kv_len, dtype)))
        batch = round(2 ** source.uniform(0, 5))
        point = Point(q_len, kv_len, batch, *source.choice(HEADS), dtype, cache_dtype, is_causal)
        if fits(point, MOST_TENSOR_BYTES):
            points.append(point)
    return points


def fits(point: Point, memory_bytes: int) -> bool:
    return point.operations <= MOST_OPERATIONS and point.tensor_bytes <= min(
        MOST_TENSOR_BYTES, memory_bytes
    )
