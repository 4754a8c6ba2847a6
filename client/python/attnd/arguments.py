"""The keyword arguments that `attend` and `forward` share wherever they are called.

A Client, a Session, a Stream and their asynchronous kin take the same ones; what can't be encoded
is a TypeError or ValueError there, all else is for the server to judge. proto/attention/v1
documents the fields that they become.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, TypeAlias, TypedDict

from attnd._proto.attention.v1 import types_pb2
from attnd.tensors import AnyTensor

Layout = Literal["heads_first", "tokens_first", "packed"]
Kind = Literal["self", "cross"]
Stage = Literal["scaled", "soft_capped", "masked", "probabilities"]
CacheMode = Literal["append", "read_only", "discard"]

# One value per row, or one for all rows; None, for a row or at all: nothing is asked of it.
PerRow: TypeAlias = "int | Sequence[int | None] | None"


class HasSessionId(Protocol):
    @property
    def id(self) -> str: ...


SessionLike: TypeAlias = "HasSessionId | str"


class SharedArguments(TypedDict, total=False):
    """Of both calls."""

    model: str  # a hosted model's name; "" where there is none (attend alone)
    layer: int  # from 0
    stack: str  # of a model with several
    kind: Kind
    attention_mask: (
        AnyTensor | None
    )  # bool (True: attend), additive, or int64 padding [batch, kv_len]
    query_lengths: Sequence[int] | None  # tokens of each row; the rest is padding, its output zero
    kv_lengths: Sequence[int] | None
    past_key: AnyTensor | None  # earlier keys and values that travel with the call
    past_value: AnyTensor | None
    use_cache: bool  # return present_key and present_value; not with sessions
    output_attentions: bool  # return the weights: only implementations that form them
    implementation: str  # "": the active one; "auto": what the server thinks best for this call
    # What an approximate implementation may leave out, one of the two; with an implementation of ""
    # or "auto" they permit one.
    sparsity_factor: float | None  # share of the visible query-key pairs to leave out, in [0, 1)
    sparsity_mass: (
        float | None
    )  # leave out as much as this share of the attention allows, in (0, 1]
    priority: int

    # Earlier keys and values that the server holds, one session per row. "append" keeps the new
    # tokens, "discard" does not, "read_only" brings none.
    sessions: Sequence[SessionLike] | None
    cache_mode: CacheMode
    truncate: PerRow  # first cut the row's cache to this length
    cache_position: PerRow  # fail unless this is where the row's new tokens go
    step: PerRow  # the caller's own number of the call; the last one again is a retry


class AttendArguments(SharedArguments, total=False):
    layout: Layout
    first_query_position: Sequence[int] | None  # of each row; None: its last query at its last key
    # Options that are None are the layer's where `model` names one, else the API's defaults.
    scale: float | None
    is_causal: bool | None
    window_left: int | None
    window_right: int | None
    soft_cap: float | None
    alibi_slopes: Sequence[float] | None  # of each query head; [] switches a layer's own off
    sink_logits: Sequence[float] | None
    attention_stage: Stage  # what output_attentions returns
    output_lse: bool
    output_dtype: object  # a dtype of NumPy or PyTorch, or its name; None: the query's


class ForwardArguments(SharedArguments, total=False):
    # Of kind "cross": what keys and values are made of; `kv_lengths` are its rows' then.
    encoder_hidden_states: AnyTensor | None
    position_ids: AnyTensor | None
    options: types_pb2.AttentionOptions | None  # override the layer's


class SelectArguments(TypedDict, total=False):
    """Of `select_attention`: a request's shape, without its tensors."""

    stack: str  # of a model with several
    kind: Kind
    dtype: object  # a dtype of NumPy or PyTorch, or its name; left out: the model's
    cached: bool  # earlier keys lie in sessions
    has_mask: bool
    output_attentions: bool
    output_lse: bool
    query_lengths: Sequence[int] | None  # of rows that differ
    kv_lengths: Sequence[int] | None
