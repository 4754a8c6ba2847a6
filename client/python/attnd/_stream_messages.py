"""Messages of the stream: requests with their ids, and the answers, which name them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from attnd import _wire, errors
from attnd._proto.attention.v1 import attention_pb2

# StreamRequest's field for an rpc, where StreamResponse's has the same name.
_FIELDS = {
    "Forward": "forward",
    "Attend": "attend",
    "OpenSession": "open",
    "ForkSession": "fork",
    "CloseSession": "close",
}

Reader = Callable[[_wire.Envelope[Any]], Any]


@dataclass(frozen=True, slots=True)
class Answer:
    id: int
    envelope: _wire.Envelope[Any] | None  # of the rpc's own response
    error: errors.AttndError | None


def request(call_id: int, rpc: str, envelope: _wire.Envelope[Any], timeout: float | None) -> bytes:
    """`timeout` None: none of its own."""
    head = attention_pb2.StreamRequest(id=call_id, timeout_seconds=timeout or 0.0)
    number = attention_pb2.StreamRequest.DESCRIPTOR.fields_by_name[_FIELDS[rpc]].number
    return _wire.wrapped(head, number, envelope)


def cancellation(call_id: int) -> bytes:
    return attention_pb2.StreamRequest(cancel=call_id).SerializeToString()


def answer(data: bytes) -> Answer:
    envelope = _wire.parse(data, attention_pb2.StreamResponse)
    message = envelope.message
    field = message.WhichOneof("response")
    if field is None:
        return Answer(message.id, None, errors.Internal("the server's answer is empty"))
    if field == "error":
        return Answer(message.id, None, errors.from_proto(message.error))
    tensors = {path.removeprefix(f"{field}."): tensor for path, tensor in envelope.tensors.items()}
    return Answer(message.id, _wire.Envelope(getattr(message, field), tensors), None)
