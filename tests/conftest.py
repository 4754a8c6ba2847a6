"""One server for most tests, and the clients that talk to it.

The binary is what ATTND_BINARY names, build/release/bin/attnd by default. Tests that stop, fill or
misconfigure a server start one of their own by `start_server`.
"""

import os
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import grpc
import pytest

import attnd
from attnd.testing import ServerProcess

ROOT = Path(__file__).resolve().parent.parent
LOG_LINES = 60


@pytest.fixture(scope="session")
def attnd_binary():
    binary = ROOT / os.environ.get("ATTND_BINARY", "build/release/bin/attnd")
    if not binary.is_file():
        pytest.fail(f"there is no {binary}: scripts/build makes it", pytrace=False)
    return binary


@pytest.fixture(scope="session")
def model_root(tmp_path_factory):
    """The server's model root; tests put model directories into it."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def server(attnd_binary, model_root):
    with ServerProcess(attnd_binary, model_root=model_root) as process:
        yield process


@pytest.fixture(scope="session")
def client(server):
    with attnd.Client(server.address, timeout=60.0) as connected:
        yield connected


@pytest.fixture(scope="session")
def channel(server):
    """For messages that the client would not send."""
    limits = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(server.address, options=limits) as connected:
        yield connected


@pytest.fixture
def start_server(attnd_binary, request):
    """Starts servers that end with the test; takes ServerProcess' arguments."""
    with ExitStack() as stack:
        request.node.own_servers = []

        def start(**arguments):
            process = stack.enter_context(ServerProcess(attnd_binary, **arguments))
            request.node.own_servers.append(process)
            return process

        yield start


@pytest.fixture
def connect():
    """Opens clients that are closed with the test."""
    with ExitStack() as stack:
        client = partial(attnd.Client, timeout=60.0)
        yield lambda address, **options: stack.enter_context(client(address, **options))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        servers = [item.funcargs.get("server"), *getattr(item, "own_servers", [])]
        for process in filter(None, servers):
            log = "\n".join(process.log().splitlines()[-LOG_LINES:])
            report.sections.append((f"log of attnd on {process.addresses}", log))
    return report
