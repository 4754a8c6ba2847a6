"""Appends random tokens to sessions, whose contents a test keeps beside the server."""

import numpy as np

from attnd import api
from end_to_end import reference

HEADS, KV_HEADS, DIM = 4, 2, 16
TOLERANCE = 2e-5
MIB = 1 << 20
PAGE = 64  # tokens


class Caller:
    """Random tokens, and every session's keys and values as the test has them."""

    def __init__(self, client, model="", seed=0, **options):
        self.client = client
        self.options = {"model": model, **options}
        self.random = np.random.default_rng(seed)

    def tokens(self, count, heads=KV_HEADS, rows=1):
        return self.random.standard_normal((rows, heads, count, DIM), dtype=np.float32)

    def append(self, session, history, count, queries=None, **arguments):
        """Appends `count` random tokens to a session and a history of [1, heads, length, dim]."""
        key, value = self.tokens(count), self.tokens(count)
        query = self.tokens(count if queries is None else queries, HEADS)
        result = self.client.attend(
            query, key, value, sessions=[session], **{**self.options, **arguments}
        )
        extend(history, key, value)
        return query, result


def extend(history, key, value):
    if history:
        key = np.concatenate([history["key"], key], axis=2)
        value = np.concatenate([history["value"], value], axis=2)
    history.update(key=key, value=value)


def cut(history, length):
    history.update({name: array[:, :, :length] for name, array in history.items()})


# Over caches in int8, queries and weights are rounded to int16.
INT8_TOLERANCE = 2e-4


def assert_attends(query, result, history, atol=TOLERANCE, **options):
    expected = reference.attend(query, history["key"], history["value"], **options)
    np.testing.assert_allclose(result.output, expected.output, atol=atol)
    return expected


def assert_holds(caller, session, history, atol=TOLERANCE, **arguments):
    """A read-only question is answered as the history says."""
    query = caller.tokens(3, HEADS)
    result = caller.client.attend(
        query, sessions=[session], cache_mode="read_only", **{**caller.options, **arguments}
    )
    assert_attends(query, result, history, atol)
    assert result.cache_length == (history["key"].shape[2],)


def layers_without_weights():
    """Three layers, the last one with a window of 8 keys before the query, and cross-attention."""
    plain = api.LayerSpec(
        repeat=2, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, value_dim=DIM
    )
    window = api.LayerSpec()
    window.CopyFrom(plain)
    window.repeat = 1
    window.options.window_left = 8
    cross = api.LayerSpec()
    cross.CopyFrom(plain)
    stack = api.LayerStack(self_attention=[plain, window], cross_attention=[cross])
    return api.ModelSpec(stacks=[stack])
