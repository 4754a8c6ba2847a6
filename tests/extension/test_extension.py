"""An implementation of this folder, in a server that knows it from its table alone."""

import numpy as np
import pytest

import attnd
from attnd import api, errors
from attnd.testing import ServerProcess
from end_to_end import reference
from end_to_end.observe import Samples

NAME = "two_pass"
MODEL = "extended"


@pytest.fixture(scope="module")
def extended_server(attnd_binary):
    with ServerProcess(attnd_binary.with_name("attnd_extended")) as process:
        yield process


@pytest.fixture(scope="module")
def extended(extended_server):
    with attnd.Client(extended_server.address, timeout=60.0) as connected:
        yield connected


@pytest.fixture
def model(extended):
    layer = api.LayerSpec(repeat=2, num_heads=4, num_kv_heads=2, head_dim=16, value_dim=16)
    spec = api.ModelSpec(stacks=[api.LayerStack(self_attention=[layer])])
    extended.load_model(MODEL, spec=spec)
    yield MODEL
    extended.unload_model(MODEL)


def test_it_is_listed_as_its_row_describes_it(extended, client):
    built_in = {row.name: row for row in client.list_implementations()}
    assert NAME not in built_in
    rows = {row.name: row for row in extended.list_implementations()}
    assert rows.pop(NAME) == api.Implementation(
        name=NAME,
        backends=["cpu"],
        dtypes=[api.DATA_TYPE_FLOAT32, api.DATA_TYPE_FLOAT16, api.DATA_TYPE_BFLOAT16],
        exact=True,
        outputs_attentions=False,
        memory="O(n)",
        compute="O(n^2 d)",
        description="Two plain passes over a query's keys, in double precision",
    )
    assert rows == built_in


def test_a_request_may_name_it(extended, client):
    query, key, value = reference.random_problem(1)
    expected = reference.attend(query, key, value, is_causal=True)
    options = {"is_causal": True, "implementation": NAME, "output_lse": True}
    result = extended.attend(query, key, value, **options)
    np.testing.assert_allclose(result.output, expected.output, atol=1e-6)
    np.testing.assert_allclose(result.lse, expected.lse, atol=1e-6)
    assert result.execution.implementation == NAME
    assert result.execution.peak_workspace_bytes > 0
    with pytest.raises(errors.NotFound):  # of the server without it
        client.attend(query, key, value, **options)


def test_it_reads_sessions_that_another_one_filled(extended):
    query, key, value = reference.random_problem(2, q_len=70, kv_len=70)
    expected = reference.attend(query, key, value, is_causal=True).output
    sessions = [extended.open_session() for _ in range(len(query))]
    for part, implementation in ((slice(0, 40), "flash"), (slice(40, 70), NAME)):
        tensors = [array[:, :, part] for array in (query, key, value)]
        result = extended.attend(
            *tensors, is_causal=True, sessions=sessions, implementation=implementation
        )
        np.testing.assert_allclose(result.output, expected[:, :, part], atol=1e-5)
    for session in sessions:
        session.close()


def test_a_model_is_switched_to_it_and_the_metrics_name_it(extended, extended_server, model):
    query, key, value = reference.random_problem(3)
    answer = extended.switch_attention(model, NAME)
    assert answer.switched
    assert answer.active == NAME
    result = extended.attend(query, key, value, model=model, layer=1)
    assert result.execution.implementation == NAME
    expected = reference.attend(query, key, value).output
    np.testing.assert_allclose(result.output, expected, atol=1e-6)
    (status,) = extended.list_models()
    assert status.active_implementation == NAME

    samples = Samples(extended_server)
    labels = {"model": model, "implementation": NAME}
    assert samples.total("attention_active_implementation", **labels) == 1
    assert samples.total("attention_active_implementation", model=model) == 1
    assert samples.total("attention_requests_total", code="OK", **labels) >= 1
    assert samples.total("attention_compute_seconds_count", **labels) >= 1
    assert samples.total("attention_peak_workspace_bytes", **labels) > 0
    assert samples.total("attention_switches_total", model=model, to=NAME) >= 1


def test_what_it_can_not_do_is_done_by_another_one_or_refused(extended, extended_server, model):
    query, key, value = reference.random_problem(4)
    extended.switch_attention(model, NAME)
    weights = {"model": model, "output_attentions": True}
    result = extended.attend(query, key, value, **weights)
    assert result.execution.implementation != NAME
    assert "two_pass does not return attention weights" in result.execution.reason
    assert Samples(extended_server).total("attention_fallbacks_total", model=model) >= 1
    with pytest.raises(errors.FailedPrecondition) as refused:
        extended.attend(query, key, value, implementation=NAME, **weights)
    assert refused.value.reason == "UNSUPPORTED_BY_IMPLEMENTATION"
    assert "standard" in refused.value.details["supporting"]
    assert NAME not in refused.value.details["supporting"].split(", ")
