"""The stream rpc, message by message: for what the client would not send, and when it would not."""

import contextlib
import queue

import grpc

from attnd._proto.attention.v1 import attention_pb2

METHOD = "/attention.v1.AttentionService/Stream"
TIMEOUT = 60.0  # of a whole stream: a test that waits for what never comes fails


class RawStream:
    """One stream; its answers are taken when a test asks for them, and not before."""

    def __init__(self, channel, timeout=TIMEOUT):
        self._outgoing = queue.SimpleQueue()
        self._call = channel.stream_stream(METHOD)(iter(self._outgoing.get, None), timeout=timeout)
        self._ended = False

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.half_close()
        self._call.cancel()

    def send_bytes(self, data):
        self._outgoing.put(data)

    def send(self, request_id, timeout_seconds=0.0, **request):
        """`request` is one of forward, attend, open, fork, close."""
        message = attention_pb2.StreamRequest(
            id=request_id, timeout_seconds=timeout_seconds, **request
        )
        self.send_bytes(message.SerializeToString())

    def cancel_request(self, request_id, own_id=0):
        self.send(own_id, cancel=request_id)

    @property
    def unsent(self):
        """Messages that wait here, because the server takes no more."""
        return self._outgoing.qsize()

    def half_close(self):
        if not self._ended:
            self._ended = True
            self._outgoing.put(None)

    def receive(self):
        return attention_pb2.StreamResponse.FromString(next(self._call))

    def receive_many(self, count):
        return [self.receive() for _ in range(count)]

    def answer_to(self, request_id, **request):
        """Sends one request and takes its answer, which is the next one."""
        self.send(request_id, **request)
        response = self.receive()
        assert response.id == request_id
        return response

    def rest(self):
        """All answers until the stream ends, and the code that it ends with."""
        self.half_close()
        responses = []
        with contextlib.suppress(grpc.RpcError):
            for data in self._call:
                responses.append(attention_pb2.StreamResponse.FromString(data))
        return responses, self._call.code()

    def vanish(self):
        """As a caller that is gone: no half-close, nothing is read any more."""
        self._call.cancel()
        self._ended = True
        self._outgoing.put(None)
