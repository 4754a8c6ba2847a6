"""NaN and infinities are values: they reach the rows that see them, and end nothing."""

import numpy as np
import pytest

from end_to_end import reference

IMPLEMENTATIONS = ("standard", "torch_sdpa")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf], ids=str)
def test_a_poisoned_query_stays_in_its_row(client, implementation, poison):
    query, key, value = reference.random_problem(9)
    expected = reference.attend(query, key, value).output
    query[1, 2, 3] = poison
    output = client.attend(query, key, value, implementation=implementation).output
    clean = np.ones(output.shape[:3], bool)
    clean[1, 2, 3] = False
    np.testing.assert_allclose(output[clean], expected[clean], atol=2e-5)
    if implementation == "standard":  # LibTorch's operator makes a row of zeros of it
        assert not np.isfinite(output[1, 2, 3]).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf], ids=str)
def test_poisoned_keys_and_values_stay_in_their_row_of_the_batch(client, implementation, poison):
    query, key, value = reference.random_problem(10)
    expected = reference.attend(query, key, value).output
    key[1, :, 4] = poison
    value[1, :, 5] = poison
    output = client.attend(query, key, value, implementation=implementation).output
    np.testing.assert_allclose(output[0], expected[0], atol=2e-5)
    assert not np.isfinite(output[1]).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_poison_beyond_a_rows_length_is_never_read(client, implementation):
    query, key, value = reference.random_problem(11)
    lengths = {"kv_lengths": [9, 4], "query_lengths": [2, 5]}
    expected = reference.attend(query, key, value, **lengths).output
    key[1, :, 4:] = np.nan
    value[1, :, 4:] = np.inf
    query[0, :, 2:] = np.nan
    output = client.attend(query, key, value, implementation=implementation, **lengths).output
    np.testing.assert_allclose(output, expected, atol=2e-5)
    assert (output[0, :, 2:] == 0).all()


def test_poison_that_a_mask_or_causality_hides(client):
    query, key, value = reference.random_problem(12, q_len=9)
    expected = reference.attend(query, key, value, is_causal=True).output
    key[:, :, 6:] = np.nan
    value[:, :, 6:] = np.nan
    for hiding in ({"is_causal": True}, {"attention_mask": np.tri(9, dtype=bool)}):
        output = client.attend(query, key, value, implementation="standard", **hiding).output
        np.testing.assert_allclose(output[:, :, :6], expected[:, :, :6], atol=2e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("hidden", [False, -np.inf], ids=["bool", "additive"])
def test_a_row_that_sees_no_key_is_zero(client, implementation, hidden):
    query, key, value = reference.random_problem(13)
    mask = np.ones((2, 1, 5, 9), bool) if hidden is False else np.zeros((2, 1, 5, 9), np.float32)
    mask[1, :, 2] = hidden
    expected = reference.attend(query, key, value, attention_mask=mask)
    result = client.attend(query, key, value, attention_mask=mask, implementation=implementation)
    np.testing.assert_allclose(result.output, expected.output, atol=2e-5)
    assert (result.output[1, :, 2] == 0).all()
    lse = client.attend(query, key, value, attention_mask=mask, output_lse=True).lse
    assert (lse[1, :, 2] == -np.inf).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("poison", [np.nan, np.inf], ids=str)
def test_a_poisoned_mask_stays_in_its_row(client, implementation, poison):
    query, key, value = reference.random_problem(14)
    expected = reference.attend(query, key, value).output
    mask = np.zeros((2, 4, 5, 9), np.float32)
    mask[0, 1, 2, 3] = poison
    output = client.attend(
        query, key, value, attention_mask=mask, implementation=implementation
    ).output
    clean = np.ones(output.shape[:3], bool)
    clean[0, 1, 2] = False
    np.testing.assert_allclose(output[clean], expected[clean], atol=2e-5)


def test_huge_finite_masks_and_logits(client):
    query, key, value = reference.random_problem(15)
    mask = np.full((5, 9), np.finfo(np.float32).min, np.float32)
    mask[:, 3] = 0
    output = client.attend(query * 100, key * 100, value, attention_mask=mask).output
    assert np.isfinite(output).all()


def test_empty_tensors_are_no_error(client):
    nothing = np.zeros((2, 2, 0, 8), np.float32)
    some = np.ones((2, 2, 3, 8), np.float32)
    assert client.attend(nothing, some, some).output.shape == (2, 2, 0, 8)
    result = client.attend(some, nothing, nothing, output_lse=True)
    assert (result.output == 0).all()
    assert (result.lse == -np.inf).all()
    no_rows = np.zeros((0, 2, 3, 8), np.float32)
    assert client.attend(no_rows, no_rows, no_rows).output.shape == (0, 2, 3, 8)
