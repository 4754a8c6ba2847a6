"""Start, load, and end of servers of the tests' own."""

import json
import signal
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2

from attnd import HealthStatus, api, errors
from attnd._proto.attention.v1 import attention_pb2
from attnd.testing import ServerError
from end_to_end import hf_models, messages
from end_to_end.observe import Samples, wait_until

MODEL = "busy"
HEADS, TOKENS = 16, 4096  # a second or two of standard attention on one core, in 300 KB
ONE_CORE = ("--threads", "1")


class BusyServer:
    """A server on one core with a model that tells how many requests wait and run."""

    def __init__(self, process, client, callers):
        self.process = process
        self.client = client
        self._callers = callers
        layer = api.LayerSpec(num_heads=HEADS, num_kv_heads=1, head_dim=1, value_dim=1)
        client.load_model(
            MODEL, spec=api.ModelSpec(stacks=[api.LayerStack(self_attention=[layer])])
        )

    def attend(self, length, **arguments):
        query = np.ones((1, HEADS, length, 1), np.float32)
        key = np.ones((1, 1, length, 1), np.float32)
        return self.client.attend(
            query, key, key, model=MODEL, implementation="standard", **arguments
        )

    def submit_slow(self, count=1):
        """Calls that take a second or two, one after the other, on threads of their own."""
        return [self._callers.submit(self.attend, TOKENS) for _ in range(count)]

    def wait_for(self, *, executing, queued):
        def is_so():
            (status,) = self.client.list_models()
            return (status.managers[0].executing, status.managers[0].queued) == (executing, queued)

        wait_until(is_so)

    def answered(self, *codes):
        samples = Samples(self.process)
        return sum(
            samples.total("attention_requests_total", model=MODEL, code=code) for code in codes
        )

    def executed(self):
        return Samples(self.process).total("attention_compute_seconds_count", model=MODEL)


@pytest.fixture
def start_busy_server(start_server, connect):
    """Starts a BusyServer with further flags."""
    with ThreadPoolExecutor(16) as callers:

        def start(*arguments):
            process = start_server(arguments=[*ONE_CORE, *arguments])
            return BusyServer(process, connect(process.address), callers)

        yield start


# Starting.


def test_the_ready_file_has_the_real_addresses(start_server, connect, tmp_path):
    path = tmp_path / "attnd.sock"
    process = start_server(listen=["127.0.0.1:0", f"unix:{path}", "[::1]:0"])
    assert len(process.addresses) == 3
    assert process.addresses[1] == f"unix:{path}"
    for address in process.addresses:
        assert not address.endswith(":0")
        assert connect(address).check_health() is HealthStatus.SERVING
    assert "attention_in_flight_requests" in Samples(process).names


def test_models_are_served_from_the_start(start_server, connect, tmp_path):
    for name in ("one", "two"):
        hf_models.make_bert(num_hidden_layers=1).save_pretrained(tmp_path / name)
    process = start_server(models={"first": tmp_path / "one", "second": tmp_path / "two"})
    client = connect(process.address)
    assert {model.spec.name for model in client.list_models()} == {"first", "second"}
    hidden_states = np.zeros((1, 2, 128), np.float32)
    assert client.forward(hidden_states, model="second", layer=0).output.shape == (1, 2, 128)


def test_a_model_that_can_not_be_served_ends_the_start_with_the_reason(start_server, tmp_path):
    hf_models.make_bert(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"absolute"', '"x"').replace('"bert"', '"mamba"'))
    with pytest.raises(ServerError, match="mamba"):
        start_server(models={"unfit": tmp_path / "model"})
    (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(ServerError, match=r"config\.json"):
        start_server(models={"unfit": tmp_path / "model"})


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "name-without-a-directory"],
        ["--model", "=directory"],
        ["--model", "name=/no/such/directory"],
        ["--no-such-flag"],
        ["--queue-capacity", "-1"],
        ["--max-message-bytes", "1"],
        ["--config", "/no/such/file"],
        ["--listen", "127.0.0.1"],
        ["--listen", "127.0.0.1:99999"],
        ["--listen", "unix:"],
        ["--listen", "unix:/" + "x" * 200],
        ["--listen", "unix:/no/such/directory/attnd.sock"],
        ["--listen", "0.0.0.0:0"],
        ["--listen", "[::]:0"],
        ["--metrics-listen", "0.0.0.0:0"],
    ],
    ids=" ".join,
)
def test_wrong_flags_end_the_start(attnd_binary, tmp_path, arguments):
    given = ["--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"]
    for flag in ("--listen", "--metrics-listen"):
        if flag in arguments:
            del given[given.index(flag) : given.index(flag) + 2]
    ready_file = tmp_path / "ready.json"
    command = [attnd_binary, *given, *arguments, "--ready-file", ready_file]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode in (1, 2)
    assert result.stderr
    assert not ready_file.exists()


def test_other_addresses_than_loopback_only_with_insecure(start_server, connect):
    process = start_server(listen=["0.0.0.0:0"], arguments=["--insecure"])
    port = process.address.rsplit(":", 1)[1]
    assert connect(f"127.0.0.1:{port}").check_health() is HealthStatus.SERVING


def test_an_address_in_use_ends_the_start(start_server):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ServerError, match=address):
            start_server(listen=[address])


def test_a_configuration_file_and_flags_over_it(start_server, connect, tmp_path):
    path = tmp_path / "attnd.textproto"
    path.write_text("max_message_bytes: 1000000\nmax_tokens: 100\n")
    process = start_server(arguments=["--config", str(path), "--max-message-bytes", "2000000"])
    info = connect(process.address).server_info()
    assert info.max_request_bytes == 2_000_000
    assert info.max_tokens == 100


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("threads: 2\nno_such_field: 1\n", 2),
        ("\nthreads: 5000000\n", 2),
        ("threads: 2\nqueue_capacity: -1\n", 2),
        ("threads: {\n", 1),
    ],
)
def test_a_wrong_configuration_is_named_with_file_and_line(attnd_binary, tmp_path, text, line):
    path = tmp_path / "attnd.textproto"
    path.write_text(text)
    command = [attnd_binary, "--config", path]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert f"{path}:{line}:" in result.stderr


def test_flags_that_only_print(attnd_binary):
    for flag, printed in (
        ("--version", "attnd "),
        ("--help", "--listen"),
        ("--print-config", "max_message_bytes: "),
    ):
        result = subprocess.run([attnd_binary, flag], capture_output=True, text=True, timeout=60)
        assert result.returncode == 0
        assert printed in result.stdout


def test_a_unix_socket_is_taken_over_from_a_server_that_was_killed(start_server, connect, tmp_path):
    path = tmp_path / "attnd.sock"
    for ending in (signal.SIGTERM, signal.SIGKILL, signal.SIGTERM):
        process = start_server(listen=[f"unix:{path}"])
        assert connect(f"unix:{path}").check_health() is HealthStatus.SERVING
        process.process.send_signal(ending)
        process.wait(30)


# Health.


def test_health_of_the_server_and_its_services(client):
    for service in ("", "attention.v1.AttentionService", "attention.v1.AdminService"):
        assert client.check_health(service) is HealthStatus.SERVING
    with pytest.raises(errors.NotFound):
        client.check_health("no.such.Service")


def watch(channel, service=""):
    method = channel.unary_stream(
        "/grpc.health.v1.Health/Watch",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    return method(health_pb2.HealthCheckRequest(service=service), timeout=60.0)


def test_watching_health(channel):
    states = {"": "SERVING", "no.such.Service": "SERVICE_UNKNOWN"}
    for service, state in states.items():
        stream = watch(channel, service)
        status = next(stream).status
        assert status == health_pb2.HealthCheckResponse.ServingStatus.Value(state)
        stream.cancel()


# The queue.


def test_a_full_queue_sheds_and_recovers(start_busy_server):
    server = start_busy_server("--queue-capacity", "2")
    calls = server.submit_slow()
    server.wait_for(executing=1, queued=0)
    calls += server.submit_slow(2)
    server.wait_for(executing=1, queued=2)
    with pytest.raises(errors.ResourceExhausted) as raised:
        server.attend(8)
    assert raised.value.retry_delay_seconds > 0.0
    for call in calls:
        assert call.result().output.shape == (1, HEADS, TOKENS, 1)
    assert server.attend(8).output.shape == (1, HEADS, 8, 1)
    assert server.answered("RESOURCE_EXHAUSTED") == 1
    assert server.executed() == 4


def test_what_has_expired_in_the_queue_is_not_executed(start_busy_server):
    server = start_busy_server()
    (slow,) = server.submit_slow()
    server.wait_for(executing=1, queued=0)
    for _ in range(2):
        with pytest.raises(errors.DeadlineExceeded):
            server.attend(8, timeout=0.05)
    slow.result()
    wait_until(lambda: server.answered("DEADLINE_EXCEEDED", "CANCELLED") == 2)
    assert server.executed() == 1


def raw_call(channel, length):
    """Like BusyServer.attend, but one that can be cancelled."""
    request = attention_pb2.AttendRequest(
        query=messages.tensor(1, HEADS, length, 1),
        key=messages.tensor(1, 1, length, 1),
        value=messages.tensor(1, 1, length, 1),
        layer=messages.layer(model=MODEL),
        execution=messages.execution(implementation="standard"),
    )
    method = channel.unary_unary(f"{messages.ATTENTION}Attend")
    return method.future(request.SerializeToString(), timeout=60.0)


def test_what_is_cancelled_leaves_the_queue_at_once_and_is_not_executed(start_busy_server):
    server = start_busy_server()
    (slow,) = server.submit_slow()
    server.wait_for(executing=1, queued=0)
    with grpc.insecure_channel(server.process.address) as channel:
        calls = [raw_call(channel, 8) for _ in range(3)]
        server.wait_for(executing=1, queued=3)
        for call in calls[:2]:
            call.cancel()
        server.wait_for(executing=1, queued=1)
        assert server.answered("CANCELLED") == 2
        slow.result()
        calls[2].result()
    assert server.executed() == 2


def test_a_call_that_is_cancelled_while_it_runs(start_busy_server):
    server = start_busy_server()
    with grpc.insecure_channel(server.process.address) as channel:
        call = raw_call(channel, TOKENS)
        server.wait_for(executing=1, queued=0)
        call.cancel()
        wait_until(lambda: server.answered("CANCELLED") == 1)
    assert server.attend(8).output.shape == (1, HEADS, 8, 1)


def test_a_model_is_unloaded_under_its_requests(start_busy_server):
    server = start_busy_server()
    calls = server.submit_slow(2)
    server.wait_for(executing=1, queued=1)
    server.client.unload_model(MODEL)
    with pytest.raises(errors.NotFound):
        server.attend(8)
    for call in calls:
        assert call.result().output.shape == (1, HEADS, TOKENS, 1)


# The end.


def test_sigterm_drains(start_busy_server):
    """Requests that were there finish, running or queued; later ones are UNAVAILABLE."""
    server = start_busy_server()
    calls = server.submit_slow(3)
    server.wait_for(executing=1, queued=2)
    with grpc.insecure_channel(server.process.address) as channel:
        health = watch(channel)
        assert next(health).status == health_pb2.HealthCheckResponse.SERVING
        server.process.terminate()
        assert next(health).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert server.client.check_health() is HealthStatus.NOT_SERVING
        with pytest.raises(errors.Unavailable):
            server.attend(8)
        for call in calls:
            assert call.result().output.shape == (1, HEADS, TOKENS, 1)
    assert server.process.wait(30) == 0


def test_sigint_drains_too(start_server):
    process = start_server()
    process.process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0


def test_a_second_signal_ends_the_server_at_once(start_busy_server):
    server = start_busy_server()
    calls = server.submit_slow(8)
    server.wait_for(executing=1, queued=7)
    with grpc.insecure_channel(server.process.address) as channel:
        health = watch(channel)
        next(health)
        server.process.terminate()
        assert next(health).status == health_pb2.HealthCheckResponse.NOT_SERVING
        server.process.terminate()
        assert server.process.wait(30) == 128 + signal.SIGTERM
    outcomes = [call.exception() for call in calls]
    assert any(isinstance(outcome, errors.Unavailable) for outcome in outcomes)


def test_a_drain_has_an_end(start_busy_server):
    server = start_busy_server("--drain-seconds", "0.2")
    calls = server.submit_slow(8)
    server.wait_for(executing=1, queued=7)
    server.process.terminate()
    assert server.process.wait(30) == 1
    outcomes = [call.exception() for call in calls]
    cut_off = (errors.Unavailable, errors.Cancelled)
    assert any(isinstance(outcome, cut_off) for outcome in outcomes)


# Metrics.

METRICS = {
    "attention_requests_total",
    "attention_request_duration_seconds_count",
    "attention_compute_seconds_count",
    "attention_in_flight_requests",
    "attention_received_bytes_total",
    "attention_sent_bytes_total",
    "attention_peak_workspace_bytes",
    "attention_active_implementation",
    "attention_switches_total",
}


def test_metrics_are_there_and_move(start_server, connect, tmp_path):
    hf_models.make_bert(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    process = start_server(models={"m": tmp_path / "model"})
    client = connect(process.address)
    hidden_states = np.zeros((1, 2, 128), np.float32)
    for implementation, count in (("standard", 2), ("torch_sdpa", 3)):
        client.switch_attention("m", implementation)
        for _ in range(count):
            client.forward(hidden_states, model="m", layer=0)
    with pytest.raises(errors.NotFound):
        client.forward(hidden_states, model="m", layer=9)
    with pytest.raises(errors.NotFound):
        client.forward(hidden_states, model="invented", layer=0)

    samples = Samples(process)
    assert samples.names >= METRICS
    total = samples.total
    forward = {"rpc": "Forward", "model": "m"}
    for implementation, count in (("standard", 2), ("torch_sdpa", 3)):
        labels = {"model": "m", "implementation": implementation}
        assert total("attention_requests_total", rpc="Forward", code="OK", **labels) == count
        assert total("attention_request_duration_seconds_count", rpc="Forward", **labels) == count
        assert total("attention_compute_seconds_count", **labels) == count
        assert total("attention_compute_seconds_sum", **labels) > 0.0
        assert total("attention_peak_workspace_bytes", **labels) > 0
    assert total("attention_requests_total", code="NOT_FOUND", **forward) == 1
    assert total("attention_requests_total", code="NOT_FOUND", rpc="Forward") == 2
    assert total("attention_requests_total", model="invented") == 0
    assert total("attention_received_bytes_total", rpc="Forward") > 7 * hidden_states.nbytes
    assert total("attention_sent_bytes_total", rpc="Forward") > 5 * hidden_states.nbytes
    assert total("attention_in_flight_requests") == 0
    assert total("attention_active_implementation", model="m", implementation="torch_sdpa") == 1
    assert total("attention_active_implementation", model="m") == 1
    assert total("attention_switches_total", model="m") == 2


def test_requests_in_flight_are_counted(start_busy_server):
    server = start_busy_server()
    calls = server.submit_slow(3)
    server.wait_for(executing=1, queued=2)
    assert Samples(server.process).total("attention_in_flight_requests") == 3
    for call in calls:
        call.result()
    assert Samples(server.process).total("attention_in_flight_requests") == 0


def test_the_metrics_address_survives_garbage(start_server):
    process = start_server()
    ready = json.loads((process.folder / "ready.json").read_text())
    host, port = ready["metrics"].rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=30.0) as connection:
        connection.sendall(b"\0\xff" * 1000)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(4096):
            pass
    assert "attention_in_flight_requests" in Samples(process).names
