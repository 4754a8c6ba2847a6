"""The stream: many requests in flight, in order per session, each with an outcome of its own."""

import grpc
import numpy as np
import pytest

from attnd import api
from attnd._proto.attention.v1 import attention_pb2, types_pb2
from end_to_end import hf_models, messages, reference
from end_to_end.messages import array_tensor, tensor
from end_to_end.observe import Samples, wait_until
from end_to_end.raw_stream import RawStream

Code = grpc.StatusCode
HEADS, KV_HEADS, DIM = 4, 2, 8
SESSIONS, STEPS = 64, 8
TOLERANCE = 2e-5
SLOW_MODEL = "slow"
SLOW_HEADS, SLOW_TOKENS = 16, 4096  # about a second on one core, in 288 KiB
LARGEST_ID = 2**64 - 1


def attend_request(ids, query, key, value, **batch):
    request = attention_pb2.AttendRequest(
        query=array_tensor(query), key=array_tensor(key), value=array_tensor(value)
    )
    request.past_key_value.sessions.CopyFrom(attention_pb2.SessionBatch(session_ids=ids, **batch))
    return request


def read(message):
    shape = tuple(message.shape)
    return np.frombuffer(message.data, np.float32).reshape(shape)


def small(**fields):
    """A call without a session."""
    return messages.attend(**fields)


def append(session_id, count=1, **batch):
    """`count` zeros to a session, or to each of several."""
    ids = session_id if isinstance(session_id, list) else [session_id]
    request = attention_pb2.AttendRequest(
        query=tensor(len(ids), HEADS, 1, DIM),
        key=tensor(len(ids), KV_HEADS, count, DIM),
        value=tensor(len(ids), KV_HEADS, count, DIM),
    )
    request.past_key_value.sessions.CopyFrom(attention_pb2.SessionBatch(session_ids=ids, **batch))
    return request


def slow():
    request = attention_pb2.AttendRequest(
        query=tensor(1, SLOW_HEADS, SLOW_TOKENS, 1),
        key=tensor(1, 1, SLOW_TOKENS, 1),
        value=tensor(1, 1, SLOW_TOKENS, 1),
        layer=types_pb2.LayerRef(model=SLOW_MODEL),
    )
    request.execution.implementation = "standard"
    return request


def outcome(response):
    """ "OK", or the reason of an error."""
    if response.WhichOneof("response") != "error":
        return "OK"
    assert response.error.message
    return response.error.reason


def length_of(client, session_id):
    return sum(cache.length for cache in client.get_session(session_id).layers)


@pytest.fixture
def stream(channel):
    with RawStream(channel) as opened:
        yield opened


@pytest.fixture
def start_with(start_server, connect, tmp_path):
    """Starts a server with these fields of the configuration; (process, client, channel)."""
    channels = []

    def start(*arguments, **fields):
        config = tmp_path / "stream.textproto"
        config.write_text("\n".join(f"{name}: {value}" for name, value in fields.items()))
        process = start_server(arguments=["--config", str(config), *arguments])
        channels.append(grpc.insecure_channel(process.address))
        return process, connect(process.address), channels[-1]

    yield start
    for channel in channels:
        channel.close()


class BusyStream:
    """A stream to a server of one core, which a slow request keeps busy."""

    def __init__(self, process, client, channel):
        self.process, self.client = process, client
        layer = api.LayerSpec(num_heads=SLOW_HEADS, num_kv_heads=1, head_dim=1, value_dim=1)
        spec = api.ModelSpec(stacks=[api.LayerStack(self_attention=[layer])])
        client.load_model(SLOW_MODEL, spec=spec)
        self.session = client.open_session()
        self.stream = RawStream(channel)

    def send_slow(self, request_id):
        """Returns when it is being executed."""
        self.stream.send(request_id, attend=slow())
        wait_until(lambda: self.client.list_models()[0].managers[0].executing == 1)

    def answered(self, code):
        return Samples(self.process).total("attention_requests_total", code=code)


@pytest.fixture
def busy(start_with):
    made = []

    def start(**fields):
        made.append(BusyStream(*start_with("--threads", "1", **fields)))
        return made[-1]

    yield start
    for each in made:
        each.stream.vanish()


# Many requests in flight.


class Traffic:
    """STEPS appends of one to three tokens to each of SESSIONS sessions, and what they answer."""

    def __init__(self, client, seed):
        random = np.random.default_rng(seed)
        self.ids = [client.open_session().id for _ in range(SESSIONS)]
        self.requests = {}  # (session, step): (query, key, value)
        for session in range(SESSIONS):
            for step in range(STEPS):
                count = int(random.integers(1, 4))
                self.requests[session, step] = tuple(
                    random.standard_normal((1, heads, count, DIM), dtype=np.float32)
                    for heads in (HEADS, KV_HEADS, KV_HEADS)
                )

    @property
    def order(self):
        """Of sending: the sessions take turns."""
        return [(session, step) for step in range(STEPS) for session in range(SESSIONS)]

    def send(self, stream, session, step, **batch):
        request = attend_request([self.ids[session]], *self.requests[session, step], **batch)
        stream.send(request_id(session, step), attend=request)

    def length(self, session, steps):
        return sum(self.requests[session, step][1].shape[2] for step in steps)

    def assert_answers(self, response, session, step, failed=()):
        """As if the earlier steps, but for those that failed, had been appended before."""
        steps = [earlier for earlier in range(step + 1) if (session, earlier) not in failed]
        assert response.WhichOneof("response") == "attend", (session, step, response.error)
        assert list(response.attend.cache_length) == [self.length(session, steps)]
        key, value = (
            np.concatenate([self.requests[session, each][part] for each in steps], axis=2)
            for part in (1, 2)
        )
        expected = reference.attend(self.requests[session, step][0], key, value).output
        np.testing.assert_allclose(read(response.attend.output), expected, atol=TOLERANCE)


def request_id(session, step):
    return 1 + session * STEPS + step


def session_and_step(response):
    return divmod(response.id - 1, STEPS)


@pytest.fixture
def large_stream(start_with):
    """On a server that takes all requests of Traffic at once; (client, stream)."""
    _, client, channel = start_with(max_stream_requests=SESSIONS * STEPS, queue_capacity=1024)
    with RawStream(channel) as opened:
        yield client, opened


def test_sessions_in_flight_are_answered_in_order(large_stream):
    client, stream = large_stream
    traffic = Traffic(client, seed=1)
    for session, step in traffic.order:
        traffic.send(stream, session, step)
    responses = stream.receive_many(SESSIONS * STEPS)
    seen = dict.fromkeys(range(SESSIONS), 0)
    for response in responses:
        session, step = session_and_step(response)
        assert step == seen[session]
        seen[session] += 1
        traffic.assert_answers(response, session, step)
    assert set(seen.values()) == {STEPS}


def test_one_failing_request_fails_alone(large_stream):
    client, stream = large_stream
    traffic = Traffic(client, seed=2)
    failing = {(7, 3), (40, 0), (63, STEPS - 1)}
    for session, step in traffic.order:
        batch = {"truncate": [1000]} if (session, step) in failing else {}
        traffic.send(stream, session, step, **batch)
    for response in stream.receive_many(SESSIONS * STEPS):
        session, step = session_and_step(response)
        if (session, step) in failing:
            assert outcome(response) == "TRUNCATE_BEYOND"
            assert response.error.code == Code.OUT_OF_RANGE.value[0]
            assert response.error.details["row"] == "0"
        else:
            traffic.assert_answers(response, session, step, failing)


def test_what_builds_on_a_failed_request_fails_with_it(large_stream):
    client, stream = large_stream
    traffic = Traffic(client, seed=3)
    broken, first_failed = 21, 4
    for session, step in traffic.order:
        fails = (session, step) == (broken, first_failed)
        position = traffic.length(session, range(step))
        batch = {"truncate": [1000]} if fails else {"cache_position": [position]}
        traffic.send(stream, session, step, **batch)
    for response in stream.receive_many(SESSIONS * STEPS):
        session, step = session_and_step(response)
        if session != broken or step < first_failed:
            traffic.assert_answers(response, session, step)
        elif step == first_failed:
            assert outcome(response) == "TRUNCATE_BEYOND"
        else:
            assert outcome(response) == "CACHE_POSITION_BEYOND"
            length = traffic.length(broken, range(first_failed))
            assert response.error.details["length"] == str(length)
    assert length_of(client, traffic.ids[broken]) == traffic.length(broken, range(first_failed))


def test_calls_over_several_sessions_wait_for_all_of_them(client, stream):
    """Rows overlap from call to call, so that no order but that of sending gives these lengths."""
    ids = [client.open_session().id for _ in range(5)]
    lengths = [0] * 5
    expected = {}
    for request_id in range(1, 101):
        rows = [(request_id * factor) % 5 for factor in (1, 3)][: 1 + request_id % 2]
        rows = list(dict.fromkeys(rows))
        for row in rows:
            lengths[row] += 1
        expected[request_id] = [lengths[row] for row in rows]
        stream.send(request_id, attend=append([ids[row] for row in rows]))
    for response in stream.receive_many(100):
        assert list(response.attend.cache_length) == expected[response.id]


def test_two_streams_on_one_session(client, channel):
    session = client.open_session()
    with RawStream(channel) as one, RawStream(channel) as other:
        for request_id in range(60):
            one.send(request_id, attend=append(session.id))
            other.send(request_id, attend=append(session.id))
        lengths = [
            [response.attend.cache_length[0] for response in stream.receive_many(60)]
            for stream in (one, other)
        ]
    assert sorted(lengths[0] + lengths[1]) == list(range(1, 121))
    for own in lengths:
        assert own == sorted(own)


def test_answers_are_those_of_the_unary_rpcs(client, channel, stream, model_root):
    hf_models.make_bert(seed=13, num_hidden_layers=1).save_pretrained(model_root / "stream-bert")
    client.load_model("stream-bert", weights="stream-bert")
    random = np.random.default_rng(14)
    hidden_states = random.standard_normal((2, 5, 128), dtype=np.float32)
    request = attention_pb2.ForwardRequest(
        layer=types_pb2.LayerRef(model="stream-bert"), hidden_states=array_tensor(hidden_states)
    )
    expected = client.forward(hidden_states, model="stream-bert", layer=0).output
    response = stream.answer_to(5, forward=request)
    np.testing.assert_allclose(read(response.forward.output), expected, atol=TOLERANCE)
    request.layer.layer = 9
    response = stream.answer_to(LARGEST_ID, forward=request)
    code, _, error = messages.answer(
        channel, f"{messages.ATTENTION}Forward", request.SerializeToString()
    )
    assert code is Code.NOT_FOUND
    assert response.error == error
    client.unload_model("stream-bert")


# Sessions on a stream.


def test_session_rpcs_wait_for_what_was_sent_before(client, stream):
    opened = stream.answer_to(0, open=attention_pb2.OpenSessionRequest()).open
    assert opened.server_epoch == client.server_info().server_epoch
    session = opened.session_id
    fork = attention_pb2.ForkSessionRequest(session_id=session, count=2)
    close = attention_pb2.CloseSessionRequest(session_id=session)
    for request_id in range(1, 41):
        stream.send(request_id, attend=append(session, request_id))
    stream.send(50, fork=fork)
    stream.send(51, attend=append(session))
    stream.send(52, close=close)
    stream.send(53, attend=append(session))
    stream.send(54, close=close)
    responses = {response.id: response for response in stream.receive_many(45)}
    length = sum(range(1, 41))
    assert responses[40].attend.cache_length == [length]
    assert responses[51].attend.cache_length == [length + 1]
    assert responses[52].HasField("close")
    assert outcome(responses[53]) == outcome(responses[54]) == "SESSION_NOT_FOUND"
    forks = responses[50].fork.session_ids
    assert len(forks) == 2
    for each in forks:
        assert length_of(client, each) == length


def test_failing_session_rpcs(client, stream):
    for request, reason in (
        ({"open": attention_pb2.OpenSessionRequest(model="nobody")}, "MODEL_NOT_FOUND"),
        ({"open": attention_pb2.OpenSessionRequest(reserve_tokens=1)}, "INVALID_FIELD"),
        ({"fork": attention_pb2.ForkSessionRequest(session_id="none")}, "SESSION_NOT_FOUND"),
        ({"close": attention_pb2.CloseSessionRequest(session_id="none")}, "SESSION_NOT_FOUND"),
    ):
        assert outcome(stream.answer_to(1, **request)) == reason
    assert outcome(stream.answer_to(1, attend=small())) == "OK"


# Ids, timeouts, cancellation.


def test_an_id_is_free_when_it_is_answered(stream):
    for _ in range(50):
        assert outcome(stream.answer_to(7, attend=small())) == "OK"


def test_an_id_in_use_is_refused(busy):
    server = busy()
    server.send_slow(1)
    server.stream.send(2, attend=append(server.session.id, 3))
    for request_id in (1, 2):
        response = server.stream.answer_to(request_id, attend=append(server.session.id))
        assert outcome(response) == "DUPLICATE_ID"
        assert response.error.code == Code.INVALID_ARGUMENT.value[0]
        assert response.error.details["field"] == "id"
    answers = server.stream.receive_many(2)
    assert {(answer.id, outcome(answer)) for answer in answers} == {(1, "OK"), (2, "OK")}
    assert length_of(server.client, server.session.id) == 3


def test_timeouts_of_requests(busy):
    """What waits is not executed; what comes after it on the session is, and others stay."""
    server = busy()
    session = server.session.id
    server.send_slow(1)
    server.stream.send(2, timeout_seconds=0.05, attend=append(session, 5))
    server.stream.send(3, attend=append(session, 2))
    server.stream.send(4, timeout_seconds=0.05, attend=append(session, 7))
    server.stream.send(5, timeout_seconds=3600.0, attend=append(session, 1))
    early = server.stream.receive_many(2)  # before the slow one is done
    assert {(answer.id, outcome(answer)) for answer in early} == {
        (2, "DEADLINE_EXCEEDED"),
        (4, "DEADLINE_EXCEEDED"),
    }
    late = {answer.id: answer for answer in server.stream.receive_many(3)}
    assert outcome(late[1]) == "OK"
    assert late[3].attend.cache_length == [2]
    assert late[5].attend.cache_length == [3]


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), -0.0, float("inf"), 1e300, 5e-324])
def test_odd_timeouts(stream, seconds):
    expected = {"nan": "INVALID_FIELD", "-1.0": "INVALID_FIELD", "5e-324": "DEADLINE_EXCEEDED"}
    stream.send(1, timeout_seconds=seconds, attend=small())
    response = stream.receive()
    assert outcome(response) == expected.get(str(seconds), "OK")
    assert outcome(stream.answer_to(1, attend=small())) == "OK"


def test_cancelling_what_waits(busy):
    server = busy()
    session = server.session.id
    server.send_slow(1)
    for request_id in range(2, 8):
        server.stream.send(request_id, attend=append(session, request_id))
    cancelled = [7, 2, 4]
    for request_id in cancelled:
        server.stream.cancel_request(request_id, own_id=3)  # an id that means nothing here
    early = server.stream.receive_many(3)
    assert {(answer.id, outcome(answer)) for answer in early} == {
        (request_id, "CANCELLED") for request_id in cancelled
    }
    assert all(answer.error.code == Code.CANCELLED.value[0] for answer in early)
    late = {answer.id: answer for answer in server.stream.receive_many(4)}
    assert outcome(late[1]) == "OK"
    assert [late[each].attend.cache_length[0] for each in (3, 5, 6)] == [3, 8, 14]


def test_cancelling_what_runs(busy):
    server = busy()
    server.send_slow(1)
    server.stream.cancel_request(1)
    response = server.stream.receive()
    assert (response.id, outcome(response)) == (1, "CANCELLED")
    assert outcome(server.stream.answer_to(1, attend=small())) == "OK"


def test_cancelling_what_is_not_there(stream):
    for request_id in (0, 1, 99, LARGEST_ID):
        stream.cancel_request(request_id, own_id=request_id)
    assert outcome(stream.answer_to(1, attend=small())) == "OK"
    stream.cancel_request(1)
    responses, code = stream.rest()
    assert (responses, code) == ([], Code.OK)


# Limits.


def test_more_requests_than_a_stream_may_have(busy):
    server = busy(max_stream_requests=4)
    assert server.client.server_info().max_stream_requests == 4
    server.send_slow(1)
    for request_id in range(2, 11):
        server.stream.send(request_id, attend=append(server.session.id))
    refused = server.stream.receive_many(6)
    assert [answer.id for answer in refused] == list(range(5, 11))
    for answer in refused:
        assert outcome(answer) == "STREAM_LIMIT"
        assert answer.error.code == Code.RESOURCE_EXHAUSTED.value[0]
        assert answer.error.retry_delay_seconds > 0
    accepted = server.stream.receive_many(4)
    assert {(answer.id, outcome(answer)) for answer in accepted} == {
        (request_id, "OK") for request_id in range(1, 5)
    }
    assert length_of(server.client, server.session.id) == 3

    # The limit is each stream's own; and room comes back when answers are taken.
    def is_answered():
        return outcome(server.stream.answer_to(20, attend=append(server.session.id))) == "OK"

    wait_until(is_answered)


def test_more_bytes_than_a_stream_may_have(start_with):
    _, client, channel = start_with(max_stream_bytes=64 << 10)
    assert client.server_info().max_stream_bytes == 64 << 10
    with RawStream(channel) as stream:
        large = small(query=tensor(2, 4, 300, 8), key=tensor(2, 2, 300, 8))
        large.value.CopyFrom(large.key)
        response = stream.answer_to(1, attend=large)
        assert outcome(response) == "STREAM_LIMIT"
        assert response.error.retry_delay_seconds == 0  # it will never fit
        assert outcome(stream.answer_to(1, attend=small())) == "OK"
    # Outside of a stream it is no more than any other.
    assert client.attend(*[np.zeros((2, 4, 300, 8), np.float32)] * 3).output.shape[2] == 300


def test_bytes_of_several_requests_together(busy):
    server = busy(max_stream_bytes=400 << 10)
    server.send_slow(1)  # 288 KiB
    kept = append(server.session.id, 500)  # 63 KiB
    for request_id in range(2, 5):
        server.stream.send(request_id, attend=kept)
    refused = server.stream.receive_many(2)
    assert [(answer.id, outcome(answer)) for answer in refused] == [
        (3, "STREAM_LIMIT"),
        (4, "STREAM_LIMIT"),
    ]
    assert refused[0].error.retry_delay_seconds > 0
    assert all(outcome(answer) == "OK" for answer in server.stream.receive_many(2))


# How streams end.


def test_half_closing_with_requests_in_flight(client, channel):
    session = client.open_session()
    stream = RawStream(channel)
    for request_id in range(100):
        stream.send(request_id, attend=append(session.id))
    responses, code = stream.rest()
    assert code is Code.OK
    assert [response.attend.cache_length[0] for response in responses] == list(range(1, 101))


def test_a_stream_without_requests(channel):
    assert RawStream(channel).rest() == ([], Code.OK)


def test_a_caller_that_vanishes(busy):
    """What ran is cancelled, what waited is not executed; the session stays until it expires."""
    server = busy()
    mortal = server.client.open_session(time_to_live=0.5)
    server.stream.send(90, attend=append(mortal.id, 4))
    server.stream.receive()
    server.send_slow(1)
    for request_id in range(2, 6):
        server.stream.send(request_id, attend=append(server.session.id))
        server.stream.send(10 * request_id, attend=append(mortal.id))
    wait_until(lambda: Samples(server.process).total("attention_in_flight_requests") >= 9)
    server.stream.vanish()
    wait_until(lambda: server.answered("CANCELLED") == 9)
    assert Samples(server.process).total("attention_in_flight_requests") <= 1  # this one's own
    assert length_of(server.client, mortal.id) == 4
    assert length_of(server.client, server.session.id) == 0

    def has_expired():
        listed = {status.id_prefix for status in server.client.list_sessions()}
        return mortal.id[:8] not in listed and server.session.id[:8] in listed

    wait_until(has_expired)
    assert server.client.attend(*[np.zeros((1, 1, 2, 4), np.float32)] * 3).output.any() == 0


def test_a_stream_whose_own_deadline_passes(busy):
    server = busy()
    server.send_slow(1)
    for request_id in range(2, 7):  # much longer than the deadline, all together
        server.stream.send(request_id, attend=slow())
    with grpc.insecure_channel(server.process.address) as own:
        stream = RawStream(own, timeout=0.3)
        stream.send(1, attend=append(server.session.id, 3))
        responses, code = stream.rest()
    # Either side may be the first to notice; the server says it for each request.
    assert code in (Code.OK, Code.DEADLINE_EXCEEDED)
    assert all(outcome(response) == "DEADLINE_EXCEEDED" for response in responses)
    server.stream.vanish()
    wait_until(lambda: Samples(server.process).total("attention_in_flight_requests") <= 1)
    assert length_of(server.client, server.session.id) == 0


def test_a_model_that_is_unloaded_under_a_stream(busy):
    server = busy()
    session = server.client.open_session(SLOW_MODEL)
    server.send_slow(1)
    request = slow()
    request.past_key_value.sessions.session_ids.append(session.id)
    server.stream.send(2, attend=request)
    server.stream.send(3, attend=append(server.session.id))
    wait_until(lambda: Samples(server.process).total("attention_in_flight_requests") >= 3)
    server.client.unload_model(SLOW_MODEL, close_sessions=True)
    answers = {answer.id: outcome(answer) for answer in server.stream.receive_many(3)}
    assert answers[1] == answers[3] == "OK"
    assert answers[2] in ("OK", "SESSION_NOT_FOUND", "MODEL_NOT_FOUND")
    assert outcome(server.stream.answer_to(4, attend=slow())) == "MODEL_NOT_FOUND"
