"""What the implementations promise beside being right, through the Python client."""

import numpy as np
import pytest

from attnd import errors
from end_to_end import reference


@pytest.fixture(scope="module")
def noise():
    """Gaussian queries, keys and values: every block of keys matters alike."""
    rng = np.random.default_rng(3)
    return [rng.standard_normal((1, 2, 2048, 64)).astype(np.float32) for _ in range(3)]


@pytest.fixture(scope="module")
def needles():
    """Keys in 64 blocks of 64 tokens; queries that are much like the keys of one block each."""
    rng = np.random.default_rng(4)
    topics = rng.standard_normal((64, 64)).astype(np.float32)
    key = np.repeat(topics, 64, axis=0) + 0.3 * rng.standard_normal((4096, 64))
    query = np.repeat(topics[rng.permutation(64)], 64, axis=0) * 2
    value = rng.standard_normal((4096, 64))
    return [x[None, None].astype(np.float32) for x in (query, key, value)]


@pytest.mark.parametrize("settings", [{"sparsity_factor": 0.0}, {"sparsity_mass": 1.0}])
def test_sparse_that_leaves_nothing_out_is_flash(client, noise, settings):
    flash = client.attend(*noise, is_causal=True, implementation="flash", output_lse=True)
    sparse = client.attend(
        *noise, is_causal=True, implementation="sparse", output_lse=True, **settings
    )
    assert sparse.output.tobytes() == flash.output.tobytes()
    assert sparse.lse.tobytes() == flash.lse.tobytes()
    assert sparse.execution.sparsity == 0.0
    assert sparse.execution.recovered_mass == 1.0
    assert flash.execution.sparsity is None


def test_memory_efficient_is_flash_in_less_memory(client, noise):
    flash = client.attend(*noise, implementation="flash")
    small = client.attend(*noise, implementation="memory_efficient")
    assert small.output.tobytes() == flash.output.tobytes()
    assert small.execution.peak_workspace_bytes <= 1 << 20
    assert small.execution.flops == flash.execution.flops


def test_on_noise_the_reported_mass_says_that_much_is_lost(client, noise):
    execution = client.attend(*noise, implementation="sparse", sparsity_factor=0.8).execution
    assert 0.7 < execution.sparsity < 0.85
    assert execution.recovered_mass < 0.6


def test_where_few_keys_matter_few_are_enough(client, needles):
    result = client.attend(*needles, implementation="sparse", sparsity_factor=0.75)
    assert 0.6 < result.execution.sparsity < 0.8
    assert result.execution.recovered_mass > 0.95
    expected = reference.attend(*needles).output
    assert np.abs(result.output - expected).mean() < 0.1 * np.abs(expected).mean()


def test_the_reported_mass_is_what_the_outputs_show(client, needles):
    exact = client.attend(*needles, implementation="flash", output_lse=True)
    sparse = client.attend(*needles, implementation="sparse", sparsity_factor=0.9, output_lse=True)
    kept = np.exp(sparse.lse - exact.lse).mean()  # over all rows
    assert abs(kept - sparse.execution.recovered_mass) < 0.2


def test_a_mass_is_kept(client, needles):
    execution = client.attend(*needles, implementation="sparse", sparsity_mass=0.9).execution
    assert execution.recovered_mass > 0.8
    assert execution.sparsity > 0.3


def test_permission_to_approximate_is_no_order(client, noise):
    execution = client.attend(*noise, sparsity_mass=0.9).execution
    assert execution.implementation in ("flash", "sparse")


def test_options_for_sparse_are_refused_by_exact_implementations(client, noise):
    with pytest.raises(errors.InvalidArgument):
        client.attend(*noise, implementation="flash", sparsity_factor=0.5)
    with pytest.raises(errors.InvalidArgument):
        client.attend(*noise, implementation="sparse", sparsity_factor=1.0)
    with pytest.raises(ValueError, match="sparsity"):
        client.attend(*noise, implementation="sparse", sparsity_factor=0.5, sparsity_mass=0.5)


def test_a_budget_that_holds_no_tile_is_refused(start_server, connect, noise):
    client = connect(start_server(arguments=["--memory-efficient-bytes", "8192"]).address)
    with pytest.raises(errors.ResourceExhausted) as refused:
        client.attend(*noise, implementation="memory_efficient")
    assert refused.value.reason == "MEMORY_EFFICIENT_BUDGET"
    assert client.attend(*noise, implementation="flash").output.shape == noise[0].shape


def test_a_budget_is_honoured_whatever_the_length(start_server, connect):
    budget = 128 << 10
    client = connect(start_server(arguments=["--memory-efficient-bytes", str(budget)]).address)
    rng = np.random.default_rng(5)
    for length in (100, 1000, 6000):
        rows = rng.standard_normal((1, 1, length, 32)).astype(np.float32)
        execution = client.attend(rows, rows, rows, implementation="memory_efficient").execution
        assert 0 < execution.peak_workspace_bytes <= budget


def test_int8_sessions_through_the_client(client, noise):
    query, key, value = (x[:, :, :300] for x in noise)
    with client.open_session(cache_dtype="int8") as session:
        result = client.attend(query, key, value, is_causal=True, sessions=[session])
    expected = reference.attend(query, key, value, is_causal=True).output
    error = np.sqrt(((result.output - expected) ** 2).mean() / (expected**2).mean())
    assert error < 2e-2
