"""Calls over one long-lived stream: many in flight, each with an outcome of its own.

    with client.stream() as stream:
        for x, session in work:
            stream.forward(x, model="m", layer=0, sessions=[session])
        for call in stream.answers():
            call.id, call.result()

A call is a `concurrent.futures.Future`, so that what the standard library has for these works here.
Calls that name the same session are done in the order in which they were sent; others may be
answered in any order. One that builds on an earlier one that may fail gives `cache_position`.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, Unpack, cast

import grpc
from google.protobuf.message import Message

from attnd import _requests, _stream_messages, _wire, errors
from attnd._channel import Traffic
from attnd._proto.attention.v1 import attention_pb2
from attnd.arguments import AttendArguments, ForwardArguments, SessionLike
from attnd.results import AttentionResult
from attnd.tensors import AnyTensor, TensorT

if TYPE_CHECKING:
    from attnd.sessions import Session

ResultT = TypeVar("ResultT")


class StreamCall(Future[ResultT], Generic[ResultT]):
    """An answer to come. `result()` raises what the call failed with, an AttndError."""

    def __init__(self, stream: Stream, call_id: int) -> None:
        super().__init__()
        self._stream = stream
        self.id = call_id

    def cancel(self) -> bool:
        """Asks the server to give the call up, and returns whether there was anything to ask.

        The call is still answered: it raises Cancelled, or has its result where that was faster.
        """
        return self._stream._cancel(self.id)

    def result(self, timeout: float | None = None) -> ResultT:
        try:
            return super().result(timeout)
        finally:
            self._stream._forget(self)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        try:
            return super().exception(timeout)
        finally:
            self._stream._forget(self)


@dataclass(frozen=True, slots=True)
class _Unanswered:
    call: StreamCall[Any]
    read: _stream_messages.Reader
    size: int  # bytes of the request


class Stream:
    """Opened by `Client.stream`; leaving its context waits for what is unanswered.

    Safe to use from several threads. A call blocks while as many requests, or bytes of them, are
    unanswered as the server takes on one stream. `timeout` of a call is counted by the server, from
    the request's arrival. When the connection fails, every unanswered call fails with it, and the
    stream is over: later calls raise the same error.
    """

    def __init__(
        self,
        channel: grpc.Channel,
        traffic: Traffic,
        *,
        max_requests: int,
        max_bytes: int,
        timeout: float | None,
        make_session: Callable[[str, str], Session],
    ) -> None:
        self._traffic = traffic
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._timeout = timeout
        self._make_session = make_session
        self._changed = threading.Condition()
        self._unanswered: dict[int, _Unanswered] = {}
        self._unanswered_bytes = 0
        self._answered: dict[int, StreamCall[Any]] = {}  # in order; not asked for yet
        self._last_id = 0
        self._failure: errors.AttndError | None = None
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        method = channel.stream_stream("/attention.v1.AttentionService/Stream")
        self._rpc = method(iter(self._outgoing.get, None))
        self._reader = threading.Thread(target=self._read, name="attnd-stream", daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(wait=exception is None)

    def attend(
        self,
        query: TensorT,
        key: AnyTensor | None = None,
        value: AnyTensor | None = None,
        *,
        timeout: float | None = None,
        **arguments: Unpack[AttendArguments],
    ) -> StreamCall[AttentionResult[TensorT]]:
        """`Client.attend`, but for the answer, which is still to come."""
        call = _requests.attend(query, key, value, arguments)
        return self._send(call.name, call.envelope, call.result, timeout)

    def forward(
        self,
        hidden_states: TensorT,
        *,
        timeout: float | None = None,
        **arguments: Unpack[ForwardArguments],
    ) -> StreamCall[AttentionResult[TensorT]]:
        """`Client.forward`, but for the answer, which is still to come."""
        call = _requests.forward(hidden_states, arguments)
        return self._send(call.name, call.envelope, call.result, timeout)

    def open_session(
        self,
        model: str = "",
        *,
        reserve_tokens: int = 0,
        time_to_live: float = 0.0,
        cache_dtype: object = None,
        rollback_tokens: int = 0,
        timeout: float | None = None,
    ) -> StreamCall[Session]:
        request = _requests.open_session(
            model, reserve_tokens, time_to_live, cache_dtype, rollback_tokens
        )
        return self._send_plain(
            "OpenSession",
            request,
            lambda answer: self._make_session(answer.message.session_id, model),
            timeout,
        )

    def fork_session(
        self,
        session: SessionLike,
        *,
        count: int = 1,
        length: int | None = None,
        timeout: float | None = None,
    ) -> StreamCall[list[str]]:
        """The forks' ids, once what was sent before for the session is done."""
        request = _requests.fork_session(session, count, length)
        return self._send_plain(
            "ForkSession", request, lambda answer: list(answer.message.session_ids), timeout
        )

    def close_session(
        self, session: SessionLike, *, timeout: float | None = None
    ) -> StreamCall[None]:
        request = attention_pb2.CloseSessionRequest(session_id=_requests.session_id(session))
        return self._send_plain("CloseSession", request, lambda answer: None, timeout)

    def answers(self) -> Iterator[StreamCall[Any]]:
        """Calls in the order in which they are answered, until nothing is unanswered.

        Those whose result, or exception, was asked for already are left out: an answer is kept for
        this until then. Calls may be sent while it runs.
        """
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._answered or not self._unanswered)
                if not self._answered:
                    return
                call = self._answered.pop(next(iter(self._answered)))
            wait([call])
            yield call

    def close(self, *, wait: bool = True) -> None:
        """Ends the stream: once what is unanswered is answered, or, without `wait`, at once."""
        if not wait:
            self._rpc.cancel()
        self._outgoing.put(None)
        self._reader.join()

    def _send_plain(
        self,
        rpc: str,
        message: Message,
        read: Callable[[_wire.Envelope[Any]], ResultT],
        timeout: float | None,
    ) -> StreamCall[ResultT]:
        return self._send(rpc, _wire.Envelope(message), read, timeout)

    def _send(
        self,
        rpc: str,
        envelope: _wire.Envelope[Any],
        read: Callable[[_wire.Envelope[Any]], ResultT],
        timeout: float | None,
    ) -> StreamCall[ResultT]:
        timeout = self._timeout if timeout is None else timeout
        with self._changed:
            self._last_id += 1
            call: StreamCall[ResultT] = StreamCall(self, self._last_id)
        data = _stream_messages.request(call.id, rpc, envelope, timeout)
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or self._has_room(len(data)))
            if self._failure is not None:
                raise _copy(self._failure)
            self._unanswered[call.id] = _Unanswered(call, read, len(data))
            self._unanswered_bytes += len(data)
            self._traffic.add_sent(len(data))
            self._outgoing.put(data)
        return call

    def _has_room(self, size: int) -> bool:
        """What is larger than all there is goes alone: the server has the word on it."""
        if not self._unanswered:
            return True
        fits = not self._max_bytes or self._unanswered_bytes + size <= self._max_bytes
        return fits and (not self._max_requests or len(self._unanswered) < self._max_requests)

    def _cancel(self, call_id: int) -> bool:
        with self._changed:
            if call_id not in self._unanswered:
                return False
            self._outgoing.put(_stream_messages.cancellation(call_id))
            return True

    def _read(self) -> None:
        try:
            for data in self._rpc:
                self._traffic.add_received(len(data))
                self._take(_stream_messages.answer(data))
            failure: errors.AttndError = errors.Unavailable("the stream has ended")
        except grpc.RpcError as error:
            failure = errors.from_rpc_error(error)
        except Exception as error:  # an answer that is no message; the callers must not wait on
            failure = errors.Internal(f"the stream's answer can't be read: {error}")
            self._rpc.cancel()
        self._fail(failure)

    def _take(self, answer: _stream_messages.Answer) -> None:
        with self._changed:
            entry = self._unanswered.pop(answer.id, None)
            if entry is None:
                return
            self._unanswered_bytes -= entry.size
            self._answered[answer.id] = entry.call
            self._changed.notify_all()
        _settle(entry, answer)

    def _fail(self, failure: errors.AttndError) -> None:
        with self._changed:
            self._failure = failure
            calls = {call_id: entry.call for call_id, entry in self._unanswered.items()}
            self._answered |= calls
            self._unanswered.clear()
            self._unanswered_bytes = 0
            self._changed.notify_all()
        for call in calls.values():
            call.set_exception(_copy(failure))
        self._outgoing.put(None)  # gRPC's thread that sends must not wait for ever

    def _forget(self, call: StreamCall[Any]) -> None:
        if call.done():
            with self._changed:
                self._answered.pop(call.id, None)


def _copy(failure: errors.AttndError) -> errors.AttndError:
    """An exception that is raised in several places would collect the tracebacks of all."""
    return type(failure)(*failure.args)


def _settle(entry: _Unanswered, answer: _stream_messages.Answer) -> None:
    if answer.error is not None:
        entry.call.set_exception(answer.error)
        return
    try:
        result = entry.read(cast(_wire.Envelope[Any], answer.envelope))
    except Exception as error:
        entry.call.set_exception(error)
    else:
        entry.call.set_result(result)
