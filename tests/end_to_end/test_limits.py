"""Limits that the operator sets: what is beyond them is refused, and the server goes on."""

import numpy as np
import pytest

from attnd import errors

KIB = 1 << 10
MIB = 1 << 20


@pytest.fixture
def small_server(start_server, connect):
    """Connects to a server with the flags that are given."""

    def start(*arguments):
        return connect(start_server(arguments=arguments).address)

    return start


def rows(length, dim=16):
    return np.zeros((1, 1, length, dim), np.float32)


def test_an_answer_beyond_the_largest_message_is_refused_before_it_is_computed(small_server):
    client = small_server("--max-message-bytes", str(256 * KIB))
    long = rows(300)
    with pytest.raises(errors.InvalidArgument) as refused:
        client.attend(long, long, long, output_attentions=True)  # 300 * 300 * 4 bytes
    assert refused.value.reason == "ANSWER_TOO_LARGE"
    assert int(refused.value.details["bytes"]) > 300 * 300 * 4
    assert client.attend(long, long, long).output.shape == long.shape


def test_a_request_beyond_the_largest_message_is_refused(small_server):
    client = small_server("--max-message-bytes", str(64 * KIB))
    with pytest.raises(errors.ResourceExhausted):
        client.attend(rows(2048), rows(1), rows(1))
    assert client.server_info().max_request_bytes == 64 * KIB


def test_a_workspace_beyond_its_limit_is_refused(small_server):
    client = small_server("--max-workspace-bytes", str(MIB))
    with pytest.raises(errors.ResourceExhausted) as refused:
        client.attend(
            rows(1024), rows(1024), rows(1024), implementation="standard"
        )  # 4 MiB of scores
    assert refused.value.reason == "WORKSPACE_LIMIT"
    assert refused.value.retry_delay_seconds == 0  # waiting would not help
    assert client.attend(rows(64), rows(64), rows(64), implementation="standard").output.any() == 0


def test_a_call_beyond_the_bytes_in_flight_is_refused(small_server):
    client = small_server("--max-inflight-bytes", str(MIB))
    with pytest.raises(errors.ResourceExhausted) as refused:
        client.attend(rows(16384), rows(1), rows(1))  # 1 MiB alone
    assert refused.value.reason == "MEMORY_BUDGET"
    assert client.attend(rows(64), rows(64), rows(64)).output.shape == (1, 1, 64, 16)


def test_a_batch_of_nothing_is_bounded_too(client):
    empty = np.zeros((1 << 17, 1, 0, 1), np.float32)
    with pytest.raises(errors.InvalidArgument) as refused:
        client.attend(empty, empty, empty)
    assert refused.value.details["field"] == "query"
