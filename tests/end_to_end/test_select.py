"""SelectAttention over a socket: what `auto` would choose, why, and that it is what happens."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from attnd import api, errors

ROOT = Path(__file__).resolve().parents[2]
ATTNCTL = (ROOT / os.environ.get("ATTND_BINARY", "build/release/bin/attnd")).with_name("attnctl")
LAYER = api.LayerSpec(num_heads=4, num_kv_heads=2, head_dim=16, value_dim=16)
SPEC = api.ModelSpec(stacks=[api.LayerStack(self_attention=[LAYER])], dtype=api.DATA_TYPE_FLOAT32)


@pytest.fixture
def model(client, unload):
    unload.append("selected")
    client.load_model("selected", spec=SPEC)
    return "selected"


def test_candidates_are_all_implementations_best_first(client, model):
    answer = client.select_attention(model, q_len=5, kv_len=9, batch=2)
    names = [candidate.implementation for candidate in answer.candidates]
    assert sorted(names) == sorted(row.name for row in client.list_implementations())
    assert names[0] == answer.implementation
    assert f"{answer.implementation}: estimated" in answer.reason
    eligible = [candidate for candidate in answer.candidates if candidate.eligible]
    assert all(candidate.estimated_seconds > 0 for candidate in eligible)
    assert all(candidate.reason for candidate in answer.candidates)


def test_what_is_told_is_what_happens(client, model):
    random = np.random.default_rng(3)
    for q_len, kv_len in ((1, 1), (1, 300), (64, 64)):
        answer = client.select_attention(model, q_len=q_len, kv_len=kv_len)
        query = random.standard_normal((1, 4, q_len, 16), dtype=np.float32)
        key, value = random.standard_normal((2, 1, 2, kv_len, 16), dtype=np.float32)
        result = client.attend(query, key, value, model=model, implementation="auto")
        assert result.execution.implementation == answer.implementation
        assert result.execution.reason.startswith(f"auto: {answer.implementation}: estimated")


def test_what_is_asked_for_changes_the_choice(client, model):
    answer = client.select_attention(model, q_len=5, output_attentions=True)
    assert answer.implementation == "standard"
    refused = {c.implementation: c.reason for c in answer.candidates if not c.eligible}
    assert "weights" in refused["flash"]
    with pytest.raises(errors.NotFound):
        client.select_attention("nothing", q_len=5)
    with pytest.raises(errors.InvalidArgument):
        client.select_attention(model, q_len=0)
    with pytest.raises(TypeError):
        client.select_attention(model, q_len=1, colour="red")


def test_attnctl_shows_candidates_and_why(server, model):
    def attnctl(*arguments):
        command = [ATTNCTL, "--address", server.address, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return done.stdout

    text = attnctl("select", model, "--queries", "1", "--keys", "4096", "--cached")
    assert "chosen" in text
    assert "estimated" in text
    assert "sparse is approximate" in text
    answer = json.loads(attnctl("--json", "select", model, "--queries", "7"))
    assert answer["candidates"][0]["implementation"] == answer["implementation"]
