"""Attend through the Python client, against attention in double precision."""

import ml_dtypes
import numpy as np
import pytest
import torch

from end_to_end import reference

IMPLEMENTATIONS = ("standard", "auto")
MASK = np.random.default_rng(0).random((2, 4, 5, 9)) < 0.7
SLOPES, SINKS = [0.5, 0.25, 0.125, 0.0625], [0.3, -1.0, 2.0, float("-inf")]
OPTIONS = {
    "plain": {},
    "scale": {"scale": 0.5},
    "causal": {"is_causal": True},
    "causal_from_position_0": {"is_causal": True, "first_query_position": [0, 0]},
    "causal_from_different_positions": {"is_causal": True, "first_query_position": [-2, 3]},
    "window": {"window_left": 2, "window_right": 1},
    "causal_window": {"is_causal": True, "window_left": 3},
    "soft_cap": {"soft_cap": 2.0},
    "alibi": {"alibi_slopes": SLOPES},
    "sinks": {"sink_logits": SINKS},
    "bool_mask": {"attention_mask": MASK},
    "bool_mask_2d": {"attention_mask": MASK[0, 0]},
    "bool_mask_per_head": {"attention_mask": MASK[0]},
    "short_mask": {"attention_mask": MASK[..., :6]},
    "one_column": {"attention_mask": MASK[..., :1]},
    "additive_mask": {"attention_mask": np.where(MASK, 0.5, -np.inf).astype(np.float32)},
    "float16_mask": {"attention_mask": np.where(MASK, 0.5, -np.inf).astype(np.float16)},
    "padding_mask": {"attention_mask": MASK[:, 0, 0].astype(np.int64)},
    "lengths": {"query_lengths": [3, 5], "kv_lengths": [9, 4]},
    "lengths_causal": {"query_lengths": [3, 5], "kv_lengths": [9, 4], "is_causal": True},
    "everything": {
        "scale": 0.3,
        "is_causal": True,
        "window_left": 6,
        "soft_cap": 3.0,
        "alibi_slopes": SLOPES,
        "sink_logits": SINKS,
        "attention_mask": MASK,
        "first_query_position": [4, 2],
    },
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", ["heads_first", "tokens_first"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(client, name, layout, implementation):
    query, key, value = reference.random_problem(1, value_dim=24)
    expected = reference.attend(query, key, value, **OPTIONS[name])
    if layout == "tokens_first":
        query, key, value = (array.swapaxes(1, 2) for array in (query, key, value))
    result = client.attend(
        query, key, value, layout=layout, implementation=implementation, **OPTIONS[name]
    )
    output = result.output if layout == "heads_first" else result.output.swapaxes(1, 2)
    np.testing.assert_allclose(output, expected.output, atol=2e-5)


@pytest.mark.parametrize("name", OPTIONS)
def test_weights_of_every_stage_and_lse(client, name):
    query, key, value = reference.random_problem(2)
    expected = reference.attend(query, key, value, **OPTIONS[name])
    result = client.attend(query, key, value, output_lse=True, **OPTIONS[name])
    assert result.lse.dtype == np.float32
    np.testing.assert_allclose(result.lse, expected.lse, atol=2e-5)
    rows = np.isfinite(expected.lse) | (expected.weights["masked"] > -np.inf).any(-1)
    for stage, weights in expected.weights.items():
        result = client.attend(
            query, key, value, output_attentions=True, attention_stage=stage, **OPTIONS[name]
        )
        given, weights = result.attention_weights, weights
        if "query_lengths" in OPTIONS[name]:  # scores of padding are not defined
            rows = np.arange(5) < np.array(OPTIONS[name]["query_lengths"])[:, None, None]
            keys = np.arange(9) < np.array(OPTIONS[name]["kv_lengths"])[:, None, None, None]
            given, weights = (
                np.where(keys & rows[..., None], array, 0.0) for array in (given, weights)
            )
        np.testing.assert_allclose(given, weights, atol=2e-5, err_msg=stage)


TOLERANCES = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 2e-2}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_dtypes_of_torch_tensors(client, dtype, implementation):
    tensors = [
        torch.from_numpy(array).to(getattr(torch, dtype)) for array in reference.random_problem(3)
    ]
    expected = reference.attend(*(tensor.float().numpy() for tensor in tensors)).output
    output = client.attend(*tensors, implementation=implementation).output
    assert output.dtype == getattr(torch, dtype)
    np.testing.assert_allclose(output.float().numpy(), expected, atol=TOLERANCES[dtype])


def test_an_output_of_another_dtype(client):
    arrays = [array.astype(ml_dtypes.bfloat16) for array in reference.random_problem(4)]
    output = client.attend(*arrays, output_dtype="float32").output
    assert output.dtype == np.float32
    expected = reference.attend(*(array.astype(np.float64) for array in arrays)).output
    np.testing.assert_allclose(output, expected, atol=1e-4)
    assert client.attend(*arrays).output.dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packed_rows(client, implementation):
    query_lengths, kv_lengths = [3, 0, 7, 1], [3, 4, 9, 200]
    rows = [
        reference.random_problem(row, batch=1, q_len=q_len, kv_len=kv_len)
        for row, (q_len, kv_len) in enumerate(zip(query_lengths, kv_lengths, strict=True))
    ]
    packed = [
        np.concatenate([array[0].swapaxes(0, 1) for array in arrays])
        for arrays in zip(*rows, strict=True)
    ]
    result = client.attend(
        *packed,
        layout="packed",
        query_lengths=query_lengths,
        kv_lengths=kv_lengths,
        is_causal=True,
        output_lse=implementation == "auto",
        implementation=implementation,
    )
    expected = [reference.attend(*row, is_causal=True) for row in rows]
    output = np.concatenate([each.output[0].swapaxes(0, 1) for each in expected])
    np.testing.assert_allclose(result.output, output, atol=2e-5)
    if implementation == "auto":
        lse = np.concatenate([each.lse[0].swapaxes(0, 1) for each in expected])
        np.testing.assert_allclose(result.lse, lse, atol=2e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", ["heads_first", "tokens_first"])
def test_past_and_present(client, layout, implementation):
    query, key, value = reference.random_problem(5)
    expected = reference.attend(query, key, value, is_causal=True).output
    axis = 2
    if layout == "tokens_first":
        query, key, value = (array.swapaxes(1, 2) for array in (query, key, value))
        axis = 1
    past_key, new_key = np.split(key, [6], axis=axis)
    past_value, new_value = np.split(value, [6], axis=axis)
    result = client.attend(
        query,
        new_key,
        new_value,
        past_key=past_key,
        past_value=past_value,
        is_causal=True,
        use_cache=True,
        layout=layout,
        implementation=implementation,
    )
    output = result.output if layout == "heads_first" else result.output.swapaxes(1, 2)
    np.testing.assert_allclose(output, expected, atol=2e-5)
    np.testing.assert_array_equal(result.present_key, key)
    np.testing.assert_array_equal(result.present_value, value)


def test_partial_results_over_ranges_of_keys_merge_by_lse(client):
    query, key, value = reference.random_problem(6)
    parts = [
        client.attend(query, key[:, :, keys], value[:, :, keys], output_lse=True)
        for keys in (slice(0, 4), slice(4, None))
    ]
    lse = np.logaddexp(*(part.lse for part in parts))
    merged = sum(part.output * np.exp(part.lse - lse)[..., None] for part in parts)
    np.testing.assert_allclose(merged, reference.attend(query, key, value).output, atol=2e-5)


def test_large_messages(client):
    """48 MiB in, 16 MiB out."""
    random = np.random.default_rng(7)
    query, key, value = (
        random.standard_normal((1, 1, 64, 65536), dtype=np.float32) for _ in range(3)
    )
    output = client.attend(query, key, value, implementation="standard").output
    expected = reference.attend(query, key, value).output
    np.testing.assert_allclose(output, expected, atol=1e-3)


def test_a_unix_socket_and_no_copies_of_the_callers_arrays(start_server, connect, tmp_path):
    process = start_server(listen=[f"unix:{tmp_path}/attnd.sock"])
    query, key, value = reference.random_problem(8)
    kept = [array.copy() for array in (query, key, value)]
    output = connect(process.address).attend(query, key, value).output
    np.testing.assert_allclose(output, reference.attend(query, key, value).output, atol=2e-5)
    for array, before in zip((query, key, value), kept, strict=True):
        np.testing.assert_array_equal(array, before)
