"""The stream for asyncio.

    async with attnd.AsyncClient(address) as client, client.stream() as stream:
        calls = [await stream.forward(x, model="m", layer=0, sessions=[s]) for x, s in work]
        for call in asyncio.as_completed(calls):
            result = await call

It is what the synchronous one is (attnd.stream); a unary call is a stream's only one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack, cast

import grpc
import grpc.aio

from attnd import _benchmark, _channel, _requests, _stream_messages, _wire, errors
from attnd._proto.attention.v1 import admin_pb2, attention_pb2
from attnd.arguments import AttendArguments, ForwardArguments, SessionLike
from attnd.results import AttentionResult
from attnd.tensors import AnyTensor, TensorT

ResultT = TypeVar("ResultT")

_SERVICE = "/attention.v1.AttentionService/"


class AsyncClient:
    """A connection to one server, of one event loop. Arguments are those of `Client`."""

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
        self._channel = grpc.aio.insecure_channel(address, options=options)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the connection; calls that are on their way are cancelled."""
        await self._channel.close()

    def stream(self, *, timeout: float | None = None) -> AsyncStream:
        """To be entered by `async with`; `timeout` is that of calls without one of their own."""
        return AsyncStream(
            self._channel, self.traffic, self.timeout if timeout is None else timeout
        )

    async def benchmark(
        self,
        model: str,
        *,
        timeout: float | None = None,
        **arguments: Unpack[_benchmark.BenchmarkArguments],
    ) -> AsyncIterator[_benchmark.BenchmarkEvent]:
        """As `Client.benchmark`; ending the iteration early, by `aclose`, ends the benchmark."""
        method = self._channel.unary_stream(
            _benchmark.PATH,
            request_serializer=self.traffic.counts_sent(_wire.serialize),
            response_deserializer=self.traffic.counts_received(
                admin_pb2.BenchmarkAttentionResponse.FromString
            ),
        )
        call = method(
            _benchmark.request(model, arguments),
            timeout=self.timeout if timeout is None else timeout,
        )
        try:
            async for response in call:
                event = _benchmark.event(response)
                if event is not None:
                    yield event
        except grpc.RpcError as error:
            raise errors.from_rpc_error(error) from error
        finally:
            call.cancel()


@dataclass(frozen=True, slots=True)
class _Unanswered:
    call: asyncio.Future[Any]
    read: _stream_messages.Reader
    size: int


class AsyncStream:
    """Opened by `AsyncClient.stream`; leaving its context waits for what is unanswered.

    Its methods wait while as many requests, or bytes of them, are unanswered as the server takes on
    one stream, then send, and return an asyncio.Future of the answer. Cancelling that future asks
    the server to give the call up.
    """

    def __init__(
        self, channel: grpc.aio.Channel, traffic: _channel.Traffic, timeout: float | None
    ) -> None:
        self._channel = channel
        self._traffic = traffic
        self._timeout = timeout
        self._limits = attention_pb2.GetServerInfoResponse()
        self._room = asyncio.Condition()
        self._writing = asyncio.Lock()
        self._unanswered: dict[int, _Unanswered] = {}
        self._unanswered_bytes = 0
        self._last_id = 0
        self._failure: errors.AttndError | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        info = self._channel.unary_unary(
            f"{_SERVICE}GetServerInfo",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=attention_pb2.GetServerInfoResponse.FromString,
        )
        try:
            self._limits = await info(attention_pb2.GetServerInfoRequest(), timeout=self._timeout)
        except grpc.RpcError as error:
            raise errors.from_rpc_error(error) from error
        self._rpc = self._channel.stream_stream(f"{_SERVICE}Stream")()
        self._reader = asyncio.create_task(self._read())
        return self

    async def __aexit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exception is None:
            async with self._writing:
                with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
                    await self._rpc.done_writing()
        else:
            self._rpc.cancel()
        await self._reader
        for task in list(self._tasks):
            await task

    async def attend(
        self,
        query: TensorT,
        key: AnyTensor | None = None,
        value: AnyTensor | None = None,
        *,
        timeout: float | None = None,
        **arguments: Unpack[AttendArguments],
    ) -> asyncio.Future[AttentionResult[TensorT]]:
        call = _requests.attend(query, key, value, arguments)
        return await self._send(call.name, call.envelope, call.result, timeout)

    async def forward(
        self,
        hidden_states: TensorT,
        *,
        timeout: float | None = None,
        **arguments: Unpack[ForwardArguments],
    ) -> asyncio.Future[AttentionResult[TensorT]]:
        call = _requests.forward(hidden_states, arguments)
        return await self._send(call.name, call.envelope, call.result, timeout)

    async def open_session(
        self,
        model: str = "",
        *,
        reserve_tokens: int = 0,
        time_to_live: float = 0.0,
        cache_dtype: object = None,
        rollback_tokens: int = 0,
        timeout: float | None = None,
    ) -> asyncio.Future[str]:
        """Of the session's id."""
        request = _requests.open_session(
            model, reserve_tokens, time_to_live, cache_dtype, rollback_tokens
        )
        envelope = _wire.Envelope(request)
        return await self._send("OpenSession", envelope, _opened, timeout)

    async def fork_session(
        self,
        session: SessionLike,
        *,
        count: int = 1,
        length: int | None = None,
        timeout: float | None = None,
    ) -> asyncio.Future[list[str]]:
        request = _requests.fork_session(session, count, length)
        return await self._send("ForkSession", _wire.Envelope(request), _forked, timeout)

    async def close_session(
        self, session: SessionLike, *, timeout: float | None = None
    ) -> asyncio.Future[None]:
        request = attention_pb2.CloseSessionRequest(session_id=_requests.session_id(session))
        return await self._send("CloseSession", _wire.Envelope(request), _closed, timeout)

    async def _send(
        self,
        rpc: str,
        envelope: _wire.Envelope[Any],
        read: Callable[[_wire.Envelope[Any]], ResultT],
        timeout: float | None,
    ) -> asyncio.Future[ResultT]:
        self._last_id += 1
        call_id = self._last_id
        timeout = self._timeout if timeout is None else timeout
        data = _stream_messages.request(call_id, rpc, envelope, timeout)
        call: asyncio.Future[ResultT] = asyncio.get_running_loop().create_future()
        call.add_done_callback(lambda done: self._cancel_if_asked(call_id, done))
        async with self._room:
            await self._room.wait_for(
                lambda: self._failure is not None or self._has_room(len(data))
            )
            if self._failure is not None:
                raise type(self._failure)(*self._failure.args)
            self._unanswered[call_id] = _Unanswered(call, read, len(data))
            self._unanswered_bytes += len(data)
        await self._write(data)
        return call

    async def _write(self, data: bytes) -> None:
        async with self._writing:
            # Where the stream has ended, the reader tells it to the call.
            with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
                await self._rpc.write(data)
                self._traffic.add_sent(len(data))

    def _has_room(self, size: int) -> bool:
        if not self._unanswered:
            return True
        limit = self._limits.max_stream_bytes
        fits = not limit or self._unanswered_bytes + size <= limit
        most = self._limits.max_stream_requests
        return fits and (not most or len(self._unanswered) < most)

    def _cancel_if_asked(self, call_id: int, call: asyncio.Future[Any]) -> None:
        if call.cancelled() and call_id in self._unanswered:
            task = asyncio.create_task(self._write(_stream_messages.cancellation(call_id)))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _read(self) -> None:
        failure: errors.AttndError = errors.Unavailable("the stream has ended")
        try:
            async for data in self._rpc:
                self._traffic.add_received(len(data))
                await self._take(_stream_messages.answer(data))
        except grpc.RpcError as error:
            failure = errors.from_rpc_error(error)
        except asyncio.CancelledError:
            failure = errors.Cancelled("the stream was cancelled")
        except Exception as error:
            failure = errors.Internal(f"the stream's answer can't be read: {error}")
            self._rpc.cancel()
        async with self._room:
            self._failure = failure
            entries = list(self._unanswered.values())
            self._unanswered.clear()
            self._room.notify_all()
        for entry in entries:
            if not entry.call.done():
                entry.call.set_exception(type(failure)(*failure.args))

    async def _take(self, answer: _stream_messages.Answer) -> None:
        async with self._room:
            entry = self._unanswered.pop(answer.id, None)
            if entry is None:
                return
            self._unanswered_bytes -= entry.size
            self._room.notify_all()
        if entry.call.done():
            return
        if answer.error is not None:
            entry.call.set_exception(answer.error)
            return
        try:
            entry.call.set_result(entry.read(cast(_wire.Envelope[Any], answer.envelope)))
        except Exception as error:
            entry.call.set_exception(error)


def _opened(answer: _wire.Envelope[Any]) -> str:
    return str(answer.message.session_id)


def _forked(answer: _wire.Envelope[Any]) -> list[str]:
    return list(answer.message.session_ids)


def _closed(answer: _wire.Envelope[Any]) -> None:
    return None
