"""grpcurl, which knows of the server what reflection tells it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

GRPCURL = Path(sys.executable).with_name("grpcurl")


@pytest.fixture
def grpcurl(server):
    """Runs grpcurl with these options and words, and returns what it printed."""

    def run(*words, options=()):
        command = [GRPCURL, "-plaintext", "-max-time", "20", *options, server.address, *words]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


def test_services_are_listed(grpcurl):
    services = set(grpcurl("list").split())
    assert services >= {
        "attention.v1.AttentionService",
        "attention.v1.AdminService",
        "grpc.health.v1.Health",
    }


def test_methods_are_described(grpcurl):
    text = grpcurl("describe", "attention.v1.AdminService.SwitchAttention")
    assert "SwitchAttentionRequest" in text
    assert "layer" in grpcurl("describe", "attention.v1.AttendRequest")


def test_health(grpcurl):
    answer = json.loads(grpcurl("grpc.health.v1.Health/Check"))
    assert answer == {"status": "SERVING"}
    service = json.dumps({"service": "attention.v1.AttentionService"})
    answer = json.loads(grpcurl("grpc.health.v1.Health/Check", options=("-d", service)))
    assert answer == {"status": "SERVING"}


def test_an_implementation_is_switched(grpcurl, client):
    for implementation in ("standard", "torch_sdpa", "auto"):
        wanted = json.dumps({"implementation": implementation})
        answer = json.loads(
            grpcurl("attention.v1.AdminService/SwitchAttention", options=("-d", wanted))
        )
        assert answer["switched"] is True
        assert answer["active"] == implementation


def test_a_unix_socket(start_server, tmp_path):
    path = tmp_path / "attnd.sock"
    start_server(listen=[f"unix:{path}"])
    command = [GRPCURL, "-plaintext", "-unix", str(path), "attention.v1.AdminService/GetHardware"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["cpu"]["cores"] >= 1
