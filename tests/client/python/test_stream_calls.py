"""The stream's own bookkeeping: limits, outcomes, order of answers, and its end."""

import asyncio
import concurrent.futures
import threading

import grpc
import numpy as np
import pytest

import attnd
from attnd import errors

LAYOUT = {"layout": "packed", "query_lengths": [2], "kv_lengths": [2]}
SECONDS = 30.0


def problem(seed=0):
    return np.random.default_rng(seed).standard_normal((3, 2, 2, 4)).astype(np.float32)


def test_answers_belong_to_their_calls(fake_client):
    with fake_client.stream() as stream:
        calls = {seed: stream.attend(*problem(seed), **LAYOUT) for seed in range(20)}
        for seed, call in calls.items():
            expected = fake_client.attend(*problem(seed), **LAYOUT).output
            np.testing.assert_array_equal(call.result(SECONDS).output, expected)
        assert len({call.id for call in calls.values()}) == 20


def test_an_error_fails_its_call_alone(fake, fake_client):
    with fake_client.stream() as stream:
        fake.failures.append(grpc.StatusCode.ABORTED)
        failing, good = (stream.attend(*problem(), **LAYOUT) for _ in range(2))
        with pytest.raises(errors.Aborted, match="as the test wants it"):
            failing.result(SECONDS)
        assert good.result(SECONDS).output.shape == (2, 2, 4)


def test_sessions_of_a_stream(fake, fake_client):
    with fake_client.stream() as stream:
        session = stream.open_session().result(SECONDS)
        first = stream.attend(*problem(), sessions=[session], **LAYOUT)
        forks = stream.fork_session(session, count=2)
        assert first.result(SECONDS).cache_length == (2,)
        assert len(forks.result(SECONDS)) == 2
        assert stream.close_session(session).result(SECONDS) is None
        with pytest.raises(errors.NotFound) as caught:
            stream.close_session(session).result(SECONDS)
        assert caught.value.reason == "SESSION_NOT_FOUND"


def test_a_call_waits_while_the_stream_is_full(fake, fake_client):
    fake.max_stream_requests = 2
    fake.held.clear()
    with fake_client.stream() as stream:
        held = [stream.attend(*problem(), **LAYOUT) for _ in range(2)]
        done = threading.Event()

        def send():
            stream.attend(*problem(), **LAYOUT)
            done.set()

        sender = threading.Thread(target=send)
        sender.start()
        assert not done.wait(0.2)
        assert held[0].cancel()
        assert done.wait(SECONDS)
        sender.join()
        with pytest.raises(errors.Cancelled):
            held[0].result(SECONDS)
        assert not held[0].cancel()
        stream.close(wait=False)
        with pytest.raises(errors.Cancelled):
            held[1].result(SECONDS)


def test_answers_come_in_the_order_of_the_answers(fake, fake_client):
    fake.held.clear()
    with fake_client.stream() as stream:
        slow = stream.attend(*problem(), **LAYOUT)
        too_late = stream.attend(*problem(), **LAYOUT, timeout=0.001)
        answers = stream.answers()
        assert next(answers) is too_late
        with pytest.raises(errors.DeadlineExceeded):
            too_late.result(0)
        slow.cancel()
        assert list(answers) == [slow]
        assert list(stream.answers()) == []


def test_answers_are_kept_until_they_are_asked_for(fake_client):
    with fake_client.stream() as stream:
        calls = [stream.attend(*problem(seed), **LAYOUT) for seed in range(5)]
        concurrent.futures.wait(calls, SECONDS)
        calls[1].result(SECONDS)
        calls[3].exception(SECONDS)
        assert set(stream.answers()) == {calls[0], calls[2], calls[4]}
        assert not stream._answered


def test_calls_are_futures_of_the_standard_library(fake_client):
    with fake_client.stream() as stream:
        calls = [stream.attend(*problem(seed), **LAYOUT) for seed in range(8)]
        done = set(concurrent.futures.as_completed(calls, timeout=SECONDS))
    assert done == set(calls)


def test_closing_waits_for_what_is_unanswered(fake_client):
    with fake_client.stream() as stream:
        calls = [stream.attend(*problem(seed), **LAYOUT) for seed in range(8)]
    assert all(call.done() and call.exception() is None for call in calls)
    with pytest.raises(errors.Unavailable):
        stream.attend(*problem(), **LAYOUT)


def test_an_exception_in_the_context_ends_the_stream(fake, fake_client):
    fake.held.clear()
    stream = fake_client.stream()
    call = stream.attend(*problem(), **LAYOUT)
    with pytest.raises(KeyError), stream:
        raise KeyError
    assert isinstance(call.exception(SECONDS), errors.Cancelled)


def test_a_server_that_goes_fails_every_call(fake, fake_client):
    fake.held.clear()
    stream = fake_client.stream()
    calls = [stream.attend(*problem(), **LAYOUT) for _ in range(3)]
    fake._server.stop(None).wait()
    for call in calls:
        assert isinstance(call.exception(SECONDS), errors.Unavailable | errors.Cancelled)
    with pytest.raises(errors.AttndError):
        stream.attend(*problem(), **LAYOUT)
    stream.close()


def test_what_can_not_be_encoded_leaves_the_stream_as_it_was(fake_client):
    with fake_client.stream() as stream:
        with pytest.raises(TypeError):
            stream.attend([1.0], *problem()[1:], **LAYOUT)
        assert stream.attend(*problem(), **LAYOUT).result(SECONDS)


def test_asynchronous_stream(fake, fake_client):
    expected = [fake_client.attend(*problem(seed), **LAYOUT).output for seed in range(12)]
    fake.max_stream_requests = 4

    async def run():
        async with attnd.AsyncClient(fake.address) as client, client.stream() as stream:
            calls = [await stream.attend(*problem(seed), **LAYOUT) for seed in range(12)]
            results = await asyncio.gather(*calls)
            session = await (await stream.open_session())
            appended = await stream.attend(*problem(), sessions=[session], **LAYOUT)
            assert (await appended).cache_length == (2,)
            fake.failures.append(grpc.StatusCode.ABORTED)
            failing = await stream.attend(*problem(), **LAYOUT)
            with pytest.raises(errors.Aborted):
                await failing
            await (await stream.close_session(session))
            return [result.output for result in results]

    for output, wanted in zip(asyncio.run(run()), expected, strict=True):
        np.testing.assert_array_equal(output, wanted)
    assert not fake.sessions


def test_asynchronous_cancellation_and_end(fake):
    fake.max_stream_requests = 1
    fake.held.clear()

    async def run():
        async with attnd.AsyncClient(fake.address) as client:
            async with client.stream() as stream:
                call = await stream.attend(*problem(), **LAYOUT)
                # There is room for one: another is sent once the server has given the first up.
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(stream.attend(*problem(), **LAYOUT), 0.2)
                call.cancel()
                second = await asyncio.wait_for(stream.attend(*problem(), **LAYOUT), SECONDS)
                second.cancel()
            stream = await client.stream().__aenter__()
            third = await stream.attend(*problem(), **LAYOUT)
            await stream.__aexit__(KeyError, KeyError(), None)
            with pytest.raises(errors.Cancelled):
                await third
            with pytest.raises(errors.Cancelled):
                await stream.attend(*problem(), **LAYOUT)

    asyncio.run(run())
