"""Attention in double precision, and how far an output is from it: no code of any kernel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .shapes import Shape

# Multiply-adds that one check may cost: beyond it rows are sampled, evenly, the last one included.
BUDGET = 1.5e9


@dataclass(frozen=True)
class Errors:
    max_abs: float
    rms: float
    reference_rms: float
    rows: int  # of all heads, that were compared
    all_rows: int

    def fields(self) -> dict[str, float]:
        return {
            "max_abs_error": self.max_abs,
            "rms_error": self.rms,
            "reference_rms": self.reference_rms,
            "reference_rows": self.rows,
            "all_rows": self.all_rows,
        }


def sampled_rows(shape: Shape) -> np.ndarray:
    """Indices of the query rows that are compared, the same ones in every head."""
    per_row = shape.batch * shape.num_heads * shape.kv_len * (shape.head_dim + shape.value_dim)
    count = int(min(shape.q_len, max(4, BUDGET // per_row)))
    return np.unique(np.linspace(0, shape.q_len - 1, count).round().astype(np.int64))


class Reference:
    """The exact output of the sampled rows of one problem."""

    def __init__(self, shape: Shape, causal: bool, tensors: dict[str, np.ndarray]) -> None:
        self.shape = shape
        self.rows = sampled_rows(shape)
        position = self.rows + shape.kv_len - shape.q_len
        hidden = np.arange(shape.kv_len)[None, :] > position[:, None] if causal else None
        self.output = np.empty(
            (shape.batch, shape.num_heads, len(self.rows), shape.value_dim), np.float64
        )
        for b in range(shape.batch):
            for kv_head in range(shape.num_kv_heads):
                key = tensors["key"][b, kv_head].astype(np.float64)
                value = tensors["value"][b, kv_head].astype(np.float64)
                for h in range(kv_head * shape.group, (kv_head + 1) * shape.group):
                    query = tensors["query"][b, h][self.rows].astype(np.float64)
                    self.output[b, h] = _attend(query, key, value, hidden)

    def errors(self, output: np.ndarray) -> Errors:
        """Of an output [batch, heads, q_len, value_dim] of any dtype; NaN counts as infinite."""
        difference = np.abs(output[:, :, self.rows].astype(np.float64) - self.output)
        difference[np.isnan(difference)] = np.inf
        heads = self.shape.batch * self.shape.num_heads
        return Errors(
            float(difference.max()),
            float(np.sqrt(np.mean(difference**2))),
            float(np.sqrt(np.mean(self.output**2))),
            len(self.rows) * heads,
            self.shape.q_len * heads,
        )


def _attend(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, hidden: np.ndarray | None
) -> np.ndarray:
    scores = query @ key.T / np.sqrt(query.shape[1])
    if hidden is not None:
        scores[hidden] = -np.inf
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return (weights @ value) / weights.sum(axis=1, keepdims=True)
