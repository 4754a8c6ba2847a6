"""What the data plane's calls return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic

from attnd._proto.attention.v1 import types_pb2
from attnd.tensors import TensorT


@dataclass(frozen=True, slots=True)
class Execution:
    """The facts of one execution; attention.v1.Execution documents the fields."""

    implementation: str
    backend: str
    reason: str
    queue_seconds: float
    compute_seconds: float
    peak_workspace_bytes: int
    packed_input_bytes: int
    flops: int
    sparsity: float | None
    recovered_mass: float | None
    batched_requests: int

    @classmethod
    def from_proto(cls, message: types_pb2.Execution) -> Execution:
        return cls(
            implementation=message.implementation,
            backend=message.backend,
            reason=message.reason,
            queue_seconds=message.queue_seconds,
            compute_seconds=message.compute_seconds,
            peak_workspace_bytes=message.peak_workspace_bytes,
            packed_input_bytes=message.packed_input_bytes,
            flops=message.flops,
            sparsity=message.sparsity if message.HasField("sparsity") else None,
            recovered_mass=message.recovered_mass if message.HasField("recovered_mass") else None,
            batched_requests=message.batched_requests,
        )


@dataclass(frozen=True, slots=True)
class AttentionResult(Generic[TensorT]):
    """An answer of `attend` or `forward`, in tensors of the kind of its query or hidden states.

    What was not asked for is None.
    """

    output: TensorT
    attention_weights: TensorT | None  # [batch, num_heads, q_len, kv_len]
    lse: TensorT | None  # float32 [batch, num_heads, q_len]; packed: [tokens, num_heads]
    present_key: TensorT | None
    present_value: TensorT | None
    cache_length: tuple[int, ...]  # of each session, after the call; () without sessions
    execution: Execution
