"""Seeded inputs, rounded to their dtype, in shared memory that every worker maps."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from .shapes import Shape

NUMPY_DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}
NAMES = ("query", "key", "value")
SHARED_FOLDER = "/dev/shm" if Path("/dev/shm").is_dir() else None


def extents(shape: Shape) -> dict[str, tuple[int, int, int, int]]:
    """[batch, heads, length, dim] of each tensor."""
    keys = (shape.batch, shape.num_kv_heads, shape.kv_len)
    return {
        "query": (shape.batch, shape.num_heads, shape.q_len, shape.head_dim),
        "key": (*keys, shape.head_dim),
        "value": (*keys, shape.value_dim),
        "output": (shape.batch, shape.num_heads, shape.q_len, shape.value_dim),
    }


def gaussian(shape: Shape, seed: int) -> dict[str, np.ndarray]:
    """Standard normal queries, keys and values: scores of standard deviation 1."""
    random = np.random.default_rng(seed)
    sizes = extents(shape)
    return {name: random.standard_normal(sizes[name], dtype=np.float32) for name in NAMES}


class SharedInputs:
    """Float32 tensors and, in files of /dev/shm, what is left of them in each dtype."""

    def __init__(self, tensors: dict[str, np.ndarray]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="kernelbench-", dir=SHARED_FOLDER)
        self._tensors = tensors
        self._rounded: dict[str, dict[str, np.ndarray]] = {}

    def rounded(self, dtype: str) -> dict[str, np.ndarray]:
        if dtype not in self._rounded:
            kind = NUMPY_DTYPES[dtype]
            self._rounded[dtype] = {k: v.astype(kind) for k, v in self._tensors.items()}
        return self._rounded[dtype]

    def files(self, dtype: str) -> dict[str, str]:
        """Paths of the tensors' bytes, contiguous."""
        paths = {name: Path(self._folder.name) / f"{name}.{dtype}" for name in NAMES}
        for name, path in paths.items():
            if not path.exists():
                self.rounded(dtype)[name].tofile(path)
        return {name: str(path) for name, path in paths.items()}

    def output_file(self) -> Path:
        return Path(self._folder.name) / "output"

    def close(self) -> None:
        self._folder.cleanup()
