"""The Python client's stream, synchronous and asynchronous, against a real server."""

import asyncio
import concurrent.futures

import numpy as np
import pytest

import attnd
from attnd import errors
from end_to_end import reference

SECONDS = 60.0
SESSIONS, STEPS = 64, 5
EXACT = 2e-5


def tokens(count, seed):
    return reference.random_problem(
        seed, batch=1, heads=4, kv_heads=2, q_len=count, kv_len=count, head_dim=16
    )


def expected_last(parts):
    key, value = (np.concatenate([part[at] for part in parts], axis=2) for at in (1, 2))
    return reference.attend(parts[-1][0], key, value, is_causal=True).output


def long_call():
    """About half a second of work: what stands behind it in the queue waits."""
    return np.random.default_rng(0).standard_normal((3, 1, 8, 4096, 64), dtype=np.float32)


def test_64_sessions_in_flight(client):
    """Five steps of each, all sent before an answer is read; one step of one session fails."""
    parts = [[tokens(3 + n % 3, 100 * n + step) for step in range(STEPS)] for n in range(SESSIONS)]
    calls = {}
    with client.stream() as stream:
        opened = [stream.open_session() for _ in range(SESSIONS)]
        sessions = [call.result(SECONDS) for call in opened]
        for step in range(STEPS):
            for n, session in enumerate(sessions):
                past = sum(part[0].shape[2] for part in parts[n][:step])
                wrong = n == 7 and step == 2
                calls[n, step] = stream.attend(
                    *parts[n][step],
                    is_causal=True,
                    sessions=[session],
                    step=step + 1,
                    cache_position=past + 1 if wrong else past,
                )
        concurrent.futures.wait(calls.values(), SECONDS)
        for (n, step), call in calls.items():
            if n == 7 and step >= 2:
                # Those that build on the one that failed fail too, by their cache_position.
                assert isinstance(call.exception(0), errors.OutOfRange)
                continue
            output = call.result(0).output
            np.testing.assert_allclose(output, expected_last(parts[n][: step + 1]), atol=EXACT)
        closed = [stream.close_session(session) for session in sessions]
        assert [call.result(SECONDS) for call in closed] == [None] * SESSIONS
    for session in sessions:
        with pytest.raises(errors.NotFound):
            client.get_session(session)


def test_calls_of_one_session_are_done_in_order(client):
    parts = [tokens(1, seed) for seed in range(40)]
    with client.open_session() as session, client.stream() as stream:
        calls = [stream.attend(*part, is_causal=True, sessions=[session]) for part in parts]
        lengths = [call.result(SECONDS).cache_length[0] for call in calls]
    assert lengths == list(range(1, 41))


def test_an_error_fails_its_call_alone(client):
    part = tokens(4, 1)
    expected = client.attend(*part).output
    with client.stream() as stream:
        calls = [
            stream.attend(part[0], part[1], part[2][:, :, :2] if n == 3 else part[2])
            for n in range(8)
        ]
        for n, call in enumerate(calls):
            if n == 3:
                with pytest.raises(errors.InvalidArgument) as caught:
                    call.result(SECONDS)
                assert caught.value.reason
            else:
                np.testing.assert_array_equal(call.result(SECONDS).output, expected)


def test_answers_as_they_come(client):
    with client.stream() as stream:
        calls = [stream.attend(*tokens(4, seed)) for seed in range(10)]
        answered = list(stream.answers())
    assert {call.id for call in answered} == {call.id for call in calls}
    assert all(call.done() for call in answered)


def test_cancelled_and_late_calls(client):
    part = tokens(4, 1)
    with client.open_session() as session, client.stream() as stream:
        blockers = [stream.attend(*long_call()) for _ in range(3)]
        late = stream.attend(*part, sessions=[session], timeout=0.02)
        given_up = stream.attend(*part, sessions=[session])
        last = stream.attend(*part, sessions=[session])
        assert given_up.cancel()
        with pytest.raises(errors.Cancelled):
            given_up.result(SECONDS)
        with pytest.raises(errors.DeadlineExceeded):
            late.result(SECONDS)
        assert last.result(SECONDS).cache_length == (4,)
        for blocker in blockers:
            assert blocker.result(SECONDS).output.shape == (1, 8, 4096, 64)


def test_a_running_call_is_cancelled(client):
    with client.stream() as stream:
        calls = [stream.attend(*long_call()) for _ in range(4)]
        for call in calls:
            call.cancel()
        outcomes = [call.exception(SECONDS) for call in calls]
    assert isinstance(outcomes[-1], errors.Cancelled)
    assert all(outcome is None or isinstance(outcome, errors.Cancelled) for outcome in outcomes)


def test_more_calls_than_the_stream_takes_wait_for_their_turn(client):
    most = client.server_info().max_stream_requests
    part = tokens(1, 1)
    with client.stream() as stream:
        calls = [stream.attend(*part) for _ in range(2 * most + 10)]
        assert all(call.result(SECONDS).output.shape == (1, 4, 1, 16) for call in calls)


def test_forks_on_the_stream_see_what_was_sent_before(client):
    first, second = tokens(5, 1), tokens(1, 2)
    with client.stream() as stream:
        session = stream.open_session().result(SECONDS)
        stream.attend(*first, is_causal=True, sessions=[session])
        forks = stream.fork_session(session, count=2).result(SECONDS)
        calls = [stream.attend(*second, is_causal=True, sessions=[fork]) for fork in forks]
        for call in calls:
            expected = expected_last([first, second])
            np.testing.assert_allclose(call.result(SECONDS).output, expected, atol=EXACT)
        for each in (session, *forks):
            stream.close_session(each).result(SECONDS)


def test_sessions_outlive_the_stream_that_was_cut(client):
    part = tokens(5, 1)
    with client.open_session() as session:
        stream = client.stream()
        stream.attend(*part, sessions=[session]).result(SECONDS)
        running = [stream.attend(*long_call()), stream.attend(*part, sessions=[session])]
        stream.close(wait=False)
        for call in running:
            assert isinstance(call.exception(SECONDS), errors.Cancelled)
        # The one behind the long one was given up with the stream, and so is not appended.
        assert session.get().layers[0].length == 5
        assert client.attend(*part, sessions=[session]).cache_length == (10,)


def test_asynchronous_stream(server):
    parts = [[tokens(2, 10 * n + step) for step in range(3)] for n in range(16)]

    async def sequence(stream, mine):
        session = await (await stream.open_session())
        calls = [
            await stream.attend(*part, is_causal=True, sessions=[session], step=step + 1)
            for step, part in enumerate(mine)
        ]
        outputs = [(await call).output for call in calls]
        await (await stream.close_session(session))
        return outputs

    async def run():
        async with (
            attnd.AsyncClient(server.address, timeout=SECONDS) as client,
            client.stream() as stream,
        ):
            return await asyncio.gather(*(sequence(stream, mine) for mine in parts))

    for mine, outputs in zip(parts, asyncio.run(run()), strict=True):
        for step, output in enumerate(outputs):
            np.testing.assert_allclose(output, expected_last(mine[: step + 1]), atol=EXACT)


def test_asynchronous_errors_and_cancellation(server):
    part = tokens(2, 1)

    async def run():
        async with (
            attnd.AsyncClient(server.address, timeout=SECONDS) as client,
            client.stream() as stream,
        ):
            blocker = await stream.attend(*long_call())
            given_up = await stream.attend(*part)
            given_up.cancel()
            wrong = await stream.attend(*part, sessions=["no-such-session"])
            with pytest.raises(errors.NotFound):
                await wrong
            with pytest.raises(asyncio.CancelledError):
                await given_up
            assert (await blocker).output.shape == (1, 8, 4096, 64)

    asyncio.run(run())
