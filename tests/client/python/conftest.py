"""A server that fails where a test says so, and its client."""

import pytest
from client.python.fake_server import FakeServer

import attnd


@pytest.fixture
def fake():
    with FakeServer() as server:
        yield server


@pytest.fixture
def fake_client(fake):
    with attnd.Client(fake.address, timeout=30.0) as client:
        yield client
