"""What calls do to sessions: appends, modes, cuts, retries, forks, dtypes, windows."""

import numpy as np
import pytest

from attnd import errors
from attnd._proto.attention.v1 import attention_pb2, types_pb2
from end_to_end import reference
from end_to_end.session_caller import (
    DIM,
    HEADS,
    INT8_TOLERANCE,
    KV_HEADS,
    MIB,
    PAGE,
    TOLERANCE,
    Caller,
    assert_attends,
    assert_holds,
    cut,
    extend,
    layers_without_weights,
)


@pytest.fixture
def caller(client):
    return Caller(client, seed=1)


@pytest.fixture(scope="module")
def spec_model(client):
    client.load_model("sessions-spec", spec=layers_without_weights())
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


def int8(array):
    """What a cache in int8 makes of it: a scale for each token and head."""
    scale = np.abs(array).max(axis=-1, keepdims=True) / np.float32(127)
    return np.rint(array / scale) * scale


@pytest.fixture
def int8_session(client, channel):
    """The Python client names the dtypes of tensors only, and int8 is none."""
    open_session = channel.unary_unary(
        "/attention.v1.AttentionService/OpenSession",
        attention_pb2.OpenSessionRequest.SerializeToString,
        attention_pb2.OpenSessionResponse.FromString,
    )
    request = attention_pb2.OpenSessionRequest(cache_dtype=types_pb2.DATA_TYPE_INT8)
    return client.attach_session(open_session(request).session_id)


def test_a_cache_in_int8(caller, int8_session):
    """A quarter of float32's bytes, and scales; appended to, forked and cut as any other."""
    seen = {}
    with int8_session as session:
        for count in (70, 1, 3):
            key, value = caller.tokens(count), caller.tokens(count)
            query = caller.tokens(count, HEADS)
            result = caller.client.attend(query, key, value, sessions=[session])
            extend(seen, int8(key), int8(value))
            assert_attends(query, result, seen, INT8_TOLERANCE)
        assert session.get().bytes == 2 * KV_HEADS * 2 * PAGE * (DIM + 4)
        (fork,) = session.fork(length=66)
        own = {name: array[:, :, :66] for name, array in seen.items()}
        key, value = caller.tokens(5), caller.tokens(5)
        query = caller.tokens(5, HEADS)
        result = caller.client.attend(query, key, value, sessions=[fork])
        extend(own, int8(key), int8(value))
        assert_attends(query, result, own, INT8_TOLERANCE)
        assert_holds(caller, session, seen, INT8_TOLERANCE)
        query = caller.tokens(2, HEADS)
        for implementation in ("standard", "torch_sdpa"):
            result = caller.client.attend(
                query,
                sessions=[session],
                cache_mode="read_only",
                truncate=65,
                implementation=implementation,
            )
            cut_to = {name: array[:, :, :65] for name, array in seen.items()}
            assert_attends(query, result, cut_to)


def test_int8_does_not_hide_what_is_no_number(caller, int8_session):
    key, value = caller.tokens(5), caller.tokens(5)
    key[0, 0, 3, 7] = np.inf
    query = caller.tokens(5, HEADS)
    with int8_session as session:
        result = caller.client.attend(
            query, key, value, sessions=[session], is_causal=True, implementation="standard"
        )
    half = HEADS // KV_HEADS  # query heads of the first KV head
    assert np.isnan(result.output[0, :half, 3:]).all()
    assert np.isfinite(result.output[0, :half, :3]).all()
    assert np.isfinite(result.output[0, half:]).all()


def test_the_first_append_says_what_a_session_without_a_model_holds(caller):
    random = caller.random
    half = [random.standard_normal((1, heads, 5, 8)).astype(np.float16) for heads in (3, 1, 1)]
    with caller.client.open_session() as session:
        assert session.get().model == ""
        assert not session.get().layers
        caller.client.attend(*half, layer=1023, sessions=[session])
        (cache,) = session.get().layers
        assert (cache.layer, cache.length) == (1023, 5)
        assert session.get().bytes == PAGE * (8 + 16) * 2  # values fill 16 columns
        history = {}
        # Another layer may have other dimensions, but not another dtype.
        caller.append(session, history, 4, layer=0)
        assert session.get().bytes == PAGE * (8 + 16) * 2 + 2 * PAGE * KV_HEADS * DIM * 2


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
