"""Arrays to bytes and back, and the messages that carry them."""

import ml_dtypes
import numpy as np
import pytest
import torch
from google.protobuf.message import DecodeError

from attnd import _wire, tensors
from attnd._proto.attention.v1 import attention_pb2, types_pb2

DTYPES = {
    "float32": types_pb2.DATA_TYPE_FLOAT32,
    "float16": types_pb2.DATA_TYPE_FLOAT16,
    "bfloat16": types_pb2.DATA_TYPE_BFLOAT16,
    "int32": types_pb2.DATA_TYPE_INT32,
    "int64": types_pb2.DATA_TYPE_INT64,
    "bool": types_pb2.DATA_TYPE_BOOL,
}
VIEWS = {
    "contiguous": lambda x: x,
    "strided": lambda x: x[:, ::2],
    "transposed": lambda x: x.swapaxes(0, 2),
    "empty": lambda x: x[:, :0],
    "scalar": lambda x: x[1, 1, 1:2].reshape(()),
}


def make_array(kind, dtype):
    array = np.arange(-12, 12).reshape(2, 3, 4).astype(tensors.numpy_dtype(dtype))
    if kind == "numpy":
        return array
    if dtype == "bfloat16":
        return torch.from_numpy(array.astype(np.float32)).bfloat16()
    return torch.from_numpy(array)


def contiguous_bytes(array):
    if isinstance(array, torch.Tensor):
        return bytes(array.contiguous().reshape(-1).view(torch.uint8).numpy())
    return array.tobytes()


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_round_trip(kind, dtype, view):
    array = VIEWS[view](make_array(kind, dtype))
    encoded = tensors.encode("query", array)
    assert encoded.header.dtype == DTYPES[dtype]
    assert tuple(encoded.header.shape) == tuple(array.shape)
    assert bytes(encoded.data) == contiguous_bytes(array)
    back = tensors.decode(encoded, like=array)
    assert type(back) is type(array)
    assert back.dtype == array.dtype
    assert tuple(back.shape) == tuple(array.shape)
    assert bool((back == array).all())


def test_results_are_writable_and_own_their_memory():
    array = np.ones((2, 2), np.float32)
    encoded = tensors.encode("query", array)
    for like in (array, torch.ones(1)):
        back = tensors.decode(encoded, like=like)
        back += 1
    assert (array == 1).all()


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_a_contiguous_array_is_not_copied(kind):
    array = make_array(kind, "float32")
    data = np.frombuffer(tensors.encode("query", array).data, np.uint8)
    assert np.shares_memory(data, array if kind == "numpy" else array.numpy())


def test_the_result_may_be_of_another_kind_than_an_input():
    encoded = tensors.encode("mask", torch.ones(3, dtype=torch.bfloat16))
    back = tensors.decode(encoded, like=np.zeros(1))
    assert back.dtype == ml_dtypes.bfloat16


def test_gradients_are_left_behind():
    array = torch.ones(3, requires_grad=True)
    back = tensors.decode(tensors.encode("query", array), like=array)
    assert not back.requires_grad


def test_big_endian_arrays_are_swapped():
    array = np.arange(3, dtype=">i4")
    assert bytes(tensors.encode("mask", array).data) == array.astype("<i4").tobytes()


@pytest.mark.parametrize(
    "value",
    [
        [1.0, 2.0],
        1.0,
        np.zeros(2, np.float64),
        np.zeros(2, np.uint8),
        np.array(["text"]),
        np.array([object()]),
        torch.zeros(2, dtype=torch.float64),
        torch.zeros(2, dtype=torch.complex64),
    ],
    ids=lambda value: str(getattr(value, "dtype", type(value).__name__)),
)
def test_what_has_no_data_type_is_a_type_error_that_names_the_argument(value):
    with pytest.raises(TypeError, match="past_key"):
        tensors.encode("past_key", value)


@pytest.mark.parametrize(
    "dtype", [np.float16, np.dtype("float16"), torch.float16, "float16"], ids=repr
)
def test_data_types_by_any_name(dtype):
    assert tensors.data_type(dtype) == types_pb2.DATA_TYPE_FLOAT16


def test_requests_are_what_protobuf_would_write():
    query, past = make_array("numpy", "float16"), make_array("torch", "bfloat16")
    envelope = _wire.Envelope(
        attention_pb2.AttendRequest(query_lengths=[1, 2], use_cache=True),
        {
            "query": tensors.encode("query", query),
            "past_key_value.inline_kv.key": tensors.encode("past_key", past),
            "past_key_value.inline_kv.value": tensors.encode("past_value", query),
        },
    )
    request = attention_pb2.AttendRequest.FromString(_wire.serialize(envelope))
    assert list(request.query_lengths) == [1, 2]
    assert request.use_cache
    assert request.query.data == contiguous_bytes(query)
    assert request.past_key_value.inline_kv.key.data == contiguous_bytes(past)
    assert request.past_key_value.inline_kv.value.dtype == types_pb2.DATA_TYPE_FLOAT16


def test_answers_are_read_as_protobuf_would():
    array = make_array("numpy", "float32")
    tensor = types_pb2.Tensor(
        dtype=types_pb2.DATA_TYPE_FLOAT32, shape=array.shape, data=array.tobytes()
    )
    response = attention_pb2.AttendResponse(output=tensor, cache_length=[3, 300])
    response.present.key.CopyFrom(tensor)
    response.present.value.CopyFrom(types_pb2.Tensor(dtype=types_pb2.DATA_TYPE_BOOL, shape=[0]))
    response.execution.reason = "why"
    response.execution.sparsity = 0.5
    unknown_fields = b"\x98\x3f\x01" + b"\xa2\x3f\x02ab" + b"\xa5\x3f1234" + b"\xa9\x3f12345678"
    data = response.SerializeToString() + unknown_fields
    envelope = _wire.parse(data, attention_pb2.AttendResponse)
    assert set(envelope.tensors) == {"output", "present.key", "present.value"}
    for path in ("output", "present.key"):
        np.testing.assert_array_equal(tensors.decode(envelope.tensors[path], like=array), array)
    assert tensors.decode(envelope.tensors["present.value"], like=array).shape == (0,)
    assert list(envelope.message.cache_length) == [3, 300]
    assert envelope.message.execution == response.execution


def test_every_truncated_answer_is_refused_or_incomplete():
    tensor = types_pb2.Tensor(dtype=types_pb2.DATA_TYPE_FLOAT32, shape=[2], data=bytes(8))
    data = attention_pb2.AttendResponse(output=tensor).SerializeToString()
    for end in range(1, len(data)):
        with pytest.raises(DecodeError):
            _wire.parse(data[:end], attention_pb2.AttendResponse)
