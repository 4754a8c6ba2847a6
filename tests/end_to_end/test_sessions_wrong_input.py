"""Wrong calls on sessions: told by code, reason and details; nothing has changed."""

from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest

from attnd import api, errors
from attnd._proto.attention.v1 import attention_pb2, types_pb2
from end_to_end import hf_models, messages, reference
from end_to_end.messages import ADMIN, ATTENTION, LARGEST, SMALLEST, tensor
from end_to_end.observe import session_prefixes, wait_until

Code = grpc.StatusCode
HEADS, KV_HEADS, DIM = 4, 2, 8
LENGTHS, STEP = (70, 5, 130), 3
WINDOW_LEFT = 8
READ_ONLY = attention_pb2.CACHE_MODE_READ_ONLY
DISCARD = attention_pb2.CACHE_MODE_DISCARD
IDS = "past_key_value.sessions.session_ids"
MIB = 1 << 20
TOLERANCE = 2e-5


class Sessions:
    """Filled sessions of known contents, one per row."""

    def __init__(self, client, seed=0, model="", layer=0, lengths=LENGTHS, step=STEP, **options):
        self.client = client
        self.place = {"model": model, "layer": layer}
        self.random = np.random.default_rng(seed)
        self.sessions = [client.open_session(model, **options) for _ in lengths]
        self.ids = [session.id for session in self.sessions]
        self.keys, self.values = [], []
        for session, length in zip(self.sessions, lengths, strict=True):
            query, key, value = self.tokens(length)
            client.attend(query, key, value, sessions=[session], step=step, **self.place)
            self.keys.append(key)
            self.values.append(value)
        self.before = self.told()

    def tokens(self, count, rows=1, dim=DIM):
        return tuple(
            self.random.standard_normal((rows, heads, count, dim), dtype=np.float32)
            for heads in (HEADS, KV_HEADS, KV_HEADS)
        )

    def told(self):
        responses = [self.client.get_session(session) for session in self.sessions]
        return [(list(response.layers), response.bytes) for response in responses]

    def assert_unchanged(self, **options):
        assert self.told() == self.before
        for session, key, value in zip(self.sessions, self.keys, self.values, strict=True):
            query, _, _ = self.tokens(1)
            result = self.client.attend(
                query, sessions=[session], cache_mode="read_only", **self.place
            )
            expected = reference.attend(query, key, value, **options).output
            np.testing.assert_allclose(result.output, expected, atol=TOLERANCE)

    def append(self, row, count, **arguments):
        query, key, value = self.tokens(count)
        return self.client.attend(
            query, key, value, sessions=[self.sessions[row]], **{**self.place, **arguments}
        )


@pytest.fixture(scope="module")
def three(client):
    made = Sessions(client)
    yield made
    for session in made.sessions:
        session.close()


@pytest.fixture(scope="module")
def window_model(client):
    layer = api.LayerSpec(num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, value_dim=DIM)
    layer.options.is_causal = True
    layer.options.window_left = WINDOW_LEFT
    client.load_model(
        "wrong-window", spec=api.ModelSpec(stacks=[api.LayerStack(self_attention=[layer])])
    )
    yield "wrong-window"
    client.unload_model("wrong-window", close_sessions=True)


@pytest.fixture
def other_session(client, window_model):
    with client.open_session(window_model) as session:
        yield session.id


@pytest.fixture
def closed_session(client):
    session = client.open_session()
    session.close()
    return session.id


def refusal(channel, request, rpc="Attend", service=ATTENTION):
    code, text, error = messages.answer(channel, f"{service}{rpc}", request.SerializeToString())
    assert code is not Code.OK
    assert error is not None, text
    assert error.code == code.value[0]
    assert error.message
    return code, error.reason, dict(error.details)


def attend(ids, q_len=2, kv_len=2, kv=True, dim=DIM, heads=KV_HEADS, rows=None, **batch):
    """One more call on these sessions, good but for what is given."""
    rows = len(ids) if rows is None else rows
    request = attention_pb2.AttendRequest(query=tensor(rows, HEADS, q_len, DIM))
    if kv:
        request.key.CopyFrom(tensor(rows, heads, kv_len, dim))
        request.value.CopyFrom(tensor(rows, heads, kv_len, DIM))
    request.past_key_value.sessions.CopyFrom(attention_pb2.SessionBatch(session_ids=ids, **batch))
    return request


def test_the_call_that_is_changed_below_is_good(client, channel):
    made = Sessions(client)
    request = attend(made.ids, truncate=[-1, 5, 100], cache_position=[70, -1, 100], step=[4, 0, 9])
    code, text, _ = messages.answer(channel, f"{ATTENTION}Attend", request.SerializeToString())
    assert (code, text) == (Code.OK, "")
    lengths = [made.client.get_session(each).layers[0].length for each in made.sessions]
    assert lengths == [72, 7, 102]


# One entry of one list is wrong, in a row among good ones.

WRONG_ROWS = {
    "cache_position_beyond": (
        {"cache_position": [70, 6, 130]},
        (Code.OUT_OF_RANGE, "CACHE_POSITION_BEYOND", {"row": "1", "length": "5", "step": "3"}),
    ),
    "cache_position_below": (
        {"cache_position": [-1, -1, 129]},
        (Code.ABORTED, "CACHE_POSITION_BELOW", {"row": "2", "length": "130", "step": "3"}),
    ),
    "cache_position_below_in_read_only": (
        {"cache_position": [69, 5, 130], "mode": READ_ONLY, "kv": False},
        (Code.ABORTED, "CACHE_POSITION_BELOW", {"row": "0", "length": "70", "step": "3"}),
    ),
    "cache_position_beyond_in_discard": (
        {"cache_position": [71, 5, 130], "mode": DISCARD},
        (Code.OUT_OF_RANGE, "CACHE_POSITION_BEYOND", {"row": "0", "length": "70", "step": "3"}),
    ),
    "cache_position_of_before_the_cut": (
        {"truncate": [-1, -1, 100], "cache_position": [-1, -1, 130]},
        (Code.OUT_OF_RANGE, "CACHE_POSITION_BEYOND", {"row": "2", "length": "130", "step": "3"}),
    ),
    "cache_position_after_the_retry": (
        {"step": [4, 4, 3], "cache_position": [-1, -1, 130]},
        (Code.OUT_OF_RANGE, "CACHE_POSITION_BEYOND", {"row": "2", "length": "130", "step": "3"}),
    ),
    "largest_cache_position": (
        {"cache_position": [LARGEST, 5, 130]},
        (Code.OUT_OF_RANGE, "CACHE_POSITION_BEYOND", {"row": "0", "length": "70", "step": "3"}),
    ),
    "truncate_beyond": (
        {"truncate": [70, 5, 131]},
        (Code.OUT_OF_RANGE, "TRUNCATE_BEYOND", {"row": "2", "length": "130", "step": "3"}),
    ),
    "truncate_beyond_in_read_only": (
        {"truncate": [70, 6, 130], "mode": READ_ONLY, "kv": False},
        (Code.OUT_OF_RANGE, "TRUNCATE_BEYOND", {"row": "1", "length": "5", "step": "3"}),
    ),
    "truncate_beyond_in_discard": (
        {"truncate": [LARGEST, 5, 130], "mode": DISCARD},
        (Code.OUT_OF_RANGE, "TRUNCATE_BEYOND", {"row": "0", "length": "70", "step": "3"}),
    ),
    "truncate_beyond_what_a_retry_leaves": (
        {"truncate": [1, -1, -1], "step": [3, 4, 4]},
        (Code.OUT_OF_RANGE, "TRUNCATE_BEYOND", {"row": "0", "length": "70", "step": "3"}),
    ),
    "late_step": (
        {"step": [4, 4, 2]},
        (Code.ABORTED, "LATE_STEP", {"row": "2", "length": "130", "step": "3"}),
    ),
    "first_step_again": (
        {"step": [1, 0, 0]},
        (Code.ABORTED, "LATE_STEP", {"row": "0", "length": "70", "step": "3"}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_ROWS)
def test_a_bad_row_among_good_ones(channel, three, name):
    changes, expected = WRONG_ROWS[name]
    assert refusal(channel, attend(three.ids, **changes)) == expected
    three.assert_unchanged()


WRONG_FIELDS = {
    "negative_truncate": ({"truncate": [-1, -2, -1]}, "past_key_value.sessions.truncate"),
    "smallest_truncate": ({"truncate": [SMALLEST, 5, 5]}, "past_key_value.sessions.truncate"),
    "negative_cache_position": (
        {"cache_position": [-2, 5, 130]},
        "past_key_value.sessions.cache_position",
    ),
    "smallest_cache_position": (
        {"cache_position": [70, 5, SMALLEST]},
        "past_key_value.sessions.cache_position",
    ),
    "step_in_read_only": (
        {"step": [0, 4, 0], "mode": READ_ONLY, "kv": False},
        "past_key_value.sessions.step",
    ),
    "step_in_discard": ({"step": [4, 4, 4], "mode": DISCARD}, "past_key_value.sessions.step"),
    "no_such_mode": ({"mode": 99}, "past_key_value.sessions.mode"),
    "negative_mode": ({"mode": -1}, "past_key_value.sessions.mode"),
    "too_few_truncates": ({"truncate": [5, 5]}, "past_key_value.sessions.truncate"),
    "too_many_cache_positions": (
        {"cache_position": [70, 5, 130, 0]},
        "past_key_value.sessions.cache_position",
    ),
    "too_few_steps": ({"step": [4]}, "past_key_value.sessions.step"),
    "more_rows_than_sessions": ({"rows": 4}, IDS),
    "fewer_rows_than_sessions": ({"rows": 2}, IDS),
    "no_rows": ({"rows": 0}, IDS),
    "keys_missing": ({"kv": False}, "key"),
    "keys_missing_in_discard": ({"kv": False, "mode": DISCARD}, "key"),
    "keys_in_read_only": ({"mode": READ_ONLY}, "key"),
    "head_dim_of_no_cache": ({"dim": 16}, "key"),
    "heads_of_no_cache": ({"heads": 1}, "key"),
    "heads_of_no_cache_in_discard": ({"heads": 4, "mode": DISCARD}, "key"),
}


@pytest.mark.parametrize("name", WRONG_FIELDS)
def test_a_field_that_breaks_a_rule(channel, three, name):
    changes, field = WRONG_FIELDS[name]
    code, reason, details = refusal(channel, attend(three.ids, **changes))
    assert (code, reason) == (Code.INVALID_ARGUMENT, "INVALID_FIELD")
    assert details["field"] == field
    three.assert_unchanged()


def test_no_session_for_a_batch(channel):
    code, reason, details = refusal(channel, attend([], rows=2))
    assert (code, reason) == (Code.INVALID_ARGUMENT, "INVALID_FIELD")
    assert details["field"] == IDS


def test_key_lengths_in_read_only(channel, three):
    request = attend(three.ids, mode=READ_ONLY, kv=False)
    request.kv_lengths.extend([1, 1, 1])
    code, _, details = refusal(channel, request)
    assert (code, details["field"]) == (Code.INVALID_ARGUMENT, "kv_lengths")
    three.assert_unchanged()


# Sessions that are none, or not these.


@pytest.mark.parametrize("row", [0, 2])
def test_sessions_that_can_not_be_used(channel, three, other_session, closed_session, row):
    """One that is closed, misspelt, a prefix, or another model's: they all look the same."""
    misspelt = ("1" if three.ids[row][0] == "0" else "0") + three.ids[row][1:]
    for wrong in (closed_session, misspelt, three.ids[row][:8], "", "x" * 10_000, other_session):
        ids = [*three.ids[:row], wrong, *three.ids[row + 1 :]]
        for options in ({}, {"mode": DISCARD}, {"mode": READ_ONLY, "kv": False}):
            told = refusal(channel, attend(ids, **options))
            assert told == (Code.NOT_FOUND, "SESSION_NOT_FOUND", {"row": str(row)})
    three.assert_unchanged()


def test_a_session_without_a_model_is_none_of_a_models(channel, three, window_model):
    request = attend(three.ids[:1])
    request.layer.model = window_model
    assert refusal(channel, request)[:2] == (Code.NOT_FOUND, "SESSION_NOT_FOUND")
    three.assert_unchanged()


def test_a_session_twice_in_one_call(channel, three):
    ids = [three.ids[0], three.ids[1], three.ids[0]]
    code, reason, details = refusal(channel, attend(ids))
    assert (code, reason) == (Code.INVALID_ARGUMENT, "INVALID_FIELD")
    assert details["field"] == IDS
    three.assert_unchanged()


@pytest.mark.parametrize("rpc", ["GetSession", "ForkSession", "CloseSession"])
def test_session_rpcs_without_a_session(channel, closed_session, rpc):
    request_class = getattr(attention_pb2, f"{rpc}Request")
    for wrong in (closed_session, closed_session[:8], "", "0" * 32, "é" * 100):
        code, reason, _ = refusal(channel, request_class(session_id=wrong), rpc)
        assert (code, reason) == (Code.NOT_FOUND, "SESSION_NOT_FOUND")


def test_an_expired_session(client, channel):
    session = client.open_session(time_to_live=0.05)
    prefixes = lambda: {status.id_prefix for status in client.list_sessions()}  # noqa: E731
    wait_until(lambda: session.id[:8] not in prefixes())
    for request, rpc in (
        (attend([session.id]), "Attend"),
        (attention_pb2.GetSessionRequest(session_id=session.id), "GetSession"),
        (attention_pb2.ForkSessionRequest(session_id=session.id), "ForkSession"),
        (attention_pb2.CloseSessionRequest(session_id=session.id), "CloseSession"),
    ):
        assert refusal(channel, request, rpc)[:2] == (Code.NOT_FOUND, "SESSION_NOT_FOUND")


# Opening and forking.

WRONG_OPENS = {
    "negative_time_to_live": ({"time_to_live_seconds": -1.0}, "time_to_live_seconds"),
    "no_number": ({"time_to_live_seconds": float("nan")}, "time_to_live_seconds"),
    "for_ever": ({"time_to_live_seconds": float("inf")}, "time_to_live_seconds"),
    "more_than_a_week": ({"time_to_live_seconds": 604_801.0}, "time_to_live_seconds"),
    "cache_in_int64": ({"cache_dtype": types_pb2.DATA_TYPE_INT64}, "cache_dtype"),
    "cache_in_bool": ({"cache_dtype": types_pb2.DATA_TYPE_BOOL}, "cache_dtype"),
    "cache_in_no_dtype": ({"cache_dtype": 99}, "cache_dtype"),
    "reserve_without_a_model": ({"reserve_tokens": 1}, "reserve_tokens"),
    "reserve_of_all_tokens": (
        {"model": "wrong-window", "reserve_tokens": 2**64 - 1},
        "reserve_tokens",
    ),
}


@pytest.mark.parametrize("name", WRONG_OPENS)
def test_a_session_that_can_not_be_opened(client, channel, window_model, name):
    fields, field = WRONG_OPENS[name]
    before = session_prefixes(client)
    request = attention_pb2.OpenSessionRequest(**fields)
    code, reason, details = refusal(channel, request, "OpenSession")
    assert (code, reason) == (Code.INVALID_ARGUMENT, "INVALID_FIELD")
    assert details["field"] == field
    assert session_prefixes(client) <= before


def test_other_sessions_that_can_not_be_opened(client, channel, window_model):
    before = session_prefixes(client)
    for fields, code, reason in (
        ({"model": "nobody"}, Code.NOT_FOUND, "MODEL_NOT_FOUND"),
        (
            {"model": window_model, "reserve_tokens": 2**39},
            Code.RESOURCE_EXHAUSTED,
            "CACHE_BUDGET",
        ),
    ):
        request = attention_pb2.OpenSessionRequest(**fields)
        assert refusal(channel, request, "OpenSession")[:2] == (code, reason)
    assert session_prefixes(client) <= before


def test_too_many_sessions(start_server, connect, tmp_path):
    config = tmp_path / "few.textproto"
    config.write_text("max_sessions: 3")
    client = connect(start_server(arguments=["--config", str(config)]).address)
    made = Sessions(client, lengths=(5, 6))
    with pytest.raises(errors.ResourceExhausted) as refused:
        made.sessions[0].fork(2)  # together or not at all
    assert refused.value.reason == "TOO_MANY_SESSIONS"
    assert len(client.list_sessions()) == 2
    (fork,) = made.sessions[0].fork(1)
    with pytest.raises(errors.ResourceExhausted):
        client.open_session()
    made.assert_unchanged()
    fork.close()
    client.open_session()


@pytest.mark.parametrize(
    ("fields", "field"),
    [({"length": -1}, "length"), ({"length": SMALLEST}, "length"), ({"count": 2**32 - 1}, "count")],
)
def test_wrong_forks(client, channel, three, fields, field):
    before = session_prefixes(client)
    request = attention_pb2.ForkSessionRequest(session_id=three.ids[0], **fields)
    code, reason, details = refusal(channel, request, "ForkSession")
    assert (code, reason) == (Code.INVALID_ARGUMENT, "INVALID_FIELD")
    assert details["field"] == field
    assert session_prefixes(client) <= before
    three.assert_unchanged()


def test_wrong_lists_of_sessions(client, channel):
    from attnd._proto.attention.v1 import admin_pb2

    for fields, code in (
        ({"page_token": "x"}, Code.INVALID_ARGUMENT),
        ({"page_token": "-1"}, Code.INVALID_ARGUMENT),
        ({"page_token": "99999999999999999999999"}, Code.INVALID_ARGUMENT),
        ({"model": "nobody"}, Code.NOT_FOUND),
    ):
        request = admin_pb2.ListSessionsRequest(**fields)
        assert refusal(channel, request, "ListSessions", ADMIN)[0] is code


# Sessions without a model.


def test_layers_of_sessions_without_a_model(channel, three):
    for place, field in (({"layer": 1024}, "layer.layer"), ({"stack": "text"}, "layer.stack")):
        request = attend(three.ids)
        request.layer.CopyFrom(types_pb2.LayerRef(**place))
        code, _, details = refusal(channel, request)
        assert (code, details.get("field")) == (Code.INVALID_ARGUMENT, field)
    three.assert_unchanged()


def test_reading_what_never_held_tokens(channel, three):
    request = attend(three.ids, mode=READ_ONLY, kv=False)
    request.layer.layer = 7
    assert refusal(channel, request) == (Code.FAILED_PRECONDITION, "CACHE_NEVER_USED", {"row": "0"})
    three.assert_unchanged()


def test_rows_whose_caches_differ(client, channel, three):
    """One in another dtype, or of other dimensions than the batch's."""
    for options, dim in (({"cache_dtype": "float16"}, DIM), ({}, 2 * DIM)):
        with client.open_session(**options) as other:
            query, key, value = three.tokens(3, dim=dim)
            client.attend(query, key, value, sessions=[other])
            before = other.get().layers
            code, reason, _ = refusal(channel, attend([three.ids[0], other.id]))
            assert (code, reason) == (Code.INVALID_ARGUMENT, "INVALID_FIELD")
            assert other.get().layers == before
    three.assert_unchanged()


# What a call needs besides.


def test_an_append_over_the_budget_in_the_middle_of_a_batch(start_server, connect, channel):
    process = start_server(arguments=["--cache-bytes", str(MIB)])
    client = connect(process.address)
    made = Sessions(client, lengths=(70, 5, 64, 130))
    rows, tokens = 4, 4000  # one row's alone would fit
    query, key, value = made.tokens(tokens, rows)
    lengths = [10, tokens, tokens, 1]
    with pytest.raises(errors.ResourceExhausted) as refused:
        client.attend(
            query[:, :, :1],
            key,
            value,
            kv_lengths=lengths,
            sessions=made.sessions,
            truncate=[None, 2, None, 3],
            step=[4, 4, 3, 4],
        )
    assert refused.value.reason == "CACHE_BUDGET"
    made.assert_unchanged()
    # And the memory that it had taken so far is free again.
    made.append(1, tokens)


def test_a_workspace_beyond_its_limit(start_server, connect):
    client = connect(start_server(arguments=["--max-workspace-bytes", str(MIB)]).address)
    made = Sessions(client)
    with pytest.raises(errors.ResourceExhausted) as refused:
        made.append(0, 1000, implementation="standard")
    assert refused.value.reason == "WORKSPACE_LIMIT"
    made.assert_unchanged()


def test_an_answer_too_large(start_server, connect):
    client = connect(start_server(arguments=["--max-message-bytes", str(128 << 10)]).address)
    made = Sessions(client)
    with pytest.raises(errors.InvalidArgument) as refused:
        made.append(2, 100, output_attentions=True, truncate=3)  # 4 * 100 * 103 * 4 bytes
    assert refused.value.reason == "ANSWER_TOO_LARGE"
    made.assert_unchanged()


def test_an_implementation_that_can_not_do_it(three):
    for arguments, error, reason in (
        (
            {"implementation": "torch_sdpa", "output_attentions": True},
            errors.FailedPrecondition,
            "UNSUPPORTED_BY_IMPLEMENTATION",
        ),
        ({"implementation": "nobody"}, errors.NotFound, "IMPLEMENTATION_NOT_FOUND"),
    ):
        with pytest.raises(error) as refused:
            three.append(0, 2, truncate=1, **arguments)
        assert refused.value.reason == reason
        three.assert_unchanged()


def test_masks_count_the_past(three):
    for mask in (np.ones((2, 73), bool), np.ones((3, 72), bool), np.ones((2, 72), np.int64)):
        with pytest.raises(errors.InvalidArgument) as refused:
            three.append(0, 2, attention_mask=mask)
        assert refused.value.details["field"] == "attention_mask"
    three.assert_unchanged()


def test_a_deadline_that_passes_in_the_queue(start_server, connect, window_model):
    """The call waits behind one that runs for a second or two."""
    client = connect(start_server(arguments=["--threads", "1"]).address)
    layer = api.LayerSpec(num_heads=16, num_kv_heads=1, head_dim=1, value_dim=1)
    client.load_model("slow", spec=api.ModelSpec(stacks=[api.LayerStack(self_attention=[layer])]))
    made = Sessions(client)
    slow = np.ones((1, 16, 4096, 1), np.float32)
    with ThreadPoolExecutor(1) as callers:
        running = callers.submit(
            client.attend, slow, slow[:, :1], slow[:, :1], model="slow", implementation="standard"
        )
        wait_until(lambda: client.list_models()[0].managers[0].executing == 1)
        for arguments in ({}, {"truncate": 0}, {"step": 3}, {"step": 4}):
            with pytest.raises((errors.DeadlineExceeded, errors.Cancelled)):
                made.append(0, 1, timeout=0.05, **arguments)
        assert not running.done()  # otherwise they had not to wait
        running.result()
    made.assert_unchanged()


# Windows.


def test_tokens_that_a_window_let_go_of(client, channel, window_model):
    made = Sessions(client, model=window_model, lengths=(300, 20), rollback_tokens=1)
    # The last call was the whole prompt, whose queries see everything: then one token, alone.
    for row in (0, 1):
        query, key, value = made.tokens(1)
        client.attend(query, key, value, sessions=[made.sessions[row]], step=9, **made.place)
        made.keys[row] = np.concatenate([made.keys[row], key], axis=2)
        made.values[row] = np.concatenate([made.values[row], value], axis=2)
    made.before = made.told()
    (cache,) = made.before[0][0]
    assert (cache.length, cache.first_position) == (301, 256)
    hidden = {"is_causal": True, "window_left": WINDOW_LEFT}

    def refused(**changes):
        request = attend(made.ids, **changes)
        request.layer.model = window_model
        return refusal(channel, request)

    told = {"row": "0", "length": "301", "first_position": "256"}
    for length in (263, 200):
        changes = {"truncate": [length, -1]}
        assert refused(**changes) == (Code.OUT_OF_RANGE, "TOKENS_LET_GO", told)
        for mode in (DISCARD, READ_ONLY):
            refusal_in_mode = refused(**changes, mode=mode, kv=mode == DISCARD)
            assert refusal_in_mode == (Code.OUT_OF_RANGE, "TOKENS_LET_GO", told)
    made.assert_unchanged(**hidden)
    for length in (263, 100):
        request = attention_pb2.ForkSessionRequest(session_id=made.ids[0], length=length)
        code, reason, details = refusal(channel, request, "ForkSession")
        assert (code, reason) == (Code.OUT_OF_RANGE, "TOKENS_LET_GO")
        assert details == {"length": "301", "first_position": "256"}
    made.assert_unchanged(**hidden)
    # A request's own options let nothing go, and see nothing that is gone.
    with pytest.raises(errors.OutOfRange):
        made.append(0, 1, window_left=-1)
    made.assert_unchanged(**hidden)
    made.append(0, 1, truncate=264)  # the first one that may be asked at 264 sees 256 on


# Forward.


@pytest.fixture(scope="module")
def bert(client, model_root):
    model = hf_models.make_bert(seed=11, num_hidden_layers=1, max_position_embeddings=64)
    model.save_pretrained(model_root / "wrong-bert")
    client.load_model("wrong-bert", weights="wrong-bert")
    yield "wrong-bert"
    client.unload_model("wrong-bert", close_sessions=True)


def test_positions_beyond_the_learned_table(client, bert):
    random = np.random.default_rng(12)
    hidden_states = random.standard_normal((2, 70, 128), dtype=np.float32)
    sessions = [client.open_session(bert) for _ in range(2)]

    def forward(count, rows=(0, 1), **arguments):
        return client.forward(
            hidden_states[list(rows), :count],
            model=bert,
            layer=0,
            sessions=[sessions[row] for row in rows],
            **arguments,
        )

    forward(60)
    expected = client.forward(hidden_states[:, :4], model=bert, layer=0)
    before = [client.get_session(session).layers for session in sessions]
    for arguments in ({}, {"truncate": [None, 60]}, {"cache_mode": "discard"}):
        with pytest.raises(errors.OutOfRange) as refused:
            forward(5, **arguments)
        assert refused.value.reason == "POSITION_OUT_OF_RANGE"
        assert refused.value.details["max_positions"] == "64"
        assert [client.get_session(session).layers for session in sessions] == before
    with pytest.raises(errors.OutOfRange):  # one row of two
        forward(5, truncate=[10, None])
    assert [client.get_session(session).layers for session in sessions] == before
    assert forward(4).cache_length == (64, 64)
    again = forward(4, truncate=0)
    np.testing.assert_allclose(again.output, expected.output, atol=TOLERANCE)


def test_forward_of_a_session_of_another_model(client, bert, window_model):
    with client.open_session(window_model) as other:
        hidden_states = np.zeros((1, 1, 128), np.float32)
        with pytest.raises(errors.NotFound) as refused:
            client.forward(hidden_states, model=bert, layer=0, sessions=[other])
        assert refused.value.reason == "SESSION_NOT_FOUND"
        assert not other.get().layers
