"""Protobuf messages with one thing wrong, and bytes that protobuf would not write."""

import grpc
import numpy as np

from attnd._proto.attention.v1 import attention_pb2, types_pb2
from attnd.tensors import encode

ATTENTION = "/attention.v1.AttentionService/"
ADMIN = "/attention.v1.AdminService/"
FLOAT32, FLOAT16 = types_pb2.DATA_TYPE_FLOAT32, types_pb2.DATA_TYPE_FLOAT16
INT32, INT64 = types_pb2.DATA_TYPE_INT32, types_pb2.DATA_TYPE_INT64
INT8, BOOL = types_pb2.DATA_TYPE_INT8, types_pb2.DATA_TYPE_BOOL
LARGEST, SMALLEST = 2**63 - 1, -(2**63)
MILLION = 1_000_000


def tensor(*shape, dtype=FLOAT32, data=None):
    """Zeros, unless the bytes are given."""
    size = {FLOAT32: 4, FLOAT16: 2, INT32: 4, INT64: 8, BOOL: 1}.get(dtype, 1)
    if data is None:
        data = bytes(size * int(np.prod(shape, dtype=object)))
    return types_pb2.Tensor(dtype=dtype, shape=shape, data=data)


def array_tensor(array):
    encoded = encode("array", array)
    message = types_pb2.Tensor()
    message.CopyFrom(encoded.header)
    message.data = bytes(encoded.data)
    return message


def attend(**fields):
    """A good request, but for what is given."""
    request = attention_pb2.AttendRequest(
        query=tensor(2, 4, 3, 8), key=tensor(2, 2, 5, 8), value=tensor(2, 2, 5, 8)
    )
    return _with(request, fields)


def forward(**fields):
    request = attention_pb2.ForwardRequest(
        layer=types_pb2.LayerRef(model="hostile"), hidden_states=tensor(2, 3, 128)
    )
    return _with(request, fields)


def _with(request, fields):
    for name, value in fields.items():
        if value is None:
            request.ClearField(name)
        elif isinstance(value, (list, int, float)):
            request.MergeFrom(type(request)(**{name: value}))
        else:
            getattr(request, name).CopyFrom(value)
    return request


def options(**fields):
    for name in ("alibi_slopes", "sink_logits"):
        if name in fields:
            fields[name] = types_pb2.PerHeadValues(values=fields[name])
    return types_pb2.AttentionOptions(**fields)


def layer(**fields):
    return types_pb2.LayerRef(**fields)


def execution(**fields):
    if "sparsity" in fields:
        fields["sparsity"] = types_pb2.SparsityOptions(**fields["sparsity"])
    return types_pb2.ExecutionOptions(**fields)


def inline_past(key, value):
    return attention_pb2.PastKeyValue(inline_kv=attention_pb2.KeyValue(key=key, value=value))


def sessions(**fields):
    return attention_pb2.PastKeyValue(sessions=attention_pb2.SessionBatch(**fields))


def in_shared_memory(*shape):
    place = types_pb2.SharedMemorySlice(region="r", byte_size=4 * int(np.prod(shape)))
    return types_pb2.Tensor(dtype=FLOAT32, shape=shape, shared_memory=place)


def a_slot(**fields):
    return attention_pb2.ResultSlots(**fields)


def answer(channel, rpc, data):
    """The code and text that these bytes are answered with, and the server's own Error, if any."""
    try:
        channel.unary_unary(rpc)(data, timeout=30.0)
    except grpc.RpcError as error:
        told = dict(error.trailing_metadata() or ()).get("attention-error-bin")
        own = None if told is None else attention_pb2.Error.FromString(told)
        return error.code(), error.details(), own
    return grpc.StatusCode.OK, "", None


def delimited(number, content):
    return varint(number << 3 | 2) + varint(len(content)) + content


def varint(value):
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])
