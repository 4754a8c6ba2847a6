"""The life of sessions: opened, reserved, listed, counted, expired, unloaded, switched."""

import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest

from attnd import api, errors
from end_to_end import hf_models, reference
from end_to_end.observe import Samples, wait_until
from end_to_end.session_caller import (
    DIM,
    HEADS,
    KV_HEADS,
    MIB,
    PAGE,
    TOLERANCE,
    Caller,
    assert_attends,
    assert_holds,
    layers_without_weights,
)


@pytest.fixture
def caller(client):
    return Caller(client, seed=1)


@pytest.fixture(scope="module")
def spec_model(client):
    client.load_model("session-rpcs-spec", spec=layers_without_weights())
    yield "session-rpcs-spec"
    client.unload_model("session-rpcs-spec", close_sessions=True)


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
