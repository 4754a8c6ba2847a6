"""Bytes on a stream that are no requests, and callers that take no answers: others are served."""

import random
import struct
from pathlib import Path

import grpc
import numpy as np
import pytest

from attnd._proto.attention.v1 import attention_pb2
from end_to_end.messages import MILLION, attend, delimited, forward, tensor, varint
from end_to_end.observe import Samples, wait_until
from end_to_end.raw_stream import RawStream

Code = grpc.StatusCode
KIB, MIB = 1 << 10, 1 << 20
ID, TIMEOUT, FORWARD, ATTEND, CANCEL, OPEN, FORK, CLOSE = 1, 2, 4, 5, 6, 7, 8, 9  # field numbers
LAST_ID = 2**63  # of the good request behind the bad ones

# What is no session is not found; what happens to name shared memory finds that it is off.
REFUSED = {Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.UNIMPLEMENTED}

GOOD = attention_pb2.StreamRequest(id=3, attend=attend()).SerializeToString()

NO_MESSAGES = {
    "nothing": b"",
    "an_id_alone": varint(ID << 3) + b"\1",
    "a_timeout_alone": varint(TIMEOUT << 3 | 1) + struct.pack("<d", 1.0),
    "text": b"attend: {}",
    "varint_without_end": varint(ID << 3) + b"\xff" * 20,
    "tag_without_end": b"\xff" * 20,
    "wire_type_6": bytes([1 << 3 | 6, 0]),
    "wire_type_7": bytes([1 << 3 | 7, 0]),
    "field_number_0": bytes([0, 0]),
    "field_number_0_behind_a_request": GOOD + bytes([0]),
    "end_of_a_group_that_never_began": bytes([1 << 3 | 4]),
    "groups_in_groups": bytes([1 << 3 | 3]) * 100_000,
    "length_beyond_the_end": varint(ATTEND << 3 | 2) + varint(1000) + b"abc",
    "length_of_2_gigabytes": varint(ATTEND << 3 | 2) + varint(2**31) + b"abc",
    "length_of_nearly_2_gigabytes": varint(ATTEND << 3 | 2) + varint(2**31 - 1) + b"abc",
    "length_of_4_gigabytes": varint(ATTEND << 3 | 2) + varint(2**32 - 1) + b"abc",
    "length_of_64_bits": varint(ATTEND << 3 | 2) + varint(2**64 - 1) + b"abc",
    "length_of_a_cancellation": varint(CANCEL << 3 | 2) + varint(2**32 - 1) + b"abc",
    "length_of_an_unknown_field": varint(1000 << 3 | 2) + varint(2**31) + b"abc",
    "inner_length_beyond_the_outer": delimited(
        ATTEND, varint(3 << 3 | 2) + varint(100)
    ) + bytes(200),
    "two_requests": GOOD + delimited(ATTEND, attend().SerializeToString()),
    "two_kinds_of_request": GOOD + delimited(CLOSE, b""),
    "a_request_and_a_cancellation": GOOD + varint(CANCEL << 3) + b"\7",
    "a_request_as_a_varint": varint(ATTEND << 3) + b"\1",
    "a_request_as_a_group": bytes([ATTEND << 3 | 3, ATTEND << 3 | 4]),
    "garbage_in_a_request": delimited(ATTEND, b"\xff" * 50),
    "groups_in_a_request": delimited(ATTEND, bytes([1 << 3 | 3]) * 100_000),
    "garbage_in_a_fork": delimited(FORK, b"\xff" * 50),
    "not_utf8_in_a_session": delimited(CLOSE, delimited(1, b"\xff\xfe")),
    "a_request_in_itself": delimited(ATTEND, GOOD),
    "a_million_sessions": delimited(
        ATTEND, delimited(11, delimited(1, delimited(1, b"") * MILLION))
    ),
    "a_million_steps": delimited(
        ATTEND, delimited(11, delimited(1, delimited(5, bytes(MILLION))))
    ),
    "a_million_lengths": delimited(FORWARD, delimited(4, bytes(MILLION))),
    "a_million_unknown_fields_in_a_close": delimited(CLOSE, delimited(1000, b"") * MILLION),
}  # fmt: skip


@pytest.fixture
def stream(channel):
    with RawStream(channel) as opened:
        yield opened


def answers_until_served(stream):
    """A good request's answer comes, behind those of what was sent before it."""
    stream.send(LAST_ID, attend=attend())
    answers = []
    while True:
        answers.append(stream.receive())
        if answers[-1].id == LAST_ID:
            assert answers[-1].HasField("attend")
            return answers[:-1]


@pytest.mark.parametrize("name", NO_MESSAGES)
def test_what_is_no_request_is_answered_and_the_stream_goes_on(stream, assert_answers, name):
    stream.send_bytes(NO_MESSAGES[name])
    (answer,) = answers_until_served(stream)
    assert answer.error.code in {code.value[0] for code in REFUSED}, answer
    assert answer.error.reason
    assert answer.error.message
    assert_answers()


def test_unknown_fields_are_no_harm(stream):
    for unknown in (delimited(1000, b"abc"), bytes([100 << 3 & 127 | 128, 6, 5])):
        stream.send_bytes(unknown + GOOD)
        assert stream.receive().HasField("attend")


def test_every_truncation_of_a_request(stream, assert_answers):
    request = attend(
        query=tensor(1, 1, 1, 2), key=tensor(1, 1, 1, 2), value=tensor(1, 1, 1, 2)
    )  # fmt: skip
    whole = attention_pb2.StreamRequest(
        id=3, timeout_seconds=9.0, traceparent="00-1-2-01", attend=request
    ).SerializeToString()
    for end in range(len(whole)):
        stream.send_bytes(whole[:end])
    stream.send_bytes(whole)
    answers = answers_until_served(stream)
    assert len(answers) == len(whole) + 1
    served = [answer for answer in answers if answer.HasField("attend")]
    assert len(served) == 1
    for answer in answers:
        assert answer.HasField("attend") or answer.error.code == Code.INVALID_ARGUMENT.value[0]
    assert_answers()


def test_truncations_within_a_request(stream, assert_answers):
    """The envelope is whole, what it carries is not: never executed as if it were."""
    data = attend(attention_mask=tensor(3, 5)).SerializeToString()
    step = len(data) // 60
    for end in range(1, len(data), step):
        stream.send_bytes(varint(ID << 3) + varint(end) + delimited(ATTEND, data[:end]))
    answers = answers_until_served(stream)
    assert len(answers) == len(range(1, len(data), step))
    # A request that ends where its mask would begin is a good one without a mask.
    good = [answer.id for answer in answers if answer.HasField("attend")]
    assert all(end == len(attend().SerializeToString()) for end in good)
    assert_answers()


def test_random_bytes(channel, assert_answers):
    """Whatever is not a cancellation by accident gets an answer, and nothing else does."""
    generator = random.Random(15)
    session = attention_pb2.StreamRequest(
        id=5, open=attention_pb2.OpenSessionRequest(time_to_live_seconds=5.0)
    ).SerializeToString()
    good = [GOOD, session, attention_pb2.StreamRequest(id=4, forward=forward()).SerializeToString()]
    with RawStream(channel) as stream:
        for turn in range(200):
            if turn % 3 == 0:
                data = generator.randbytes(generator.randrange(1, 200))
            else:
                changed = bytearray(good[turn % len(good)])
                for _ in range(generator.randrange(1, 6)):
                    changed[generator.randrange(min(len(changed), 64))] = generator.randrange(256)
                data = bytes(changed)
            stream.send_bytes(data)
        answers = answers_until_served(stream)
    assert 180 <= len(answers) <= 200
    for answer in answers:
        if answer.HasField("error"):
            assert answer.error.reason
            assert answer.error.code in range(1, 17)
            assert answer.error.code != Code.INTERNAL.value[0], answer
    assert_answers()


def test_a_message_beyond_the_limit_ends_its_stream_alone(start_server, connect):
    process = start_server(arguments=["--max-message-bytes", str(64 * KIB)])
    client = connect(process.address)
    with grpc.insecure_channel(process.address) as channel:
        other = RawStream(channel)
        assert other.answer_to(1, attend=attend()).HasField("attend")
        stream = RawStream(channel)
        stream.send_bytes(delimited(ATTEND, bytes(MIB)))
        _, code = stream.rest()
        assert code is Code.RESOURCE_EXHAUSTED
        assert other.answer_to(2, attend=attend()).HasField("attend")
        other.half_close()
    assert client.list_models() == []


# Callers that take no answers.


def resident_bytes(process):
    with open(f"/proc/{process.process.pid}/status") as status:
        (line,) = (line for line in status if line.startswith("VmRSS:"))
    return int(line.split()[1]) * KIB


def assert_grew_less(process, before, limit):
    # The address sanitizer keeps what was freed, to catch its use.
    if "libasan" in Path(f"/proc/{process.process.pid}/maps").read_text():
        return
    assert resident_bytes(process) - before < limit


@pytest.fixture
def own_server(start_server, connect):
    process = start_server()
    with grpc.insecure_channel(process.address) as channel:
        yield process, connect(process.address), channel


def assert_serves(client, tokens=3):
    ones = np.ones((1, 1, tokens, 4), np.float32)
    key = ones[:, :, :3]
    np.testing.assert_allclose(client.attend(ones, key, key).output, ones)


@pytest.mark.parametrize(
    "data",
    [b"", GOOD, varint(CANCEL << 3) + b"\1", delimited(CLOSE, b"")],
    ids=["empty", "attend", "cancel", "close"],
)
def test_thousands_of_messages_without_taking_an_answer(own_server, data):
    process, client, channel = own_server
    assert_serves(client)
    before = resident_bytes(process)
    count = 10_000
    stream = RawStream(channel)
    for _ in range(count):
        stream.send_bytes(data)
    for _ in range(20):
        assert_serves(client)
    assert_grew_less(process, before, 64 * MIB)
    responses, code = stream.rest()
    assert code is Code.OK
    assert len(responses) == (0 if data[:1] == varint(CANCEL << 3) else count)
    assert_grew_less(process, before, 64 * MIB)
    assert_serves(client)


def test_a_caller_that_takes_no_answers_is_read_no_further(own_server):
    process, client, channel = own_server
    assert_serves(client)
    before = resident_bytes(process)
    count = 4000
    with RawStream(channel) as stream:
        # Answers of 64 KiB fill the way back, 32 KiB of what is skipped the way there.
        request = attend(
            query=tensor(1, 1, 1024, 1), key=tensor(1, 1, 1, 1), value=tensor(1, 1, 1, 16)
        )
        surplus = delimited(ATTEND, request.SerializeToString() + delimited(1000, bytes(32 * KIB)))
        for request_id in range(count):
            stream.send_bytes(varint(ID << 3) + varint(request_id) + surplus)
        left = unchanged = 0
        while unchanged < 50:
            assert_serves(client)
            unchanged = unchanged + 1 if stream.unsent == left else 0
            left = stream.unsent
        assert left > count // 4
        assert_grew_less(process, before, 128 * MIB)
        # Its answers are still there, and with them the server reads on.
        responses, code = stream.rest()
    assert code is Code.OK
    assert len(responses) == count


# 5 KB that are answered by 1 MiB.
LARGE_ANSWER = attend(
    query=tensor(1, 1, 1024, 1), key=tensor(1, 1, 1, 1), value=tensor(1, 1, 1, 256)
)


def test_large_answers_that_nobody_takes(start_server, connect):
    """Many of them: within the memory's bounds, and all of it is free when the caller is gone."""
    process = start_server(arguments=["--max-inflight-bytes", str(32 * MIB)])
    client = connect(process.address)
    assert_serves(client)
    before = resident_bytes(process)
    with grpc.insecure_channel(process.address) as channel:
        stream = RawStream(channel)
        for request_id in range(200):
            stream.send(request_id, attend=LARGE_ANSWER)
        wait_until(lambda: Samples(process).total("attention_requests_total") >= 200)
        assert Samples(process).total("attention_requests_total", code="RESOURCE_EXHAUSTED") > 0
        assert_grew_less(process, before, 128 * MIB)
        stream.vanish()
    wait_until(lambda: Samples(process).total("attention_in_flight_bytes") < MIB)
    assert_serves(client, tokens=30_000)


def test_a_stream_that_takes_no_answers_leaves_room_for_others(start_server, connect, tmp_path):
    config = tmp_path / "limits.textproto"
    config.write_text(f"max_inflight_bytes: {32 * MIB} max_stream_bytes: {8 * MIB}")
    process = start_server(arguments=["--config", str(config)])
    client = connect(process.address)
    with grpc.insecure_channel(process.address) as channel:
        stream = RawStream(channel)
        for request_id in range(200):
            stream.send(request_id, attend=LARGE_ANSWER)
        wait_until(lambda: Samples(process).total("attention_in_flight_bytes") > MIB)
        held = unchanged = 0
        while unchanged < 20:  # until nothing more of what was sent is done
            now = Samples(process).total("attention_in_flight_bytes")
            unchanged = unchanged + 1 if now == held else 0
            held = now
        for _ in range(5):
            assert_serves(client, tokens=30_000)
        responses, code = stream.rest()
    assert code is Code.OK
    assert len(responses) == 200


def test_many_idle_streams(own_server):
    _, client, channel = own_server
    streams = [RawStream(channel) for _ in range(90)]
    for stream in streams:
        assert stream.answer_to(1, attend=attend()).HasField("attend")
    assert_serves(client)
    for stream in streams[::2]:
        stream.vanish()
    for stream in streams[1::2]:
        assert stream.rest() == ([], Code.OK)
    assert_serves(client)


def test_streams_that_break_off_at_every_stage(own_server):
    process, client, channel = own_server
    session = client.open_session()
    request = attend(query=tensor(1, 4, 1, 8), key=tensor(1, 2, 1, 8), value=tensor(1, 2, 1, 8))
    request.past_key_value.sessions.session_ids.append(session.id)
    for turn in range(100):
        stream = RawStream(channel)
        for request_id in range(turn % 10):
            stream.send(request_id, attend=request)
        if turn % 3 == 0 and turn % 10:
            stream.receive()
        if turn % 4 == 0:
            stream.half_close()
        stream.vanish()
    wait_until(lambda: Samples(process).total("attention_in_flight_requests") <= 0)
    (cache,) = client.get_session(session).layers
    assert 0 < cache.length <= sum(turn % 10 for turn in range(100))
    assert_serves(client)
