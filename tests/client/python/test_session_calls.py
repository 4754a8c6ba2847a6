"""Sessions as objects: what is sent for their arguments, numbers of steps, calls made again."""

import grpc
import numpy as np
import pytest

import attnd
from attnd import errors
from attnd._proto.attention.v1 import attention_pb2

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
DEADLINE_EXCEEDED = grpc.StatusCode.DEADLINE_EXCEEDED


def tokens(count, seed=0):
    """Arguments of `attend` for that many new tokens of one row."""
    random = np.random.default_rng(seed)
    query, key, value = random.standard_normal((3, count, 2, 4)).astype(np.float32)
    lengths = {"query_lengths": [count], "kv_lengths": [count]}
    return (query, key, value), {"layout": "packed", "is_causal": True, **lengths}


def append(session, count, seed=0, **arguments):
    tensors, layout = tokens(count, seed)
    return session.attend(*tensors, **layout, **arguments)


def batch_of(request):
    return request.past_key_value.sessions


def test_steps_are_numbered_by_layer(fake, fake_client):
    session = fake_client.open_session()
    for layer in (0, 0, 3):
        append(session, 2, layer=layer)
    assert [list(batch_of(request).step) for request in fake.attended] == [[1], [2], [1]]
    assert [session.length(layer) for layer in (0, 3, 1)] == [4, 2, 0]


@pytest.mark.parametrize("code", [UNAVAILABLE, DEADLINE_EXCEEDED])
def test_lost_answer_appends_once(fake, fake_client, code):
    plain, lossy = fake_client.open_session(), fake_client.open_session()
    for seed, losses in ((0, []), (1, [code, code]), (2, [])):
        expected = append(plain, 3, seed)
        fake.losses += losses
        result = append(lossy, 3, seed)
        np.testing.assert_array_equal(result.output, expected.output)
        assert result.cache_length == expected.cache_length == (3 * seed + 3,)
    assert [batch_of(request).step[0] for request in fake.attended] == [1, 1, 2, 2, 2, 2, 3, 3]


def test_a_call_that_failed_in_the_end_is_replaced_by_the_next(fake, fake_client):
    session, expected = fake_client.open_session(), fake_client.open_session()
    append(session, 2)
    fake.losses += [UNAVAILABLE] * 3
    with pytest.raises(errors.Unavailable):
        append(session, 5, seed=1)
    assert session.length() == 2
    append(expected, 2)
    np.testing.assert_array_equal(
        append(session, 1, seed=2).output, append(expected, 1, seed=2).output
    )
    assert session.length() == 3


def test_retries_are_counted_and_other_errors_not_retried(fake, fake_client):
    session = fake_client.open_session()
    fake.failures += [UNAVAILABLE] * 2
    with pytest.raises(errors.Unavailable):
        append(session, 1, retries=1)
    assert len(fake.attended) == 2
    fake.failures += [grpc.StatusCode.RESOURCE_EXHAUSTED]
    with pytest.raises(errors.ResourceExhausted):
        append(session, 1)
    assert len(fake.attended) == 3
    with pytest.raises(ValueError, match="retries"):
        append(session, 1, retries=-1)


def test_no_retry_without_time_for_it(fake, fake_client):
    session = fake_client.open_session()
    fake.failures += [UNAVAILABLE]
    with pytest.raises(errors.Unavailable):
        append(session, 1, timeout=0.04)  # less than the pause before a retry
    assert len(fake.attended) == 1


def test_read_only_and_discard_are_not_numbered(fake, fake_client):
    session = fake_client.open_session()
    (query, key, value), layout = tokens(3)
    session.attend(query, key, value, **layout)
    fake.losses += [UNAVAILABLE]
    session.attend(query, layout="packed", query_lengths=[3], cache_mode="read_only")
    session.attend(query, key, value, **layout, cache_mode="discard")
    modes = [batch_of(request) for request in fake.attended[1:]]
    assert [list(batch.step) for batch in modes] == [[], [], []]
    assert modes[-1].mode == attention_pb2.CACHE_MODE_DISCARD
    assert session.length() == 3
    append(session, 1)
    assert list(batch_of(fake.attended[-1]).step) == [2]


def test_forks_go_on_counting(fake, fake_client):
    parent = fake_client.open_session()
    for layer in (0, 1):
        append(parent, 4, layer=layer)
    append(parent, 2, layer=1)
    one, two = parent.fork(2, length=5)
    assert fake.forked == [(parent.id, 2)]
    assert [one.length(0), one.length(1)] == [4, 5]
    append(one, 1, layer=1)
    assert list(batch_of(fake.attended[-1]).step) == [3]
    assert (one.length(1), two.length(1), parent.length(1)) == (6, 5, 6)


def test_an_attached_session_goes_on_counting(fake, fake_client):
    opened = fake_client.open_session()
    append(opened, 2, layer=5)
    append(opened, 2, layer=5)
    attached = fake_client.attach_session(opened.id)
    assert attached.length(5) == 4
    append(attached, 1, layer=5)
    assert list(batch_of(fake.attended[-1]).step) == [3]
    with pytest.raises(errors.Aborted):
        append(opened, 1, layer=5, step=1)
    opened.get()
    assert opened.length(5) == 5


def test_context_closes_and_closing_again_is_no_error(fake, fake_client):
    with fake_client.open_session() as session:
        append(session, 1)
    assert fake.closed == [session.id]
    session.close()
    with pytest.raises(errors.NotFound):
        append(session, 1)


def test_arguments_of_a_batch(fake, fake_client):
    sessions = [fake_client.open_session() for _ in range(3)]
    query, key, value = np.zeros((3, 6, 2, 4), np.float32)
    layout = {"layout": "packed", "query_lengths": [1, 2, 3], "kv_lengths": [1, 2, 3]}
    result = fake_client.attend(query, key, value, sessions=sessions, step=7, **layout)
    assert result.cache_length == (1, 2, 3)
    fake_client.attend(
        query,
        key,
        value,
        sessions=[sessions[0].id, *sessions[1:]],
        truncate=[0, None, 2],
        cache_position=[0, 2, None],
        step=[8, None, 9],
        **layout,
    )
    batch = batch_of(fake.attended[-1])
    assert list(batch.truncate) == [0, -1, 2]
    assert list(batch.cache_position) == [0, 2, -1]
    assert list(batch.step) == [8, 0, 9]
    assert list(batch_of(fake.attended[0]).step) == [7, 7, 7]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"step": 1}, ValueError),
        ({"cache_mode": "append"}, ValueError),
        ({"sessions": ["a", "b"], "step": [1]}, ValueError),
        ({"sessions": ["a"], "cache_mode": "keep"}, ValueError),
        ({"sessions": ["a"], "past_key": np.zeros((1, 1, 1, 4), np.float32)}, ValueError),
        ({"sessions": "a"}, TypeError),
        ({"sesions": ["a"]}, TypeError),
    ],
)
def test_arguments_that_can_not_be_meant(fake_client, fake, arguments, error):
    query = np.zeros((1, 1, 1, 4), np.float32)
    with pytest.raises(error):
        fake_client.attend(query, query, query, **arguments)
    assert fake.attended == []


def test_the_id_is_not_in_the_representation(fake_client):
    session = attnd.Session(fake_client, "0123456789abcdef")
    assert session.id not in repr(session)


def test_traffic_is_counted(fake, fake_client):
    before = fake_client.traffic.bytes_sent, fake_client.traffic.bytes_received
    query = np.zeros((100, 2, 4), np.float32)
    layout = {"layout": "packed", "query_lengths": [100], "kv_lengths": [100]}
    fake_client.attend(query, query, query, **layout)
    size = query.nbytes
    assert 3 * size < fake_client.traffic.bytes_sent - before[0] < 3 * size + 200
    assert size < fake_client.traffic.bytes_received - before[1] < size + 200
