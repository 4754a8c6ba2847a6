"""Messages whose tensors' bytes do not pass through protobuf.

A Python protobuf message copies a tensor's bytes when they are set, when it is serialised, when it
is parsed and when they are read. Here a request is put together from its envelope, serialised by
protobuf, and the tensors' own memory, copied once; of an answer protobuf parses the envelope alone.
In between are only the tags and lengths of the protobuf encoding, in which fields may come in any
order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeAlias, TypeVar

from google.protobuf.message import DecodeError, Message

from attnd._proto.attention.v1 import types_pb2
from attnd.tensors import EncodedTensor

_LENGTH_DELIMITED = 2
_TENSOR = types_pb2.Tensor.DESCRIPTOR.full_name

# Protobuf's two implementations have descriptor classes of their own.
Descriptor: TypeAlias = Any
FieldDescriptor: TypeAlias = Any

MessageT = TypeVar("MessageT", bound=Message)
Pieces = list[bytes | memoryview]


@dataclass(slots=True)
class Envelope(Generic[MessageT]):
    """A message without its tensors, and these by path: "past_key_value.inline_kv.key"."""

    message: MessageT
    tensors: dict[str, EncodedTensor] = field(default_factory=dict)


def serialize(envelope: Envelope[Message]) -> bytes:
    return b"".join(_message_pieces(envelope))


def wrapped(head: Message, number: int, envelope: Envelope[Message]) -> bytes:
    """`head` with the envelope's message as its field of this number."""
    return b"".join([head.SerializeToString(), *_delimited(number, _message_pieces(envelope))])


def parse(data: bytes, message_class: type[MessageT]) -> Envelope[MessageT]:
    """The answer's tensors are views of `data`."""
    envelope = Envelope(message_class())
    rest = _split(memoryview(data), message_class.DESCRIPTOR, "", envelope.tensors)
    envelope.message.ParseFromString(b"".join(rest))
    return envelope


def _message_pieces(envelope: Envelope[Message]) -> Pieces:
    pieces: Pieces = [envelope.message.SerializeToString()]
    for path, tensor in envelope.tensors.items():
        pieces += _field_pieces(envelope.message.DESCRIPTOR, path.split("."), tensor)
    return pieces


def _field_pieces(descriptor: Descriptor, path: list[str], tensor: EncodedTensor) -> Pieces:
    described = descriptor.fields_by_name[path[0]]
    if len(path) > 1:
        content = _field_pieces(described.message_type, path[1:], tensor)
    else:
        header = tensor.header.SerializeToString()
        content = [header, *_delimited(types_pb2.Tensor.DATA_FIELD_NUMBER, [tensor.data])]
    return _delimited(described.number, content)


def _delimited(number: int, content: Pieces) -> Pieces:
    size = sum(len(piece) for piece in content)
    return [_varint(number << 3 | _LENGTH_DELIMITED) + _varint(size), *content]


def _split(
    view: memoryview, descriptor: Descriptor, path: str, tensors: dict[str, EncodedTensor]
) -> Pieces:
    """Puts the tensors of a message into `tensors`, and returns the bytes of everything else."""
    rest: Pieces = []
    for number, whole, content in _fields(view):
        described = descriptor.fields_by_number.get(number)
        if content is None or described is None or not _may_hold_tensors(described):
            rest.append(whole)
        elif described.message_type.full_name == _TENSOR:
            tensors[path + described.name] = _read_tensor(content)
        else:
            inner = _split(content, described.message_type, f"{path}{described.name}.", tensors)
            rest += _delimited(number, inner)
    return rest


def _may_hold_tensors(described: FieldDescriptor) -> bool:
    message = described.message_type
    if message is None or described.is_repeated:
        return False
    return message.full_name == _TENSOR or any(
        inner.message_type is not None and inner.message_type.full_name == _TENSOR
        for inner in message.fields
    )


def _read_tensor(view: memoryview) -> EncodedTensor:
    data = memoryview(b"")
    rest: Pieces = []
    for number, whole, content in _fields(view):
        if number == types_pb2.Tensor.DATA_FIELD_NUMBER and content is not None:
            data = content
        else:
            rest.append(whole)
    return EncodedTensor(types_pb2.Tensor.FromString(b"".join(rest)), data)


def _fields(view: memoryview) -> Iterator[tuple[int, memoryview, memoryview | None]]:
    """(number, all of the field, content of a length-delimited one) of each field in turn."""
    position = 0
    while position < len(view):
        start = position
        tag, position = _read_varint(view, position)
        content = None
        match tag & 7:
            case 0:
                _, position = _read_varint(view, position)
            case 1:
                position += 8
            case 2:
                size, position = _read_varint(view, position)
                content = view[position : position + size]
                position += size
            case 5:
                position += 4
            case _:
                raise DecodeError("the server's answer is not a protobuf message")
        if position > len(view):
            raise DecodeError("the server's answer ends within a field")
        yield tag >> 3, view[start:position], content


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(view: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(view) and shift < 70:
        byte = view[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise DecodeError("the server's answer ends within a number")
