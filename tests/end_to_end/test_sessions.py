"""Sessions through the rpcs and modes that have to do with them."""

import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest

from attnd import api, errors
from end_to_end import hf_models, reference
from end_to_end.observe import Samples, wait_until

HEADS, KV_HEADS, DIM = 4, 2, 16
TOLERANCE = 2e-5
MIB = 1 << 20
PAGE = 64  # tokens


class Caller:
    """Random tokens, and every session's keys and values as the test has them."""

    def __init__(self, client, model="", seed=0, **options):
        self.client = client
        self.options = {"model": model, **options}
        self.random = np.random.default_rng(seed)

    def tokens(self, count, heads=KV_HEADS, rows=1):
        return self.random.standard_normal((rows, heads, count, DIM), dtype=np.float32)

    def append(self, session, history, count, queries=None, **arguments):
        """Appends `count` random tokens to a session and a history of [1, heads, length, dim]."""
        key, value = self.tokens(count), self.tokens(count)
        query = self.tokens(count if queries is None else queries, HEADS)
        result = self.client.attend(
            query, key, value, sessions=[session], **{**self.options, **arguments}
        )
        extend(history, key, value)
        return query, result


def extend(history, key, value):
    if history:
        key = np.concatenate([history["key"], key], axis=2)
        value = np.concatenate([history["value"], value], axis=2)
    history.update(key=key, value=value)


def cut(history, length):
    history.update({name: array[:, :, :length] for name, array in history.items()})


def assert_attends(query, result, history, **options):
    expected = reference.attend(query, history["key"], history["value"], **options)
    np.testing.assert_allclose(result.output, expected.output, atol=TOLERANCE)
    return expected


def assert_holds(caller, session, history, **arguments):
    """A read-only question is answered as the history says."""
    query = caller.tokens(3, HEADS)
    result = caller.client.attend(
        query, sessions=[session], cache_mode="read_only", **{**caller.options, **arguments}
    )
    assert_attends(query, result, history)
    assert result.cache_length == (history["key"].shape[2],)


@pytest.fixture
def caller(client):
    return Caller(client, seed=1)


@pytest.fixture(scope="module")
def spec_model(client):
    """Without weights: three layers, the last one with a window of 8 keys before the query."""
    plain = api.LayerSpec(
        repeat=2, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, value_dim=DIM
    )
    window = api.LayerSpec()
    window.CopyFrom(plain)
    window.repeat = 1
    window.options.window_left = 8
    cross = api.LayerSpec()
    cross.CopyFrom(plain)
    stack = api.LayerStack(self_attention=[plain, window], cross_attention=[cross])
    client.load_model("sessions-spec", spec=api.ModelSpec(stacks=[stack]))
    yield "sessions-spec"
    client.unload_model("sessions-spec", close_sessions=True)


# Appending, in all ways.


@pytest.mark.parametrize("is_causal", [False, True])
def test_appends_of_all_sizes(caller, is_causal):
    """Across the ends of pages; one token, several, and none."""
    history = {}
    with caller.client.open_session() as session:
        for count in (1, 2, PAGE - 3, 1, 3 * PAGE, 0, PAGE + 5, 1):
            query, result = caller.append(session, history, count, is_causal=is_causal)
            assert_attends(query, result, history, is_causal=is_causal)
            assert result.cache_length == (history["key"].shape[2],)


def test_batches_whose_rows_differ(caller):
    """Sessions of different lengths, and rows that bring different numbers of tokens."""
    client = caller.client
    sessions = [client.open_session() for _ in range(3)]
    histories = [{} for _ in sessions]
    for session, history, length in zip(sessions, histories, (70, 0, 13), strict=True):
        if length:
            caller.append(session, history, length)
    lengths = [2, 5, 1]
    for _ in range(3):
        query = caller.tokens(5, HEADS, rows=3)
        key, value = caller.tokens(5, rows=3), caller.tokens(5, rows=3)
        result = client.attend(
            query,
            key,
            value,
            sessions=sessions,
            query_lengths=lengths,
            kv_lengths=lengths,
            is_causal=True,
        )
        for row, (history, length) in enumerate(zip(histories, lengths, strict=True)):
            one = slice(row, row + 1)
            extend(history, key[one, :, :length], value[one, :, :length])
            expected = reference.attend(
                query[one, :, :length], history["key"], history["value"], is_causal=True
            )
            np.testing.assert_allclose(
                result.output[one, :, :length], expected.output, atol=TOLERANCE
            )
            assert (result.output[row, :, length:] == 0).all()
        assert result.cache_length == tuple(h["key"].shape[2] for h in histories)
    for session, history in zip(sessions, histories, strict=True):
        assert_holds(caller, session, history)


@pytest.mark.parametrize("layout", ["tokens_first", "packed"])
def test_other_layouts_fill_the_same_cache(caller, layout):
    client = caller.client
    sessions = [client.open_session() for _ in range(2)]
    histories = [{}, {}]
    for lengths in ([66, 3], [1, 1], [2, 0]):
        longest = max(lengths)
        query = caller.tokens(longest, HEADS, rows=2)
        key, value = caller.tokens(longest, rows=2), caller.tokens(longest, rows=2)
        given = [array.swapaxes(1, 2) for array in (query, key, value)]
        if layout == "packed":
            inside = np.arange(longest) < np.array(lengths)[:, None]
            given = [array[inside] for array in given]
        result = client.attend(
            *[np.ascontiguousarray(array) for array in given],
            sessions=sessions,
            layout=layout,
            query_lengths=lengths,
            kv_lengths=lengths,
            is_causal=True,
            output_lse=True,
        )
        rows_before = 0
        for row, (history, length) in enumerate(zip(histories, lengths, strict=True)):
            one = slice(row, row + 1)
            extend(history, key[one, :, :length], value[one, :, :length])
            expected = reference.attend(
                query[one, :, :length], history["key"], history["value"], is_causal=True
            )
            output = result.output[row, :length] if layout == "tokens_first" else None
            if output is None:
                place = slice(rows_before, rows_before + length)
                output, lse = result.output[place], result.lse[place].T
            else:
                lse = result.lse[row, :, :length]
            np.testing.assert_allclose(output.swapaxes(0, 1), expected.output[0], atol=TOLERANCE)
            np.testing.assert_allclose(lse, expected.lse[0], atol=TOLERANCE)
            rows_before += length
    for session, history in zip(sessions, histories, strict=True):
        assert_holds(caller, session, history)


def test_weights_lse_and_masks_count_the_past(caller):
    history = {}
    with caller.client.open_session() as session:
        caller.append(session, history, 9)
        mask = caller.random.random((1, HEADS, 4, 13)) < 0.7
        query, result = caller.append(
            session,
            history,
            4,
            attention_mask=mask,
            output_attentions=True,
            output_lse=True,
            implementation="standard",
        )
        expected = assert_attends(query, result, history, attention_mask=mask)
        np.testing.assert_allclose(
            result.attention_weights, expected.weights["probabilities"], atol=TOLERANCE
        )
        np.testing.assert_allclose(result.lse, expected.lse, atol=TOLERANCE)


def test_no_queries_and_no_keys(caller):
    history = {}
    with caller.client.open_session() as session:
        _, result = caller.append(session, history, 5, queries=0)  # an append without a question
        assert result.output.shape == (1, HEADS, 0, DIM)
        assert result.cache_length == (5,)
        query, result = caller.append(session, history, 0, queries=2)  # a question alone
        assert_attends(query, result, history)
        nothing = caller.tokens(0)
        result = caller.client.attend(
            caller.tokens(0, HEADS), nothing, nothing, sessions=[session], truncate=3
        )  # a cut alone
        assert result.cache_length == (3,)
        cut(history, 3)
        assert_holds(caller, session, history)


def test_a_question_to_an_empty_cache_is_answered_with_zeros(caller):
    with caller.client.open_session() as session:
        query, none = caller.tokens(2, HEADS), caller.tokens(0)
        result = caller.client.attend(query, none, none, sessions=[session], output_lse=True)
        assert (result.output == 0).all()
        assert (result.lse == -np.inf).all()


# Modes, cuts, retries.


def test_discard_and_read_only_leave_the_cache_as_it_is(caller):
    client, history = caller.client, {}
    with client.open_session() as session:
        caller.append(session, history, 70, step=4)
        before = session.get()
        for truncate in (None, 64, 20, 0):
            seen = dict(history)
            if truncate is not None:
                cut(seen, truncate)
            key, value = caller.tokens(3), caller.tokens(3)
            query = caller.tokens(3, HEADS)
            result = client.attend(
                query,
                key,
                value,
                sessions=[session],
                cache_mode="discard",
                truncate=truncate,
                cache_position=seen["key"].shape[2],
                is_causal=True,
            )
            extended = dict(seen)
            extend(extended, key, value)
            assert_attends(query, result, extended, is_causal=True)
            assert result.cache_length == (70,)
            result = client.attend(
                query, sessions=[session], cache_mode="read_only", truncate=truncate
            )
            assert_attends(query, result, seen)
            assert result.cache_length == (70,)
        after = session.get()
        assert after.layers == before.layers
        assert after.bytes == before.bytes
        assert_holds(caller, session, history)


def test_cuts_and_replays(caller):
    history = {}
    with caller.client.open_session() as session:
        caller.append(session, history, 150)
        for keep, count in ((149, 1), (128, 70), (64, 0), (63, 5), (0, 2)):
            cut(history, keep)
            query, result = caller.append(session, history, count, truncate=keep)
            assert_attends(query, result, history)
            assert result.cache_length == (keep + count,)
        assert_holds(caller, session, history)


def test_a_step_again_is_a_retry(caller):
    """With other tokens, too: what it brought the first time is taken back, its cut is not."""
    history = {}
    with caller.client.open_session() as session:
        caller.append(session, history, 60, step=1)
        cut(history, 40)
        kept = dict(history)
        caller.append(session, history, 7, step=2, truncate=40)
        for count in (7, 30, 1, 7):
            history = dict(kept)
            query, result = caller.append(session, history, count, step=2)
            assert_attends(query, result, history)
            assert result.cache_length == (40 + count,)
        caller.append(session, history, 1, step=9)
        assert session.get().layers[0].last_step == 9
        assert_holds(caller, session, history)


def test_a_call_without_a_step_makes_earlier_ones_late(caller):
    history = {}
    with caller.client.open_session() as session:
        caller.append(session, history, 3, step=5)
        caller.append(session, history, 2)
        with pytest.raises(errors.Aborted) as refused:
            caller.append(session, {}, 1, step=5)
        assert refused.value.reason == "LATE_STEP"
        caller.append(session, history, 1, step=6)
        assert_holds(caller, session, history)


def test_layers_have_lengths_and_steps_of_their_own(caller, spec_model):
    with caller.client.open_session(spec_model) as session:
        histories = [{}, {}]
        caller.append(session, histories[0], 5, model=spec_model, layer=0, step=1)
        caller.append(session, histories[1], 3, model=spec_model, layer=1, step=1)
        caller.append(session, histories[1], 3, model=spec_model, layer=1, step=2)
        told = {cache.layer: (cache.length, cache.last_step) for cache in session.get().layers}
        assert told == {0: (5, 1), 1: (6, 2)}
        for layer, history in enumerate(histories):
            assert_holds(caller, session, history, model=spec_model, layer=layer)


def test_a_window_keeps_what_a_retry_of_the_last_call_sees(caller, spec_model):
    """However many tokens that call brought, and however few may be cut otherwise."""
    arguments = {"model": spec_model, "layer": 2, "is_causal": True}
    hidden = {"is_causal": True, "window_left": 8}
    with caller.client.open_session(spec_model, rollback_tokens=1) as session:
        history = {}
        caller.append(session, history, 200, step=1, **arguments)
        caller.append(session, history, 150, step=2, **arguments)
        for _ in range(3):
            cut(history, 200)
            query, result = caller.append(session, history, 150, step=2, **arguments)
            assert_attends(query, result, history, **hidden)
        query, result = caller.append(session, history, 1, step=3, **arguments)
        assert_attends(query, result, history, **hidden)
        (cache,) = session.get().layers
        assert (cache.length, cache.first_position) == (351, 320)  # 342 is the first one seen


# Forks.


def test_forks_share_and_go_on_alone(caller):
    client, history = caller.client, {}
    parent = client.open_session()
    caller.append(parent, history, 100, step=1)
    sessions = [parent, *parent.fork(3)]
    assert len({session.id for session in sessions}) == 4
    histories = [dict(history) for _ in sessions]
    for count in (1, 30, 2):
        for session, own in zip(sessions, histories, strict=True):
            query, result = caller.append(session, own, count)
            assert_attends(query, result, own)
    (short,) = parent.fork(length=70)
    cut(own := dict(histories[0]), 70)
    assert_holds(caller, short, own)
    parent.close()
    for session, own in zip(sessions[1:], histories[1:], strict=True):
        assert_holds(caller, session, own)


def test_a_fork_inherits_the_steps(caller):
    history = {}
    parent = caller.client.open_session()
    caller.append(parent, history, 3, step=7)
    (fork,) = parent.fork()
    for step in (7, 6):  # a fork's last call is not its own: there is nothing to retry
        with pytest.raises(errors.Aborted):
            caller.append(fork, {}, 1, step=step)
    caller.append(fork, history, 1, step=8)
    assert_holds(caller, fork, history)


def test_shared_pages_are_counted_once_for_each_session(start_server, connect):
    process = start_server(arguments=["--cache-bytes", str(MIB)])
    caller = Caller(connect(process.address), seed=3)
    parent = caller.client.open_session()
    caller.append(parent, {}, 2000)
    size = parent.get().bytes
    assert size >= 2 * 2000 * KV_HEADS * DIM * 4 > MIB // 2 - PAGE * 1024
    # Copies would not fit.
    for fork in parent.fork(5):
        assert fork.get().bytes == size


# Caches' dtypes and models.


@pytest.mark.parametrize("cache_dtype", ["float16", "bfloat16", "float32"])
def test_a_cache_of_another_dtype(caller, cache_dtype):
    import torch

    def stored(array):
        return torch.from_numpy(array).to(getattr(torch, cache_dtype)).float().numpy()

    seen = {}
    with caller.client.open_session(cache_dtype=cache_dtype) as session:
        for count in (70, 1, 3):
            key, value = caller.tokens(count), caller.tokens(count)
            query = caller.tokens(count, HEADS)
            result = caller.client.attend(query, key, value, sessions=[session])
            # New tokens are seen as they are stored.
            extend(seen, stored(key), stored(value))
            assert_attends(query, result, seen)
        size = 4 if cache_dtype == "float32" else 2
        assert session.get().bytes == 2 * 2 * PAGE * KV_HEADS * DIM * size


def test_the_first_append_says_what_a_session_without_a_model_holds(caller):
    random = caller.random
    half = [random.standard_normal((1, heads, 5, 8)).astype(np.float16) for heads in (3, 1, 1)]
    with caller.client.open_session() as session:
        assert session.get().model == ""
        assert not session.get().layers
        caller.client.attend(*half, layer=1023, sessions=[session])
        (cache,) = session.get().layers
        assert (cache.layer, cache.length) == (1023, 5)
        assert session.get().bytes == 2 * PAGE * 8 * 2
        history = {}
        # Another layer may have other dimensions, but not another dtype.
        caller.append(session, history, 4, layer=0)
        assert session.get().bytes == 2 * PAGE * 8 * 2 + 2 * PAGE * KV_HEADS * DIM * 2


def test_cross_attention_caches_are_apart(caller, spec_model):
    client = caller.client
    with client.open_session(spec_model) as session:
        own, encoder = {}, {}
        common = {"model": spec_model, "layer": 1}
        caller.append(session, encoder, 50, queries=0, kind="cross", **common)
        for _ in range(3):
            query, result = caller.append(session, own, 1, **common)
            assert_attends(query, result, own)
            assert_holds(caller, session, encoder, kind="cross", **common)
        assert {(cache.kind, cache.length) for cache in session.get().layers} == {(1, 3), (2, 50)}
        (fork,) = session.fork(length=2)
        assert_holds(caller, fork, encoder, kind="cross", **common)  # whole
        cut(own, 2)
        assert_holds(caller, fork, own, **common)


def test_a_window_lets_go_of_what_nobody_can_see(caller, spec_model):
    client, history = caller.client, {}
    arguments = {"model": spec_model, "layer": 2, "is_causal": True}
    with client.open_session(spec_model, rollback_tokens=10) as session:
        for count in (30, 100, 1, 70, 1):
            query, result = caller.append(session, history, count, **arguments)
            assert_attends(query, result, history, is_causal=True, window_left=8)
        (cache,) = session.get().layers
        assert cache.length == 202
        # The last call's query at 201 sees 193 on, one after a rollback by 10 sees 184 on.
        assert cache.first_position == 128
        assert session.get().bytes == 2 * 2 * PAGE * KV_HEADS * DIM * 4
        cut(history, 192)
        query, result = caller.append(session, history, 2, truncate=192, **arguments)
        assert_attends(query, result, history, is_causal=True, window_left=8)


# Rpcs.


def test_what_a_session_is_opened_with(client, start_server, connect):
    from attnd._proto.attention.v1 import attention_pb2

    def open_at(address, **fields):
        with grpc.insecure_channel(address) as channel:
            data = channel.unary_unary("/attention.v1.AttentionService/OpenSession")(
                attention_pb2.OpenSessionRequest(**fields).SerializeToString(), timeout=30.0
            )
        return attention_pb2.OpenSessionResponse.FromString(data)

    first, second = open_at(client.address), open_at(client.address, time_to_live_seconds=7.5)
    assert first.time_to_live_seconds == 3600.0
    assert second.time_to_live_seconds == 7.5
    assert first.server_epoch == second.server_epoch == client.server_info().server_epoch
    # Nothing of one tells anything of the other, and there is nothing to guess.
    assert len(set(first.session_id)) > 4
    assert len(first.session_id) == len(second.session_id) >= 22
    same = sum(a == b for a, b in zip(first.session_id, second.session_id, strict=True))
    assert same < len(first.session_id) // 2
    # Another server's sessions are of another epoch.
    other = open_at(start_server().address)
    assert other.server_epoch != first.server_epoch
    for session_id in (first.session_id, second.session_id):
        client.close_session(session_id)


def test_present_is_not_returned_with_sessions(caller):
    with caller.client.open_session() as session:
        _, result = caller.append(session, {}, 3, use_cache=True)
        assert result.present_key is None
        assert result.present_value is None


def test_callers_on_one_session_wait_for_each_other(caller):
    """Appends of eight threads and forks between them: every length comes once."""
    client = caller.client
    with client.open_session() as session, ThreadPoolExecutor(8) as callers:
        value = np.ones((1, KV_HEADS, 1, DIM), np.float32)
        query = np.ones((1, HEADS, 1, DIM), np.float32)

        def append(_):
            return client.attend(query, value, value, sessions=[session]).cache_length[0]

        def fork(_):
            (session_id,) = client.fork_session(session)
            (cache,) = client.get_session(session_id).layers
            client.close_session(session_id)
            return cache.length

        append(0)
        forks = [callers.submit(fork, index) for index in range(20)]
        lengths = list(callers.map(append, range(160)))
        assert sorted(lengths) == list(range(2, 162))
        assert all(1 <= each.result() <= 161 for each in forks)
        assert client.get_session(session).layers[0].length == 161


def test_reserved_tokens_are_there_or_refused_at_once(start_server, connect):
    process = start_server(arguments=["--cache-bytes", str(MIB)])
    client = connect(process.address)
    layer = api.LayerSpec(num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, value_dim=DIM)
    client.load_model("m", spec=api.ModelSpec(stacks=[api.LayerStack(self_attention=[layer])]))
    caller = Caller(client, "m", seed=2)
    with pytest.raises(errors.ResourceExhausted) as refused:
        client.open_session("m", reserve_tokens=10_000)  # 2.5 MiB
    assert refused.value.reason == "CACHE_BUDGET"
    assert refused.value.retry_delay_seconds == 0  # waiting does not help
    assert not client.list_sessions()

    reserved = client.open_session("m", reserve_tokens=2000)
    greedy = client.open_session("m")
    with pytest.raises(errors.ResourceExhausted) as refused:
        caller.append(greedy, {}, 3000)
    assert refused.value.reason == "CACHE_BUDGET"
    with pytest.raises(errors.ResourceExhausted) as refused:
        client.open_session("m", reserve_tokens=3000)
    assert refused.value.retry_delay_seconds > 0
    caller.append(greedy, {}, 1800)  # nearly all that is left
    history = {}
    for count in (1000, 900, 99, 1):
        caller.append(reserved, history, count)
    assert_holds(caller, reserved, history)
    reserved.close()
    caller.append(greedy, {}, 1800)  # the reserve came back


def test_a_full_cache_has_room_again_when_a_session_closes(start_server, connect):
    process = start_server(arguments=["--cache-bytes", str(MIB)])
    caller = Caller(connect(process.address), seed=4)
    first, second = (caller.client.open_session() for _ in range(2))
    caller.append(first, {}, 3000)
    history = {}
    caller.append(second, history, 500)
    with pytest.raises(errors.ResourceExhausted) as refused:
        caller.append(second, {}, 3000)
    assert refused.value.retry_delay_seconds > 0
    assert_holds(caller, second, history)
    first.close()
    caller.append(second, history, 3000)
    assert_holds(caller, second, history)


def test_sessions_are_listed_in_pages_and_by_model(channel, caller, spec_model):
    from attnd._proto.attention.v1 import admin_pb2

    client = caller.client
    sessions = [client.open_session(spec_model) for _ in range(5)]
    caller.append(sessions[2], {}, 9, model=spec_model, layer=0)
    with client.open_session() as other:
        method = channel.unary_unary(
            "/attention.v1.AdminService/ListSessions",
            request_serializer=admin_pb2.ListSessionsRequest.SerializeToString,
            response_deserializer=admin_pb2.ListSessionsResponse.FromString,
        )
        pages, token = [], ""
        while True:
            page = method(
                admin_pb2.ListSessionsRequest(model=spec_model, page_size=2, page_token=token)
            )
            pages.append(list(page.sessions))
            token = page.next_page_token
            if not token:
                break
        assert all(len(page) == 2 for page in pages[:-1])
        listed = [status for page in pages for status in page]
        own = [status for status in listed if status.length == 9]
        assert {status.model for status in listed} == {spec_model}
        assert [status.id_prefix for status in listed[-5:]] == [
            session.id[: len(listed[0].id_prefix)] for session in sessions
        ]
        (status,) = own
        assert status.bytes == 2 * PAGE * KV_HEADS * DIM * 4
        assert 0 <= status.idle_seconds <= status.age_seconds
        # Enough to tell sessions apart, not enough to use one.
        assert len(status.id_prefix) < len(sessions[0].id) // 2
        with pytest.raises(errors.NotFound):
            client.get_session(status.id_prefix)
        everybody = {each.id_prefix for each in client.list_sessions()}
        assert other.id[:8] in everybody
    for session in sessions:
        session.close()


def test_a_session_expires_unless_it_is_used(client):
    used = client.open_session(time_to_live=1.0)
    idle = client.open_session(time_to_live=0.3)
    caller = Caller(client)
    history = {}
    caller.append(used, history, 1)
    began = time.monotonic()

    def is_gone():
        caller.append(used, history, 1)
        prefixes = {status.id_prefix for status in client.list_sessions()}
        return idle.id[:8] not in prefixes

    # What only looks at the list touches nothing; what names a session keeps it for ever.
    wait_until(lambda: is_gone() and time.monotonic() - began > 1.2)
    with pytest.raises(errors.NotFound) as refused:
        idle.get()
    assert refused.value.reason == "SESSION_NOT_FOUND"
    assert used.get().time_to_live_seconds == 1.0
    assert_holds(caller, used, history)
    used.close()


def test_every_rpc_that_names_a_session_touches_it(client):
    caller = Caller(client)
    with client.open_session() as session:
        caller.append(session, {}, 1)
        began = time.monotonic()
        wait_until(lambda: time.monotonic() - began > 0.05)
        # Told as it was before this rpc.
        assert 0.05 <= session.get().idle_seconds <= time.monotonic() - began + 0.1
        assert session.get().idle_seconds < 0.05


def test_a_model_with_sessions_is_unloaded_only_when_asked_to_close_them(client):
    layer = api.LayerSpec(num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, value_dim=DIM)
    spec = api.ModelSpec(stacks=[api.LayerStack(self_attention=[layer])])
    client.load_model("short-lived", spec=spec)
    caller = Caller(client, "short-lived")
    session, history = client.open_session("short-lived"), {}
    caller.append(session, history, 5)
    with pytest.raises(errors.FailedPrecondition) as refused:
        client.unload_model("short-lived")
    assert refused.value.reason == "MODEL_HAS_SESSIONS"
    caller.append(session, history, 1)
    assert_holds(caller, session, history)
    client.unload_model("short-lived", close_sessions=True)
    with pytest.raises(errors.NotFound) as refused:
        session.get()
    assert refused.value.reason == "SESSION_NOT_FOUND"
    # Another model of the same name is another model.
    client.load_model("short-lived", spec=spec)
    with pytest.raises(errors.NotFound):
        caller.append(session, history, 1)
    client.unload_model("short-lived")


def test_sessions_survive_a_switch_of_the_implementation(caller, spec_model):
    client, history = caller.client, {}
    with client.open_session(spec_model) as session:
        used = set()
        for turn in range(12):
            name = ("standard", "torch_sdpa", "auto")[turn % 3]
            assert client.switch_attention(spec_model, name).switched
            query, result = caller.append(session, history, 7, model=spec_model, layer=0)
            assert_attends(query, result, history)
            used.add(result.execution.implementation)
        assert used >= {"standard", "torch_sdpa"}


def test_metrics_count_sessions_and_their_bytes(start_server, connect):
    process = start_server()
    caller = Caller(connect(process.address))
    assert Samples(process).total("attention_sessions") == 0
    sessions = [caller.client.open_session() for _ in range(2)]
    sessions += sessions[0].fork(1)
    caller.append(sessions[1], {}, 100)
    samples = Samples(process)
    assert samples.total("attention_sessions") == 3
    assert samples.total("attention_cache_bytes") >= 2 * 2 * PAGE * KV_HEADS * DIM * 4
    for session in sessions:
        session.close()
    samples = Samples(process)
    assert samples.total("attention_sessions") == 0
    assert samples.total("attention_cache_bytes") == 0


def test_model_status_counts_sessions(caller, spec_model):
    client = caller.client

    def status():
        (one,) = (each for each in client.list_models() if each.spec.name == spec_model)
        return one.sessions, one.cache_bytes

    before = status()
    with client.open_session(spec_model) as session:
        caller.append(session, {}, 1, model=spec_model, layer=0)
        assert status() == (before[0] + 1, before[1] + 2 * PAGE * KV_HEADS * DIM * 4)
    assert status() == before


def test_forward_and_attend_share_a_session(client, model_root):
    """What Forward appended is what Attend sees: keys of the layer's own projection."""
    hf_models.make_bert(seed=9, num_hidden_layers=1).save_pretrained(model_root / "shared-bert")
    client.load_model("shared-bert", weights="shared-bert")
    random = np.random.default_rng(10)
    hidden_states = random.standard_normal((1, 6, 128), dtype=np.float32)
    with client.open_session("shared-bert") as session:
        whole = client.forward(hidden_states, model="shared-bert", layer=0, use_cache=True)
        result = client.forward(hidden_states, model="shared-bert", layer=0, sessions=[session])
        np.testing.assert_allclose(result.output, whole.output, atol=TOLERANCE)
        query = random.standard_normal((1, 4, 2, 32), dtype=np.float32)
        seen = client.attend(
            query, model="shared-bert", layer=0, sessions=[session], cache_mode="read_only"
        )
        expected = reference.attend(query, whole.present_key, whole.present_value)
        np.testing.assert_allclose(seen.output, expected.output, atol=TOLERANCE)
    client.unload_model("shared-bert")
