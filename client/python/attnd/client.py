"""The client: attention as calls, on NumPy arrays or PyTorch tensors."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from attnd import _wire, errors
from attnd._proto.attention.v1 import admin_pb2, attention_pb2, types_pb2
from attnd.results import AttentionResult, Execution
from attnd.tensors import AnyTensor, TensorT, data_type, decode, encode

Layout = Literal["heads_first", "tokens_first", "packed"]
Kind = Literal["self", "cross"]
Stage = Literal["scaled", "soft_capped", "masked", "probabilities"]

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

_ATTENTION = "/attention.v1.AttentionService/"
_ADMIN = "/attention.v1.AdminService/"
_MAX_MESSAGE_BYTES = (1 << 31) - 1  # protobuf's own; the server's limit is the one that counts

ResponseT = TypeVar("ResponseT", bound=Message)
ChoiceT = TypeVar("ChoiceT", bound=str)
NumberT = TypeVar("NumberT", bound=int)


class HealthStatus(enum.Enum):
    """grpc.health.v1's serving status."""

    UNKNOWN = health_pb2.HealthCheckResponse.UNKNOWN
    SERVING = health_pb2.HealthCheckResponse.SERVING
    NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Client:
    """A connection to one server; safe to use from several threads.

    `address` is "host:port" or "unix:PATH". `timeout` is that of every call in seconds, unless the
    call has one of its own; None waits for ever. Failed calls raise the subclasses of
    attnd.errors.AttndError; arguments that can't be encoded raise TypeError or ValueError, all else
    is for the server to judge. `channel_options` are gRPC's.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout: float | None = None,
        max_message_bytes: int = _MAX_MESSAGE_BYTES,
        channel_options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        self.address = address
        self.timeout = timeout
        limits = [
            ("grpc.max_send_message_length", max_message_bytes),
            ("grpc.max_receive_message_length", max_message_bytes),
        ]
        self._channel = grpc.insecure_channel(address, options=[*limits, *channel_options])
        self._attend = self._tensor_method("Attend", attention_pb2.AttendResponse)
        self._forward = self._tensor_method("Forward", attention_pb2.ForwardResponse)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection; calls that are on their way are cancelled."""
        self._channel.close()

    # The data plane.

    def attend(
        self,
        query: TensorT,
        key: AnyTensor,
        value: AnyTensor,
        *,
        model: str = "",
        stack: str = "",
        layer: int = 0,
        kind: Kind = "self",
        attention_mask: AnyTensor | None = None,
        layout: Layout = "heads_first",
        query_lengths: Sequence[int] | None = None,
        kv_lengths: Sequence[int] | None = None,
        first_query_position: Sequence[int] | None = None,
        scale: float | None = None,
        is_causal: bool | None = None,
        window_left: int | None = None,
        window_right: int | None = None,
        soft_cap: float | None = None,
        alibi_slopes: Sequence[float] | None = None,
        sink_logits: Sequence[float] | None = None,
        past_key: AnyTensor | None = None,
        past_value: AnyTensor | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        attention_stage: Stage = "probabilities",
        output_lse: bool = False,
        output_dtype: object = None,
        implementation: str = "",
        priority: int = 0,
        timeout: float | None = None,
    ) -> AttentionResult[TensorT]:
        """Attention alone, on queries, keys and values that the caller projected and rotated.

        Shapes are [batch, heads, length, dim], [batch, length, heads, dim] or, packed, [tokens,
        heads, dim] with `query_lengths` and `kv_lengths`. Key and value have num_kv_heads heads,
        which divides the query's. The mask is bool (True: attend), additive, or an int64 padding
        mask [batch, kv_len]. Options that are None are the layer's where `model` names one, and the
        API's defaults otherwise. `output_dtype` is a dtype of NumPy or PyTorch, or its name; None
        is the query's.
        """
        options = types_pb2.AttentionOptions(
            scale=scale,
            is_causal=is_causal,
            window_left=window_left,
            window_right=window_right,
            soft_cap=soft_cap,
            alibi_slopes=None
            if alibi_slopes is None
            else types_pb2.PerHeadValues(values=alibi_slopes),
            sink_logits=None
            if sink_logits is None
            else types_pb2.PerHeadValues(values=sink_logits),
        )
        request = attention_pb2.AttendRequest(
            layer=_layer(model, stack, layer, kind),
            tensor_layout=_choice("layout", layout, _LAYOUTS),
            query_lengths=query_lengths,
            kv_lengths=kv_lengths,
            first_query_position=first_query_position,
            options=options,
            use_cache=use_cache,
            output_attentions=output_attentions,
            attention_stage=_choice("attention_stage", attention_stage, _STAGES),
            output_lse=output_lse,
            execution=types_pb2.ExecutionOptions(implementation=implementation, priority=priority),
            output_dtype=None if output_dtype is None else data_type(output_dtype),
        )
        tensors = {
            "query": query,
            "key": key,
            "value": value,
            "attention_mask": attention_mask,
            "past_key_value.inline_kv.key": past_key,
            "past_key_value.inline_kv.value": past_value,
        }
        return self._call_tensors(self._attend, request, tensors, query, timeout)

    def forward(
        self,
        hidden_states: TensorT,
        *,
        model: str,
        layer: int,
        stack: str = "",
        kind: Kind = "self",
        encoder_hidden_states: AnyTensor | None = None,
        attention_mask: AnyTensor | None = None,
        position_ids: AnyTensor | None = None,
        query_lengths: Sequence[int] | None = None,
        kv_lengths: Sequence[int] | None = None,
        past_key: AnyTensor | None = None,
        past_value: AnyTensor | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        options: types_pb2.AttentionOptions | None = None,
        implementation: str = "",
        priority: int = 0,
        timeout: float | None = None,
    ) -> AttentionResult[TensorT]:
        """An attention layer of a hosted model.

        That is its projections, position encoding, attention and output projection, without the
        residual and the layer norm of the block around it. hidden_states is [batch, q_len,
        hidden_size], or [tokens, hidden_size] with `query_lengths`, of any floating dtype, which is
        the output's too. `options` overrides the layer's.
        """
        request = attention_pb2.ForwardRequest(
            layer=_layer(model, stack, layer, kind),
            query_lengths=query_lengths,
            kv_lengths=kv_lengths,
            use_cache=use_cache,
            output_attentions=output_attentions,
            options=options,
            execution=types_pb2.ExecutionOptions(implementation=implementation, priority=priority),
        )
        tensors = {
            "hidden_states": hidden_states,
            "encoder_hidden_states": encoder_hidden_states,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_value.inline_kv.key": past_key,
            "past_key_value.inline_kv.value": past_value,
        }
        return self._call_tensors(self._forward, request, tensors, hidden_states, timeout)

    def server_info(self, *, timeout: float | None = None) -> attention_pb2.GetServerInfoResponse:
        """Version, limits and features."""
        request = attention_pb2.GetServerInfoRequest()
        return self._call(
            f"{_ATTENTION}GetServerInfo", request, attention_pb2.GetServerInfoResponse, timeout
        )

    # The control plane.

    def list_models(self, *, timeout: float | None = None) -> list[admin_pb2.ModelStatus]:
        request = admin_pb2.ListModelsRequest()
        response = self._call(f"{_ADMIN}ListModels", request, admin_pb2.ListModelsResponse, timeout)
        return list(response.models)

    def load_model(
        self,
        name: str,
        *,
        weights: str = "",
        implementation: str = "",
        spec: admin_pb2.ModelSpec | None = None,
        timeout: float | None = None,
    ) -> admin_pb2.ModelStatus:
        """Hosts one more model: `weights` is a directory under the server's model root.

        `spec` says what the directory does not, or everything where there is no directory
        (attention alone, no `forward`); the other arguments, where given, go before it.
        """
        request = admin_pb2.LoadModelRequest(spec=spec)
        request.spec.name = name
        request.spec.weights = weights or request.spec.weights
        request.spec.implementation = implementation or request.spec.implementation
        return self._call(f"{_ADMIN}LoadModel", request, admin_pb2.LoadModelResponse, timeout).model

    def unload_model(
        self, name: str, *, close_sessions: bool = False, timeout: float | None = None
    ) -> None:
        """Running requests finish; later ones raise NotFound."""
        request = admin_pb2.UnloadModelRequest(model=name, close_sessions=close_sessions)
        self._call(f"{_ADMIN}UnloadModel", request, admin_pb2.UnloadModelResponse, timeout)

    def switch_attention(
        self, model: str, implementation: str, *, timeout: float | None = None
    ) -> admin_pb2.SwitchAttentionResponse:
        """Makes an implementation, or "auto", the model's active one.

        The model "" is attention without a model. An implementation that can't serve the model
        raises nothing: the answer's `switched` is False, and its `reason` says why.
        """
        request = admin_pb2.SwitchAttentionRequest(model=model, implementation=implementation)
        return self._call(
            f"{_ADMIN}SwitchAttention", request, admin_pb2.SwitchAttentionResponse, timeout
        )

    def list_implementations(
        self, *, timeout: float | None = None
    ) -> list[admin_pb2.Implementation]:
        request = admin_pb2.ListImplementationsRequest()
        response = self._call(
            f"{_ADMIN}ListImplementations", request, admin_pb2.ListImplementationsResponse, timeout
        )
        return list(response.implementations)

    def get_hardware(self, *, timeout: float | None = None) -> admin_pb2.GetHardwareResponse:
        request = admin_pb2.GetHardwareRequest()
        return self._call(f"{_ADMIN}GetHardware", request, admin_pb2.GetHardwareResponse, timeout)

    def check_health(self, service: str = "", *, timeout: float | None = None) -> HealthStatus:
        """Of the whole server, or of one service; an unknown service raises NotFound."""
        request = health_pb2.HealthCheckRequest(service=service)
        response = self._call(
            "/grpc.health.v1.Health/Check", request, health_pb2.HealthCheckResponse, timeout
        )
        return HealthStatus(response.status)

    # How calls are made.

    def _tensor_method(self, name: str, response_class: type[ResponseT]) -> Any:
        return self._channel.unary_unary(
            f"{_ATTENTION}{name}",
            request_serializer=_wire.serialize,
            response_deserializer=lambda data: _wire.parse(data, response_class),
        )

    def _call_tensors(
        self,
        method: Any,
        request: Message,
        tensors: dict[str, Any],
        like: TensorT,
        timeout: float | None,
    ) -> AttentionResult[TensorT]:
        encoded = {
            path: encode(_argument_of(path), tensor)
            for path, tensor in tensors.items()
            if tensor is not None
        }
        answer = self._invoke(method, _wire.Envelope(request, encoded), timeout)
        decoded = {path: decode(tensor, like) for path, tensor in answer.tensors.items()}
        return AttentionResult(
            output=decoded["output"],
            attention_weights=decoded.get("attention_weights"),
            lse=decoded.get("lse"),
            present_key=decoded.get("present.key"),
            present_value=decoded.get("present.value"),
            execution=Execution.from_proto(answer.message.execution),
        )

    def _call(
        self, path: str, request: Message, response_class: type[ResponseT], timeout: float | None
    ) -> ResponseT:
        method = self._channel.unary_unary(
            path,
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=response_class.FromString,
        )
        response: ResponseT = self._invoke(method, request, timeout)
        return response

    def _invoke(self, method: Any, request: object, timeout: float | None) -> Any:
        try:
            return method(request, timeout=self.timeout if timeout is None else timeout)
        except grpc.RpcError as error:
            raise errors.from_rpc_error(error) from error


def _layer(model: str, stack: str, layer: int, kind: Kind) -> types_pb2.LayerRef:
    return types_pb2.LayerRef(
        model=model, stack=stack, layer=layer, kind=_choice("kind", kind, _KINDS)
    )


def _choice(argument: str, given: ChoiceT, choices: dict[ChoiceT, NumberT]) -> NumberT:
    if given not in choices:
        raise ValueError(f"{argument} is {given!r}; it must be one of {', '.join(choices)}")
    return choices[given]


def _argument_of(path: str) -> str:
    return path.replace("past_key_value.inline_kv.", "past_")
