"""What the tests of the control plane and of hostile messages share."""

import numpy as np
import pytest

from attnd import api
from end_to_end import hf_models, messages, reference


@pytest.fixture
def assert_answers(client):
    """Asserts that the server still answers, and rightly."""
    query, key, value = reference.random_problem(0)
    expected = reference.attend(query, key, value).output

    def check():
        np.testing.assert_allclose(client.attend(query, key, value).output, expected, atol=2e-5)

    return check


@pytest.fixture(scope="module")
def hostile_models(client, model_root):
    """A model with weights and one without, of two layers, 4 heads of 32 and 128 hidden values."""
    hf_models.make_bert(seed=7, num_hidden_layers=2).save_pretrained(model_root / "hostile")
    client.load_model("hostile", weights="hostile")
    layer = api.LayerSpec(repeat=2, num_heads=4, num_kv_heads=4, head_dim=32, value_dim=32)
    spec = api.ModelSpec(stacks=[api.LayerStack(self_attention=[layer])])
    client.load_model("weightless", spec=spec)
    yield
    client.unload_model("hostile")
    client.unload_model("weightless")


@pytest.fixture
def send(channel, hostile_models, assert_answers):
    """Sends bytes to an rpc; the answer's code and text, after which the server must answer on."""

    def send(rpc, data):
        code, text, error = messages.answer(channel, rpc, data)
        if error is not None:
            assert error.code == code.value[0]
            assert error.reason
        assert_answers()
        return code, text

    return send


@pytest.fixture
def unload(client):
    """Names of models that are unloaded at the end, where they were loaded."""
    names = []
    yield names
    for name in names:
        if name in {model.spec.name for model in client.list_models()}:
            client.unload_model(name)


@pytest.fixture(scope="session")
def bert_directory(model_root):
    """A good one, to be copied and broken."""
    directory = model_root / "admin-bert"
    hf_models.make_bert(seed=5, num_hidden_layers=1).save_pretrained(directory)
    return directory
