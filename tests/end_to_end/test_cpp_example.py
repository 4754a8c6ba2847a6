"""The example of docs/examples, as it is built, against a server with a real model."""

import os
import socket
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from end_to_end.causal_models import make_causal

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = (ROOT / os.environ.get("ATTND_BINARY", "build/release/bin/attnd")).with_name(
    "attnd_example_decode"
)
LENGTHS = ["16 tokens", "19 tokens", "21 tokens"]
# Between the answers of OpenSession and Fork, and that of the smallest Forward: 256 floats.
LARGE_ANSWER = 1000


@pytest.fixture(scope="module")
def model(client, model_root):
    """Its name, layers and hidden size, as the example's arguments."""
    llama = make_causal("llama", hidden_size=256)
    llama.save_pretrained(model_root / "cpp-example")
    client.load_model("cpp-example", weights="cpp-example")
    yield "cpp-example", str(llama.config.num_hidden_layers), str(llama.config.hidden_size)
    client.unload_model("cpp-example")


def decode(address, *arguments):
    command = [EXAMPLE, address, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_it_decodes_forks_and_closes_its_sessions(server, client, model):
    result = decode(server.address, *model)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == LENGTHS
    assert client.list_sessions("cpp-example") == []


class LossyWire:
    """Passes connections on to a server, and loses every third large answer with its connection."""

    def __init__(self, address):
        host, port = address.rsplit(":", 1)
        self._server = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._large = 0
        self.lost = 0
        self._sockets = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        # A closed listener does not wake a thread that waits for it.
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for end in self._sockets:
            end.close()

    def _accept(self):
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._server)
                self._sockets += [near, far]
                for source, target, answers in ((near, far, False), (far, near, True)):
                    threading.Thread(
                        target=self._copy, args=(source, target, answers), daemon=True
                    ).start()

    def _copy(self, source, target, answers):
        with suppress(OSError):
            while data := source.recv(1 << 20):
                if answers and len(data) >= LARGE_ANSWER:
                    self._large += 1
                    if self._large % 3 == 0:
                        self.lost += 1
                        break
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def test_lost_answers_append_nothing_twice(server, model):
    wire = LossyWire(server.address)
    try:
        result = decode(wire.address, *model)
    finally:
        wire.close()
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == LENGTHS
    assert wire.lost >= 5


def test_a_server_that_refuses_is_quoted(server, model):
    result = decode(server.address, "no-such-model", *model[1:])
    assert result.returncode == 1
    assert "no-such-model" in result.stderr
    assert result.stdout == ""
