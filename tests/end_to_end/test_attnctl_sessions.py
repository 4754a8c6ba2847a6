"""attnctl's view of sessions: what the server holds, and nobody's key to it."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from attnd import api

ROOT = Path(__file__).resolve().parents[2]
ATTNCTL = (ROOT / os.environ.get("ATTND_BINARY", "build/release/bin/attnd")).with_name("attnctl")
MODEL = "attnctl-sessions"
PAGE_OF_THE_SERVER = 100  # sessions, as ListSessionsRequest has it


@pytest.fixture(scope="module")
def attnctl(server):
    def run(*arguments):
        command = [ATTNCTL, "--address", server.address, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    return run


@pytest.fixture
def run(attnctl):
    """What attnctl printed, once it has succeeded."""

    def run(*arguments):
        result = attnctl(*arguments)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


@pytest.fixture(scope="module")
def model(client):
    layer = api.LayerSpec(repeat=3, num_heads=4, num_kv_heads=2, head_dim=16, value_dim=16)
    spec = api.ModelSpec(stacks=[api.LayerStack(self_attention=[layer])])
    client.load_model(MODEL, spec=spec)
    yield MODEL
    client.unload_model(MODEL)


@pytest.fixture
def session(client, model):
    """Of two layers that hold 5 and 3 tokens."""
    random = np.random.default_rng(3)
    with client.open_session(model) as opened:
        for layer, length in ((0, 5), (2, 3)):
            query = random.standard_normal((1, 4, length, 16), dtype=np.float32)
            key, value = random.standard_normal((2, 1, 2, length, 16), dtype=np.float32)
            client.attend(query, key, value, sessions=[opened], model=model, layer=layer)
        yield opened


def test_sessions_are_listed_without_their_ids(run, session):
    header, row = run("sessions", "--model", MODEL).splitlines()
    assert header.split() == ["SESSION", "MODEL", "LENGTH", "CACHE", "IDLE", "AGE", "PRINCIPAL"]
    prefix, name, length = row.split()[:3]
    assert name == MODEL
    assert length == "5"
    assert session.id.startswith(prefix.removesuffix("..."))
    assert session.id not in row


def test_sessions_as_json_have_the_apis_names(run, session):
    text = run("sessions", "--json")
    (row,) = (row for row in json.loads(text)["sessions"] if row["model"] == MODEL)
    assert row["length"] == "5"
    assert int(row["bytes"]) > 0
    assert row["age_seconds"] >= row["idle_seconds"]
    assert session.id not in text


def test_only_the_named_models_sessions_are_listed(run, client, session):
    with client.open_session():
        assert len(json.loads(run("sessions", "--json"))["sessions"]) >= 2
        assert len(json.loads(run("sessions", "--model", MODEL, "--json"))["sessions"]) == 1


def test_a_model_that_is_not_there_is_an_error_and_not_an_empty_list(attnctl):
    result = attnctl("sessions", "--model", "no-such-model")
    assert result.returncode == 1
    assert result.stderr.startswith("attnctl: NOT_FOUND: ")


def test_all_pages_are_listed(run, client, model):
    count = PAGE_OF_THE_SERVER + 7
    parent = client.open_session(model)
    forks = parent.fork(count=count - 1)
    try:
        rows = json.loads(run("sessions", "--model", model, "--json"))["sessions"]
        assert len(rows) == count
        assert len({row["id_prefix"] for row in rows}) == count
        assert len(run("sessions", "--model", model).splitlines()) == count + 1
    finally:
        for opened in (parent, *forks):
            opened.close()
    assert run("sessions", "--model", model) == f"no sessions of {model}\n"


def test_a_session_shows_its_layers(run, session):
    facts, layers = run("session", session.id).split("\n\n")
    assert dict(line.split(maxsplit=1) for line in facts.splitlines())["model"] == MODEL
    rows = [line.split() for line in layers.splitlines()[1:]]
    assert [row[1:5] for row in rows] == [["0", "self", "5", "0"], ["2", "self", "3", "0"]]
    answer = json.loads(run("session", session.id, "--json"))
    assert [layer["length"] for layer in answer["layers"]] == ["5", "3"]
    assert answer["model"] == MODEL


def test_an_empty_session_says_so(run, client):
    with client.open_session() as opened:
        assert "no tokens in any layer" in run("session", opened.id)


def test_a_prefix_is_no_id(attnctl, session):
    result = attnctl("session", session.id[:-1])
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("attnctl: NOT_FOUND: ")
    assert result.stderr.count("\n") == 1
    assert session.id not in result.stderr


@pytest.mark.parametrize("arguments", [["session"], ["session", "a", "b"], ["sessions", "a"]])
def test_usage_errors_end_with_2_and_a_hint(attnctl, arguments):
    result = attnctl(*arguments)
    assert result.returncode == 2
    assert "--help" in result.stderr
