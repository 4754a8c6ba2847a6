"""BenchmarkAttention: results for all implementations, while the server serves, until cancelled."""

import asyncio
import json
import threading
import time

import grpc
import numpy as np
import pytest

import attnd
from attnd import api, errors
from end_to_end import hf_models, reference

MODEL = "timed"
EXACT = {"flash", "torch_sdpa", "standard", "memory_efficient"}
SMALL = {"batch": 2, "q_len": 48, "kv_len": 80, "iterations": 3, "max_seconds": 60.0}
# Longer than any test waits for it.
ENDLESS = {"q_len": 64, "iterations": 100000, "max_seconds": 600.0}


def spec():
    layer = api.LayerSpec(repeat=2, num_heads=4, num_kv_heads=2, head_dim=32, value_dim=32)
    stack = api.LayerStack(self_attention=[layer])
    return api.ModelSpec(stacks=[stack], dtype=api.DATA_TYPE_FLOAT32)


@pytest.fixture
def model(client):
    client.load_model(MODEL, spec=spec())
    yield MODEL
    client.unload_model(MODEL)


def split(events):
    events = list(events)
    progress = [event for event in events if isinstance(event, api.BenchmarkProgress)]
    results = [event for event in events if isinstance(event, api.BenchmarkResult)]
    assert len(progress) + len(results) == len(events)
    return progress, {result.implementation: result for result in results}


def wait_until_free(client):
    """Until the server has noticed that a benchmark was given up."""
    deadline = time.monotonic() + 30.0
    while True:
        try:
            return split(client.benchmark(MODEL, q_len=1, iterations=1, max_seconds=5.0))
        except errors.ResourceExhausted:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


@pytest.mark.parametrize(
    "sample",
    [{}, {"cached": True}, {"has_mask": True}],
    ids=["plain", "cached", "masked"],
)
def test_progress_comes_then_a_result_for_every_implementation(client, model, sample):
    events = list(client.benchmark(model, layer=1, **sample, **SMALL))
    progress, results = split(events)
    fractions = [event.fraction for event in progress]
    assert len(progress) >= 2
    assert fractions == sorted(fractions)
    assert isinstance(events[0], api.BenchmarkProgress)
    assert events[0].implementation
    assert events[-1] == api.BenchmarkProgress(fraction=1.0)
    known = {row.name for row in client.list_implementations()}
    assert set(results) <= known
    assert set(results) >= EXACT
    for name, result in results.items():
        assert result.error == ""
        assert result.iterations == SMALL["iterations"]
        assert 0.0 < result.min_seconds <= result.median_seconds <= result.p95_seconds
        assert result.backend.startswith("cpu/")
        assert result.flops > 0
        if name in EXACT:
            assert result.max_abs_error < 2e-5
            assert result.relative_error < 2e-5
    assert results["standard"].peak_workspace_bytes > 0


def test_hidden_states_are_what_forward_would_attend_to(client, model_root):
    hf_models.make_bert(seed=11, num_hidden_layers=1).save_pretrained(model_root / "timed-bert")
    client.load_model("timed-bert", weights="timed-bert")
    try:
        hidden = np.random.default_rng(3).standard_normal((2, 9, 128), dtype=np.float32)
        _, results = split(client.benchmark("timed-bert", hidden_states=hidden, iterations=2))
        assert set(results) >= EXACT
        for name in EXACT:
            assert results[name].error == ""
            assert results[name].relative_error < 2e-5
        with pytest.raises(errors.InvalidArgument):
            list(client.benchmark("timed-bert", hidden_states=hidden[..., :64]))
        with pytest.raises(errors.InvalidArgument):
            list(client.benchmark("timed-bert", hidden_states=hidden[0]))
    finally:
        client.unload_model("timed-bert")


def test_named_implementations_and_those_that_cannot(client, model):
    names = ["standard", "flash"]
    _, results = split(
        client.benchmark(model, implementations=names, output_attentions=True, **SMALL)
    )
    assert list(results) == names
    assert results["standard"].error == ""
    assert results["flash"].error
    assert results["flash"].iterations == 0


def test_serving_goes_on_meanwhile(client, connect, server, model):
    query, key, value = reference.random_problem(0)
    expected = reference.attend(query, key, value).output
    events = client.benchmark(model, **ENDLESS)
    assert isinstance(next(events), api.BenchmarkProgress)
    other = connect(server.address)
    for _ in range(200):
        np.testing.assert_allclose(other.attend(query, key, value).output, expected, atol=2e-5)
    # It still runs: another one is refused.
    with pytest.raises(errors.ResourceExhausted) as refused:
        list(client.benchmark(model, **SMALL))
    assert refused.value.reason == "BENCHMARK_RUNNING"
    assert refused.value.retry_delay_seconds > 0.0
    events.close()
    wait_until_free(client)


def test_it_advances_under_full_load(client, connect, server, model):
    query, key, value = reference.random_problem(1, q_len=64, kv_len=256)
    stop = threading.Event()

    def load():
        own = connect(server.address)
        while not stop.is_set():
            own.attend(query, key, value)

    callers = [threading.Thread(target=load) for _ in range(4)]
    for caller in callers:
        caller.start()
    try:
        _, results = split(client.benchmark(model, implementations=["flash"], **SMALL))
    finally:
        stop.set()
        for caller in callers:
            caller.join()
    assert results["flash"].error == ""
    assert results["flash"].iterations == SMALL["iterations"]


def test_closing_the_generator_ends_it(client, model):
    events = client.benchmark(model, **ENDLESS)
    next(events)
    events.close()
    _, results = wait_until_free(client)
    assert results


def test_time_that_is_over_ends_it_with_what_there_is(client, model):
    start = time.monotonic()
    _, results = split(client.benchmark(model, q_len=64, iterations=100000, max_seconds=1.0))
    assert time.monotonic() - start < 20.0
    assert set(results) >= EXACT
    assert results["flash"].iterations >= 1
    with pytest.raises(errors.DeadlineExceeded):
        list(client.benchmark(model, timeout=0.5, **ENDLESS))
    wait_until_free(client)


def test_asyncio(server, client, model):
    async def run():
        async with attnd.AsyncClient(server.address, timeout=60.0) as asynchronous:
            events = [event async for event in asynchronous.benchmark(model, **SMALL)]
            endless = asynchronous.benchmark(model, **ENDLESS)
            assert isinstance(await anext(endless), api.BenchmarkProgress)
            await endless.aclose()
            return events

    _, results = split(asyncio.run(run()))
    assert set(results) >= EXACT
    wait_until_free(client)


WRONG = {
    "no_sample_length": {"q_len": 0},
    "too_many_tokens": {"batch": 1 << 31, "q_len": 1 << 31},
    "lengths_of_other_rows": {"query_lengths": [1, 2, 3]},
    "an_int_dtype": {"dtype": "int64"},
    "negative_seconds": {"max_seconds": -1.0},
    "nan_seconds": {"max_seconds": float("nan")},
    "seconds_beyond_the_limit": {"max_seconds": 1e9},
    "iterations_beyond_the_limit": {"iterations": 1 << 30},
    "an_implementation_twice": {"implementations": ["flash", "flash"]},
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input(client, model, name):
    with pytest.raises(errors.InvalidArgument):
        list(client.benchmark(model, **WRONG[name]))


def test_what_is_not_there(client, model):
    for arguments in (
        {"model": "no_such"},
        {"model": model, "layer": 7},
        {"model": model, "stack": "no_such"},
        {"model": model, "kind": "cross"},
        {"model": model, "implementations": ["no_such"]},
    ):
        with pytest.raises(errors.NotFound):
            list(client.benchmark(**arguments))
    with pytest.raises(errors.InvalidArgument):
        list(client.benchmark(""))
    with pytest.raises(errors.FailedPrecondition):
        list(client.benchmark(model, hidden_states=np.zeros((1, 2, 64), np.float32)))


def test_more_memory_than_it_may_use(client, model):
    for arguments in ({"max_bytes": 1000}, {"q_len": 100000, "kv_len": 4000000, "max_bytes": 0}):
        with pytest.raises(errors.ResourceExhausted) as refused:
            list(client.benchmark(model, **arguments))
        assert refused.value.reason == "BENCHMARK_BYTES"
    _, results = split(client.benchmark(model, **SMALL))  # nothing is held
    assert results


def test_a_request_without_a_sample(channel, assert_answers):
    call = channel.unary_stream("/attention.v1.AdminService/BenchmarkAttention")
    for data in (b"", b"\xff\xff\xff"):
        with pytest.raises(grpc.RpcError) as refused:
            list(call(data, timeout=30.0))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert_answers()


def test_a_server_that_drains_ends_it(start_server, connect):
    process = start_server()
    own = connect(process.address)
    own.load_model(MODEL, spec=spec())
    events = own.benchmark(MODEL, **ENDLESS)
    next(events)
    start = time.monotonic()
    process.close()
    assert time.monotonic() - start < 20.0
    with pytest.raises(errors.Unavailable):
        list(events)


def test_timings_are_kept_over_restarts(start_server, connect, tmp_path):
    path = tmp_path / "timings.json"
    arguments = ["--timings-file", str(path)]

    def run():
        process = start_server(arguments=arguments)
        own = connect(process.address)
        own.load_model(MODEL, spec=spec())
        split(own.benchmark(MODEL, **SMALL))
        log = process.log()
        process.close()
        return log

    assert "timings" not in run()
    written = json.loads(path.read_text())
    assert {timing["implementation"] for timing in written["timings"]} >= EXACT
    assert "knows" in run()
    assert len(json.loads(path.read_text())["timings"]) == len(written["timings"])
    path.write_text(path.read_text()[:100])
    assert "ignores" in run()
    assert json.loads(path.read_text())["hardware"] == written["hardware"]
