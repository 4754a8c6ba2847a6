"""Attention in double precision, heads first, one row of the batch after the other.

The order of operations is that of attention.v1.AttentionOptions. Shares nothing with the server.
"""

from dataclasses import dataclass

import numpy as np


@dataclass
class Expected:
    output: np.ndarray  # [batch, num_heads, q_len, value_dim]
    weights: dict[str, np.ndarray]  # by stage, [batch, num_heads, q_len, kv_len]
    lse: np.ndarray  # [batch, num_heads, q_len]


def attend(
    query,
    key,
    value,
    *,
    attention_mask=None,
    scale=None,
    is_causal=False,
    window_left=-1,
    window_right=-1,
    soft_cap=0.0,
    alibi_slopes=None,
    sink_logits=None,
    first_query_position=None,
    query_lengths=None,
    kv_lengths=None,
    past_key=None,
    past_value=None,
):
    query, key, value = (np.asarray(array, np.float64) for array in (query, key, value))
    if past_key is not None:
        key = np.concatenate([np.asarray(past_key, np.float64), key], axis=2)
        value = np.concatenate([np.asarray(past_value, np.float64), value], axis=2)
    batch, heads, q_len, head_dim = query.shape
    kv_len = key.shape[2]
    key, value = (np.repeat(array, heads // array.shape[1], axis=1) for array in (key, value))
    query_lengths = [q_len] * batch if query_lengths is None else query_lengths
    kv_lengths = [kv_len] * batch if kv_lengths is None else kv_lengths
    if first_query_position is None:
        first_query_position = [k - q for q, k in zip(query_lengths, kv_lengths, strict=True)]

    scores = {"scaled": query @ key.swapaxes(2, 3) * (scale or head_dim**-0.5)}
    capped = scores["scaled"]
    if soft_cap:
        capped = soft_cap * np.tanh(capped / soft_cap)
    scores["soft_capped"] = capped

    bias = np.zeros((batch, heads, q_len, kv_len))
    place = np.arange(q_len)[:, None] + np.reshape(first_query_position, (batch, 1, 1, 1))
    distance = np.arange(kv_len) - place  # [batch, 1, q_len, kv_len], positive after the query
    if alibi_slopes is not None:
        bias = bias - np.reshape(alibi_slopes, (1, heads, 1, 1)) * np.abs(distance)
    if attention_mask is not None:
        bias = bias + _additive(attention_mask, kv_len)
    hidden = np.arange(kv_len) >= np.reshape(kv_lengths, (batch, 1, 1, 1))
    if is_causal:
        hidden = hidden | (distance > 0)
    if window_left >= 0:
        hidden = hidden | (distance < -window_left)
    if window_right >= 0:
        hidden = hidden | (distance > window_right)
    scores["masked"] = np.where(hidden, -np.inf, capped + bias)

    largest = scores["masked"].max(axis=-1, initial=-np.inf, keepdims=True)
    if sink_logits is not None:
        sinks = np.reshape(np.asarray(sink_logits, np.float64), (1, heads, 1, 1))
        largest = np.maximum(largest, sinks)
    largest = np.where(np.isfinite(largest), largest, 0.0)
    exponentials = np.exp(scores["masked"] - largest)
    denominator = exponentials.sum(axis=-1, keepdims=True)
    if sink_logits is not None:
        denominator = denominator + np.exp(sinks - largest)
    weights = exponentials / np.where(denominator == 0.0, 1.0, denominator)
    with np.errstate(divide="ignore"):
        lse = (np.log(denominator) + largest)[..., 0]

    padding = np.arange(q_len) >= np.reshape(query_lengths, (batch, 1, 1))
    weights = np.where(padding[..., None], 0.0, weights)
    # A key that no query sees may hold anything.
    output = np.einsum("bhqk,bhkd->bhqd", weights, np.where(weights.any(2)[..., None], value, 0.0))
    lse = np.where(padding, -np.inf, lse)
    return Expected(output, {**scores, "probabilities": weights}, lse)


def _additive(mask, kv_len):
    """[.., kv_len]: a short last dimension hides the rest, one of 1 is broadcast."""
    mask = np.asarray(mask)
    if mask.dtype == np.int64:
        mask = mask.astype(bool)[:, None, None, :]
    if mask.dtype == np.bool_:
        mask = np.where(mask, 0.0, -np.inf)
    mask = mask.astype(np.float64)
    if 1 < mask.shape[-1] < kv_len:
        missing = [(0, 0)] * (mask.ndim - 1) + [(0, kv_len - mask.shape[-1])]
        mask = np.pad(mask, missing, constant_values=-np.inf)
    return mask


def random_problem(
    seed, *, batch=2, heads=4, kv_heads=2, q_len=5, kv_len=9, head_dim=16, value_dim=16
):
    """(query, key, value), float32, heads first."""
    random = np.random.default_rng(seed)
    shapes = (
        (batch, heads, q_len, head_dim),
        (batch, kv_heads, kv_len, head_dim),
        (batch, kv_heads, kv_len, value_dim),
    )
    return tuple(random.standard_normal(shape, dtype=np.float32) for shape in shapes)
