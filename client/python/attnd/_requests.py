"""From the calls' arguments to messages, and from answers to results; knows of no connection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message

from attnd import _wire
from attnd._proto.attention.v1 import admin_pb2, attention_pb2, types_pb2
from attnd.arguments import (
    AttendArguments,
    CacheMode,
    ForwardArguments,
    Kind,
    Layout,
    PerRow,
    SelectArguments,
    SessionLike,
    Stage,
)
from attnd.results import AttentionResult, Execution
from attnd.tensors import AnyTensor, TensorT, data_type, decode, encode

_LAYOUTS: dict[Layout, types_pb2.TensorLayout] = {
    "heads_first": types_pb2.TENSOR_LAYOUT_HEADS_FIRST,
    "tokens_first": types_pb2.TENSOR_LAYOUT_TOKENS_FIRST,
    "packed": types_pb2.TENSOR_LAYOUT_PACKED,
}
_KINDS: dict[Kind, types_pb2.AttentionKind] = {
    "self": types_pb2.ATTENTION_KIND_SELF,
    "cross": types_pb2.ATTENTION_KIND_CROSS,
}
_STAGES: dict[Stage, attention_pb2.ScoreStage] = {
    "scaled": attention_pb2.SCORE_STAGE_SCALED,
    "soft_capped": attention_pb2.SCORE_STAGE_SOFT_CAPPED,
    "masked": attention_pb2.SCORE_STAGE_MASKED,
    "probabilities": attention_pb2.SCORE_STAGE_PROBABILITIES,
}
_MODES: dict[CacheMode, attention_pb2.CacheMode] = {
    "append": attention_pb2.CACHE_MODE_APPEND,
    "read_only": attention_pb2.CACHE_MODE_READ_ONLY,
    "discard": attention_pb2.CACHE_MODE_DISCARD,
}
_KIND_NAMES: dict[int, Kind] = {number: name for name, number in _KINDS.items()}

ChoiceT = TypeVar("ChoiceT", bound=str)
NumberT = TypeVar("NumberT", bound=int)


class Call(Generic[TensorT]):
    """One request of the data plane, and how its answer is read."""

    def __init__(
        self,
        name: str,
        request: Message,
        tensors: Mapping[str, AnyTensor | None],
        like: TensorT,
    ) -> None:
        self.name = name  # the rpc's
        self.envelope = _wire.Envelope(
            request,
            {
                path: encode(_argument_of(path), tensor)
                for path, tensor in tensors.items()
                if tensor is not None
            },
        )
        self._like = like

    def result(self, answer: _wire.Envelope[Any]) -> AttentionResult[TensorT]:
        decoded = {path: decode(tensor, self._like) for path, tensor in answer.tensors.items()}
        return AttentionResult(
            output=decoded["output"],
            attention_weights=decoded.get("attention_weights"),
            lse=decoded.get("lse"),
            present_key=decoded.get("present.key"),
            present_value=decoded.get("present.value"),
            cache_length=tuple(answer.message.cache_length),
            execution=Execution.from_proto(answer.message.execution),
        )


def attend(
    query: TensorT, key: AnyTensor | None, value: AnyTensor | None, arguments: AttendArguments
) -> Call[TensorT]:
    _refuse_unknown("attend", arguments, AttendArguments)
    dtype = arguments.get("output_dtype")
    request = attention_pb2.AttendRequest(
        layer=_layer(arguments),
        tensor_layout=_choice("layout", arguments.get("layout", "heads_first"), _LAYOUTS),
        query_lengths=arguments.get("query_lengths"),
        kv_lengths=arguments.get("kv_lengths"),
        first_query_position=arguments.get("first_query_position"),
        options=_options(arguments),
        past_key_value=_sessions(arguments),
        use_cache=arguments.get("use_cache", False),
        output_attentions=arguments.get("output_attentions", False),
        attention_stage=_choice(
            "attention_stage", arguments.get("attention_stage", "probabilities"), _STAGES
        ),
        output_lse=arguments.get("output_lse", False),
        execution=_execution(arguments),
        output_dtype=None if dtype is None else data_type(dtype),
    )
    tensors = {
        "query": query,
        "key": key,
        "value": value,
        "attention_mask": arguments.get("attention_mask"),
        "past_key_value.inline_kv.key": arguments.get("past_key"),
        "past_key_value.inline_kv.value": arguments.get("past_value"),
    }
    return Call("Attend", request, tensors, query)


def forward(hidden_states: TensorT, arguments: ForwardArguments) -> Call[TensorT]:
    _refuse_unknown("forward", arguments, ForwardArguments)
    for name in ("model", "layer"):
        if name not in arguments:
            raise TypeError(f"forward needs the argument {name!r}")
    request = attention_pb2.ForwardRequest(
        layer=_layer(arguments),
        query_lengths=arguments.get("query_lengths"),
        kv_lengths=arguments.get("kv_lengths"),
        past_key_value=_sessions(arguments),
        use_cache=arguments.get("use_cache", False),
        output_attentions=arguments.get("output_attentions", False),
        options=arguments.get("options"),
        execution=_execution(arguments),
    )
    tensors = {
        "hidden_states": hidden_states,
        "encoder_hidden_states": arguments.get("encoder_hidden_states"),
        "attention_mask": arguments.get("attention_mask"),
        "position_ids": arguments.get("position_ids"),
        "past_key_value.inline_kv.key": arguments.get("past_key"),
        "past_key_value.inline_kv.value": arguments.get("past_value"),
    }
    return Call("Forward", request, tensors, hidden_states)


def select(
    model: str, layer: int, batch: int, q_len: int, kv_len: int, arguments: SelectArguments
) -> admin_pb2.SelectAttentionRequest:
    _refuse_unknown("select_attention", arguments, SelectArguments)
    dtype = arguments.get("dtype")
    shape = admin_pb2.AttentionShape(
        batch=batch,
        q_len=q_len,
        kv_len=kv_len,
        dtype=None if dtype is None else data_type(dtype),
        cached=arguments.get("cached", False),
        has_mask=arguments.get("has_mask", False),
        output_attentions=arguments.get("output_attentions", False),
        output_lse=arguments.get("output_lse", False),
        query_lengths=arguments.get("query_lengths"),
        kv_lengths=arguments.get("kv_lengths"),
    )
    ref = _layer({**arguments, "model": model, "layer": layer})
    return admin_pb2.SelectAttentionRequest(layer=ref, shape=shape)


def open_session(
    model: str,
    reserve_tokens: int,
    time_to_live: float,
    cache_dtype: object,
    rollback_tokens: int,
) -> attention_pb2.OpenSessionRequest:
    return attention_pb2.OpenSessionRequest(
        model=model,
        reserve_tokens=reserve_tokens,
        time_to_live_seconds=time_to_live,
        cache_dtype=_cache_type(cache_dtype),
        rollback_tokens=rollback_tokens,
    )


def _cache_type(cache_dtype: object) -> types_pb2.DataType | None:
    """A tensor's dtype, or "int8", which only caches have."""
    if cache_dtype is None:
        return None
    return types_pb2.DATA_TYPE_INT8 if cache_dtype == "int8" else data_type(cache_dtype)


def fork_session(
    session: SessionLike, count: int, length: int | None
) -> attention_pb2.ForkSessionRequest:
    return attention_pb2.ForkSessionRequest(
        session_id=session_id(session), count=count, length=length
    )


def session_id(session: SessionLike) -> str:
    return session if isinstance(session, str) else session.id


def kind_name(kind: int) -> Kind:
    return _KIND_NAMES.get(kind, "self")


def _refuse_unknown(call: str, arguments: Mapping[str, Any], known: type) -> None:
    unknown = arguments.keys() - known.__annotations__.keys()
    if unknown:
        raise TypeError(f"{call} has no argument {', '.join(sorted(unknown))}")


def _layer(arguments: Mapping[str, Any]) -> types_pb2.LayerRef:
    return types_pb2.LayerRef(
        model=arguments.get("model", ""),
        stack=arguments.get("stack", ""),
        layer=arguments.get("layer", 0),
        kind=_choice("kind", arguments.get("kind", "self"), _KINDS),
    )


def _options(arguments: AttendArguments) -> types_pb2.AttentionOptions:
    return types_pb2.AttentionOptions(
        scale=arguments.get("scale"),
        is_causal=arguments.get("is_causal"),
        window_left=arguments.get("window_left"),
        window_right=arguments.get("window_right"),
        soft_cap=arguments.get("soft_cap"),
        alibi_slopes=_per_head(arguments.get("alibi_slopes")),
        sink_logits=_per_head(arguments.get("sink_logits")),
    )


def _per_head(values: Sequence[float] | None) -> types_pb2.PerHeadValues | None:
    return None if values is None else types_pb2.PerHeadValues(values=values)


def _execution(arguments: Mapping[str, Any]) -> types_pb2.ExecutionOptions:
    factor, mass = arguments.get("sparsity_factor"), arguments.get("sparsity_mass")
    if factor is not None and mass is not None:
        raise ValueError("a call has either sparsity_factor or sparsity_mass")
    sparsity = None
    if factor is not None:
        sparsity = types_pb2.SparsityOptions(factor=factor)
    elif mass is not None:
        sparsity = types_pb2.SparsityOptions(mass=mass)
    return types_pb2.ExecutionOptions(
        implementation=arguments.get("implementation", ""),
        priority=arguments.get("priority", 0),
        sparsity=sparsity,
    )


def _sessions(arguments: Mapping[str, Any]) -> attention_pb2.PastKeyValue | None:
    sessions: Sequence[SessionLike] | None = arguments.get("sessions")
    if sessions is None:
        for name in ("cache_mode", "truncate", "cache_position", "step"):
            if arguments.get(name) is not None:
                raise ValueError(f"{name} is given without sessions")
        return None
    if isinstance(sessions, str):
        raise TypeError("sessions is a str; it must be a sequence of them, one for each row")
    if arguments.get("past_key") is not None or arguments.get("past_value") is not None:
        raise ValueError("a call has either sessions or past_key and past_value")
    rows = len(sessions)
    batch = attention_pb2.SessionBatch(
        session_ids=[session_id(session) for session in sessions],
        mode=_choice("cache_mode", arguments.get("cache_mode", "append"), _MODES),
        truncate=_per_row("truncate", arguments.get("truncate"), rows, none=-1),
        cache_position=_per_row("cache_position", arguments.get("cache_position"), rows, none=-1),
        step=_per_row("step", arguments.get("step"), rows, none=0),
    )
    return attention_pb2.PastKeyValue(sessions=batch)


def _per_row(argument: str, given: PerRow, rows: int, *, none: int) -> list[int]:
    if given is None:
        return []
    if isinstance(given, Sequence):
        if len(given) != rows:
            raise ValueError(f"{argument} has {len(given)} values for {rows} sessions")
        return [none if value is None else value for value in given]
    return [given] * rows


def _choice(argument: str, given: ChoiceT, choices: dict[ChoiceT, NumberT]) -> NumberT:
    if given not in choices:
        raise ValueError(f"{argument} is {given!r}; it must be one of {', '.join(choices)}")
    return choices[given]


def _argument_of(path: str) -> str:
    return path.replace("past_key_value.inline_kv.", "past_")
