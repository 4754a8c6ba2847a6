"""The client: attention as calls, on NumPy arrays or PyTorch tensors."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from attnd import _benchmark, _channel, _requests, _wire, errors
from attnd._proto.attention.v1 import admin_pb2, attention_pb2
from attnd.arguments import AttendArguments, ForwardArguments, SelectArguments, SessionLike
from attnd.results import AttentionResult
from attnd.sessions import Session
from attnd.stream import Stream
from attnd.tensors import AnyTensor, TensorT

_ATTENTION = "/attention.v1.AttentionService/"
_ADMIN = "/attention.v1.AdminService/"

ResponseT = TypeVar("ResponseT", bound=Message)


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
    is for the server to judge. `channel_options` are gRPC's. `traffic` counts the bytes of its
    messages, sent and received.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout: float | None = None,
        max_message_bytes: int = _channel.MAX_MESSAGE_BYTES,
        channel_options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        self.address = address
        self.timeout = timeout
        self.traffic = _channel.Traffic()
        options = _channel.options(max_message_bytes, channel_options)
        self._channel = grpc.insecure_channel(address, options=options)
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
        key: AnyTensor | None = None,
        value: AnyTensor | None = None,
        *,
        timeout: float | None = None,
        **arguments: Unpack[AttendArguments],
    ) -> AttentionResult[TensorT]:
        """Attention alone, on queries, keys and values that the caller projected and rotated.

        Shapes are [batch, heads, length, dim], [batch, length, heads, dim] or, packed, [tokens,
        heads, dim] with `query_lengths` and `kv_lengths`. Key and value have num_kv_heads heads,
        which divides the query's, and are left out with `cache_mode="read_only"` alone.
        """
        call = _requests.attend(query, key, value, arguments)
        return call.result(self._invoke(self._attend, call.envelope, timeout))

    def forward(
        self,
        hidden_states: TensorT,
        *,
        timeout: float | None = None,
        **arguments: Unpack[ForwardArguments],
    ) -> AttentionResult[TensorT]:
        """An attention layer of a hosted model: `model` and `layer` are needed.

        That is its projections, position encoding, attention and output projection, without the
        residual and the layer norm of the block around it. hidden_states is [batch, q_len,
        hidden_size], or [tokens, hidden_size] with `query_lengths`, of any floating dtype, which is
        the output's too. A layer of `kind="cross"` takes its keys and values from
        `encoder_hidden_states` [batch, kv_len, encoder_hidden_size], or [tokens,
        encoder_hidden_size] with `kv_lengths`, or with `cache_mode="read_only"` from sessions.
        """
        call = _requests.forward(hidden_states, arguments)
        return call.result(self._invoke(self._forward, call.envelope, timeout))

    def stream(self, *, timeout: float | None = None) -> Stream:
        """Calls over one long-lived stream, many in flight; see attnd.stream.

        `timeout` is that of each of its calls which has none of its own.
        """
        info = self.server_info()
        return Stream(
            self._channel,
            self.traffic,
            max_requests=info.max_stream_requests,
            max_bytes=info.max_stream_bytes,
            timeout=self.timeout if timeout is None else timeout,
            make_session=self._session,
        )

    # Sessions.

    def open_session(
        self,
        model: str = "",
        *,
        reserve_tokens: int = 0,
        time_to_live: float = 0.0,
        cache_dtype: object = None,
        rollback_tokens: int = 0,
        timeout: float | None = None,
    ) -> Session:
        """A sequence's key/value cache on the server, over all layers of a model, or of none.

        `reserve_tokens` sets memory aside at once. `time_to_live` is in seconds without a call; 0
        is the server's default. `cache_dtype` (a tensor's dtype, or "int8") is the model's by
        default, or that of the first append. `rollback_tokens` can always be cut again on layers
        with windows; 0: 64.
        """
        request = _requests.open_session(
            model, reserve_tokens, time_to_live, cache_dtype, rollback_tokens
        )
        response = self._call(
            f"{_ATTENTION}OpenSession", request, attention_pb2.OpenSessionResponse, timeout
        )
        return self._session(response.session_id, model)

    def attach_session(self, session_id: str, *, timeout: float | None = None) -> Session:
        """A session that was opened elsewhere, its lengths and steps as the server has them."""
        session = self._session(session_id, "")
        session.learn(self.get_session(session_id, timeout=timeout))
        return session

    def fork_session(
        self,
        session: SessionLike,
        *,
        count: int = 1,
        length: int | None = None,
        timeout: float | None = None,
    ) -> list[str]:
        """Ids of sessions that share this one's first `length` tokens; `Session.fork` is typed."""
        request = _requests.fork_session(session, count, length)
        response = self._call(
            f"{_ATTENTION}ForkSession", request, attention_pb2.ForkSessionResponse, timeout
        )
        return list(response.session_ids)

    def get_session(
        self, session: SessionLike, *, timeout: float | None = None
    ) -> attention_pb2.GetSessionResponse:
        """What the server holds of it. It counts as a use: the time to live starts anew."""
        request = attention_pb2.GetSessionRequest(session_id=_requests.session_id(session))
        return self._call(
            f"{_ATTENTION}GetSession", request, attention_pb2.GetSessionResponse, timeout
        )

    def close_session(self, session: SessionLike, *, timeout: float | None = None) -> None:
        """Frees its cache. One that has expired or was closed before is no error."""
        request = attention_pb2.CloseSessionRequest(session_id=_requests.session_id(session))
        try:
            self._call(
                f"{_ATTENTION}CloseSession", request, attention_pb2.CloseSessionResponse, timeout
            )
        except errors.NotFound:
            return

    def list_sessions(
        self, model: str = "", *, timeout: float | None = None
    ) -> list[admin_pb2.SessionStatus]:
        """The open sessions of all callers, of one model or of all; ids only by their beginning."""
        sessions: list[admin_pb2.SessionStatus] = []
        request = admin_pb2.ListSessionsRequest(model=model)
        while True:
            response = self._call(
                f"{_ADMIN}ListSessions", request, admin_pb2.ListSessionsResponse, timeout
            )
            sessions += response.sessions
            if not response.next_page_token:
                return sessions
            request.page_token = response.next_page_token

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

    def benchmark(
        self,
        model: str,
        *,
        timeout: float | None = None,
        **arguments: Unpack[_benchmark.BenchmarkArguments],
    ) -> Iterator[_benchmark.BenchmarkEvent]:
        """Times implementations side by side on the server, while it serves.

        Yields BenchmarkProgress as it comes, then a BenchmarkResult for each implementation, then
        progress of 1. Closing the generator, or leaving it to be collected, ends the benchmark.
        """
        envelope = _benchmark.request(model, arguments)
        return self._events(envelope, self.timeout if timeout is None else timeout)

    def _events(
        self, envelope: _wire.Envelope[Any], timeout: float | None
    ) -> Iterator[_benchmark.BenchmarkEvent]:
        method = self._channel.unary_stream(
            _benchmark.PATH,
            request_serializer=self.traffic.counts_sent(_wire.serialize),
            response_deserializer=self.traffic.counts_received(
                admin_pb2.BenchmarkAttentionResponse.FromString
            ),
        )
        call = method(envelope, timeout=timeout)
        try:
            for response in call:
                event = _benchmark.event(response)
                if event is not None:
                    yield event
        except grpc.RpcError as error:
            raise errors.from_rpc_error(error) from error
        finally:
            call.cancel()

    def select_attention(
        self,
        model: str,
        layer: int = 0,
        *,
        q_len: int,
        kv_len: int | None = None,
        batch: int = 1,
        timeout: float | None = None,
        **arguments: Unpack[SelectArguments],
    ) -> admin_pb2.SelectAttentionResponse:
        """What "auto" would choose for a request of this shape on a model's layer, and why.

        `kv_len` counts past and new keys; left out, it is `q_len`. The answer's candidates are all
        implementations, best first, each with its estimate or why it was passed over; its
        `implementation` is empty where none can do what is asked.
        """
        request = _requests.select(
            model, layer, batch, q_len, q_len if kv_len is None else kv_len, arguments
        )
        return self._call(
            f"{_ADMIN}SelectAttention", request, admin_pb2.SelectAttentionResponse, timeout
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

    def _session(self, session_id: str, model: str) -> Session:
        return Session(self, session_id, model)

    def _tensor_method(self, name: str, response_class: type[ResponseT]) -> Any:
        return self._channel.unary_unary(
            f"{_ATTENTION}{name}",
            request_serializer=self.traffic.counts_sent(_wire.serialize),
            response_deserializer=self.traffic.counts_received(
                lambda data: _wire.parse(data, response_class)
            ),
        )

    def _call(
        self, path: str, request: Message, response_class: type[ResponseT], timeout: float | None
    ) -> ResponseT:
        method = self._channel.unary_unary(
            path,
            request_serializer=self.traffic.counts_sent(
                lambda message: message.SerializeToString()
            ),
            response_deserializer=self.traffic.counts_received(response_class.FromString),
        )
        response: ResponseT = self._invoke(method, request, timeout)
        return response

    def _invoke(self, method: Any, request: object, timeout: float | None) -> Any:
        try:
            return method(request, timeout=self.timeout if timeout is None else timeout)
        except grpc.RpcError as error:
            raise errors.from_rpc_error(error) from error
