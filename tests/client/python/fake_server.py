"""A server in this process with sessions as the proto has them, which fails where a test says so.

For what a real server can't be brought to do: lose an answer after the work, answer a stream late
or not at all, or end it. Attention alone, without models; nothing here is fast.
"""

import contextlib
import itertools
import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import grpc
import numpy as np

from attnd._proto.attention.v1 import attention_pb2, types_pb2
from attnd.tensors import EncodedTensor, decode, encode
from end_to_end import reference

SERVICE = "attention.v1.AttentionService"
CODES = grpc.StatusCode
REQUESTS = {
    "Attend": attention_pb2.AttendRequest,
    "OpenSession": attention_pb2.OpenSessionRequest,
    "ForkSession": attention_pb2.ForkSessionRequest,
    "GetSession": attention_pb2.GetSessionRequest,
    "CloseSession": attention_pb2.CloseSessionRequest,
    "GetServerInfo": attention_pb2.GetServerInfoRequest,
}
STREAMED = {
    "attend": "Attend",
    "open": "OpenSession",
    "fork": "ForkSession",
    "close": "CloseSession",
}


class Refused(Exception):
    def __init__(self, code, message, reason="", **details):
        super().__init__(message)
        self.code = code
        self.error = attention_pb2.Error(
            code=code.value[0], message=message, reason=reason, details=details
        )


@dataclass
class Layer:
    key: np.ndarray | None = None  # [tokens, heads, dim]
    value: np.ndarray | None = None
    step: int = 0
    before_step: int = 0  # the length before the last step

    @property
    def length(self):
        return 0 if self.key is None else len(self.key)

    def cut(self, length):
        return Layer(
            None if self.key is None else self.key[:length],
            None if self.value is None else self.value[:length],
            self.step,
            self.before_step,
        )


@dataclass
class FakeServer:
    """`failures` are taken from before a call is done, `losses` after it: codes, in order."""

    max_stream_requests: int = 64
    failures: list = field(default_factory=list)
    losses: list = field(default_factory=list)
    attended: list = field(default_factory=list)  # every AttendRequest
    sessions: dict = field(default_factory=dict)  # {id: {layer: Layer}}
    closed: list = field(default_factory=list)
    forked: list = field(default_factory=list)  # (id, count) of each call
    # While it is clear, a stream's requests are left unanswered, but for those that are cancelled
    # or have less than a second.
    held: threading.Event = field(default_factory=threading.Event)

    def __enter__(self):
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self.held.set()
        self._server = grpc.server(ThreadPoolExecutor(16))
        handlers = {name: self._unary(name) for name in REQUESTS}
        handlers["Stream"] = grpc.stream_stream_rpc_method_handler(
            self._stream,
            attention_pb2.StreamRequest.FromString,
            lambda message: message.SerializeToString(),
        )
        generic = grpc.method_handlers_generic_handler(SERVICE, handlers)
        self._server.add_generic_rpc_handlers((generic,))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()
        return self

    def __exit__(self, *exception):
        self.held.set()
        self._server.stop(None).wait()

    def _unary(self, name):
        def handle(request, context):
            try:
                return self._do(name, request)
            except Refused as refused:
                context.set_trailing_metadata(
                    [("attention-error-bin", refused.error.SerializeToString())]
                )
                context.abort(refused.code, str(refused))

        return grpc.unary_unary_rpc_method_handler(
            handle, REQUESTS[name].FromString, lambda message: message.SerializeToString()
        )

    def _stream(self, requests, context):
        answers = queue.SimpleQueue()
        waiting = set()

        def take(request):
            kind = request.WhichOneof("request")
            if kind == "cancel":
                if request.cancel in waiting:
                    waiting.remove(request.cancel)
                    answers.put(_failed(request.cancel, Refused(CODES.CANCELLED, "given up")))
            elif self.held.is_set():
                answers.put(self._answer(request, kind))
            elif 0 < request.timeout_seconds < 1:
                refused = Refused(CODES.DEADLINE_EXCEEDED, "too late")
                answers.put(_failed(request.id, refused))
            else:
                waiting.add(request.id)

        def read():
            with contextlib.suppress(Exception):  # what gRPC raises where a caller is gone
                for request in requests:
                    take(request)
            answers.put(None)

        threading.Thread(target=read, daemon=True).start()
        yield from iter(answers.get, None)

    def _answer(self, request, kind):
        try:
            answer = self._do(STREAMED[kind], getattr(request, kind))
        except Refused as refused:
            return _failed(request.id, refused)
        return attention_pb2.StreamResponse(id=request.id, **{kind: answer})

    def _do(self, name, request):
        with self._lock:
            return getattr(self, f"_{name}")(request)

    def _GetServerInfo(self, request):  # noqa: N802
        return attention_pb2.GetServerInfoResponse(max_stream_requests=self.max_stream_requests)

    def _OpenSession(self, request):  # noqa: N802
        return attention_pb2.OpenSessionResponse(session_id=self._add({}))

    def _ForkSession(self, request):  # noqa: N802
        parent = self._session(request.session_id)
        length = request.length if request.HasField("length") else None
        self.forked.append((request.session_id, request.count))
        forks = [
            self._add({place: layer.cut(length) for place, layer in parent.items()})
            for _ in range(request.count or 1)
        ]
        return attention_pb2.ForkSessionResponse(session_ids=forks)

    def _GetSession(self, request):  # noqa: N802
        layers = [
            attention_pb2.LayerCache(layer=index, kind=1, length=layer.length, last_step=layer.step)
            for index, layer in self._session(request.session_id).items()
        ]
        return attention_pb2.GetSessionResponse(layers=layers)

    def _CloseSession(self, request):  # noqa: N802
        self._session(request.session_id)
        del self.sessions[request.session_id]
        self.closed.append(request.session_id)
        return attention_pb2.CloseSessionResponse()

    def _Attend(self, request):  # noqa: N802
        self.attended.append(request)
        if self.failures:
            raise Refused(self.failures.pop(0), "as the test wants it")
        answer = self._attend(request)
        if self.losses:
            raise Refused(self.losses.pop(0), "lost on the way")
        return answer

    def _attend(self, request):
        assert request.tensor_layout == types_pb2.TENSOR_LAYOUT_PACKED
        batch = request.past_key_value.sessions
        queries = np.split(_array(request.query), np.cumsum(request.query_lengths)[:-1])
        keys = values = [None] * len(queries)
        if request.HasField("key"):
            keys, values = (
                np.split(_array(tensor), np.cumsum(request.kv_lengths)[:-1])
                for tensor in (request.key, request.value)
            )
        layers = [
            self._next(batch, row, request.layer.layer, key, value)
            for row, (key, value) in enumerate(zip(keys, values, strict=True))
        ]
        outputs = [
            _attention(request, row, query, layer)
            for row, (query, layer) in enumerate(zip(queries, layers, strict=True))
        ]
        lengths = []
        for session, layer in zip(batch.session_ids, layers, strict=False):
            if batch.mode == attention_pb2.CACHE_MODE_APPEND:
                self.sessions[session][request.layer.layer] = layer
            lengths.append(self.sessions[session].get(request.layer.layer, Layer()).length)
        output = _message(np.concatenate(outputs).astype(np.float32))
        return attention_pb2.AttendResponse(output=output, cache_length=lengths)

    def _next(self, batch, row, place, key, value):
        """The row's layer as the call leaves it; nothing is changed yet."""
        if not batch.session_ids:
            return Layer(key, value)
        layer = self._session(batch.session_ids[row]).get(place, Layer())
        step = batch.step[row] if batch.step else 0
        if step and step == layer.step:
            layer = layer.cut(layer.before_step)
        elif step and step < layer.step:
            raise Refused(CODES.ABORTED, "a late duplicate", "LATE_STEP", step=str(layer.step))
        if batch.truncate and batch.truncate[row] >= 0:
            if batch.truncate[row] > layer.length:
                raise Refused(CODES.OUT_OF_RANGE, f"the cache has {layer.length}")
            layer = layer.cut(batch.truncate[row])
        if batch.cache_position and 0 <= batch.cache_position[row] != layer.length:
            raise Refused(CODES.OUT_OF_RANGE, f"the cache has {layer.length}")
        if key is None:
            return layer
        if layer.key is not None:
            key = np.concatenate([layer.key, key])
            value = np.concatenate([layer.value, value])
        return Layer(key, value, step, layer.length)

    def _session(self, session_id):
        if session_id not in self.sessions:
            raise Refused(CODES.NOT_FOUND, "no such session", "SESSION_NOT_FOUND")
        return self.sessions[session_id]

    def _add(self, layers):
        session_id = f"session-{next(self._ids)}"
        self.sessions[session_id] = layers
        return session_id


def _attention(request, row, query, layer):
    options = request.options
    mask = None
    if request.HasField("attention_mask"):
        mask = _array(request.attention_mask)
        mask = mask[row if len(mask) > 1 else 0, :, : len(query), : layer.length][None]
    query, key, value = (
        np.asarray(part).swapaxes(0, 1)[None] for part in (query, layer.key, layer.value)
    )
    if not query.shape[2] or not key.shape[2]:
        return np.zeros((query.shape[2], query.shape[1], value.shape[3]))
    first = list(request.first_query_position)
    attended = reference.attend(
        query,
        key,
        value,
        attention_mask=mask,
        scale=options.scale or None,
        is_causal=options.is_causal,
        window_left=options.window_left if options.HasField("window_left") else -1,
        window_right=options.window_right if options.HasField("window_right") else -1,
        soft_cap=options.soft_cap,
        sink_logits=list(options.sink_logits.values) or None,
        first_query_position=[first[row]] if first else None,
    )
    return attended.output[0].swapaxes(0, 1)


def _failed(call_id, refused):
    return attention_pb2.StreamResponse(id=call_id, error=refused.error)


def _array(tensor):
    return decode(EncodedTensor(tensor, memoryview(tensor.data)), np.empty(0))


def _message(array):
    encoded = encode("array", array)
    message = types_pb2.Tensor()
    message.CopyFrom(encoded.header)
    message.data = bytes(encoded.data)
    return message
