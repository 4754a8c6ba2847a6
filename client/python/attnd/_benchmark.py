"""BenchmarkAttention's request out of a call's arguments; knows of no connection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias, TypedDict

from attnd import _wire
from attnd._proto.attention.v1 import admin_pb2, types_pb2
from attnd.arguments import Kind
from attnd.tensors import AnyTensor, data_type, encode

PATH = "/attention.v1.AdminService/BenchmarkAttention"

BenchmarkEvent: TypeAlias = "admin_pb2.BenchmarkProgress | admin_pb2.BenchmarkResult"
_Request: TypeAlias = "_wire.Envelope[admin_pb2.BenchmarkAttentionRequest]"

_KINDS: dict[Kind, types_pb2.AttentionKind] = {
    "self": types_pb2.ATTENTION_KIND_SELF,
    "cross": types_pb2.ATTENTION_KIND_CROSS,
}


class BenchmarkArguments(TypedDict, total=False):
    """What is executed, and for how long. Either hidden_states, or a shape of random values."""

    layer: int  # from 0
    stack: str  # of a model with several
    kind: Kind
    hidden_states: AnyTensor | None  # [batch, q_len, hidden_size]: the attention inside forward
    batch: int
    q_len: int
    kv_len: int  # past and new keys
    dtype: object  # a tensor's dtype, or its name; the model's by default
    cached: bool  # keys and values lie in sessions' pages
    has_mask: bool
    output_attentions: bool
    output_lse: bool
    query_lengths: Sequence[int]  # of rows that differ
    kv_lengths: Sequence[int]
    implementations: Sequence[str]  # all that can execute it by default
    iterations: int  # of each; 0: as many as a steady median needs
    max_seconds: float  # 0: the server's default
    max_bytes: int  # of memory, beyond the model's; 0: the server's default


_SHAPE = ("batch", "q_len", "kv_len", "cached", "has_mask", "output_attentions", "output_lse")
_LENGTHS = ("query_lengths", "kv_lengths")


def request(model: str, arguments: BenchmarkArguments) -> _Request:
    unknown = arguments.keys() - BenchmarkArguments.__annotations__.keys()
    if unknown:
        raise TypeError(f"benchmark has no argument {', '.join(sorted(unknown))}")
    kind = arguments.get("kind", "self")
    if kind not in _KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(_KINDS)}")
    message = admin_pb2.BenchmarkAttentionRequest(
        layer=types_pb2.LayerRef(
            model=model,
            stack=arguments.get("stack", ""),
            layer=arguments.get("layer", 0),
            kind=_KINDS[kind],
        ),
        implementations=arguments.get("implementations", ()),
        iterations=arguments.get("iterations", 0),
        max_seconds=arguments.get("max_seconds", 0.0),
        max_bytes=arguments.get("max_bytes", 0),
    )
    hidden_states = arguments.get("hidden_states")
    if hidden_states is None:
        message.shape.CopyFrom(_shape(arguments))
        return _wire.Envelope(message)
    for name in (*_SHAPE, *_LENGTHS, "dtype"):
        if name in arguments:
            raise ValueError(f"a benchmark has either hidden_states or {name}")
    return _wire.Envelope(message, {"hidden_states": encode("hidden_states", hidden_states)})


def _shape(arguments: BenchmarkArguments) -> admin_pb2.AttentionShape:
    dtype = arguments.get("dtype")
    return admin_pb2.AttentionShape(
        batch=arguments.get("batch", 1),
        q_len=arguments.get("q_len", 512),
        kv_len=arguments.get("kv_len", arguments.get("q_len", 512)),
        dtype=None if dtype is None else data_type(dtype),
        cached=arguments.get("cached", False),
        has_mask=arguments.get("has_mask", False),
        output_attentions=arguments.get("output_attentions", False),
        output_lse=arguments.get("output_lse", False),
        query_lengths=arguments.get("query_lengths"),
        kv_lengths=arguments.get("kv_lengths"),
    )


def event(response: admin_pb2.BenchmarkAttentionResponse) -> BenchmarkEvent | None:
    """None for one that this client does not know."""
    if response.HasField("progress"):
        return response.progress
    return response.result if response.HasField("result") else None
