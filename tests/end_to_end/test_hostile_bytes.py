"""Bytes that are no messages, and messages that are more than their bytes; a real socket."""

import random
import socket
import struct

import grpc
import pytest

from attnd._proto.attention.v1 import admin_pb2
from end_to_end.messages import (
    ADMIN,
    ATTENTION,
    MILLION,
    answer,
    attend,
    delimited,
    forward,
    layer,
    options,
    tensor,
    varint,
)

Code = grpc.StatusCode
ALLOWED = {
    Code.OK,
    Code.INVALID_ARGUMENT,
    Code.NOT_FOUND,
    Code.UNIMPLEMENTED,
    Code.OUT_OF_RANGE,
}

NO_MESSAGES = {
    "length_beyond_the_end": varint(3 << 3 | 2) + varint(1000) + b"abc",
    "length_of_4_gigabytes": varint(3 << 3 | 2) + varint(2**32 - 1) + b"abc",
    "length_of_2_gigabytes": varint(3 << 3 | 2) + varint(2**31) + b"abc",
    "length_of_64_bits": varint(3 << 3 | 2) + varint(2**64 - 1) + b"abc",
    "inner_length_beyond_the_outer": delimited(3, varint(3 << 3 | 2) + varint(100)) + bytes(200),
    "varint_without_end": b"\x10" + b"\xff" * 20,
    "tag_without_end": b"\xff" * 20,
    "wire_type_6": bytes([1 << 3 | 6, 0]),
    "wire_type_7": bytes([1 << 3 | 7, 0]),
    "field_number_0": bytes([0, 0]),
    "end_of_a_group_that_never_began": bytes([1 << 3 | 4]),
    "groups_in_groups": bytes([1 << 3 | 3]) * 100_000,
    "text": b"query: {}",
    "not_utf8_in_a_string": attend().SerializeToString() + delimited(1, delimited(1, b"\xff\xfe")),
    "json": b'{"query": {}}',
    "nothing": b"",
}


@pytest.mark.parametrize("rpc", ["Attend", "Forward"])
@pytest.mark.parametrize("name", NO_MESSAGES)
def test_bytes_that_are_no_message(send, name, rpc):
    code, text = send(f"{ATTENTION}{rpc}", NO_MESSAGES[name])
    assert code is Code.INVALID_ARGUMENT, text


@pytest.mark.parametrize("rpc", ["ListModels", "LoadModel", "SwitchAttention", "UnloadModel"])
def test_bytes_that_are_no_message_of_the_control_plane(send, rpc):
    code, text = send(f"{ADMIN}{rpc}", b"\xff" * 20)
    assert code is Code.INVALID_ARGUMENT, text


def test_every_truncation_of_a_message(channel, assert_answers):
    """None is executed as if it were whole, but where a field more or less makes no difference."""
    request = attend(
        query=tensor(1, 1, 1, 2), key=tensor(1, 1, 1, 2), value=tensor(1, 1, 1, 2),
        attention_mask=tensor(1, 1), options=options(scale=0.5, sink_logits=[0.5]),
        query_lengths=[1], layer=layer(model=""),
    )  # fmt: skip
    data = request.SerializeToString()
    without_error = 0
    for end in range(len(data)):
        code, text, _ = answer(channel, f"{ATTENTION}Attend", data[:end])
        assert code in (Code.OK, Code.INVALID_ARGUMENT), (end, text)
        without_error += code is Code.OK
    assert without_error < 8
    assert_answers()


def test_random_bytes(channel, hostile_models, assert_answers):
    generator = random.Random(8)
    good = [attend().SerializeToString(), forward().SerializeToString()]
    for turn in range(600):
        rpc, data = ("Attend", good[0]) if turn % 2 else ("Forward", good[1])
        if turn % 3 == 0:
            data = generator.randbytes(generator.randrange(1, 200))
        else:
            changed = bytearray(data)
            for _ in range(generator.randrange(1, 6)):  # near the front, where lengths and tags are
                changed[generator.randrange(min(len(changed), 64))] = generator.randrange(256)
            data = bytes(changed)
        code, text, _ = answer(channel, f"{ATTENTION}{rpc}", data)
        assert code in ALLOWED, (turn, data, code, text)
    assert_answers()


# An entry without content is two bytes on the wire and many more when parsed.
MANY_ENTRIES = {
    "sessions": ("Attend", delimited(11, delimited(1, delimited(1, b"") * MILLION))),
    "session_steps": ("Attend", delimited(11, delimited(1, delimited(5, bytes(MILLION))))),
    "unpacked_shape": ("Attend", delimited(3, bytes([2 << 3, 1]) * MILLION)),
    "packed_shape": ("Attend", delimited(3, delimited(2, b"\1" * MILLION))),
    "query_lengths": ("Attend", delimited(6, bytes(MILLION))),
    "repeated_tensors": ("Attend", delimited(3, b"") * MILLION),
    "unknown_fields": ("Attend", delimited(1000, b"") * MILLION),
    "sinks": ("Attend", delimited(10, delimited(7, delimited(1, bytes(4 * MILLION))))),
    "forward_lengths": ("Forward", delimited(4, bytes(MILLION))),
}


@pytest.mark.parametrize("name", MANY_ENTRIES)
def test_a_million_empty_entries(send, name):
    rpc, data = MANY_ENTRIES[name]
    code, text = send(f"{ATTENTION}{rpc}", data)
    assert code is Code.INVALID_ARGUMENT, text


@pytest.mark.parametrize(
    "data",
    [
        delimited(1, delimited(4, b"") * MILLION),
        delimited(1, delimited(4, delimited(5, b"") * MILLION)),
        delimited(1, delimited(4, delimited(5, delimited(7, delimited(5, b"") * MILLION)))),
    ],
    ids=["stacks", "layers", "rotary_parameters"],
)
def test_a_million_empty_entries_of_a_spec(send, data):
    code, text = send(f"{ADMIN}LoadModel", data)
    assert code is Code.INVALID_ARGUMENT, text


def test_a_message_larger_than_the_largest(send):
    side = 1500
    request = attend(query=tensor(1, 8, side * side, 1), key=None, value=None)
    code, text = send(f"{ATTENTION}Attend", request.SerializeToString())
    assert code is Code.RESOURCE_EXHAUSTED, text


def test_a_name_of_a_megabyte_in_a_spec(send):
    spec = admin_pb2.ModelSpec(name="x" * MILLION)
    data = admin_pb2.LoadModelRequest(spec=spec).SerializeToString()
    code, text = send(f"{ADMIN}LoadModel", data)
    assert code is Code.INVALID_ARGUMENT, text


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.0\r\n\r\n", b"\0" * 5000, b"PRI * HTTP/2.0"])
def test_a_connection_that_does_not_speak_grpc(server, assert_answers, garbage):
    host, port = server.address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=30.0) as connection:
        connection.sendall(garbage)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(4096):
            pass
    assert_answers()


def test_lengths_of_the_wire_format_are_not_believed(server, assert_answers):
    """An HTTP/2 data frame that announces a gRPC message of 4 GiB."""
    host, port = server.address.rsplit(":", 1)
    settings = b"\0\0\0\4\0\0\0\0\0"
    announced = b"\0" + struct.pack(">I", 2**32 - 1)
    frame = struct.pack(">I", len(announced))[1:] + b"\0\0" + struct.pack(">I", 1) + announced
    with socket.create_connection((host, int(port)), timeout=30.0) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings + frame)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(4096):
            pass
    assert_answers()


def test_compressed_messages_are_refused(server, client):
    """Sixteen MiB of zeros are sixteen KiB on the wire: none of them is unpacked."""
    request = attend(query=tensor(1, 1, 2**18, 16), key=tensor(1, 1, 1, 16))
    with grpc.insecure_channel(server.address, compression=grpc.Compression.Gzip) as channel:
        call = channel.unary_unary(f"{ATTENTION}Attend")
        with pytest.raises(grpc.RpcError) as failure:
            call(request.SerializeToString(), timeout=30)
    assert failure.value.code() is Code.UNIMPLEMENTED
    assert client.server_info().version
